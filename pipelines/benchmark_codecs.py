"""What `aldm benchmark --codecs` runs: for every codec and seed its training, as an `aldm` command."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aldm.config import Config, TrainingConfig, override
from aldm.errors import UserError
from pipelines.benchmark_plan import ENDLESS, Terms

if TYPE_CHECKING:
    from aldm.data.store import VolumeStore

CODECS: dict[str, tuple[str, ...]] = {
    "haar-vqgan": ("codec.kind=haar-vqgan", "codec.quantizer=codebook"),
    "haar-vqgan-fsq": ("codec.kind=haar-vqgan", "codec.quantizer=fsq"),
    "vqgan": ("codec.kind=vqgan", "codec.quantizer=codebook"),
    "vqgan-fsq": ("codec.kind=vqgan", "codec.quantizer=fsq"),
}
"""The codecs that are trained: what is set for each."""


@dataclass(frozen=True, kw_only=True)
class CodecTerms(Terms):
    """A benchmark of codecs."""

    def settings(self) -> dict[str, Any]:
        """Return what the folder notes."""
        return {"codecs": True} | super().settings()


@dataclass(frozen=True)
class CodecEntry:
    """One codec with one seed; all that it makes lies in `folder`."""

    method: str
    seed: int
    folder: Path
    training: tuple[str, ...]
    """The command without `aldm`."""

    def commands(self) -> list[tuple[str, ...]]:
        """Return the one command."""
        return [self.training]


def check_codecs(names: Sequence[str], config: Config, store: "VolumeStore") -> None:
    """Refuse what cannot be trained, before anything is written.

    Raises:
        UserError: an unknown name or one twice, a split without subjects, or a codec that the configuration or the
            volumes do not allow.
    """
    import torch

    from aldm.models.codecs import check_sides
    from aldm.stages import VQGANStage

    unknown = [name for name in names if name not in CODECS]
    if unknown:
        known = ", ".join(CODECS)
        raise UserError(f"--codecs (with spaces between): unknown {', '.join(unknown)}; known are {known}")
    if len(set(names)) < len(names):
        raise UserError("--codecs names a codec twice")
    for split in ("train", "test"):
        if not store.subjects(split):
            raise UserError(f"the store {store.path} has no subject in the split {split}")
    for name in names:
        with torch.device("meta"):
            stage = VQGANStage(override(config, CODECS[name]), store)
        check_sides(store.preprocess.spatial_shape, stage.codec.downsampling)  # it is trained on crops, measured whole


def plan_codec(name: str, seed: int, terms: Terms, config: Config) -> CodecEntry:
    """Return what is run for a codec and a seed.

    Args:
        name: one of CODECS.
        seed: of the training.
        terms: what is equal for all.
        config: what the flags of the terms make.
    """
    folder = terms.out / name / f"seed-{seed}"
    command = ["train", "vqgan", *terms.flags, "--store", terms.store, "--run-dir", folder / "vqgan"]
    command += [word for assignment in CODECS[name] for word in ("--set", assignment)]
    command += [*_until_the_time_is_over(config.train_vqgan), "--max-minutes", f"{terms.minutes:.4g}"]
    command += ["--seed", seed, "--engine", "plain", "--group", terms.group]
    return CodecEntry(name, seed, folder, tuple(map(str, command)))


def _until_the_time_is_over(training: TrainingConfig) -> tuple[object, ...]:
    """Return the flags with which only the time ends a training, the adversary starting after the same share of it.

    A number of steps of the configuration is a limit that minutes do not lift, and starts are fitted in proportion.
    """
    if training.max_steps is None:
        return ()
    start = round(training.adversarial_start_step / training.max_steps * ENDLESS)
    return "--max-steps", ENDLESS, "--set", f"train_vqgan.adversarial_start_step={start}"
