"""How far off a translation may be: the training of the network that says so, and its calibration.

A trained model is taken as it is. The network sees what it made of which sources, and learns the standard deviation of
its error at every voxel, by the likelihood of a Gaussian (Nix & Weigend 1994; Kendall & Gal 2017, eq. 5). Then one
factor for each target and number of sources is fitted on the validation subjects (calibration.py). Volumes are
B C X Y Z in [-1, 1].
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np
import torch
from torch import Tensor, nn

from aldm.calibration import Calibration, RatioCounts
from aldm.config import Config
from aldm.data.store import SubjectRecord, VolumeStore
from aldm.data.volume_subsets import VolumeSubsets
from aldm.denoising import build_error_unet, of_target
from aldm.errors import UserError
from aldm.latents import data_record
from aldm.players import Batch, Engine, Export, Player, StepInfo, Values
from aldm.progress import progress
from aldm.stage_data import panel
from aldm.subsets import several
from aldm.translate import Translator
from aldm.translation import Request

OUTSIDE = 0.05
"""Weight of a voxel outside the mask beside one inside."""
LESION = 3.0
"""What the voxels of a lesion weigh together beside all of the mask."""
MOST_OF_LESION = 150.0
"""The most that one voxel of a lesion weighs."""

OWN_SECTIONS = ("error_unet", "train_uncertainty", "seed", "precision", "activation_checkpointing")
"""What of a configuration is the training's own; the rest is the model's."""


class FrozenModel:
    """A trained model whose errors are to be learnt: what it makes of a batch.

    Attributes:
        config, model_hash: of the translator.
        takes_several: whether it translates from several sources.
    """

    def __init__(self, translator: Translator) -> None:
        self._translator = translator
        translator.calibration = None  # of errors that it knows already, where it does, nothing is asked
        self.config, self.model_hash = translator.config, translator.model_hash
        self.takes_several = translator.takes_several

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        self._translator.to(device)

    def translates(self, source: str, target: str) -> bool:
        """Whether the model was trained to translate one modality into another."""
        return self._translator.translates(source, target)

    @torch.no_grad()
    def predict(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Return what the model makes of the given volumes, sampled as it is by default, and what it keeps of these.

        Returns:
            prediction: (B, 1, X, Y, Z).
            kept: (B, M, X, Y, Z), the given volumes through the model's codec, as `Predictor.error_size` shows them.
        """
        names, kept = self.config.modalities, torch.zeros_like(batch["volumes"])
        requests = []
        for i, (given, target, generator) in enumerate(
            zip(batch["given"], batch["target"].tolist(), generators, strict=True)
        ):
            codes = {}
            for m in given.nonzero()[:, 0].tolist():
                codes[names[m]] = self._translator.encode(batch["volumes"][i, m].cpu().numpy())
                kept[i, m] = self._translator.predictor.decode(codes[names[m]])[0, 0]
            requests.append(Request(codes, names[target], int(torch.randint(2**31, (), generator=generator))))
        results = self._translator.translate_batch(requests)
        return torch.stack([torch.from_numpy(result.mean) for result in results])[:, None].to(kept.device), kept


def negative_log_likelihood(error: Tensor, log_size: Tensor) -> Tensor:
    """Return that of every voxel's error under a Gaussian of standard deviation exp(log_size), but for a constant.

    Args:
        error: of either sign.
        log_size: of the same shape.
    """
    return log_size + error.square() * torch.exp(-2 * log_size) / 2


def voxel_weights(mask: Tensor, lesion: Tensor) -> Tensor:
    """Return what a voxel counts in the loss, fp32 of the masks' shape: lesions are small, and the errors there matter.

    Args:
        mask, lesion: (B, 1, X, Y, Z) bool; where there is no lesion the mask alone counts.
    """
    inside = torch.where(mask, 1.0, OUTSIDE)
    in_mask, in_lesion = (part.sum(dim=(1, 2, 3, 4), keepdim=True) for part in (mask, lesion))
    ratio = in_mask / in_lesion.clamp_min(1)
    return inside + lesion * (LESION * ratio).clamp_max(MOST_OF_LESION)


