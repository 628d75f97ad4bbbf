"""The denoiser: what the network of stage 3 is shown, and what its output stands for. Latents are B C x y z.

The layers between are an architecture: aldm/models/unet.py (Table C) or aldm/models/lean_unet.py. All inputs are given
by name: nobody else knows in which order they are concatenated.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aldm.config import DiffusionConfig, UNetConfig
from aldm.diffusion import PREDICTS_NOISE, make_schedule
from aldm.models.blocks import zero_


def time_embedding(t: Tensor, channels: int, max_period: float = 10_000.0) -> Tensor:
    """Return the sinusoidal embedding (B, channels) in fp32 of times (B,), integer or not (Vaswani et al. 2017)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return F.pad(torch.cat((angles.cos(), angles.sin()), dim=1), (0, channels - 2 * half))


class Denoiser(nn.Module):
    """A network on latents, with all that is concatenated, gated and scaled around it.

    The configuration chooses one of three predictions:

    - `denoise`: one target; the network sees cat[z_t, z_source, z_target_like].
    - `refine_all` (all_targets): every modality from one source; it sees cat[z_source, z_target_like of all].
    - `refine_missing` (any_sources): every modality from those that are given; it sees z_target_like of all.

    A subclass is an architecture: it makes layers that take `in_channels` to `out_channels`, and computes `network`.

    Args:
        config: of the network.
        diffusion: the objective, residual_std, and which of the three predictions.
        num_modalities: M, the modalities that ids count through.
        latent_channels: C.

    Attributes:
        in_channels, out_channels: of the network: the concatenated inputs, and its output.
        stride: sides that it does not divide are padded with zeros at their ends, and the result is cropped back.
        activation_checkpointing: recompute activations in the backward pass.
    """

    def __init__(
        self, config: UNetConfig, diffusion: DiffusionConfig, num_modalities: int, latent_channels: int
    ) -> None:
        super().__init__()
        self.diffusion, self.schedule = diffusion, make_schedule(diffusion)
        self.num_modalities, self.latent_channels = num_modalities, latent_channels
        self.in_channels, self.out_channels = (latent_channels * number for number in self._latents_in_and_out())
        self.stride = 2 ** (len(config.channels) - 1)
        self.activation_checkpointing = False

        self._time_channels, channels = config.channels[0], 4 * config.channels[0]
        self.time = nn.Sequential(nn.Linear(self._time_channels, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.target = nn.Embedding(num_modalities, channels)
        self.pair: nn.Embedding | None = None
        if config.embed_source and not diffusion.any_sources:  # which embeds what is given instead
            self.pair = nn.Embedding(num_modalities**2, channels)

        self.gates: nn.Parameter | None = None
        self.noise_gain: nn.Linear | None = None
        if config.skip_gates and diffusion.objective in PREDICTS_NOISE:
            self.noise_gain = nn.Linear(channels, latent_channels)
            zero_(self.noise_gain)
        elif config.skip_gates and not diffusion.together:
            # M M 3 C: of the network, of the source, of the target-like latent beside the 1 of `denoise`
            same = torch.eye(num_modalities)[:, :, None, None].expand(-1, -1, 1, latent_channels)
            self.gates = nn.Parameter(torch.cat((1 - same, same, -same), dim=2))

    def network(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return the output (B, out_channels, x, y, z) of the architecture's layers.

        Args:
            x: (B, in_channels, x, y, z), sides that `stride` divides.
            embedding: (B, E), of `embed`.
        """
        raise NotImplementedError

    def embed(self, t: Tensor, target: Tensor, source: Tensor | None) -> Tensor:
        """Return the conditioning vector (B, E), E four times the network's first width.

        Args:
            t: (B,) times, integer or float.
            target: (B,) int64 ids of the wanted modalities, or (B, M) 1 for each modality that is given, else 0.
            source: (B,) int64 ids of the source modalities; only embed_source needs them.
        """
        if target.dim() == 2:  # the modalities that are there, in their order
            embedding = target.to(self.target.weight.dtype) @ self.target.weight
        else:
            embedding = self.target(target)
        if self.pair is not None:
            assert source is not None, "embed_source needs the source's modality"
            embedding = embedding + self.pair(source * self.num_modalities + target)
        return embedding + self.time(time_embedding(t, self._time_channels).to(embedding.dtype))

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return the configuration's prediction, from the arguments of its method by name.

        Engines wrap the module and follow this call alone.
        """
        if self.diffusion.any_sources:
            return self.refine_missing(**inputs)
        return self.refine_all(**inputs) if self.diffusion.together else self.denoise(**inputs)

    def denoise(
        self, *, z_t: Tensor, t: Tensor, z_source: Tensor, z_target_like: Tensor, target: Tensor, source: Tensor
    ) -> Tensor:
        """Return what the objective predicts at z_t, (B, C, x, y, z).

        For epsilon and v the network's output is the prediction, unless the configuration has residual_std: then see
        `_from_target_like`. For x0 and regression it is the difference between z_target and z_target_like, which is
        added: stage 2 already stands near the answer, and a network that outputs 0 repeats it. With skip_gates the
        network learns how much of itself, of z_target_like and of z_source to take: at first as without gates, where
        source = target the source alone. For epsilon and v it learns, per channel, time and target, how much of the
        noise in its input to pass through, at first none: to predict noise is to pass most of it through voxel by
        voxel, which the layers learn slowly.

        Args:
            z_t: (B, C, x, y, z) noisy latent.
            t: (B,) time steps.
            z_source, z_target_like: (B, C, x, y, z) standardised latents.
            target, source: (B,) int64 modality ids.
        """

        def output(z: Tensor) -> Tensor:
            return self._output((z, z_source, z_target_like), t, target, source)

        if self.diffusion.objective not in PREDICTS_NOISE:
            return output(z_t) + z_target_like
        if self.diffusion.residual_std is None:
            return output(z_t)
        return self._from_target_like(output, z_t, t, z_target_like)

    def refine_all(self, *, z_source: Tensor, z_target_like: Tensor, source: Tensor) -> Tensor:
        """Return z_target of all modalities, (B, M C, x, y, z), that of the source being z_target_like as it is.

        The network is told the source alone; its output is the difference to z_target_like, which is added.

        Args:
            z_source: (B, C, x, y, z).
            z_target_like: (B, M C, x, y, z), modality by modality.
            source: (B,) int64 modality ids.
        """
        t = torch.zeros(len(source), device=z_source.device)
        change = self._output((z_source, z_target_like), t, source, source)
        other = torch.arange(self.num_modalities, device=source.device) != source[:, None]
        return z_target_like + change * self._per_channel(other)

    def refine_missing(self, *, z_target_like: Tensor, given: Tensor) -> Tensor:
        """Return z_target of all modalities, (B, M C, x, y, z), those given being z_target_like as they are.

        Args:
            z_target_like: (B, M C, x, y, z) of aldm.denoising.target_like_of_sources.
            given: (B, M), 1 for each modality that is given, else 0.
        """
        t = torch.zeros(len(given), device=given.device)
        change = self._output((z_target_like,), t, given, None)
        return z_target_like + change * self._per_channel(1 - given)

    def loss_weights(self, t: Tensor, z_t: Tensor, image_weights: Tensor | None = None) -> Tensor | None:
        """Return the weights, (C,) or (B, C), of the squared error of a prediction; None where all are 1.

        Where `_from_target_like` scales the network's output F, by k_c in channel c, every noise level asks the same of
        F (Karras et al. 2022: 1 / c_out^2): an error of 1 in F costs 1. Without that epsilon hardly depends on F where
        the noise is high, although what is coarse in a sample is decided there. Without `image_weights` the loss is
        that of F, (F - F*)^2 in every channel. With them it is the squared error in the image of the predicted
        z_target, up to one factor a level: channel c gets w_c k_c^2 (F - F*)^2 over the mean of w k^2 over the
        channels.

        Args:
            t: (B,) time steps.
            z_t: (B, C, x, y, z), at those.
            image_weights: (C,) aldm.losses.image_space_weights, w, for a loss in image space.
        """
        if self.diffusion.objective not in PREDICTS_NOISE or self.diffusion.residual_std is None:
            return image_weights
        std, alpha, _, spread = self._scales(t, z_t)
        scale = std / spread * (alpha if self.diffusion.objective == "epsilon" else 1)
        squares = scale.square().flatten(1)
        if image_weights is None:
            return squares.reciprocal()
        return image_weights / (image_weights * squares).mean(dim=1, keepdim=True)

    def example_inputs(self, sides: Sequence[int]) -> dict[str, Tensor]:
        """Return what `forward` takes for one sample, all zeros: the first modality to itself, or nothing given.

        Args:
            sides: x, y, z of the latents.
        """
        one, every = (torch.zeros(1, self.latent_channels * number, *sides) for number in (1, self.num_modalities))
        ids = torch.zeros(1, dtype=torch.long)
        if self.diffusion.any_sources:
            return {"z_target_like": every, "given": torch.zeros(1, self.num_modalities)}
        if self.diffusion.together:
            return {"z_source": one, "z_target_like": every, "source": ids}
        latents = dict.fromkeys(("z_t", "z_source", "z_target_like"), one)
        return {**latents, "t": torch.zeros(1), "target": ids, "source": ids}

    def _latents_in_and_out(self) -> tuple[int, int]:
        """Return how many latents the network sees and makes."""
        if self.diffusion.any_sources:
            return self.num_modalities, self.num_modalities
        return (1 + self.num_modalities, self.num_modalities) if self.diffusion.together else (3, 1)

    def _output(self, latents: Sequence[Tensor], t: Tensor, target: Tensor, source: Tensor | None) -> Tensor:
        """Return the network's output for the concatenated latents, gated where it has gates or a noise gain."""
        sides = latents[0].shape[2:]
        latents = [self._padded(z) for z in latents]
        embedding = self.embed(t, target, source)
        x = torch.cat(latents, dim=1).contiguous(memory_format=torch.channels_last_3d)
        h = self.network(x, embedding)
        if self.noise_gain is not None:
            h = h + self.noise_gain(embedding)[:, :, None, None, None] * latents[0]
        if self.gates is not None:
            assert source is not None, "skip_gates needs the source's modality"
            pair = self.gates.flatten(0, 1).index_select(0, source * self.num_modalities + target)
            gate_net, gate_source, gate_like = pair[:, :, :, None, None, None].unbind(1)
            _, z_source, z_target_like = latents
            h = gate_net * h + gate_source * z_source + gate_like * z_target_like
        return h[:, :, : sides[0], : sides[1], : sides[2]]

    def _padded(self, z: Tensor) -> Tensor:
        """Return (B, C, x, y, z) with zeros at the ends of sides that the stride does not divide."""
        padding = [-side % self.stride for side in z.shape[2:]]
        return F.pad(z, (0, padding[2], 0, padding[1], 0, padding[0])) if any(padding) else z

    def _per_channel(self, of_modality: Tensor) -> Tensor:
        """Return (B, M) of modalities as (B, M C, 1, 1, 1) of their channels."""
        return of_modality.repeat_interleave(self.latent_channels, dim=1)[:, :, None, None, None]

    def _from_target_like(
        self, network: Callable[[Tensor], Tensor], z_t: Tensor, t: Tensor, z_target_like: Tensor
    ) -> Tensor:
        """Return epsilon or v from what z_target_like already says about z_target.

        If z_target were normal about y = z_target_like with standard deviation s (residual_std), the best guess at z_t
        would be known; the network adds what is missing, scaled so that its input and what it has to output have unit
        variance (Karras et al. 2022, table 1 and appendix B.6, here about y instead of 0, and for a variance-preserving
        chain). With r = (z_t - alpha y) / q, q^2 = alpha^2 s^2 + sigma^2, and the network's output F(r),

            z_target = y + (s / q) (alpha s r + sigma F)        epsilon = (sigma r - alpha s F) / q
        """
        std, alpha, sigma, spread = self._scales(t, z_t)
        residual = (z_t - alpha * z_target_like) / spread
        output = network(residual).float()
        epsilon = (sigma * residual - alpha * std * output) / spread
        if self.diffusion.objective == "epsilon":
            return epsilon
        z_target = z_target_like + (std / spread) * (alpha * std * residual + sigma * output)
        return alpha * epsilon - sigma * z_target

    def _scales(self, t: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return s, alpha, sigma and q of `_from_target_like`, shaped to multiply z_t."""
        std = z_t.new_tensor(self.diffusion.residual_std or [1.0]).view(1, -1, 1, 1, 1)
        alpha, sigma = self.schedule.alpha_sigma_between(t, z_t)
        return std, alpha, sigma, (alpha**2 * std**2 + sigma**2).sqrt()
