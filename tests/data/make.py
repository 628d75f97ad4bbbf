"""Writes written/: a store, latents, a run folder and a translator as this version leaves them.

    python tests/data/make.py

tests/test_format_promise.py reads them with every later version and compares what it finds with contents.json, which
is written here, too. They are made again only where a format changes on purpose; then its format_version does as well,
and the folder of the version before stays beside it. All of it together is below 200 kB.
"""

import csv
import hashlib
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import aldm
from aldm.checkpoint import load_checkpoint
from aldm.cli import main as run
from aldm.config import Config, to_dict
from aldm.data.phantom import write_phantom
from aldm.data.preparing import prepare_store
from aldm.data.store import VolumeStore
from aldm.data.volume import Volume
from aldm.latents import LatentStore
from aldm.presets import tiny
from aldm.run_folder import step_of
from aldm.translate import Translator

OUT = Path(__file__).with_name("written")
SPLITS = ("train", "validation")


def config() -> Config:
    """Return tiny() with the smallest networks, on volumes of 8 x 8 x 8 voxels."""
    small = tiny()
    return replace(
        small,
        preprocess=replace(small.preprocess, spacing_mm=(32.0, 32.0, 32.0), spatial_shape=(8, 8, 8)),
        codec=replace(small.codec, kind="haar"),
        ms_spade=replace(
            small.ms_spade, in_channels=2, res_channels=(2,), spade_channels=(2,), hidden_channels=1, kernel_size=1
        ),
        unet=replace(small.unet, channels=(2,), attention_levels=(), norm_groups=1),
        train_ms_spade=replace(small.train_ms_spade, adversarial_weight=0.0),
    )


def settings() -> list[str]:
    """Return the flags of `aldm` with which tiny becomes config()."""
    pairs: list[str] = ["--preset", "tiny"]
    usual, wanted = to_dict(tiny()), to_dict(config())
    for section in ("preprocess", "codec", "ms_spade", "unet", "train_ms_spade"):
        for name, value in wanted[section].items():
            if value != usual[section][name]:
                pairs += ["--set", f"{section}.{name}={json.dumps(value) if not isinstance(value, str) else value}"]
    return pairs


def write(out: Path) -> None:
    """Write the four folders."""
    with tempfile.TemporaryDirectory() as scratch:
        tree, splits, stage_3 = (Path(scratch) / name for name in ("tree", "splits.csv", "diffusion"))
        names = write_phantom(tree, "ixi", len(SPLITS), seed=0, spacing_mm=16.0)
        with splits.open("w", newline="") as stream:
            csv.writer(stream).writerows([("subject_id", "split"), *zip(names, SPLITS, strict=True)])
        prepare_store(tree, out / "store", layout="ixi", config=config().preprocess, splits=splits, num_processes=1)
        words = [*settings(), "--log-level", "warning"]
        train = [*words, "--engine", "plain", "--no-tracking"]
        latents, ms_spade = ["--latents", str(out / "latents")], ["--ms-spade", str(out / "run" / "last")]
        for job in (
            ["encode", "--store", str(out / "store"), "--codec", "haar", "--out", str(out / "latents"), *words],
            ["train", "ms-spade", *latents, "--run-dir", str(out / "run"), *train],
            ["train", "diffusion", *latents, *ms_spade, "--run-dir", str(stage_3), *train],
            ["export", "--codec", "haar", *ms_spade, "--diffusion", str(stage_3), "--out", str(out / "translator")],
        ):
            if run(job):
                raise SystemExit(f"aldm {' '.join(job)} failed")
    shutil.rmtree(out / "run" / "best")  # of the same kind as last


def contents(out: Path) -> dict[str, Any]:
    """Return what is in the four folders, as every version has to read it."""
    store, latents = VolumeStore.open(out / "store"), LatentStore.open(out / "latents")
    subjects = {}
    for subject in store.subjects():
        subjects[subject.subject_id] = {
            "split": subject.split,
            "volumes": {name: digest(store.volume(subject.subject_id, name)) for name in subject.modalities},
            "mask": digest(store.mask(subject.subject_id)),
        }
    encoded = {
        subject.subject_id: {name: digest(latents.latent(subject.subject_id, name, 0)) for name in subject.modalities}
        for subject in latents.subjects()
    }
    translated = Translator.load(out / "translator").translate(scan(), "t1", "t2", seed=3)
    return {
        "version": aldm.__version__,
        "store": {"modalities": list(store.modalities), "layout": store.layout, "subjects": subjects},
        "latents": {"mean": latents.mean.tolist(), "std": latents.std.tolist(), "subjects": encoded},
        "run": {
            "hash": load_checkpoint(out / "run" / "last", "ms-spade").hash,
            "step": step_of(out / "run" / "last"),
        },
        "translator": {"t1 to t2": translated.volume.data[::4, ::4, ::4].round(4).tolist()},
    }


def digest(array: np.ndarray) -> dict[str, Any]:
    """Return what tells an array from another: its shape, type, mean, and a hash of its values."""
    values = np.ascontiguousarray(array)
    return {
        "shape": list(values.shape),
        "dtype": str(values.dtype),
        "mean": round(float(values.astype(np.float64).mean()), 6),
        "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
    }


def scan() -> Volume:
    """Return a volume to translate: an ellipsoid with a gradient, 20 x 24 x 18 voxels of 8 mm."""
    shape = (20, 24, 18)
    place = [np.linspace(-1, 1, n) for n in shape]
    x, y, z = np.meshgrid(*place, indexing="ij")
    inside = x**2 / 0.6 + y**2 / 0.7 + z**2 / 0.5 < 1
    data = np.where(inside, 100 + 40 * x + 20 * np.cos(5 * y) * z, 0).astype(np.float32)
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    affine[:3, 3] = -8.0 * (np.array(shape) - 1) / 2
    return Volume(data, affine)


def main() -> int:
    """Write everything again, in a folder whose name says nothing of this machine."""
    with tempfile.TemporaryDirectory(prefix="aldm-written-") as scratch:
        write(Path(scratch))
        shutil.rmtree(OUT, ignore_errors=True)
        shutil.copytree(scratch, OUT)
    (OUT / "contents.json").write_text(json.dumps(contents(OUT)) + "\n")
    total = 0
    for path in sorted(OUT.rglob("*")):
        if path.is_file():
            total += path.stat().st_size
            print(f"{path.stat().st_size:8,} {path.relative_to(OUT)}")
    print(f"{total:8,} bytes in all")
    return 0 if total < 200_000 else 1


if __name__ == "__main__":
    sys.exit(main())
