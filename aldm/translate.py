"""The translator: a folder written by `aldm export`; a volume in, another modality of it out, on its own grid.

Every kind of model (`aldm`: codec, MS-SPADE, denoiser; `unet`: plain regression; the comparison methods) stands behind
one interface, `Translator.encode` and `Translator.translate_encoded`, which is what the evaluation measures. Arrays are
X Y Z of RAS+ volumes, tensors B C X Y Z, intensities in the models in [-1, 1].
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aldm import __version__
from aldm.checkpoint import Checkpoint, load_checkpoint, load_weights
from aldm.config import Config, SamplingConfig
from aldm.data.bias import shaded
from aldm.data.foreground import constant_background
from aldm.data.intensity import unscale
from aldm.data.modalities import modality_index
from aldm.data.preprocess import PreprocessRecord, model_grid, prepare_volume, restore
from aldm.data.volume import Volume
from aldm.errors import UserError
from aldm.memory import gigabytes
from aldm.pairs import check_pair, pair_is_known
from aldm.predictors import KINDS, MemoryLimit, Predictor, build_predictor, check_limit
from aldm.records import Kinds
from aldm.sampling import OnStep, check_sampling, sample_many

NOTICE = "synthetic image, for research use only, not for diagnosis"
META: Mapping[str, Kinds] = {"aldm": {"latents.mean": list, "latents.std": list, "data": dict}, "unet": {"data": dict}}
"""What the meta of a translator folder of each kind holds, to be read here."""
INTENSITIES = ("median", "unit")
BRIDGE_STEPS_FOR_SAMPLES = 4
"""Steps of a bridge whose configuration has one step, when several samples are asked for: one step has one answer."""
PREPARATION_BYTES = 24
"""Memory of putting a volume on the model's grid and back, per voxel of the larger grid (measured: 13 to 22)."""
OTHER_SAMPLER_STEPS = 10
"""Steps of a sampler that is not the configured one."""


@dataclass(frozen=True, eq=False)
class Translation:
    """A translated volume on the grid of the volume that it was made from."""

    volume: Volume
    """float32, scaled as `intensity` in the provenance says."""
    uncertainty: np.ndarray | None
    """Voxelwise standard deviation of the samples in the volume's own units (X, Y, Z) float32; None for one sample."""
    provenance: dict[str, Any]
    """How it was made: JSON-able."""


def choose_sampling(
    config: Config,
    kind: str,
    sampler: str | None = None,
    num_inference_steps: int | None = None,
    num_samples: int | None = None,
    eta: float | None = None,
) -> SamplingConfig:
    """Return how a model samples, the unsaid filled in: its own sampler, and numbers that suit the sampler.

    Raises:
        UserError: a sampler or number that the model's objective cannot be integrated with.
    """
    base, diffusion = config.sampling, config.diffusion
    samples = base.num_samples if num_samples is None else num_samples
    if kind != "aldm":
        if samples != 1 or sampler is not None or num_inference_steps not in (None, 1) or eta:
            raise UserError(
                f"a {kind} model has one answer and no sampler: leave out `sampler`, `num_inference_steps`, "
                "`num_samples` and `eta`"
            )
        return replace(base, num_inference_steps=1, num_samples=1, eta=0.0)
    name = base.sampler if sampler is None else sampler
    spread = samples > 1 and diffusion.objective == "bridge"
    if num_inference_steps is not None:
        steps = num_inference_steps
    elif name == "one-step":
        steps = 1
    elif spread:
        steps = max(base.num_inference_steps, BRIDGE_STEPS_FOR_SAMPLES)
    elif name == base.sampler:
        steps = base.num_inference_steps
    else:
        steps = diffusion.num_train_timesteps if name == "ddpm" else OTHER_SAMPLER_STEPS
    if eta is None:
        eta = base.eta if base.eta > 0 or not spread else 1.0
    check_sampling(diffusion, name, steps, samples, eta)
    return SamplingConfig(sampler=name, num_inference_steps=steps, num_samples=samples, eta=eta)


def _percentiles(checkpoint: Checkpoint) -> dict[str, tuple[float, float]]:
    """Return the training set's median percentiles of every modality of the model."""
    found = {}
    for name in checkpoint.config.modalities:
        key = f"data.median_percentiles.{name}"
        checkpoint.check_meta({key: list})
        pair = checkpoint.meta["data"]["median_percentiles"][name]
        if len(pair) != 2 or not all(isinstance(value, int | float) for value in pair):
            raise UserError(f"{checkpoint.path} is damaged: {key} is {pair!r:.60}, wanted two numbers; export it again")
        found[name] = float(pair[0]), float(pair[1])
    return found


