"""The device to compute on."""

import torch

from aldm.errors import UserError


def select_device(name: str = "auto") -> torch.device:
    """Return the torch device of that name.

    Args:
        name: cpu, cuda, or auto: a GPU if there is one.

    Raises:
        UserError: cuda was asked for and torch sees no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"`device` cuda: torch {torch.__version__} sees no GPU here; "
            "give `device` cpu, or install a CUDA build of it"
        )
    use_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")
