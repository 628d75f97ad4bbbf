"""The kinds of models behind the translator: encode a source once, then predict any target from that.

Tensors are B C X Y Z of RAS+ volumes, intensities in [-1, 1]. Modalities are integer ids in the model's own order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from aldm.baselines.methods import method_network, translate
from aldm.baselines.pairs import on_volume, slice_shape, spatial_dims_of
from aldm.config import Config, SamplingConfig
from aldm.config_baselines import METHODS
from aldm.denoising import (
    build_denoiser,
    build_error_unet,
    build_ms_spade,
    build_regression_unet,
    of_target,
    target_like_of_sources,
)
from aldm.diffusion import NoiseWindow
from aldm.errors import UserError
from aldm.latents import check_statistics, standardise, unstandardise
from aldm.memory import gigabytes, peak_bytes, release_freed_memory, resident_bytes
from aldm.models.codecs import Codec, build_codec
from aldm.models.denoiser import Denoiser
from aldm.models.haar_unet import HaarUNet
from aldm.models.ms_spade import MSSpade
from aldm.models.slabs import decode_bounded, encode_bounded, floor_bytes
from aldm.precision import arithmetic
from aldm.sampling import OnStep, sample

KINDS = ("aldm", "unet", *METHODS)
UNCERTAINTY = "uncertainty"
"""Key of a translator folder's meta that holds the calibration of its error_unet."""
LOADED_LATER_BYTES = 128 * 10**6
"""What comes on top once a loaded model starts to work: libraries of the first convolution, the allocator's reserve."""


@dataclass(frozen=True)
class MemoryLimit:
    """The most that this process may hold in memory, all told."""

    max_bytes: int
    scratch_dir: Path | None = None
    """Folder on a disk for what does not fit; None takes the system's folder for temporary files."""

    def left(self) -> int:
        """Return what may still be allocated, bytes."""
        release_freed_memory()
        return self.max_bytes - resident_bytes()


Sources = tuple[int, ...]


class Predictor(nn.Module):
    """What a kind of model has to do. `config` is the whole configuration, `modalities` named.

    Attributes:
        limit: the memory that it may use on a CPU; None sets no limit.
        error_unet: what says how far off a prediction may be (uncertainty.py); None where it was not trained.
    """

    config: Config
    limit: MemoryLimit | None = None

    def __init__(self) -> None:
        super().__init__()
        self.error_unet: nn.Module | None = None

    @property
    def stride(self) -> int:
        """Voxels of the volume to a step on the grid of its code."""
        return 1

    @property
    def period(self) -> int:
        """Voxels by which a volume has to move for the answer to move with it; a multiple of `stride`.

        A network that halves its grid n times has 2^n: moved by less, it takes other voxels together.
        """
        return self.stride

    def encode(self, x: Tensor) -> Tensor:
        """Return what `predict` starts from, given a source (1, 1, X, Y, Z) in [-1, 1]; B of them make a batch.

        That is the source itself, where a model has no codec.
        """
        return x

    def decode(self, code: Tensor) -> Tensor:
        """Return the volume (1, 1, X, Y, Z) that was encoded, as far as the encoding keeps it."""
        return code

    def predict(
        self,
        code: Tensor,
        sources: Sequence[Sources],
        targets: Sequence[int],
        sampling: SamplingConfig,
        generators: Sequence[torch.Generator | NoiseWindow],
        on_step: OnStep | None,
    ) -> Tensor:
        """Return a prediction (B, 1, X, Y, Z) of each of a batch; the volumes of a batch know nothing of each other.

        Args:
            code: of B samples, each from `join`.
            sources: of each, the ids of its source modalities, ascending.
            targets: of each, the id of the wanted modality.
            sampling, generators, on_step: as in Translator.translate_batch.
        """
        raise NotImplementedError

    def join(self, codes: Mapping[int, Tensor]) -> Tensor:
        """Return what `predict` takes of one sample, given the code of each of its sources: here of the only one."""
        (code,) = codes.values()
        return code

    def error_size(self, prediction: Tensor, codes: Sequence[Mapping[int, Tensor]], targets: Sequence[int]) -> Tensor:
        """Return how large `error_unet` says that the errors are, before any calibration, (B, 1, X, Y, Z) fp32.

        Args:
            prediction: (B, 1, X, Y, Z), what `predict` made.
            codes: of each sample, source id -> what `encode` returned.
            targets: of each, the id of its modality.
        """
        assert self.error_unet is not None, "only asked where there is one"
        given = torch.zeros(len(codes), len(self.config.modalities), device=prediction.device)
        volumes = prediction.new_zeros(*given.shape, *prediction.shape[2:])
        for i, own in enumerate(codes):
            for modality, code in own.items():
                given[i, modality], volumes[i, modality] = 1, self.decode(code)[0, 0]
        with self.autocast():
            log_size: Tensor = self.error_unet(prediction, volumes, given, torch.tensor(targets, device=given.device))
        return log_size.exp()

    def needed_bytes(self) -> int:
        """Return the least memory that a translation needs beyond the weights, bytes.

        Where errors are known, the prediction and the sources, decoded again one after another, are held meanwhile.
        """
        if self.error_unet is None:
            return self.prediction_bytes()
        held = 4 * (2 + len(self.config.modalities)) * math.prod(self.config.preprocess.spatial_shape)
        return max(self.prediction_bytes() + held, peak_bytes(self._one_error_size))

    def prediction_bytes(self) -> int:
        """Return what `predict` alone needs, bytes."""
        raise NotImplementedError

    def _one_error_size(self) -> None:
        """Ask the error network of a volume without values, from as many sources as there can be."""
        shape, number = self.config.preprocess.spatial_shape, len(self.config.modalities)
        x = torch.zeros(1, 1, *shape)
        with self.autocast():
            volumes, given = x.expand(1, number, *shape).clone(), torch.ones(1, number)
            cast(nn.Module, self.error_unet)(x, volumes, given, torch.zeros(1, dtype=torch.long))

    def autocast(self, enabled: bool = True) -> torch.autocast:
        """Return the context that the networks run in: bf16 where the configuration asks for it."""
        return arithmetic(self.config.precision, next(self.parameters()).device, lower=enabled)


