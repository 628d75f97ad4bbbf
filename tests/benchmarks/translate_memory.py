"""Measure the peak memory and the time of `aldm translate` on a whole volume with an untrained model, on a CPU.

    python tests/benchmarks/translate_memory.py

Each line is one `aldm translate` in its own process: volume, limit, what the process held at most (VmHWM), and the wall
time without the start of Python.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import torch

from aldm.checkpoint import save_checkpoint
from aldm.config import Config, PreprocessConfig
from aldm.models.codecs import build_codec
from aldm.predictors import build_predictor
from aldm.presets import brats_haar, small

SHAPE = (192, 192, 144)
MODALITIES = ("t1", "t1ce", "t2", "flair")
_CHILD = """
import json, re, sys, time
from aldm.cli import main
start = time.perf_counter()
code = main(sys.argv[1:])
seconds = time.perf_counter() - start
peak_kib = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1))
print(json.dumps({"code": code, "seconds": seconds, "peak_gb": peak_kib * 1024 / 1e9}))
"""


def whole_volume_config(codec: str, precision: str) -> Config:
    """small() on the paper's grid: nothing of a 192 x 192 x 144 volume at 1 mm is left out or made coarser."""
    base = small()
    return replace(
        base,
        modalities=MODALITIES,
        precision=precision,
        preprocess=PreprocessConfig(spacing_mm=(1.0, 1.0, 1.0), spatial_shape=SHAPE),
        codec=replace(base.codec, kind=codec),
        ms_spade=replace(base.ms_spade, intensity_map=codec == "haar"),
    )


def cases() -> list[tuple[str, Config, float]]:
    """Return what is measured: its name, its configuration and the limit, GB."""
    small_ones = [
        ("haar", "bf16", 4.0),
        ("haar", "fp32", 4.0),
        ("haar-vqgan", "bf16", 4.0),
        ("haar-vqgan", "bf16", 1.5),
        ("vqgan", "bf16", 4.0),
        ("vqgan", "bf16", 1.5),
    ]
    return [
        ("brats-haar", brats_haar(), 4.0),
        *((f"small, {codec}", whole_volume_config(codec, precision), limit) for codec, precision, limit in small_ones),
    ]


def save_model(folder: Path, config: Config) -> None:
    """Write an untrained translator folder."""
    channels = build_codec(config.codec).latent_channels
    meta = {
        "latents": {"mean": [0.0] * channels, "std": [1.0] * channels},
        "data": {
            "median_percentiles": {name: [0.0, 1000.0] for name in config.modalities},
            "backgrounds": dict.fromkeys(config.modalities),
        },
    }
    torch.manual_seed(0)
    predictor = build_predictor("aldm", config, meta)
    save_checkpoint(folder, kind="aldm", config=config, weights=predictor.state_dict(), meta=meta)


def save_volume(path: Path, shape: Sequence[int] = SHAPE) -> None:
    """Write a smooth ball with noise, zero outside, at 1 mm."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    inside = (grid**2).sum(axis=0) < 0.8
    data = inside * (500 + 200 * grid[0] + np.random.default_rng(0).normal(0, 30, shape))
    nibabel.save(nibabel.Nifti1Image(data.astype(np.int16), np.eye(4)), path)


def measure(folder: Path, config: Config, max_memory_gb: float | None, threads: int) -> dict[str, float]:
    """Translate the volume of `folder` in a process of its own and return code, seconds and peak_gb."""
    model, volume, output = folder / "model", folder / "volume.nii", folder / "out.nii"
    for left in (model / "config.json", model / "weights.safetensors"):
        left.unlink(missing_ok=True)
    save_model(model, config)
    if not volume.exists():
        save_volume(volume)
    arguments = ["translate", volume, output, "--model", model, "--source", "t1", "--target", "t2", "--overwrite"]
    arguments += [] if max_memory_gb is None else ["--max-memory-gb", max_memory_gb]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *map(str, arguments), "--device", "cpu", "--log-level", "warning"],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each process")
    args = parser.parse_args()
    print(f"| {' x '.join(map(str, SHAPE))}, preset, codec | precision | limit (GB) | peak (GB) | seconds |")
    print("|---|---|---|---|---|")
    for name, config, limit in cases():
        with tempfile.TemporaryDirectory() as folder:
            result = measure(Path(folder), config, limit, args.threads)
        if result["code"] != 0:
            sys.exit("a translation failed: see above")
        peak, seconds = f"{result['peak_gb']:.2f}", f"{result['seconds']:.0f}"
        print(f"| {name} | {config.precision} | {limit:g} | {peak} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
