"""MS-SPADE: stacked weights against one network per modality."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aldm.models.ms_spade import MSSpade, Spade

M = 3


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(source_skip: bool = False) -> MSSpade:
    return MSSpade(2, M, 4, (6, 6), (6, 4), hidden_channels=3, kernel_size=3, source_skip=source_skip)


def one_modality(model: MSSpade, modality: int) -> MSSpade:
    """The network that knows one modality only, with that modality's weights."""
    single = MSSpade(2, 1, 4, (6, 6), (6, 4), hidden_channels=3, kernel_size=3)
    weights = model.state_dict()
    own = single.state_dict()
    single.load_state_dict(
        {
            key: weights[key] if value.shape == weights[key].shape else weights[key][modality, None]
            for key, value in own.items()
        }
    )
    return single


def test_stacked_weights_are_a_loop_over_modalities() -> None:
    model = network()
    z, target = torch.randn(4, 2, 3, 4, 5), torch.tensor([2, 0, 2, 1])
    zero = torch.zeros(1, dtype=torch.long)
    expected = [one_modality(model, int(m))(z[b : b + 1], zero) for b, m in enumerate(target)]
    torch.testing.assert_close(model(z, target), torch.cat(expected))


def test_the_order_of_the_batch_does_not_matter() -> None:
    model = network(source_skip=True)
    z = torch.randn(4, 2, 3, 4, 5)
    target, source = torch.tensor([2, 0, 2, 1]), torch.tensor([0, 0, 1, 2])
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(model(z, target, source)[order], model(z[order], target[order], source[order]))


def test_the_target_decides() -> None:
    model = network()
    z = torch.randn(1, 2, 4, 4, 4)
    outs = [model(z, torch.tensor([m])) for m in range(M)]
    assert not torch.allclose(outs[0], outs[1])
    assert not torch.allclose(outs[1], outs[2])


@pytest.mark.parametrize("source_skip", [False, True])
def test_every_parameter_gets_a_gradient_in_every_step(source_skip: bool) -> None:
    model = network(source_skip)
    model(torch.randn(1, 2, 4, 4, 4), torch.tensor([1]), torch.tensor([0])).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape, name
        assert parameter.grad.abs().sum() > 0, name
    weight = model.spade_blocks[0].spade1.shared.weight
    assert weight.grad[1].abs().sum() > 0
    assert weight.grad[0].abs().sum() == weight.grad[2].abs().sum() == 0


def test_spade_is_its_definition() -> None:
    spade = Spade(1, channels=3, hidden_channels=2)
    x, zero = torch.randn(2, 3, 4, 4, 4), torch.zeros(2, dtype=torch.long)

    def conv(layer: torch.nn.Module, h: Tensor, rows: slice) -> Tensor:
        return F.conv3d(h, layer.weight[0, rows], layer.bias[0, rows], padding=1)

    hidden = F.relu(conv(spade.shared, x, slice(None)))
    gamma, beta = conv(spade.gamma_beta, hidden, slice(0, 3)), conv(spade.gamma_beta, hidden, slice(3, 6))
    torch.testing.assert_close(spade(x, zero), F.instance_norm(x) * (1 + gamma) + beta)


def test_source_skip_starts_as_the_identity_where_source_is_target() -> None:
    model = network(source_skip=True)
    z = torch.randn(2, 2, 3, 3, 3)
    same = torch.tensor([0, 2])
    assert torch.equal(model(z, same, same), z)
    assert not torch.allclose(model(z, same, torch.tensor([1, 1])), z)


def test_activation_checkpointing_changes_no_gradient() -> None:
    model = network()
    z, target = torch.randn(1, 2, 4, 4, 4), torch.tensor([1])
    gradients = []
    for flag in (False, True):
        model.activation_checkpointing = flag
        gradients.append(torch.autograd.grad(model(z, target).square().sum(), list(model.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_it_learns_a_different_map_for_each_target() -> None:
    model = network(source_skip=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    z, target = torch.randn(2, 2, 4, 4, 4), torch.tensor([1, 2])
    wanted = torch.stack((z[0].abs(), -z[1]))
    source = torch.zeros(2, dtype=torch.long)
    first = (model(z, target, source) - wanted).abs().mean().item()
    for _ in range(60):
        loss = (model(z, target, source) - wanted).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.35 * first


def test_gates_are_those_of_source_and_target_in_this_order() -> None:
    """A trained checkpoint has them as M M 2 C: of [source, target], the source's share before the network's."""
    model = network(source_skip=True)
    assert model.gates is not None
    share = torch.arange(M)[:, None] * 10.0 + torch.arange(M)
    with torch.no_grad():
        model.gates.zero_()
        model.gates[:, :, 0] = share[..., None]
    z, source, target = torch.randn(4, 2, 3, 3, 3), torch.tensor([0, 1, 2, 2]), torch.tensor([1, 0, 1, 2])
    wanted = torch.tensor([1.0, 10.0, 21.0, 22.0]).view(-1, 1, 1, 1, 1) * z
    torch.testing.assert_close(model(z, target, source), wanted)


def test_with_voxel_norms_a_box_of_a_latent_is_answered_as_in_the_whole() -> None:
    z, target = torch.randn(1, 2, 40, 6, 6), torch.tensor([1])
    z[:, :, 36:] += 4
    for voxel_norm in (True, False):
        model = MSSpade(2, M, 4, (6,), (6,), hidden_channels=3, kernel_size=3, voxel_norm=voxel_norm)
        whole, box = model(z, target), model(z[:, :, :28], target)
        assert torch.allclose(whole[:, :, :8], box[:, :, :8]) is voxel_norm
