"""Losses of the three trainings. Volumes and latents are B C X Y Z."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EDGE_SCALES = 3


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """Return -mean(D(fake)) (Lim and Ye 2017): what the generator minimises."""
    return -fake_logits.float().mean()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the mean of relu(1 - D(real)) and relu(1 + D(fake)) (Lim and Ye 2017): the discriminator's loss."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def class_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the cross-entropy of every patch against its sample's class.

    Args:
        logits: (B, M + 1, x, y, z); classes 0 .. M - 1 are modalities, class M is "fake".
        classes: (B,) int64.
    """
    every_patch = classes.view(-1, 1, 1, 1).expand(-1, *logits.shape[2:])
    return F.cross_entropy(logits.float(), every_patch)


def latent_generator_loss(fake_logits: Tensor, target: Tensor) -> Tensor:
    """Return the loss of a generated latent that is to pass for a real one of its target modality."""
    return class_loss(fake_logits, target)


def latent_discriminator_loss(real_logits: Tensor, fake_logits: Tensor, target: Tensor) -> Tensor:
    """Return the loss of a discriminator that tells the M modalities and "fake" (class M) apart.

    Args:
        real_logits, fake_logits: (B, M + 1, x, y, z).
        target: (B,) modality ids of the real latents.
    """
    fake = torch.full_like(target, fake_logits.shape[1] - 1)
    return 0.5 * (class_loss(real_logits, target) + class_loss(fake_logits, fake))


def edge_loss(x: Tensor, y: Tensor) -> Tensor:
    """Return the L1 distance of the spatial differences of two volumes at full, half and quarter resolution.

    It stands where other VQGANs put a perceptual distance (LPIPS): that one needs a network trained on photographs, and
    none for MR volumes comes with a package. Edges are what L1 alone blurs first. A scale whose sides are below 2
    voxels is left out.
    """
    difference = (x - y).float()
    total = difference.new_zeros(())
    for scale in range(EDGE_SCALES):
        if scale:
            difference = F.avg_pool3d(difference, 2)
        total = total + sum(difference.diff(dim=axis).abs().mean() for axis in (2, 3, 4)) / 3
        if min(difference.shape[2:]) < 4:
            break
    return total


def adaptive_weight(
    weight: Tensor,
    redo: Callable[[Tensor], Tensor],
    reconstruction_loss: Callable[[Tensor], Tensor],
    adversarial_loss: Callable[[Tensor], Tensor],
    reduce: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Tensor:
    """Return |grad of the reconstruction loss| / |grad of the adversarial loss| at the last layer (Esser et al. 2021,
    eq. 7).

    The last layer is computed again on its detached input with a cloned weight, so that no gradient is asked of the
    training's own graph: engines that shard parameters or reduce gradients in hooks do not bear that.

    Args:
        weight: the last layer's weight, whole.
        redo: the reconstruction from a weight of the last layer, its input fixed and detached.
        reconstruction_loss, adversarial_loss: of a reconstruction.
        reduce: the mean of a gradient over all ranks, so that the weight is the whole batch's however it is shared.

    Returns:
        A scalar in [0, 1e4] without gradient; the denominator has 1e-4 added.
    """
    with torch.enable_grad():
        clone = weight.detach().clone().requires_grad_()
        reconstruction = redo(clone)
        (plain,) = torch.autograd.grad(reconstruction_loss(reconstruction), clone, retain_graph=True)
        (adversarial,) = torch.autograd.grad(adversarial_loss(reconstruction), clone)
    return (reduce(plain).norm() / (reduce(adversarial).norm() + 1e-4)).clamp(0, 1e4).detach()


def weighted_mse(prediction: Tensor, target: Tensor, channel_weights: Tensor | None = None) -> Tensor:
    """Return the mean squared error, each channel times its weight ((C,), or (B, C) for each sample; None for ones)."""
    squares = (prediction.float() - target.float()).square()
    if channel_weights is None:
        return squares.mean()
    return (squares * channel_weights.view(-1, squares.shape[1], 1, 1, 1)).mean()


def weighted_l1(prediction: Tensor, target: Tensor, channel_weights: Tensor | None = None) -> Tensor:
    """Return the mean absolute error, each channel times its weight ((C,); None for ones)."""
    errors = (prediction.float() - target.float()).abs()
    if channel_weights is None:
        return errors.mean()
    return (errors * channel_weights.view(1, -1, 1, 1, 1)).mean()


def image_space_weights(std: Sequence[float] | Tensor) -> Tensor:
    """Return (C,) weights that make the squared error of standardised latents proportional to the image's.

    Where the codec is isometric, a channel's share of the image's squared error is std^2 times that of the standardised
    latent. The weights have mean 1.
    """
    squares = torch.as_tensor(std, dtype=torch.float32).square()
    return squares / squares.mean()
