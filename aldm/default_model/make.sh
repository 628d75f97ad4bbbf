#!/usr/bin/env bash
# Makes the default model again: make default-model DIR=FOLDER, about three hours on two CPU cores. It goes on where it
# was stopped. Then write what the tests expect of the model: python tests/golden_default_model.py
set -euo pipefail
: "${1:?a folder to work in is wanted: make default-model DIR=FOLDER}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
mkdir -p "$1"
cd "$1"
train="--seed 7 --engine plain --resume-or-start"
any="--set diffusion.any_sources=true"
once() { [ -e "$1" ] || "${@:2}"; } # what a step leaves is whole or not there

# simulated heads: 130 to train on, 6 to choose the checkpoint by and to calibrate on, 14 for the scores
once data aldm phantom data --layout heads --num-subjects 150 --seed 7 --spacing-mm 2 --num-processes 2
{
  echo subject_id,split
  for i in $(seq 0 149); do
    if ((i < 130)); then split=train; elif ((i < 136)); then split=validation; else split=test; fi
    printf 'Head_%05d,%s\n' "$i" "$split"
  done
} > splits.csv
once store/manifest.parquet aldm prepare data store --layout brats --spacing-mm 2 2 2 --spatial-shape 88 112 88 --splits splits.csv --num-processes 2
once latents aldm encode --store store --codec haar --flips --out latents
aldm train ms-spade --latents latents --run-dir ms-spade $any --max-steps 100 $train
aldm train diffusion --latents latents --ms-spade ms-spade --run-dir diffusion $any --max-steps 1200 $train
once sharp aldm export --codec haar --ms-spade ms-spade --diffusion diffusion --half --out sharp
aldm train uncertainty --store store --model sharp --run-dir uncertainty --max-steps 200 $train
once model aldm export --model sharp --uncertainty uncertainty --store store --half --out model
# the yardstick, a plain U-Net with about the same time
aldm train unet --store store --run-dir unet --max-steps 1200 $train
once unet-model aldm export --baseline unet --out unet-model
once scores aldm evaluate --model model --store store --split test --max-subjects 6 --out scores --baseline unet=unet-model
aldm export --model sharp --uncertainty uncertainty --store store --half --scores scores --out model --overwrite
cp model/config.json model/weights.safetensors model/README.md model/card.json "$here"
cat >> "$here/README.md" << 'END'

## How it was made

By `make default-model` (aldm/default_model/make.sh): 130 simulated heads, whole and skull-stripped, to train on, 6 to choose the
checkpoint by and to calibrate the uncertainty on, 14 to test on, of which the first 6 gave the scores above. No real volume was used.

<!-- real heads: begin -->
<!-- real heads: end -->
END
echo "now: python tests/golden_default_model.py, and make check-real for docs/real_heads.md and the card"
