"""Which translations a model was trained for."""

from aldm.config import Config
from aldm.config_baselines import BOTH_WAYS
from aldm.data.modalities import check_modality
from aldm.errors import UserError


def pair_is_known(config: Config, kind: str, source: str, target: str) -> bool:
    """Whether a model was trained to translate `source` into `target`."""
    if source not in config.modalities or target not in config.modalities:
        return False
    return config.pair in (None, (source, target)) or (kind in BOTH_WAYS and config.pair == (target, source))


def check_pair(config: Config, kind: str, source: str, target: str) -> None:
    """Refuse a translation that a model was not trained for.

    Raises:
        UserError: an unknown modality, or another pair than the model's.
    """
    check_modality("source", source, config.modalities)
    check_modality("target", target, config.modalities)
    if not pair_is_known(config, kind, source, target):
        raise UserError(
            f"this {kind} model translates {pairs_in_words(config, kind)}, not {source} to {target}: give "
            "that pair, or a model trained for this one"
        )


def pairs_in_words(config: Config, kind: str) -> str:
    """Return what a model translates: its one pair, or the modalities of which it translates each into each."""
    if config.pair is None:
        return ", ".join(config.modalities)
    return " to ".join(config.pair) + (" and back" if kind in BOTH_WAYS else "")
