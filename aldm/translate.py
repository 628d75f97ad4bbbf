"""The translator: a folder written by `aldm export`; a volume in, another modality of it out, on its own grid.

Every kind of model (`aldm`: codec, MS-SPADE, denoiser; `unet`: plain regression; the comparison methods) stands behind
one interface, `Translator.encode` and `Translator.translate_encoded`, which is what the evaluation measures. Arrays are
X Y Z of RAS+ volumes, tensors B C X Y Z, intensities in the models in [-1, 1].
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aldm import __version__
from aldm.calibration import Calibration
from aldm.config import Config, SamplingConfig
from aldm.data.modalities import modality_index, sort_modalities
from aldm.data.overlap import check_not_the_same, check_one_place
from aldm.data.preprocess import PreprocessRecord, count_boxes, prepare_volumes
from aldm.data.volume import Volume, one_grid
from aldm.errors import UserError
from aldm.likeness import NOT_MEASURED, Likeness, Statistics
from aldm.pairs import check_pair, check_sources, pair_is_known
from aldm.predictors import Predictor
from aldm.sampling import OnStep, sample_many
from aldm.sampling_choice import choose_sampling
from aldm.translation import BoxResult, Encoded, Request, Translation, check_room, check_room_to_blend, on_own_grid
from aldm.translator_folder import load_model

NOTICE = "synthetic image, for research use only, not for diagnosis"
INTENSITIES = ("median", "unit")


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
        statistics: Statistics | None = None,
        calibration: Calibration | None = None,
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
            statistics: what tells how unlike the training volumes another one is; None where that was not kept.
            calibration: of the intervals around its translations; None where its errors were not learnt.
            device: where to compute.
        """
        self.predictor, self.config, self.kind, self.model_hash = predictor, config, kind, model_hash
        self.median_percentiles, self.backgrounds = median_percentiles, dict(backgrounds or {})
        self.statistics, self.calibration = statistics, calibration
        self.to(torch.device(device))
        predictor.eval().requires_grad_(False)

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
                data.median_percentiles {modality: [low, high]}, data.backgrounds {modality: value or None}, for kind
                aldm latents.mean and latents.std, where it was measured data.likeness (`Statistics.to_dict`), and where
                the model knows its errors uncertainty (`Calibration.to_dict`).
            device: where to compute.
            sampling, precision: instead of the folder's own; with another sampling its intervals do not hold, and there
                are none.
            max_memory_gb: the most memory that this process may hold, GB (10^9 bytes), on a CPU: codecs then run slab
                by slab, with the same result.
            scratch_dir: folder on a disk for what does not fit; None takes the system's for temporary files.

        Raises:
            UserError: not such a folder, another format version, weights that do not fit the configuration, or a limit
                that a translation cannot hold.
        """
        model = load_model(
            folder, device, sampling=sampling, precision=precision, max_memory_gb=max_memory_gb, scratch_dir=scratch_dir
        )
        return cls(
            model.predictor,
            model.config,
            kind=model.kind,
            median_percentiles=model.median_percentiles,
            backgrounds=model.backgrounds,
            model_hash=model.model_hash,
            statistics=model.statistics,
            calibration=model.calibration,
            device=device,
        )

    def to(self, device: torch.device) -> None:
        """Move the model to a device."""
        self.device = device
        self.predictor.to(device)

    @property
    def takes_several(self) -> bool:
        """Whether it translates from several sources."""
        return self.kind == "aldm" and self.config.diffusion.any_sources

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

    def check_sources(self, sources: Sequence[str], target: str) -> None:
        """Refuse what the model was not trained for: one source as `check_pair`, or several.

        Raises:
            UserError: an unknown modality, another pair than the model's, several sources of a model that takes one,
                or a target that is among them.
        """
        check_sources(self.config, self.kind, sources, target)

    def has_uncertainty(self, sampling: SamplingConfig) -> bool:
        """Whether translations that are sampled so have a calibrated interval: sampled otherwise, errors are others."""
        return self.calibration is not None and sampling == self.sampling()

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
    ) -> BoxResult:
        """Translate model input.

        Args:
            code: what `encode` returned.
            source, target: modalities.
            sampling: what `self.sampling(...)` returned; None takes the model's own.
            seed: of the first sample; sample i has seed + i.
            on_step: called as on_step(done, total) after each network evaluation; what it raises goes through.

        Returns:
            what was made, (spatial_shape).

        Raises:
            UserError: a modality that the model does not know.
        """
        request = Request({source: code}, target, seed)
        return self.translate_batch([request], sampling=sampling, on_step=on_step)[0]

    @torch.inference_mode()
    def translate_batch(
        self, requests: Sequence[Request], *, sampling: SamplingConfig | None = None, on_step: OnStep | None = None
    ) -> list[BoxResult]:
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
            self.check_sources(tuple(request.codes), request.target)
        codes = [
            {modality_index(name, self.modalities): code for name, code in request.codes.items()}
            for request in requests
        ]
        sources = [tuple(sorted(one)) for one in codes]
        targets = [modality_index(request.target, self.modalities) for request in requests]
        code = torch.cat([self.predictor.join(one) for one in codes])
        chosen = self.sampling() if sampling is None else sampling
        finished = 0  # samples

        def report(done: int, total: int) -> None:
            if on_step is not None:
                on_step(finished * total + done, chosen.num_samples * total)

        def draw(generators: Sequence[torch.Generator]) -> Tensor:
            nonlocal finished
            noise = [request.noise(generator) for request, generator in zip(requests, generators, strict=True)]
            result = self.predictor.predict(code, sources, targets, chosen, noise, report)
            finished += 1
            return result.clamp(-1, 1)

        mean, std = sample_many(draw, chosen.num_samples, [request.seed for request in requests])
        parts = [mean, std, self._half_width(mean, codes, targets, chosen)]
        arrays = [[None] * len(requests) if part is None else part[:, 0].cpu().numpy() for part in parts]
        return [BoxResult(*one) for one in zip(*arrays, strict=True)]

    def _half_width(
        self, mean: Tensor, codes: Sequence[Mapping[int, Tensor]], targets: Sequence[int], chosen: SamplingConfig
    ) -> Tensor | None:
        """Return half of the interval around each mean; None where the calibration does not hold for it."""
        if self.calibration is None or not self.has_uncertainty(chosen):
            return None
        names = [self.modalities[target] for target in targets]
        factors = [self.calibration.factor(name, len(own)) for name, own in zip(names, codes, strict=True)]
        size = self.predictor.error_size(mean, codes, targets)
        return size * size.new_tensor(factors).view(-1, 1, 1, 1, 1)

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
        others: Mapping[str, Volume] | None = None,
        on_step: OnStep | None = None,
    ) -> Translation:
        """Translate a volume into one modality; the result lies on the volume's own grid.

        Args:
            volume: RAS+, any spacing, any units.
            source, target: modalities.
            sampler, num_inference_steps, num_samples, eta: as in `sampling`.
            seed, intensity, others, on_step: as in `translate_each`.

        Raises:
            UserError: what `sampling` and `translate_each` refuse.
        """
        chosen = self.sampling(sampler, num_inference_steps, num_samples, eta)
        results = self.translate_each(
            volume, source, [target], sampling=chosen, seed=seed, intensity=intensity, others=others, on_step=on_step
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
        others: Mapping[str, Volume] | None = None,
        on_step: OnStep | None = None,
    ) -> Iterator[Translation]:
        """Translate a volume into one modality after another; the source is encoded once for all.

        Args:
            volume: RAS+, any spacing, any units.
            source: its modality.
            targets: the wanted modalities.
            sampling, seed: as in `translate_encoded`.
            intensity: median scales the result to the training set's median percentiles of the target; unit to [0, 1].
            others: modality -> another volume of the same head, for a model that takes any sources. They are brought to
                the first volume's grid by their affines; where all have one grid their order does not matter to the
                bit.
            on_step: as in `translate_encoded`; it counts the boxes of one target.

        Raises:
            UserError: an unknown modality or intensity, a volume without contrast, or several sources of a model that
                takes one.
        """
        if intensity not in INTENSITIES:
            raise UserError(f"intensity is {intensity!r}, wanted one of: {', '.join(INTENSITIES)}")
        volumes = {source: volume, **(others or {})}
        for target in targets:
            self.check_sources(tuple(volumes), target)
        chosen = self.sampling() if sampling is None else sampling
        encoded = self.prepare(volumes)
        volume = volumes[next(iter(encoded.codes[0]))]  # the one that the record is of
        for target in targets:
            requests = encoded.requests(target, seed)
            results: list[BoxResult] = []

            def report(done: int, total: int, made: Sequence[BoxResult] = results) -> None:
                if on_step is not None:
                    on_step(len(made) * total + done, len(encoded.codes) * total)

            for request in requests:
                results += self.translate_batch([request], sampling=chosen, on_step=report)
            yield self.finished(results, requests[0], volume, encoded.record, chosen, intensity)

    @property
    def box_step(self) -> int:
        """Voxels that a volume's boxes differ by multiples of: the networks' period, where a box holds two of it."""
        period = self.predictor.period
        return period if 2 * period <= min(self.config.preprocess.spatial_shape) else self.predictor.stride

    def count_boxes(self, volume: Volume) -> int:
        """Return how many boxes a translation of the volume takes.

        Raises:
            UserError: as `prepare`.
        """
        return count_boxes(volume, self.config.preprocess, stride=self.box_step)

    def prepare(self, volumes: Mapping[str, Volume], *, max_boxes: int | None = None) -> Encoded:
        """Return the volumes of one head, encoded box by box.

        Args:
            volumes: source modality -> volume; the grid is the first one's. Volumes that have one grid are taken in the
                vocabulary's order.
            max_boxes: refuse volumes that take more; None sets no limit.

        Raises:
            UserError: a volume without contrast, that takes more than `max_boxes`, or too large for the memory limit;
                volumes that do not lie on each other, or two that are the same.
        """
        predictor, config = self.predictor, self.config.preprocess
        names = sort_modalities(volumes) if one_grid(volumes.values()) else tuple(volumes)
        found = [volumes[name] for name in names]
        check_one_place(volumes)
        check_not_the_same(volumes)
        if predictor.limit is not None:
            check_room(found, config, predictor.limit)
        boxes, record = prepare_volumes(found, config, stride=self.box_step, max_boxes=max_boxes)
        if predictor.limit is not None and len(record.boxes) > 1:
            check_room_to_blend(record, config.spatial_shape, len(names), predictor.needed_bytes(), predictor.limit)
        codes = tuple(
            {name: self.encode(x) for name, x in zip(names, parts, strict=True)} for parts in zip(*boxes, strict=True)
        )
        return Encoded(codes, record, config.spatial_shape, predictor.stride)

    def likeness(self, record: PreprocessRecord, sources: Sequence[str]) -> Likeness | None:
        """Return how unlike the training data prepared volumes are: that of the one that is most; None: cannot tell.

        Args:
            record: of what `prepare` returned.
            sources: their modalities, in the order of its codes.
        """
        if self.statistics is None:
            return None
        found = [self.statistics.measure(row, name) for row, name in zip(record.features, sources, strict=True)]
        return max((one for one in found if one is not None), key=lambda one: one.distance, default=None)

    def finished(
        self,
        results: Sequence[BoxResult],
        request: Request,
        volume: Volume,
        record: PreprocessRecord,
        sampling: SamplingConfig,
        intensity: str = "median",
    ) -> Translation:
        """Return the results of `translate_batch` for all boxes as one, on the grid of the volume they were cut from.

        What boxes that overlap say beside their means is the weighted mean of theirs: see `on_own_grid`.

        Args:
            results: of `requests`, in their order.
            request: any of these.
            volume: what `prepare` was given.
            record: of what it returned.
            sampling, intensity: as in `translate_each`.
        """
        target = request.target
        low, high = self.median_percentiles[target] if intensity == "median" else (0.0, 1.0)
        background = self.backgrounds.get(target) if intensity == "median" else None
        background = low if background is None else background
        data, spread, half_width = on_own_grid(results, record, volume, low, high, background)
        made: dict[str, Any] = {
            "synthetic": True,
            "notice": NOTICE,
            "software": f"aldm {__version__}",
            "model_kind": self.kind,
            "model_hash": self.model_hash,
            "preset": self.config.preset,
            "source": request.source,
            "target": target,
        }
        if self.kind == "aldm":
            made |= {**asdict(sampling), "seed": request.seed}
        made |= {"intensity": intensity, "intensity_range": [low, high]}
        made |= {"num_boxes": len(record.boxes), "share_outside": record.share_outside}
        if half_width is not None and self.calibration is not None:
            made["uncertainty_level"] = self.calibration.level
        likeness = self.likeness(record, tuple(request.codes))
        made["likeness"] = NOT_MEASURED if likeness is None else asdict(likeness)
        if volume.num_nan:
            made["nan_background_voxels"] = volume.num_nan
        if record.bias is not None:
            made["bias_correction"] = "n4, multiplied back"
        if record.background is not None:
            made["background"] = background
        return Translation(Volume(data, volume.affine), half_width, spread, made)
