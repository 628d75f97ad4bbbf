"""The two adversarial losses of the comparison methods: means over the discriminator's map and the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def lsgan(judgement: Tensor, is_real: float | Tensor) -> Tensor:
    """Return mean (judgement - is_real)^2, the least-squares loss (Mao et al. 2017).

    Args:
        judgement: what the discriminator says, any shape.
        is_real: what it should say: 1 (or True) for real, 0 for fake, between them for smoothed labels.
    """
    wanted = is_real if isinstance(is_real, Tensor) else float(is_real)
    return (judgement - wanted).square().mean()


def vanilla(judgement: Tensor, is_real: float) -> Tensor:
    """Return the binary cross-entropy of logits (Goodfellow et al. 2014); arguments as of `lsgan`."""
    return F.binary_cross_entropy_with_logits(judgement, torch.full_like(judgement, float(is_real)))