class UncertaintyStage:
    """The size of a trained model's errors.

    Loss: the negative log-likelihood of the error, a mean over the voxels weighted by `voxel_weights`. What the model
    makes of a sample is recomputed every time.

    Args:
        config: error_unet and train_uncertainty; the rest is the model's.
        store: prepared volumes.
        model: what is trained already.

    Raises:
        UserError: the store was prepared otherwise than the model's, or lacks its modalities.
    """

    name = "uncertainty"
    score = "nll"
    higher_is_better = False

    def __init__(self, config: Config, store: VolumeStore, model: FrozenModel) -> None:
        check_store(store, model.config)
        own = {name: getattr(config, name) for name in OWN_SECTIONS}
        self.config = replace(model.config, **own)
        self._store, self._model = store, model
        self.error_unet = build_error_unet(self.config)
        self.players = [Player("error_unet", self.error_unet, config.train_uncertainty, self._loss)]

    def connect(self, engine: Engine) -> None:
        """Move the frozen model to the engine's device."""
        self._model.to(engine.device)

    def samples(self, split: str) -> VolumeSubsets:
        """Subjects' volumes, some of them given, one wanted."""
        model = self._model
        return VolumeSubsets(self._store, split, self.config.modalities, model.translates, model.takes_several)

    def _loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        error, log_size = self._error_and_size(model, batch, info.generators)
        loss = _mean(negative_log_likelihood(error, log_size), voxel_weights(batch["mask"], batch["lesion"]))
        return loss, {"error_ratio": _error_ratio(error, log_size, batch["mask"])}

    def _error_and_size(
        self, model: nn.Module, batch: Batch, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Return the error of the frozen model and the logarithm of its size as the network says it."""
        prediction, kept = self._model.predict(batch, generators)
        truth = of_target(batch["volumes"], batch["target"], 1)
        log_size = model(prediction, kept, batch["given"], batch["target"])
        return prediction - truth, log_size

    def validate(self, modules: Mapping[str, nn.Module], batch: Batch, info: StepInfo) -> Values:
        """The loss inside the mask, and RMS error by RMS size there."""
        error, log_size = self._error_and_size(modules["error_unet"], batch, info.generators)
        info.shared["panel"] = panel(error=error.abs(), size=log_size.exp())
        return {
            "nll": _mean(negative_log_likelihood(error, log_size), batch["mask"]),
            "error_ratio": _error_ratio(error, log_size, batch["mask"]),
        }

    def export(self, weights: Mapping[str, Mapping[str, Tensor]]) -> Export:
        """The network, and which model's errors it knows."""
        meta = {
            "modalities": list(self.config.modalities),
            "data": data_record(self._store, self.config.modalities),
            "model_hash": self._model.model_hash,
        }
        return Export("uncertainty", self.config, weights["error_unet"], meta)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean over all voxels."""
    return (values * weights).sum() / weights.sum()


def _error_ratio(error: Tensor, log_size: Tensor, mask: Tensor) -> Tensor:
    """Return the RMS error by the RMS size inside a mask: 1 where the network is right in the mean."""
    return (_mean(error.square(), mask) / _mean((2 * log_size).exp(), mask)).sqrt()


def check_store(store: VolumeStore, config: Config) -> None:
    """Refuse volumes that a model cannot be measured on.

    Raises:
        UserError: they were prepared otherwise than the model's, or there are fewer than two of its modalities.
    """
    if store.preprocess != config.preprocess:
        raise UserError(
            f"the store {store.path} was prepared with {store.preprocess}, the model was trained with "
            f"{config.preprocess}: prepare the data with the model's preprocessing"
        )
    shared = [name for name in config.modalities if name in store.modalities]
    if len(shared) < 2:
        raise UserError(
            f"the store {store.path} ({', '.join(store.modalities)}) and the model ({', '.join(config.modalities)}) "
            "share fewer than two modalities"
        )


def calibrate(translator: Translator, error_unet: nn.Module, store: VolumeStore) -> Calibration:
    """Give a translator the network that knows its errors, and fit its factors on the validation subjects.

    Args:
        translator: whose errors they are; `error_unet` and the calibration are set.
        error_unet: trained.
        store: whose validation split is measured: every source, or subset of sources, into every target.

    Raises:
        UserError: no validation subject with anything that the model translates, or a store of another preprocessing.
    """
    check_store(store, translator.config)
    translator.predictor.error_unet = error_unet.to(translator.device).eval().requires_grad_(False)
    translator.calibration = Calibration(dict.fromkeys(translator.modalities, (1.0,)), 0)
    subjects = store.subjects("validation")
    counts: dict[tuple[str, int], RatioCounts] = defaultdict(RatioCounts)
    lesions: dict[tuple[str, int], RatioCounts] = defaultdict(RatioCounts)
    for subject in progress(subjects, description="calibrate", unit="subject"):
        mask, labels = store.mask(subject.subject_id), store.seg(subject.subject_id)
        for request, truth in translations_of(translator, store, subject):
            (result,) = translator.translate_batch([request])
            assert result.half_width is not None, "the translator has a network for it"
            error, size, key = abs(truth - result.mean), result.half_width, (request.target, len(request.codes))
            counts[key].add(error[mask], size[mask])
            if labels is not None:
                lesions[key].add(error[labels > 0], size[labels > 0])
    for name in translator.modalities:
        made = any(translator.translates(source, name) for source in translator.modalities if source != name)
        if made and (name, 1) not in counts:
            raise UserError(
                f"the store {store.path} has no validation subject with {name} and something that the model makes it "
                "of: the interval is fitted on such subjects; prepare some (`splits` of aldm prepare)"
            )
    factors: dict[str, tuple[float, ...]] = defaultdict(tuple)
    for name, number in sorted(counts):
        factors[name] += (counts[name, number].factor(lesions[name, number]),)
    return Calibration(dict(factors), len(subjects))


def translations_of(
    translator: Translator, store: VolumeStore, subject: SubjectRecord
) -> Iterator[tuple[Request, np.ndarray]]:
    """Yield all that a model makes of a subject's volumes, and what that should be, (spatial_shape) in [-1, 1]."""
    names = tuple(name for name in translator.modalities if name in subject.modalities)
    volumes = {name: store.volume(subject.subject_id, name) for name in names}
    codes = {name: translator.encode(volume) for name, volume in volumes.items()}
    pairs = [(source, target) for source, target in permutations(names, 2) if translator.translates(source, target)]
    wanted: list[tuple[tuple[str, ...], str]] = [((source,), target) for source, target in pairs]
    wanted += several(names) if translator.takes_several else []
    for sources, target in wanted:
        yield Request({name: codes[name] for name in sources}, target, 0), volumes[target]
