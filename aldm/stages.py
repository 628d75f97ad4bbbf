"""What each training optimises: vqgan, ms-spade, diffusion.

Volumes are B 1 X Y Z in [-1, 1], latents B C x y z standardised per channel.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aldm.config import Config
from aldm.data.dataset import LatentPairs, LatentSubsets, LatentTargets, Samples, VolumeSamples, checked_crop
from aldm.data.store import VolumeStore
from aldm.denoising import build_denoiser, build_ms_spade, of_target, target_like_of_sources
from aldm.diffusion import training_loss_inputs
from aldm.errors import UserError
from aldm.intensity_map_fit import fit_intensity_map
from aldm.latents import LatentStore, data_record
from aldm.losses import (
    adaptive_weight,
    edge_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    image_space_weights,
    latent_discriminator_loss,
    latent_generator_loss,
    weighted_l1,
    weighted_mse,
)
from aldm.models.blocks import InverseHaarTransform
from aldm.models.codecs import build_codec
from aldm.models.discriminator import PatchDiscriminator
from aldm.players import Batch, Engine, Export, Player, StepInfo, Values
from aldm.sampling import check_sampling, sample
from aldm.stage_data import (
    adversary,
    check_image_space,
    check_patches,
    latent_score,
    latent_values,
    latents_record,
    panel,
    psnr_from_squared_error,
    with_data,
)

LEAST_SQUARED_ERROR = 1e-4
"""Added to what an intensity map leaves, intensities in [-1, 1], so that no source is believed alone."""
PRECISION_POWER = 4
"""Of the weights of several sources: their errors go together, so a mean by inverse squared errors takes too much of
the worse ones."""
RESIDUAL_SAMPLES = 16
"""Pairs over which the distance that stage 2 leaves is measured."""
TARGET_LIKE_CACHE_BYTES = 2 * 2**30
"""Memory for the outputs of the frozen MS-SPADE that the diffusion stage keeps."""


class VQGANStage:
    """Stage 1: encoder, decoder and codebook against a patch discriminator (Table A; Esser et al. 2021, eq. 6).

    Generator: L1 + commitment + edge_weight edges + lambda adversarial_weight adversarial, where lambda
    is the adaptive weight (1 without it). Discriminator: hinge, on the reconstruction that the generator's turn left.
    Both the discriminator and the adversarial term start at adversarial_start_step.

    Args:
        config: codec and train_vqgan.
        store: prepared volumes.

    Raises:
        UserError: the codec has nothing to train, or the crop does not fit the volumes, the codec or the discriminator.
    """

    name = "vqgan"
    score = "psnr_db"
    higher_is_better = True
    model_data: Mapping[str, Any] | None = None
    """What the model that it starts from keeps of its data, for modalities that the store lacks."""

    def __init__(self, config: Config, store: VolumeStore) -> None:
        if config.codec.kind == "haar":
            raise UserError(
                "codec.kind is haar, a fixed transform with nothing to train: go on with aldm encode, `codec` haar, or "
                "train another with `codec.kind=haar-vqgan`"
            )
        self.config = with_data(config, store.modalities, asdict(store.preprocess))
        self._store, self._training = store, config.train_vqgan
        self.codec = build_codec(config.codec)
        self.codec.activation_checkpointing = config.activation_checkpointing
        self._check_crop()
        self.players = [Player("codec", self.codec, self._training, self._generator_loss)]
        self.discriminator: PatchDiscriminator | None = None
        if self._training.adversarial_weight > 0:
            self.discriminator = PatchDiscriminator(
                1, self._training.discriminator_channels, self._training.discriminator_layers
            )
            self.players.append(adversary(self.discriminator, self._training, self._discriminator_loss))

    def connect(self, engine: Engine) -> None:
        """Sum the codebook's statistics over the engine's ranks."""
        self._engine = engine
        if self.codec.quantizer is not None and engine.world_size > 1:
            self.codec.quantizer.reduce = lambda value: engine.reduce(value) * engine.world_size
            self.codec.quantizer.rank = engine.rank

    def samples(self, split: str) -> VolumeSamples:
        """Volumes, cropped and flipped."""
        training = self._training
        return VolumeSamples(self._store, split, self.config.modalities, training.crop, training.flip_probability)

    def _generator_loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        x = batch["volume"]
        with self._last_calls() as last_calls:
            output = model(x)
        loss = self._reconstruction_loss(output.reconstruction, x)
        values: Values = {
            "reconstruction_loss": loss.detach(),
            "commitment_loss": output.commitment_loss.detach(),
            "codebook_usage": output.codebook_usage,
            "perplexity": output.perplexity,
        }
        loss = loss + output.commitment_loss
        if "discriminator" in info.playing:
            info.shared["reconstruction"] = output.reconstruction.detach()
            adversarial = self._adversarial_loss(output.reconstruction)
            weight = torch.ones((), device=x.device)
            if self._training.adaptive_weight:
                weight = self._adaptive_weight(last_calls, x)
            values |= {"adversarial_loss": adversarial.detach(), "adaptive_weight": weight}
            loss = loss + self._training.adversarial_weight * weight * adversarial
        return loss, values

    def _discriminator_loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        both = torch.cat([batch["volume"], info.shared["reconstruction"].to(batch["volume"].dtype)])
        real, fake = model(both).float().chunk(2)
        return hinge_discriminator_loss(real, fake), {
            "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean(),
        }

    def _reconstruction_loss(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        loss = F.l1_loss(reconstruction.float(), x)
        if self._training.edge_weight > 0:
            loss = loss + self._training.edge_weight * edge_loss(reconstruction, x)
        return loss

    def _adversarial_loss(self, reconstruction: Tensor) -> Tensor:
        assert self.discriminator is not None
        return hinge_generator_loss(self.discriminator(reconstruction))

    @contextlib.contextmanager
    def _last_calls(self) -> Iterator[list[tuple[Tensor, int]]]:
        """Collect the detached inputs of the decoder's last convolution and their padding along X, slab by slab."""
        calls: list[tuple[Tensor, int]] = []

        def collect(_: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
            calls.append((inputs[0].detach(), options.get("padding_x", 1)))

        assert self.codec.last_layer is not None, "a codec that trains has a last layer"
        hook = self.codec.last_layer.register_forward_pre_hook(collect, with_kwargs=True)
        try:
            yield calls
        finally:
            hook.remove()

    def _adaptive_weight(self, last_calls: list[tuple[Tensor, int]], x: Tensor) -> Tensor:
        """The ratio of gradient norms at the last convolution; inverse Haar transforms may follow it."""
        last_layer = self.codec.last_layer
        assert last_layer is not None, "a codec that trains has a last layer"
        haar = nn.Sequential(*(block for block in self.codec.decoder if isinstance(block, InverseHaarTransform)))
        with self._engine.whole(list(last_layer.parameters())):
            bias = last_layer.get_parameter("bias").detach().clone()

            def redo(weight: Tensor) -> Tensor:
                slabs = [F.conv3d(z, weight, bias, padding=(pad, 1, 1)) for z, pad in last_calls]
                return haar(slabs[0] if len(slabs) == 1 else torch.cat(slabs, dim=2))

            return adaptive_weight(
                last_layer.get_parameter("weight"),
                redo,
                lambda reconstruction: self._reconstruction_loss(reconstruction, x),
                self._adversarial_loss,
                self._engine.reduce,
            )

    def validate(self, modules: Mapping[str, nn.Module], batch: Batch, info: StepInfo) -> Values:
        """PSNR, dB, and L1 of the reconstruction."""
        reconstruction = modules["codec"](batch["volume"]).reconstruction.float()
        info.shared["panel"] = panel(volume=batch["volume"], reconstruction=reconstruction)
        return {
            "psnr_db": psnr_from_squared_error((reconstruction - batch["volume"]).square()),
            "l1": F.l1_loss(reconstruction, batch["volume"]),
        }

    def export(self, weights: Mapping[str, Mapping[str, Tensor]]) -> Export:
        """The codec alone."""
        names = self.config.modalities
        meta = {"modalities": list(names), "data": data_record(self._store, names, self.model_data)}
        return Export("codec", self.config, weights["codec"], meta)

    def _check_crop(self) -> None:
        shape = checked_crop(self._training.crop, self._store.preprocess.spatial_shape)
        shape = shape or self._store.preprocess.spatial_shape
        if self._training.adversarial_weight > 0:
            check_patches(shape, self._training, "train_vqgan")
        divisor = self.codec.downsampling
        if any(side % divisor for side in shape):
            raise UserError(
                f"stage 1 trains on {' x '.join(map(str, shape))} voxels, which the codec's downsampling of {divisor} "
                "does not divide: give another `crop`, or set preprocess.spatial_shape and prepare the store again"
            )


class MSSpadeStage:
    """Stage 2: source latent to target-like latent (Table B).

    Generator: L1(z_target_like, z_target) + adversarial_weight cross-entropy of the latent discriminator against the
    target's class. Discriminator: the M modalities for real latents, "fake" (class M) for generated ones.

    Args:
        config: ms_spade and train_ms_spade.
        latents: encoded volumes.

    Raises:
        UserError: the discriminator has too many layers for the latents.
    """

    name = "ms-spade"

    def __init__(self, config: Config, latents: LatentStore) -> None:
        self.config = with_data(config, latents.modalities, latents.data["preprocess"], latents.codec)
        self._latents, self._training = latents, config.train_ms_spade
        self.score, self.higher_is_better = latent_score(latents)
        number = len(self.config.modalities)
        check_image_space(latents, self._training, "train_ms_spade")
        if self._training.adversarial_weight > 0:
            check_patches(latents.sides, self._training, "train_ms_spade")
        self.ms_spade = build_ms_spade(self.config, latents.latent_channels)
        self.players = [Player("ms-spade", self.ms_spade, self._training, self._generator_loss)]
        self.discriminator: PatchDiscriminator | None = None
        if self._training.adversarial_weight > 0:
            self.discriminator = PatchDiscriminator(
                latents.latent_channels,
                self._training.discriminator_channels,
                self._training.discriminator_layers,
                number + 1,
            )
            self.players.append(adversary(self.discriminator, self._training, self._discriminator_loss))

    def fit_intensity_map(self) -> None:
        """Fit the intensity map, where there is one, to the training subjects: a model's that is fine-tuned too.

        A pair that no training subject has both modalities of keeps what the model knows of it; without a model it has
        the identity, and is believed as little as the worst of the others.
        """
        module = self.ms_spade
        if module.intensity_map is None:
            return
        errors = fit_intensity_map(module.intensity_map, self._latents, self.config.modalities)
        if self.config.diffusion.any_sources:
            known = np.nan_to_num(errors, nan=np.nanmax(errors, initial=0.0))
            precision = torch.from_numpy(1 / (known + LEAST_SQUARED_ERROR)).to(module.precision)
            kept = torch.from_numpy(np.isnan(errors) & bool(self.config.init_from))
            module.precision.copy_(torch.where(kept, module.precision, precision))

    def connect(self, engine: Engine) -> None:
        """Nothing is frozen here."""
        self._std = torch.from_numpy(self._latents.std).to(engine.device)
        self._weights = image_space_weights(self._std).sqrt() if self._training.image_space_loss else None

    def samples(self, split: str) -> LatentPairs:
        """Pairs of latents."""
        fraction = self._training.same_modality_fraction
        return LatentPairs(self._latents, split, self.config.modalities, fraction, self.config.pair)

    def _generator_loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        z_target_like = model(batch["z_source"], batch["target"], batch["source"])
        loss = weighted_l1(z_target_like, batch["z_target"], self._weights)
        values: Values = {"l1": loss.detach()}
        if "discriminator" in info.playing:
            assert self.discriminator is not None
            info.shared["z_target_like"] = z_target_like.detach()
            adversarial = latent_generator_loss(self.discriminator(z_target_like), batch["target"])
            values["adversarial_loss"] = adversarial.detach()
            loss = loss + self._training.adversarial_weight * adversarial
        return loss, values

    def _discriminator_loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        both = torch.cat([batch["z_target"], info.shared["z_target_like"].to(batch["z_target"].dtype)])
        real, fake = model(both).chunk(2)
        accuracy = (real.detach().argmax(dim=1) == batch["target"].view(-1, 1, 1, 1)).float().mean()
        return latent_discriminator_loss(real, fake, batch["target"]), {"accuracy_real": accuracy}

    def validate(self, modules: Mapping[str, nn.Module], batch: Batch, info: StepInfo) -> Values:
        """The target-like latent's distance from the target's: PSNR, dB, of the volume where the codec is isometric."""
        z = modules["ms-spade"](batch["z_source"], batch["target"], batch["source"])
        info.shared["panel"] = panel(source=batch["z_source"], prediction=z, target=batch["z_target"])
        return latent_values(self._latents, self._std, z, batch["z_target"])

    def export(self, weights: Mapping[str, Mapping[str, Tensor]]) -> Export:
        """MS-SPADE alone."""
        meta = {"modalities": list(self.config.modalities), "latents": latents_record(self._latents)}
        return Export("ms-spade", self.config, weights["ms-spade"], meta)


def measured_residual_std(config: Config, latents: LatentStore, ms_spade: nn.Module) -> tuple[float, ...]:
    """Return diffusion.residual_std: the RMS of z_target - z_target_like, per channel, to three digits.

    Over RESIDUAL_SAMPLES pairs of the validation subjects, where there are any: on its own training subjects stage 2 is
    better than it will be.

    Args:
        config: modalities and pair.
        latents: encoded volumes.
        ms_spade: trained on them.
    """
    modalities = config.modalities or latents.modalities
    pairs = LatentPairs(latents, "validation", modalities, pair=config.pair)
    if not len(pairs):
        pairs = LatentPairs(latents, "train", modalities, 0.0, config.pair)
    squares = []
    for index in range(min(RESIDUAL_SAMPLES, len(pairs))):
        pair = pairs.sample(index, torch.Generator().manual_seed(index))
        target, source = (torch.tensor([pair[end]]) for end in ("target", "source"))
        with torch.no_grad():
            residual = pair["z_target"] - ms_spade(pair["z_source"][None], target, source)[0]
        squares.append(residual.square().mean(dim=(1, 2, 3)))
    return tuple(float(f"{max(value, 1e-3):.3g}") for value in torch.stack(squares).mean(dim=0).sqrt().tolist())


class DiffusionStage:
    """Stage 3: the U-Net on cached latents, with the frozen MS-SPADE of stage 2 (Table C).

    Loss: mean squared error on what the objective predicts, over image-space weights where the configuration says so.
    The outputs of MS-SPADE are kept in memory, in float16, as far as TARGET_LIKE_CACHE_BYTES reach.

    Args:
        config: unet, diffusion, sampling and train_diffusion.
        latents: encoded volumes.
        ms_spade: trained, on the same latents.
        ms_spade_hash: of its checkpoint.

    Raises:
        UserError: the sampler of the configuration does not go with the objective, or the loss with the codec.
    """

    name = "diffusion"

    def __init__(self, config: Config, latents: LatentStore, ms_spade: nn.Module, ms_spade_hash: str) -> None:
        self.config = with_data(config, latents.modalities, latents.data["preprocess"], latents.codec)
        sampling = config.sampling
        check_image_space(latents, config.train_diffusion, "train_diffusion")
        check_sampling(config.diffusion, sampling.sampler, sampling.num_inference_steps, eta=sampling.eta)
        self._latents, self._training = latents, config.train_diffusion
        self._ms_spade, self._ms_spade_hash = ms_spade.eval().requires_grad_(False), ms_spade_hash
        self.score, self.higher_is_better = latent_score(latents)
        self._target_like: dict[tuple[str, int, int, int], Tensor] = {}
        self._target_like_bytes = 0
        self._together, self._any_sources = self.config.diffusion.together, self.config.diffusion.any_sources
        if self._any_sources and self.config.pair is not None:
            raise UserError(
                "diffusion.any_sources learns from subsets of all modalities: leave `source` and `target` out, or "
                "diffusion.any_sources"
            )
        self.unet = build_denoiser(self.config, latents.latent_channels)
        self.players = [Player("unet", self.unet, self._training, self._loss)]

    def connect(self, engine: Engine) -> None:
        """Move the frozen MS-SPADE to the engine's device."""
        if next(self._ms_spade.parameters()).device != engine.device:  # the planner's fake tensors cannot be moved
            self._ms_spade.to(engine.device)
        self._std = torch.from_numpy(self._latents.std).to(engine.device)
        self._weights = image_space_weights(self._std) if self._training.image_space_loss else None

    def samples(self, split: str) -> Samples:
        """Pairs of latents; where all targets are predicted together, all of a subject's in training."""
        names, pair = self.config.modalities, self.config.pair
        if self._any_sources and split == "train":
            return LatentSubsets(self._latents, split, names)
        if self._together and split == "train":
            return LatentTargets(self._latents, split, names, pair)
        return LatentPairs(self._latents, split, names, self._training.same_modality_fraction, pair)

    def _loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        if self._any_sources:
            z = model(z_target_like=self._of_sources(batch["z"], batch), given=batch["given"])
            return weighted_mse(z, batch["z"], self._weights_of(batch["wanted"])), {}
        if self._together:
            z = self._refined(model, batch)
            return weighted_mse(z, batch["z_targets"], self._weights_of(batch["wanted"])), {}
        z_target_like = self._z_target_like(batch, batch["target"].tolist())
        drawn = [
            training_loss_inputs(
                self.config.diffusion,
                self.unet.schedule,
                batch["z_target"][i : i + 1],
                z_target_like[i : i + 1],
                generator,
            )
            for i, generator in enumerate(info.generators)
        ]
        z_t, t, wanted = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        prediction = self._predict(model, batch, z_target_like, z_t, t)
        weights = self.unet.loss_weights(t, z_t, self._weights)
        return weighted_mse(prediction, wanted, weights), {}

    def _weights_of(self, wanted: Tensor) -> Tensor:
        """Return the weights, (B, M C), of all modalities' channels, mean 1 over those that are wanted (B, M)."""
        channels = self._latents.latent_channels
        own = torch.ones(channels, device=wanted.device) if self._weights is None else self._weights
        return (wanted / wanted.mean()).repeat_interleave(channels, dim=1) * own.repeat(wanted.shape[1])

    def _predict(self, unet: nn.Module, batch: Batch, z_target_like: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Return what the objective predicts at z_t."""
        given = {name: batch[name] for name in ("z_source", "target", "source")}
        prediction: Tensor = unet(z_t=z_t, t=t, z_target_like=z_target_like, **given)
        return prediction

    def _refined(self, unet: nn.Module, batch: Batch) -> Tensor:
        """Return all modalities, (B, M C, x, y, z), each from its sample's source."""
        z_target_like = self._all_target_like(batch)
        z: Tensor = unet(z_source=batch["z_source"], z_target_like=z_target_like, source=batch["source"])
        return z

    def _all_target_like(self, batch: Batch) -> Tensor:
        """MS-SPADE's outputs for all modalities, (B, M C, x, y, z)."""
        size, number = len(batch["source"]), len(self.config.modalities)
        return torch.cat([self._z_target_like(batch, [target] * size) for target in range(number)], dim=1)

    def _of_sources(self, z: Tensor, batch: Batch) -> Tensor:
        """What each sample's sources say of all modalities, (B, M C, x, y, z), from z (B, M C, x, y, z)."""
        number, found = len(self.config.modalities), []
        keys = zip(batch["subject_id"], batch["sources"], batch["flip"].tolist(), strict=True)
        for one, (subject_id, sources, flip) in zip(z.unflatten(1, (number, -1)), keys, strict=True):
            given = [one[m][None] if m in sources else None for m in range(number)]
            like = partial(self._of_one_source, one, subject_id, flip)
            found.append(target_like_of_sources(given, like, cast(Tensor, self._ms_spade.precision)))
        return torch.cat(found)

    @torch.no_grad()
    def _of_one_source(self, z: Tensor, subject_id: str, flip: int, source: int, target: int) -> Tensor:
        ids = {name: torch.tensor([value], device=z.device) for name, value in (("source", source), ("flip", flip))}
        return self._z_target_like({"z_source": z[source][None], "subject_id": [subject_id], **ids}, [target])

    @torch.no_grad()
    def _z_target_like(self, batch: Batch, targets: list[int]) -> Tensor:
        """MS-SPADE's output for each sample, computed one by one so that it does not depend on the batch around it."""
        found = []
        sources = batch["source"].tolist()
        for i, key in enumerate(zip(batch["subject_id"], sources, targets, batch["flip"].tolist(), strict=True)):
            z = self._target_like.get(key)
            if z is None:
                one = slice(i, i + 1)
                target = torch.full_like(batch["source"][one], targets[i])
                z = self._ms_spade(batch["z_source"][one], target, batch["source"][one]).half().cpu()
                if self._target_like_bytes + z.nbytes <= TARGET_LIKE_CACHE_BYTES:
                    self._target_like[key] = z
                    self._target_like_bytes += z.nbytes
            found.append(z.to(batch["z_source"].device, torch.float32))
        return torch.cat(found)

    def validate(self, modules: Mapping[str, nn.Module], batch: Batch, info: StepInfo) -> Values:
        """The sampled latent's distance from the target's, by the sampler and steps of the configuration."""
        z_target_like = self._z_target_like(batch, batch["target"].tolist())
        if self._any_sources:
            z = of_target(self._from_one_source(modules["unet"], batch), batch["target"], self._latents.latent_channels)
        elif self._together:
            z = of_target(self._refined(modules["unet"], batch), batch["target"], self._latents.latent_channels)
        else:
            z = self._sampled(modules["unet"], batch, z_target_like, info)
        info.shared["panel"] = panel(source=batch["z_source"], prediction=z, target=batch["z_target"])
        values = latent_values(self._latents, self._std, z, batch["z_target"])
        before = latent_values(self._latents, self._std, z_target_like, batch["z_target"])
        return values | {f"ms_spade_{name}": value for name, value in before.items()}

    def _from_one_source(self, unet: nn.Module, batch: Batch) -> Tensor:
        """All modalities, (B, M C, x, y, z), of the batch's pairs, each from its source alone."""
        given = F.one_hot(batch["source"], len(self.config.modalities)).to(batch["z_source"].dtype)
        z = (given[:, :, None, None, None, None] * batch["z_source"][:, None]).flatten(1, 2)
        sources = [[source] for source in batch["source"].tolist()]
        everything: Tensor = unet(z_target_like=self._of_sources(z, {**batch, "sources": sources}), given=given)
        return everything

    def _sampled(self, unet: nn.Module, batch: Batch, z_target_like: Tensor, info: StepInfo) -> Tensor:
        sampling = self.config.sampling
        return sample(
            lambda z_t, t: self._predict(unet, batch, z_target_like, z_t, t),
            config=self.config.diffusion,
            schedule=self.unet.schedule,
            sampler=sampling.sampler,
            num_inference_steps=sampling.num_inference_steps,
            z_start=z_target_like,
            generator=info.generators[0],
            eta=sampling.eta,
        )

    def export(self, weights: Mapping[str, Mapping[str, Tensor]]) -> Export:
        """The U-Net alone."""
        meta = {
            "modalities": list(self.config.modalities),
            "latents": latents_record(self._latents),
            "ms_spade_hash": self._ms_spade_hash,
        }
        return Export("diffusion", self.config, weights["unet"], meta)
