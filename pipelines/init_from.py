"""`aldm train --init-from`: the flag, and the configuration that fine-tunes a model."""

from dataclasses import fields, replace
from pathlib import Path

from aldm.config import Config, override
from aldm.errors import UserError
from pipelines.arguments import ConfigChanges, JobParser

OF_THE_TRAINING = ("train_", "baselines", "seed", "precision", "activation_checkpointing", "sampling")
"""How the sections and keys begin that fine-tuning may change; the networks and the data's preprocessing stay."""


def add_starting_model(parser: JobParser) -> None:
    """Add the flag that names the model to start from."""
    parser.add_argument(
        "--init-from",
        metavar="MODEL",
        help="fine-tune this model: a translator folder, default (the built-in one) or the run folder of an earlier "
        "training. The configuration is the model's own, with a fifth of its steps or epochs and half of its learning "
        "rate; the latents are those of aldm encode --like MODEL (default: random weights)",
    )


def folder_of(word: str) -> Path:
    """Return the folder of the model that the flag names."""
    from aldm.starting_model import model_folder

    return model_folder(word)


def config_of_model(stage: str, word: str, changes: ConfigChanges) -> Config:
    """Return the configuration that fine-tunes a model, with what --set and --precision change.

    Raises:
        UserError: no such model, one without a network of this stage, or the networks are to be changed.
    """
    from aldm.starting_model import fine_tuning_config

    if changes.preset is not None:
        raise UserError(
            f"--preset {changes.preset} with --init-from {word}: a trained model carries its configuration; leave the "
            "preset out, and change values of the training with --set"
        )
    own = fine_tuning_config(stage, word)
    config = override(own, changes.set)
    names = [field.name for field in fields(Config) if not field.name.startswith(OF_THE_TRAINING)]
    changed = [name for name in names if getattr(own, name) != getattr(config, name)]
    if changed:
        raise UserError(
            f"--set {' '.join(changes.set)} changes {', '.join(changed)}, which the model {word} carries: leave it "
            "out; train_* can be changed"
        )
    return config if changes.precision is None else replace(config, precision=changes.precision)
