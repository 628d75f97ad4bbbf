"""What `aldm translate` and `aldm evaluate` share: the translator folder, how it samples, the memory it may use."""

import argparse
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from aldm.config import Config, override
from aldm.errors import UserError
from aldm.presets import load_preset
from pipelines.arguments import ConfigChanges, JobParser

if TYPE_CHECKING:
    from aldm.translate import Translator

CHANGEABLE = ("sampling", "precision", "preset", "seed", "activation_checkpointing", "segmenter", "init_from")
"""What may differ from a trained model's own configuration; trainings (train_*) and a segmenter have no say in it."""

MAX_SEED = 2**63 - 2**33
"""Largest --seed: a sample's own is that plus its number and, in an evaluation, a 32-bit hash of its pair."""


def check_seed(seed: int) -> None:
    """Refuse a --seed that no generator takes."""
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"--seed is {seed}, wanted 0 to {MAX_SEED}")


def add_translator_arguments(
    parser: JobParser, *, without_model: str = "the small model that ships with the package"
) -> None:
    """Add the flags that choose a translator and its limits.

    Args:
        parser: of the job.
        without_model: what happens without --model, for the help.
    """
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help=f"translator folder, written by aldm export (default: {without_model})",
    )
    parser.add_argument(
        "--max-memory-gb",
        type=float,
        metavar="G",
        help="most memory this process may hold, GB (10^9 bytes), on a CPU: the codec then runs slab by slab with the "
        "same result; refused below what the model needs (default: no limit)",
    )
    parser.add_argument(
        "--scratch-dir",
        type=Path,
        metavar="DIR",
        help="folder on a disk for what --max-memory-gb keeps out of memory (default: the system's temporary folder)",
    )


@dataclass(frozen=True, kw_only=True)
class TranslatorOptions:
    """Where a translator runs and what it may use.

    Attributes:
        device: cpu, cuda or auto.
        max_memory_gb: the most memory this process may hold, GB (10^9 bytes), on a CPU; None for no limit.
        scratch_dir: folder on a disk for what does not fit; None takes the system's.
    """

    device: str = "auto"
    max_memory_gb: float | None = None
    scratch_dir: Path | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> "TranslatorOptions":
        """Return what the flags of `add_translator_arguments` say."""
        return cls(device=args.device, max_memory_gb=args.max_memory_gb, scratch_dir=args.scratch_dir)


def model_config(folder: Path, changes: ConfigChanges) -> Config:
    """Return a translator folder's configuration with what --preset, --set and --precision change for its use.

    Raises:
        UserError: not a translator folder, or the networks or the data's preprocessing are to be changed: a trained
            model carries them.
    """
    from aldm.checkpoint import config_of, read_checkpoint_record
    from aldm.predictors import KINDS

    record = read_checkpoint_record(folder)
    if record["kind"] not in KINDS:
        raise UserError(
            f"{folder} holds a checkpoint of kind {record['kind']!r}, wanted a translator folder "
            f"({' or '.join(KINDS)}): make one with aldm export"
        )
    own = config_of(record, folder)
    used = own
    if changes.preset is not None:
        preset = load_preset(changes.preset)
        same = replace(preset, modalities=own.modalities, pair=own.pair, baselines=own.baselines)
        _check_same(own, same, f"--preset {changes.preset}", folder)
        used = replace(own, sampling=preset.sampling, precision=preset.precision)
    used = override(used, changes.set)
    _check_same(own, used, f"--set {' '.join(changes.set)}", folder)
    return used if changes.precision is None else replace(used, precision=changes.precision)


def load_translator(folder: Path, config: Config, options: TranslatorOptions) -> "Translator":
    """Load a translator folder with the sampling and precision of `config`, on the device that the options name.

    Raises:
        UserError: as Translator.load, or an option that makes no sense.
    """
    from aldm.device import select_device
    from aldm.translate import Translator

    if options.max_memory_gb is not None and not 0 < options.max_memory_gb < math.inf:
        raise UserError(f"--max-memory-gb is {options.max_memory_gb:g}, wanted a number above 0")
    if options.scratch_dir is not None and not options.scratch_dir.is_dir():
        raise UserError(f"--scratch-dir {options.scratch_dir} is not a folder: make it first, or leave it out")
    return Translator.load(
        folder,
        select_device(options.device),
        sampling=config.sampling,
        precision=config.precision,
        max_memory_gb=options.max_memory_gb,
        scratch_dir=options.scratch_dir,
    )


def _check_same(own: Config, wanted: Config, flag: str, folder: Path) -> None:
    """Refuse a change of what a trained model carries."""
    names = [field.name for field in fields(Config) if not field.name.startswith("train_")]
    changed = [name for name in names if name not in CHANGEABLE and getattr(own, name) != getattr(wanted, name)]
    if changed:
        raise UserError(
            f"{flag} changes {', '.join(changed)}, which the trained model {folder} carries: leave it out; sampling.* "
            "and --precision can be changed"
        )
