"""The edge maps: values of flat volumes and of steps, gradients on flat background."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import sobel

from aldm.baselines.edges import sobel_edges


def test_background_has_no_edges_up_to_its_border() -> None:
    assert torch.equal(sobel_edges(torch.full((2, 1, 5, 4, 3), -1.0)), torch.full((2, 1, 5, 4, 3), -1.0))


@pytest.mark.parametrize("axis", [2, 3, 4])
@pytest.mark.parametrize(("height", "expected"), [(0.1, -0.240), (0.5, 0.928), (2.0, 1.0)])
def test_a_step_along_any_axis(axis: int, height: float, expected: float) -> None:
    x = torch.full((1, 1, 8, 8, 8), -1.0)
    x.narrow(axis, 4, 4).add_(height)
    edges = sobel_edges(x).transpose(axis, -1)[0, 0, 4, 4]
    assert edges[3].item() == pytest.approx(expected, abs=1e-3)
    assert edges[3].item() == pytest.approx(2 * math.tanh(4 * height) - 1, abs=1e-6)
    assert edges[4] == edges[3]
    assert edges[1] == edges[6] == -1


def test_it_is_the_sobel_filter_of_scipy() -> None:
    x = torch.rand(1, 1, 6, 7, 5, dtype=torch.float64) * 0.1 - 1
    padded = np.pad(x[0, 0].numpy(), 1, constant_values=-1.0)
    responses = np.stack([sobel(padded, axis)[1:-1, 1:-1, 1:-1] / 4 for axis in range(3)])
    expected = 2 * np.tanh(np.linalg.norm(responses, axis=0)) - 1
    torch.testing.assert_close(sobel_edges(x)[0, 0], torch.from_numpy(expected))
    assert sobel_edges(x).abs().max() <= 1


def test_gradients_are_right_and_finite_on_flat_background() -> None:
    flat = torch.full((1, 1, 5, 5, 5), -1.0, requires_grad=True)
    sobel_edges(flat).sum().backward()
    assert torch.equal(flat.grad, torch.zeros_like(flat))
    assert torch.autograd.gradcheck(sobel_edges, torch.rand(1, 1, 3, 4, 3, dtype=torch.float64, requires_grad=True))


def test_autocast_leaves_the_edges_in_full_precision() -> None:
    x = torch.rand(1, 1, 5, 5, 5) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        edges = sobel_edges(x)
    assert torch.equal(edges, sobel_edges(x))
    assert sobel_edges(x.bfloat16()).dtype == torch.float32
