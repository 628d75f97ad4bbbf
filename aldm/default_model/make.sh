#!/usr/bin/env bash
# Makes the default model again, in about 25 minutes on two CPU cores: bash aldm/default_model/make.sh EMPTY_FOLDER
# Then write what the tests expect of it: python tests/golden_default_model.py
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
mkdir -p "$1"
cd "$1"
stages="--codec haar --ms-spade ms-spade --diffusion diffusion --half --out model"

aldm phantom data --layout ixi --num-subjects 60 --seed 7 --spacing-mm 3
aldm prepare data store --layout ixi --num-processes 2
aldm encode --store store --codec haar --out latents
aldm train ms-spade --latents latents --run-dir ms-spade --max-steps 100 --seed 7 --engine plain
aldm train diffusion --latents latents --ms-spade ms-spade --run-dir diffusion --max-steps 1500 --seed 7 --engine plain
aldm export $stages
# the yardstick, a plain U-Net with about the same time
aldm train unet --store store --run-dir unet --max-steps 1500 --seed 7 --engine plain
aldm export --baseline unet --out unet-model
aldm evaluate --model model --store store --split test --out scores --baseline unet=unet-model
aldm export $stages --scores scores --overwrite
cp model/config.json model/weights.safetensors model/README.md model/card.json "$here"
