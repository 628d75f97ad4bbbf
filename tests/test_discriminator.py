"""The patch discriminator's shapes and independence of samples."""

import pytest
import torch

from aldm.errors import UserError
from aldm.models.discriminator import PatchDiscriminator


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("num_layers", "num_classes", "sides", "expected"),
    [(3, 1, (16, 24, 8), (2, 3, 1)), (2, 5, (4, 6, 4), (1, 1, 1)), (1, 1, (5, 4, 7), (2, 2, 3))],
)
def test_one_judgement_per_patch_and_class(
    num_layers: int, num_classes: int, sides: tuple[int, int, int], expected: tuple[int, int, int]
) -> None:
    model = PatchDiscriminator(3, 8, num_layers, num_classes)
    logits = model(torch.randn(2, 3, *sides))
    assert logits.shape == (2, num_classes, *expected)


def test_samples_of_a_batch_do_not_meet() -> None:
    model = PatchDiscriminator(1, 8, 2).double()
    x = torch.randn(3, 1, 8, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


def test_every_parameter_learns() -> None:
    model = PatchDiscriminator(1, 8, 2, num_classes=3)
    model(torch.randn(1, 1, 8, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_an_input_that_the_strides_use_up_is_refused() -> None:
    with pytest.raises(UserError, match="sides of at least 8 voxels, got 8 x 4 x 8"):
        PatchDiscriminator(1, 8, 3)(torch.randn(1, 1, 8, 4, 8))
