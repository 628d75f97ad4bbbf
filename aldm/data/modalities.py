"""The modality vocabulary: the only place where the order of the modalities is written down."""

from collections.abc import Iterable

from aldm.errors import UserError

MODALITIES: tuple[str, ...] = ("t1", "t1ce", "t2", "flair", "pd")


def sort_modalities(names: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct names in the vocabulary's order.

    Raises:
        UserError: a name is not in the vocabulary.
    """
    wanted = set(names)
    unknown = sorted(wanted - set(MODALITIES))
    if unknown:
        raise UserError(f"unknown modality {', '.join(map(repr, unknown))}: known are {', '.join(MODALITIES)}")
    return tuple(name for name in MODALITIES if name in wanted)


def check_modality(name: str, value: str, modalities: Iterable[str]) -> None:
    """Refuse a parameter that has to be a modality.

    Args:
        name: of the parameter, such as source.
        value: what it was given.
        modalities: what it may be.

    Raises:
        UserError: it is none of them.
    """
    if value not in modalities:
        raise UserError(f"`{name}` is {value!r}, wanted one of: {', '.join(modalities)}")


def modality_index(name: str, modalities: tuple[str, ...]) -> int:
    """Return the integer id of a modality in a model that knows `modalities` (its position there).

    Raises:
        UserError: the model does not know the modality.
    """
    if name not in modalities:
        raise UserError(f"modality {name!r} is not one that this model knows: {', '.join(modalities)}")
    return modalities.index(name)
