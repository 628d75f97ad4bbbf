"""The denoiser: what the network is shown, how its output is gated and scaled, what it says that an error costs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aldm.config import OBJECTIVES, CodecConfig, Config, DiffusionConfig, UNetConfig
from aldm.denoising import build_denoiser
from aldm.diffusion import make_schedule, noised, to_x0, training_target
from aldm.latents import unstandardise
from aldm.losses import image_space_weights, weighted_mse
from aldm.models.codecs import build_codec
from aldm.models.denoiser import Denoiser, time_embedding
from aldm.presets import tiny

GATED = replace(
    tiny(),
    modalities=("t1", "t2", "pd"),
    unet=replace(tiny().unet, skip_gates=True, embed_source=True),
    diffusion=DiffusionConfig(objective="regression"),
)
EPSILON, EVERY, ANY = (
    replace(GATED, diffusion=diffusion)
    for diffusion in (
        DiffusionConfig(),
        DiffusionConfig(objective="regression", all_targets=True),
        DiffusionConfig(objective="regression", all_targets=True, any_sources=True),
    )
)


class Stub(Denoiser):
    """A denoiser of two modalities whose network is a function of its input."""

    def __init__(
        self, diffusion: DiffusionConfig, latent_channels: int, function: Callable[[Tensor], Tensor] = torch.zeros_like
    ) -> None:
        super().__init__(UNetConfig(channels=(8,)), diffusion, 2, latent_channels)
        self.function = function

    def network(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.function(x)


def random_inputs(denoiser: Denoiser, sides: tuple[int, int, int] = (8, 4, 12)) -> dict[str, Tensor]:
    """Latents of noise; times and modalities are the first ones."""
    inputs = denoiser.example_inputs(sides)
    return {name: torch.randn_like(x) if x.dim() == 5 else x for name, x in inputs.items()}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_time_embedding_is_its_definition() -> None:
    embedding = time_embedding(torch.tensor([0, 7]), 8)
    frequencies = torch.tensor([10_000 ** (-k / 4) for k in range(4)])
    torch.testing.assert_close(embedding[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    torch.testing.assert_close(embedding[1], torch.cat(((7 * frequencies).cos(), (7 * frequencies).sin())))


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(
    ("config", "own"),
    [(GATED, ["gates", "time", "target", "pair"]), (EPSILON, ["time", "target", "pair", "noise_gain"])],
)
def test_names_and_order_of_parameters_are_those_of_files_from_before(
    config: Config, own: list[str], lean: bool
) -> None:
    """Weights are written by name, the states of an optimizer by place."""
    denoiser = build_denoiser(replace(config, unet=replace(config.unet, lean=lean)), 2)
    layers = ["conv_in", "down", "downsample", "middle", "up", "upsample", "out"]
    names = [name for name, _ in denoiser.named_parameters()]
    assert [part for part, _ in groupby(name.partition(".")[0] for name in names)] == own + ["mix"] * lean + layers
    assert {"down.1.0.block.conv1.weight", "up.0.0.attention.qkv.weight", "out.conv.bias"} <= set(names)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("config", [GATED, EPSILON, EVERY, ANY])
def test_the_example_is_what_it_takes(config: Config, lean: bool) -> None:
    denoiser = build_denoiser(replace(config, unet=replace(config.unet, lean=lean)), 2)
    made = denoiser(**random_inputs(denoiser, (5, 4, 3)))
    assert made.shape == (1, 2 if config in (GATED, EPSILON) else 6, 5, 4, 3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_network_that_outputs_nothing_predicts_the_target_like_latent(objective: str) -> None:
    config = replace(tiny(), modalities=("t1", "t2"), diffusion=DiffusionConfig(objective=objective))
    denoiser = build_denoiser(config, 8)  # its last layer starts at zero
    inputs = random_inputs(denoiser)
    output = denoiser(**inputs)
    wanted = torch.zeros_like(output) if objective in ("epsilon", "v") else inputs["z_target_like"]
    assert torch.equal(output, wanted)


@pytest.mark.parametrize("objective", ["epsilon", "v"])
@pytest.mark.parametrize("t", [0.0, 12.5, 999.0])
def test_a_network_that_outputs_nothing_predicts_the_posterior_mean_about_the_target_like_latent(
    objective: str, t: float
) -> None:
    """Of a target that is normal about it; by the rule of two normals, channel by channel."""
    std = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64).view(1, 3, 1, 1, 1)
    diffusion = DiffusionConfig(objective=objective, residual_std=(0.1, 0.5, 2.0))
    schedule = make_schedule(diffusion)
    z_t, z_source, z_target_like = torch.randn(3, 2, 3, 2, 2, 2, dtype=torch.float64)
    given = {"z_t": z_t, "t": torch.full((2,), t), "z_source": z_source, "z_target_like": z_target_like}
    ids = torch.tensor([1, 1])
    prediction = Stub(diffusion, 3, lambda x: torch.zeros_like(x[:, :3])).denoise(**given, target=ids, source=ids)
    level = schedule.level(t)
    precision = level.alpha**2 / level.sigma**2 + 1 / std**2
    mean = (level.alpha * z_t / level.sigma**2 + z_target_like / std**2) / precision
    found = to_x0(objective, prediction, z_t, level.alpha, level.sigma)
    torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", ["epsilon", "v"])
def test_what_the_network_has_to_output_has_unit_variance(objective: str) -> None:
    """For the target that it should predict; its input too, at every noise level."""
    std = torch.tensor([0.1, 1.0]).view(1, 2, 1, 1, 1)
    diffusion = DiffusionConfig(objective=objective, residual_std=(0.1, 1.0))
    schedule = make_schedule(diffusion)
    z_target_like = torch.randn(1, 2, 40, 40, 40)
    z_target = z_target_like + std * torch.randn_like(z_target_like)
    noise, ids = torch.randn_like(z_target), torch.tensor([0])
    for t in (0.0, 30.0, 400.0, 999.0):
        times = torch.tensor([t])
        z_t = noised(schedule, z_target, times, noise)
        seen = []

        def echo(x: Tensor, value: float, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x[:, :2])
            return torch.full_like(x[:, :2], value)

        given = {"z_t": z_t, "t": times, "z_source": torch.zeros_like(z_t), "z_target_like": z_target_like}
        denoisers = [Stub(diffusion, 2, partial(echo, value=value)) for value in (0.0, 1.0)]
        zero, one = (denoiser.denoise(**given, target=ids, source=ids) for denoiser in denoisers)
        wanted = (training_target(objective, schedule, z_target, times, noise) - zero) / (one - zero)
        for each in (seen[0], wanted):
            torch.testing.assert_close(each.std(dim=(0, 2, 3, 4)), torch.ones(2), rtol=0.03, atol=0.03)
        # an error of the output counts the same at every noise level and in every channel
        weights = denoisers[0].loss_weights(times, z_t)
        assert weights is not None
        assert float(weighted_mse(one, zero, weights)) == pytest.approx(1, rel=1e-3)
        for channel in range(2):
            torch.testing.assert_close(
                (one - zero)[0, channel].square().mean() * weights[0, channel], torch.tensor(1.0)
            )


@pytest.mark.parametrize("objective", ["epsilon", "v"])
@pytest.mark.parametrize("t", [0.0, 400.0, 999.0])
def test_the_image_space_loss_of_noise_predictions_is_the_images(objective: str, t: float) -> None:
    """A linear network's gradient is that of the decoded volume's squared error, up to one factor; 1 in F costs 1."""
    torch.manual_seed(0)
    codec, channels = build_codec(CodecConfig(kind="haar")), 8
    mean, std, residual = torch.randn(channels), torch.rand(channels) + 0.1, torch.rand(channels) + 0.1
    diffusion = DiffusionConfig(objective=objective, residual_std=tuple(residual.tolist()))
    schedule = make_schedule(diffusion)
    z_target, z_source, z_target_like, noise = torch.randn(4, 2, channels, 2, 3, 2)
    times, ids = torch.full((2,), t), torch.tensor([0, 1])
    z_t = noised(schedule, z_target, times, noise)
    wanted = training_target(objective, schedule, z_target, times, noise)
    mix = (0.1 * torch.randn(channels, 3 * channels)).requires_grad_()

    def ask(network: Callable[[Tensor], Tensor]) -> Tensor:
        given = {"z_t": z_t, "t": times, "z_source": z_source, "z_target_like": z_target_like}
        return Stub(diffusion, channels, network).denoise(**given, target=ids, source=ids)

    prediction = ask(lambda x: torch.einsum("dc,bcxyz->bdxyz", mix, x))
    weights = Stub(diffusion, channels).loss_weights(times, z_t, image_space_weights(std))
    (got,) = torch.autograd.grad(weighted_mse(prediction, wanted, weights), mix, retain_graph=True)
    level = schedule.level(t)
    found = to_x0(objective, prediction, z_t, level.alpha, level.sigma)
    volumes = [codec.decode(unstandardise(z, mean, std)) for z in (found, z_target)]
    (image,) = torch.autograd.grad(F.mse_loss(*volumes), mix)
    torch.testing.assert_close(got / got.norm(), image / image.norm(), rtol=1e-3, atol=1e-4)
    zero, one = (ask(lambda x, value=value: torch.full_like(x[:, :channels], value)) for value in (0.0, 1.0))
    assert float(weighted_mse(one, zero, weights)) == pytest.approx(1, rel=1e-3)


def test_the_gates_start_from_the_source_where_the_pair_is_the_same_and_without_a_say_elsewhere() -> None:
    denoiser = build_denoiser(GATED, 2)
    torch.nn.init.normal_(denoiser.out.conv.weight)
    names = ("z_t", "z_source", "z_target_like")
    given = dict(zip(names, torch.randn(3, 2, 2, 8, 4, 12), strict=True))
    given |= {"t": torch.ones(2), "target": torch.tensor([1, 1]), "source": torch.tensor([1, 0])}
    plain = build_denoiser(replace(GATED, unet=replace(GATED.unet, skip_gates=False)), 2)
    plain.load_state_dict({name: value for name, value in denoiser.state_dict().items() if name != "gates"})
    torch.testing.assert_close(denoiser(**given), torch.stack([given["z_source"][0], plain(**given)[1]]))


def test_the_noise_gain_starts_without_a_say_and_passes_the_noisy_input_by_time_and_channel() -> None:
    denoiser = build_denoiser(EPSILON, 2)
    plain = build_denoiser(replace(EPSILON, unet=replace(EPSILON.unet, skip_gates=False)), 2)
    plain.load_state_dict({name: value for name, value in denoiser.state_dict().items() if "noise_gain" not in name})
    z_t, z_source, z_target_like = torch.randn(3, 2, 2, 5, 4, 12)
    given = {"z_t": z_t, "z_source": z_source, "z_target_like": z_target_like, "t": torch.tensor([3.0, 700.0])}
    given |= {"target": torch.tensor([1, 0]), "source": torch.tensor([0, 1])}
    assert torch.equal(denoiser(**given), plain(**given))
    assert denoiser.noise_gain is not None
    torch.nn.init.normal_(denoiser.noise_gain.weight)
    gained = (denoiser(**given) - plain(**given)) / z_t
    gains = gained.mean(dim=(2, 3, 4))
    torch.testing.assert_close(gained, gains[:, :, None, None, None].expand_as(gained), rtol=1e-3, atol=1e-3)
    assert len(gains.unique()) == 4  # two channels at two times