class LatentDiffusion(Predictor):
    """The paper's pipeline: codec, MS-SPADE to a target-like latent, denoiser, codec."""

    def __init__(
        self, config: Config, codec: Codec, ms_spade: MSSpade, unet: Denoiser, mean: Tensor, std: Tensor
    ) -> None:
        """Take the trained parts.

        Args:
            config: the whole configuration.
            codec, ms_spade, unet: the three trainings' results.
            mean, std: (C,) of the raw latents of the training set; MS-SPADE and denoiser see standardised latents.
        """
        super().__init__()
        self.config = config
        self.codec, self.ms_spade, self.unet = codec, ms_spade, unet
        # not persistent: the weights are the three networks', the statistics stand in the folder's config.json
        self.register_buffer("mean", mean.float(), persistent=False)
        self.register_buffer("std", std.float(), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @property
    def stride(self) -> int:
        """Voxels of the volume to a step on the grid of its latent."""
        return self.codec.downsampling

    @property
    def period(self) -> int:
        """Voxels of the volume to a step on the coarsest grid of the denoiser."""
        return self.stride * self.unet.stride

    def encode(self, x: Tensor) -> Tensor:
        """Return the standardised source latent (1, C, x, y, z)."""
        with self.autocast(not self.codec.isometric):  # a lossless codec stays lossless
            if self.limit is None:
                z = self.codec.encode(x)
            else:
                z = encode_bounded(self.codec, x, self.limit.left(), self.limit.scratch_dir)
        return standardise(z.float(), self.mean, self.std)

    def decode(self, code: Tensor) -> Tensor:
        """Return the volume (1, 1, X, Y, Z) of a standardised latent."""
        z = unstandardise(code, self.mean, self.std)
        with self.autocast(not self.codec.isometric):
            if self.limit is None:
                return self.codec.decode(z).float()
            return decode_bounded(self.codec, z, self.limit.left(), self.limit.scratch_dir).float()

    def predict(
        self,
        code: Tensor,
        sources: Sequence[Sources],
        targets: Sequence[int],
        sampling: SamplingConfig,
        generators: Sequence[torch.Generator | NoiseWindow],
        on_step: OnStep | None,
    ) -> Tensor:
        """Return one sample of the target, decoded."""
        source_ids = torch.tensor([first for first, *_ in sources], device=code.device)
        target_ids = torch.tensor(list(targets), device=code.device)
        if self.config.diffusion.any_sources:
            z = of_target(self.predict_missing(code, sources), target_ids, self.codec.latent_channels)
            if on_step is not None:
                on_step(1, 1)
        elif self.config.diffusion.together:
            z = of_target(self.predict_all(code, source_ids), target_ids, self.codec.latent_channels)
            if on_step is not None:
                on_step(1, 1)
        else:
            z = self._sample(code, source_ids, target_ids, sampling, generators, on_step)
        if self.limit is None:
            return self.decode(z)
        return torch.cat([self.decode(one[None]) for one in z])  # slab by slab is one volume at a time

    def predict_all(self, code: Tensor, source: Tensor) -> Tensor:
        """Return the latents of all modalities, (B, M C, x, y, z), for sources (B,) int64."""
        targets = [torch.full_like(source, modality) for modality in range(len(self.config.modalities))]
        with self.autocast():
            z_target_like = torch.cat([self.ms_spade(code, target, source).float() for target in targets], dim=1)
            return self.unet.refine_all(z_source=code, z_target_like=z_target_like, source=source).float()

    def join(self, codes: Mapping[int, Tensor]) -> Tensor:
        """Return the code of one sample: with any sources (1, M C, x, y, z), 0 where a modality is not given."""
        if not self.config.diffusion.any_sources:
            return super().join(codes)
        empty = torch.zeros_like(next(iter(codes.values())))
        return torch.cat([codes.get(modality, empty) for modality in range(len(self.config.modalities))], dim=1)

    def predict_missing(self, code: Tensor, sources: Sequence[Sources]) -> Tensor:
        """Return the latents of all modalities, (B, M C, x, y, z), for codes (B, M C, x, y, z) of `join`."""
        number, found = len(self.config.modalities), []
        with self.autocast():
            for one, ids in zip(code.unflatten(1, (number, -1)), sources, strict=True):
                given = [one[m][None] if m in ids else None for m in range(number)]
                found.append(target_like_of_sources(given, partial(self._target_like, one), self.ms_spade.precision))
            marks = torch.tensor([[float(m in ids) for m in range(number)] for ids in sources], device=code.device)
            return self.unet.refine_missing(z_target_like=torch.cat(found), given=marks).float()

    def _target_like(self, z: Tensor, source: int, target: int) -> Tensor:
        """Return what MS-SPADE makes of one modality of (M, C, x, y, z) for another, (1, C, x, y, z)."""
        ids = (torch.tensor([m], device=z.device) for m in (target, source))
        result: Tensor = self.ms_spade(z[source][None], *ids).float()
        return result

    def _sample(
        self,
        code: Tensor,
        source_ids: Tensor,
        target_ids: Tensor,
        sampling: SamplingConfig,
        generators: Sequence[torch.Generator | NoiseWindow],
        on_step: OnStep | None,
    ) -> Tensor:
        """Return one sample of the target's latent."""
        with self.autocast():
            z_target_like = self.ms_spade(code, target_ids, source_ids).float()

        given = {"z_source": code, "z_target_like": z_target_like, "target": target_ids, "source": source_ids}

        def predict(z: Tensor, t: Tensor) -> Tensor:
            with self.autocast():
                return self.unet.denoise(z_t=z, t=t, **given).float()

        return sample(
            predict,
            config=self.config.diffusion,
            schedule=self.unet.schedule,
            sampler=sampling.sampler,
            num_inference_steps=sampling.num_inference_steps,
            z_start=z_target_like,
            generator=generators,
            eta=sampling.eta,
            on_step=on_step,
        )

    def prediction_bytes(self) -> int:
        """Return the larger of what the codec needs slab by slab and what the latent networks need on whole latents."""
        shape = self.config.preprocess.spatial_shape
        sides = [side // self.codec.downsampling for side in shape]

        def one_evaluation() -> None:
            # the sampler holds up to five latents beside the network's own: source, target-like, z, x0 and the last x0
            latents = [torch.zeros(1, self.codec.latent_channels, *sides) for _ in range(5)]
            ids = torch.zeros(1, dtype=torch.long)
            if self.config.diffusion.any_sources:
                number = len(self.config.modalities)
                self.predict_missing(self.join({0: latents[0]}), [tuple(range(max(1, number - 1)))])
                return
            if self.config.diffusion.together:
                self.predict_all(latents[0], ids)
                return
            with self.autocast():
                z, t = self.ms_spade(latents[0], ids, ids), torch.zeros(1)
                given = {"z_source": latents[0], "z_target_like": latents[1], "target": ids, "source": ids}
                self.unet.denoise(z_t=z, t=t, **given)

        return max(floor_bytes(self.codec, shape), peak_bytes(one_evaluation))


class Regression(Predictor):
    """A network that maps the source volume to the target volume in one evaluation: the plain U-Net."""

    def __init__(self, config: Config, unet: HaarUNet) -> None:
        """Take the trained network."""
        super().__init__()
        self.config, self.unet = config, unet

    @property
    def period(self) -> int:
        """Voxels of the volume to a step on the network's coarsest grid."""
        return self.unet.stride

    def predict(
        self,
        code: Tensor,
        sources: Sequence[Sources],
        targets: Sequence[int],
        sampling: SamplingConfig,
        generators: Sequence[torch.Generator | NoiseWindow],
        on_step: OnStep | None,
    ) -> Tensor:
        """Return the prediction; sampling and generators have no say in it."""
        source_ids = torch.tensor([first for first, *_ in sources], device=code.device)
        target_ids = torch.tensor(list(targets), device=code.device)
        with self.autocast():
            result: Tensor = self.unet(code, source_ids, target_ids)
        if on_step is not None:
            on_step(1, 1)
        return result

    def prediction_bytes(self) -> int:
        """Return what the network needs on a whole volume."""
        shape = self.config.preprocess.spatial_shape

        def one_evaluation() -> None:
            ids = torch.zeros(1, dtype=torch.long)
            with self.autocast():
                self.unet(torch.zeros(1, 1, *shape), ids, ids)

        return peak_bytes(one_evaluation)


class PairTranslation(Predictor):
    """A comparison method: one network for one pair, on volumes or on their axial slices."""

    def __init__(self, config: Config, method: str) -> None:
        """Build the network of a method."""
        super().__init__()
        self.config = config
        self.network = method_network(config, method)
        self._spatial_dims, self._plane = spatial_dims_of(method), slice_shape(config)
        assert config.pair is not None, "a comparison method is trained for a pair"
        self._source = config.modalities.index(config.pair[0])

    def predict(
        self,
        code: Tensor,
        sources: Sequence[Sources],
        targets: Sequence[int],
        sampling: SamplingConfig,
        generators: Sequence[torch.Generator | NoiseWindow],
        on_step: OnStep | None,
    ) -> Tensor:
        """Return the prediction, volume by volume; sampling and generators have no say in it."""
        ways = [source != self._source for source, *_ in sources]
        results = [self._one(x[None], reverse) for x, reverse in zip(code, ways, strict=True)]
        if on_step is not None:
            on_step(1, 1)
        return torch.cat(results)

    def prediction_bytes(self) -> int:
        """Return what the network needs on a whole volume."""
        return peak_bytes(lambda: self._one(torch.zeros(1, 1, *self.config.preprocess.spatial_shape), False))

    def _one(self, x: Tensor, reverse: bool) -> Tensor:
        with self.autocast():
            return on_volume(
                lambda part: translate(self.network, part, reverse), x, self._spatial_dims, self._plane
            ).float()


def build_predictor(kind: str, config: Config, meta: Mapping[str, Any]) -> Predictor:
    """Build a predictor with fresh weights; a translator folder's weights load into it strictly.

    Args:
        kind: aldm (weights codec.*, ms_spade.*, unet.*), unet (weights unet.*) or a comparison method (network.*).
        config: the whole configuration, `modalities` named.
        meta: of the folder; aldm reads latents.mean and latents.std, one number per latent channel (UserError: others).
            With an `uncertainty` there are weights error_unet.* as well.
    """
    predictor = _untaught(kind, config, meta)
    if UNCERTAINTY in meta:
        predictor.error_unet = build_error_unet(config)
    return predictor


def _untaught(kind: str, config: Config, meta: Mapping[str, Any]) -> Predictor:
    """Return a predictor that knows nothing of its errors."""
    if kind in METHODS:
        return PairTranslation(config, kind)
    if kind == "unet":
        return Regression(config, build_regression_unet(config))
    assert kind == "aldm", kind
    codec = build_codec(config.codec)
    check_statistics(meta["latents"], codec.latent_channels, "the model's meta", "export it again")
    mean, std = (torch.tensor(meta["latents"][name], dtype=torch.float32) for name in ("mean", "std"))
    ms_spade, unet = build_ms_spade(config, codec.latent_channels), build_denoiser(config, codec.latent_channels)
    return LatentDiffusion(config, codec, ms_spade, unet, mean, std)


def check_limit(predictor: Predictor, limit: MemoryLimit) -> None:
    """Refuse a limit that a translation cannot hold.

    Raises:
        UserError: it is below what the process holds already and the predictor needs; the message says the least.
    """
    held, needed = resident_bytes(), predictor.needed_bytes() + LOADED_LATER_BYTES
    if limit.max_bytes < held + needed:
        raise UserError(
            f"`max_memory_gb` {gigabytes(limit.max_bytes)} is too little for a volume of "
            f"{' x '.join(map(str, predictor.config.preprocess.spatial_shape))} voxels: program and weights hold "
            f"{gigabytes(held)} GB, a translation needs {gigabytes(needed)} GB more; give at least "
            f"{gigabytes(held + needed)}" + ("" if predictor.config.precision == "bf16" else ", or `precision` bf16")
        )