@dataclass(frozen=True, eq=False)
class Request:
    """One of a batch for `Translator.translate_batch`."""

    code: Tensor
    """What `Translator.encode` returned."""
    source: str
    target: str
    seed: int
    """Of the first sample; sample i has seed + i."""


class Translator:
    """A trained model, ready to translate volumes from any of its modalities into any other."""

    def __init__(
        self,
        predictor: Predictor,
        config: Config,
        *,
        kind: str,
        median_percentiles: dict[str, tuple[float, float]],
        backgrounds: Mapping[str, float | None] | None = None,
        model_hash: str,
        device: torch.device | str = "cpu",
    ) -> None:
        """Take a trained predictor and what it has to know about its training set.

        Args:
            predictor: moved to `device` and put into evaluation mode here.
            config: the whole configuration; `modalities` must be named.
            kind: aldm, unet or a comparison method.
            median_percentiles: modality -> the training set's median lower and upper percentile, in its own units.
            backgrounds: modality -> background of the training set's masked volumes, None where they are not masked.
            model_hash: identifies the weights.
            device: where to compute.
        """
        self.predictor, self.config, self.kind, self.model_hash = predictor, config, kind, model_hash
        self.median_percentiles, self.backgrounds = median_percentiles, dict(backgrounds or {})
        self.device = torch.device(device)
        predictor.to(self.device).eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        *,
        sampling: SamplingConfig | None = None,
        precision: str | None = None,
        max_memory_gb: float | None = None,
        scratch_dir: Path | None = None,
    ) -> "Translator":
        """Read a translator folder; nothing else is needed.

        Args:
            folder: written by `aldm export`: weights.safetensors, and config.json whose `meta` holds
                data.median_percentiles {modality: [low, high]}, data.backgrounds {modality: value or None} and, for
                kind aldm, latents.mean and latents.std.
            device: where to compute.
            sampling, precision: instead of the folder's own.
            max_memory_gb: the most memory that this process may hold, GB (10^9 bytes), on a CPU: codecs then run slab
                by slab, with the same result.
            scratch_dir: folder on a disk for what does not fit; None takes the system's for temporary files.

        Raises:
            UserError: not such a folder, another format version, weights that do not fit the configuration, or a limit
                that a translation cannot hold.
        """
        checkpoint = load_checkpoint(folder, *KINDS)
        config = checkpoint.config
        if sampling is not None:
            config = replace(config, sampling=sampling)
        if precision is not None:
            config = replace(config, precision=precision)
        checkpoint.check_meta(META["aldm" if checkpoint.kind == "aldm" else "unet"])
        predictor = build_predictor(checkpoint.kind, config, checkpoint.meta)
        load_weights(predictor, checkpoint.weights, folder)
        percentiles = _percentiles(checkpoint)
        checkpoint.check_meta({"data.backgrounds": dict})
        backgrounds = checkpoint.meta["data"]["backgrounds"]
        model_hash = checkpoint.hash
        kind = checkpoint.kind
        del checkpoint  # its copy of the weights
        if max_memory_gb is not None:
            if torch.device(device).type != "cpu":
                raise UserError(
                    "`max_memory_gb` bounds the memory of a CPU: leave it out on a GPU, or give `device` cpu"
                )
            predictor.limit = MemoryLimit(int(max_memory_gb * 1e9), scratch_dir)
            check_limit(predictor, predictor.limit)
        return cls(
            predictor,
            config,
            kind=kind,
            median_percentiles=percentiles,
            backgrounds=backgrounds,
            model_hash=model_hash,
            device=device,
        )

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that the model knows, in the order of their ids."""
        return self.config.modalities

    def translates(self, source: str, target: str) -> bool:
        """Whether the model was trained to translate one modality into another."""
        return pair_is_known(self.config, self.kind, source, target)

    def check_pair(self, source: str, target: str) -> None:
        """Refuse what the model was not trained for.

        Raises:
            UserError: an unknown modality, or another pair than the model's.
        """
        check_pair(self.config, self.kind, source, target)

    def sampling(
        self,
        sampler: str | None = None,
        num_inference_steps: int | None = None,
        num_samples: int | None = None,
        eta: float | None = None,
    ) -> SamplingConfig:
        """Return how to sample, the unsaid filled in: the model's own sampler, and numbers that suit the sampler.

        Raises:
            UserError: a sampler or number that the model's objective cannot be integrated with.
        """
        return choose_sampling(self.config, self.kind, sampler, num_inference_steps, num_samples, eta)

    @torch.inference_mode()
    def encode(self, x: np.ndarray) -> Tensor:
        """Return the encoded source, which any number of `translate_encoded` can start from.

        Args:
            x: (spatial_shape) in [-1, 1].

        Raises:
            UserError: a shape that is not the model's.
        """
        if x.shape != self.config.preprocess.spatial_shape:
            raise UserError(f"the array has shape {x.shape}, wanted the model's {self.config.preprocess.spatial_shape}")
        volume = torch.from_numpy(np.ascontiguousarray(x, np.float32))[None, None]
        return self.predictor.encode(volume.to(self.device))

    @torch.inference_mode()
    def reconstruct(self, x: np.ndarray) -> np.ndarray:
        """Return what is left of a volume, (spatial_shape) in [-1, 1], after encoding and decoding it."""
        code = self.encode(x)
        return self.predictor.decode(code).clamp(-1, 1)[0, 0].cpu().numpy()

    @torch.inference_mode()
    def translate_encoded(
        self,
        code: Tensor,
        source: str,
        target: str,
        *,
        sampling: SamplingConfig | None = None,
        seed: int = 0,
        on_step: OnStep | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Translate model input.

        Args:
            code: what `encode` returned.
            source, target: modalities.
            sampling: what `self.sampling(...)` returned; None takes the model's own.
            seed: of the first sample; sample i has seed + i.
            on_step: called as on_step(done, total) after each network evaluation; what it raises goes through.

        Returns:
            mean of the samples in [-1, 1] and their standard deviation (None for one sample), (spatial_shape) float32.

        Raises:
            UserError: a modality that the model does not know.
        """
        request = Request(code, source, target, seed)
        return self.translate_batch([request], sampling=sampling, on_step=on_step)[0]

    @torch.inference_mode()
    def translate_batch(
        self, requests: Sequence[Request], *, sampling: SamplingConfig | None = None, on_step: OnStep | None = None
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Translate several encoded sources in one pass of the networks; each as if it were alone.

        Args:
            requests: any sources, targets and seeds.
            sampling: of all, what `self.sampling(...)` returned; None takes the model's own.
            on_step: called as on_step(done, total) after each network evaluation; what it raises goes through.

        Returns:
            for each request, in order, what `translate_encoded` returns.

        Raises:
            UserError: a modality that the model does not know.
        """
        for request in requests:
            self.check_pair(request.source, request.target)
        sources = [modality_index(request.source, self.modalities) for request in requests]
        targets = [modality_index(request.target, self.modalities) for request in requests]
        code = torch.cat([request.code for request in requests])
        chosen = self.sampling() if sampling is None else sampling
        finished = 0  # samples

        def report(done: int, total: int) -> None:
            if on_step is not None:
                on_step(finished * total + done, chosen.num_samples * total)

        def draw(generators: Sequence[torch.Generator]) -> Tensor:
            nonlocal finished
            result = self.predictor.predict(code, sources, targets, chosen, generators, report)
            finished += 1
            return result.clamp(-1, 1)

        mean, std = sample_many(draw, chosen.num_samples, [request.seed for request in requests])
        means = mean[:, 0].cpu().numpy()
        if std is None:
            return [(one, None) for one in means]
        return list(zip(means, std[:, 0].cpu().numpy(), strict=True))

    def translate(
        self,
        volume: Volume,
        source: str,
        target: str,
        *,
        sampler: str | None = None,
        num_inference_steps: int | None = None,
        num_samples: int | None = None,
        eta: float | None = None,
        seed: int = 0,
        intensity: str = "median",
        on_step: OnStep | None = None,
    ) -> Translation:
        """Translate a volume into one modality; the result lies on the volume's own grid.

        Args:
            volume: RAS+, any spacing, any units.
            source, target: modalities.
            sampler, num_inference_steps, num_samples, eta: as in `sampling`.
            seed, intensity, on_step: as in `translate_each`.

        Raises:
            UserError: what `sampling` and `translate_each` refuse.
        """
        chosen = self.sampling(sampler, num_inference_steps, num_samples, eta)
        results = self.translate_each(
            volume, source, [target], sampling=chosen, seed=seed, intensity=intensity, on_step=on_step
        )
        return next(results)

    def translate_each(
        self,
        volume: Volume,
        source: str,
        targets: Sequence[str],
        *,
        sampling: SamplingConfig | None = None,
        seed: int = 0,
        intensity: str = "median",
        on_step: OnStep | None = None,
    ) -> Iterator[Translation]:
        """Translate a volume into one modality after another; the source is encoded once for all.

        Args:
            volume: RAS+, any spacing, any units.
            source: its modality.
            targets: the wanted modalities.
            sampling, seed: as in `translate_encoded`.
            intensity: median scales the result to the training set's median percentiles of the target; unit to [0, 1].
            on_step: as in `translate_encoded`; it counts one target.

        Raises:
            UserError: an unknown modality or intensity, or a volume without contrast.
        """
        if intensity not in INTENSITIES:
            raise UserError(f"intensity is {intensity!r}, wanted one of: {', '.join(INTENSITIES)}")
        for target in targets:
            self.check_pair(source, target)
        chosen = self.sampling() if sampling is None else sampling
        prepared, record = self.prepare(volume)
        for target in targets:
            request = Request(prepared, source, target, seed)
            (result,) = self.translate_batch([request], sampling=chosen, on_step=on_step)
            yield self.finished(result, request, volume, record, chosen, intensity)

    def prepare(self, volume: Volume) -> tuple[Tensor, PreprocessRecord]:
        """Return the encoded volume and the record that `finished` puts a result back with.

        Raises:
            UserError: a volume without contrast, or too large for the memory limit.
        """
        if self.predictor.limit is not None:
            self._check_room(volume, self.predictor.limit)
        x, record = prepare_volume(volume, self.config.preprocess)
        return self.encode(x), record

    def finished(
        self,
        result: tuple[np.ndarray, np.ndarray | None],
        request: Request,
        volume: Volume,
        record: PreprocessRecord,
        sampling: SamplingConfig,
        intensity: str = "median",
    ) -> Translation:
        """Return a result of `translate_batch` on the grid of the volume that `prepare` was given."""
        mean, std = result
        target = request.target
        low, high = self.median_percentiles[target] if intensity == "median" else (0.0, 1.0)
        # outside the model's box nothing was predicted: background
        data = restore(unscale(mean, low, high), record, volume, fill=low)
        spread = None if std is None else restore(std * ((high - low) / 2), record, volume, fill=0.0)
        made = self.provenance(request.source, target, sampling, request.seed)
        made |= {"intensity": intensity, "intensity_range": [low, high]}
        if volume.num_nan:
            made["nan_background_voxels"] = volume.num_nan
        if record.bias is not None:  # the shading that was taken from the source is the result's too
            data = shaded(data, volume.affine, record.bias, min(0.0, low))
            spread = None if spread is None else shaded(spread, volume.affine, record.bias, 0.0)
            made["bias_correction"] = "n4, multiplied back"
        outside = None if record.background is None else constant_background(volume.data)
        if outside is not None:  # a masked volume's result is masked alike
            background = self.backgrounds.get(target)
            made["background"] = low if background is None or intensity == "unit" else background
            data[outside] = made["background"]
            if spread is not None:
                spread[outside] = 0.0
        return Translation(Volume(data, volume.affine), spread, made)

    def _check_room(self, volume: Volume, limit: MemoryLimit) -> None:
        """Refuse a volume whose preparation would break the limit."""
        _, grid = model_grid([volume], self.config.preprocess)
        voxels = max(volume.data.size, math.prod(grid))
        needed, left = PREPARATION_BYTES * voxels, limit.left()
        if needed > left:
            raise UserError(
                f"`max_memory_gb` {gigabytes(limit.max_bytes)} is too little to prepare {voxels:,} voxels: that needs "
                f"{gigabytes(needed)} GB and {gigabytes(left)} GB are left; give at least "
                f"{gigabytes(limit.max_bytes + needed - left)}"
            )

    def provenance(self, source: str, target: str, sampling: SamplingConfig, seed: int) -> dict[str, Any]:
        """Return how a result of these choices is made, as JSON-able values."""
        values: dict[str, Any] = {
            "synthetic": True,
            "notice": NOTICE,
            "software": f"aldm {__version__}",
            "model_kind": self.kind,
            "model_hash": self.model_hash,
            "preset": self.config.preset,
            "source": source,
            "target": target,
        }
        if self.kind == "aldm":
            values |= {
                "sampler": sampling.sampler,
                "num_inference_steps": sampling.num_inference_steps,
                "num_samples": sampling.num_samples,
                "eta": sampling.eta,
                "seed": seed,
            }
        return values
