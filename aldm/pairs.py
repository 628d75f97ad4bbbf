"""Which translations a model was trained for."""

from collections.abc import Sequence

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


def check_sources(config: Config, kind: str, sources: Sequence[str], target: str) -> None:
    """Refuse a translation from several volumes, or from one, that a model was not trained for.

    Raises:
        UserError: as check_pair for one source; of several: a model that takes one, an unknown modality, one that is
            named twice, or a target that is among them.
    """
    if len(sources) == 1:
        check_pair(config, kind, sources[0], target)
        return
    check_several(sources, target, kind=kind, modalities=config.modalities, takes_several=takes_several(config, kind))


def takes_several(config: Config, kind: str) -> bool:
    """Whether a model translates from several volumes of one head."""
    return kind == "aldm" and config.diffusion.any_sources


def check_several(
    sources: Sequence[str], target: str, *, kind: str, modalities: Sequence[str], takes_several: bool
) -> None:
    """Refuse several sources that a model does not translate together.

    Args:
        sources: more than one.
        target: the wanted modality.
        kind, modalities, takes_several: of the model.

    Raises:
        UserError: as `check_sources` of several.
    """
    words = " and ".join(sources)
    if not takes_several:
        raise UserError(
            f"this {kind} model takes one source, got {words}: give one, or a model that was trained with "
            "diffusion.any_sources"
        )
    for name in sources:
        check_modality("source", name, modalities)
    check_modality("target", target, modalities)
    if len(set(sources)) < len(sources):
        raise UserError(f"the sources {words} name a modality twice: give each once")
    if target in sources:
        raise UserError(f"the target {target} is among the sources {words}: there is nothing to translate")


def pairs_in_words(config: Config, kind: str) -> str:
    """Return what a model translates: its one pair, or the modalities of which it translates each into each."""
    if config.pair is None:
        return ", ".join(config.modalities)
    return " to ".join(config.pair) + (" and back" if kind in BOTH_WAYS else "")
