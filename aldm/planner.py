"""Expected memory, operations and time of a preset, before anything runs.

A stage is built and one of its steps is run on fake tensors (shapes and types without data) while trace.py counts what
is alive: the same losses, the same order, the same precision as in training.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from aldm.baselines.methods import method_stage
from aldm.baselines.networks import ImagePool
from aldm.baselines.pairs import image_shape
from aldm.baselines.regression_unet import RegressionStage
from aldm.config import ALDM_TRAININGS, Config, TrainingConfig, training_of
from aldm.config_baselines import METHODS
from aldm.data.labels import LESION, TISSUES
from aldm.data.modalities import MODALITIES
from aldm.denoising import build_denoiser, build_ms_spade
from aldm.engine import PlainEngine
from aldm.models.codecs import Codec, build_codec
from aldm.players import Batch, Player, Stage, StepInfo, only_trainable
from aldm.precision import arithmetic, usable_precision
from aldm.predictors import LatentDiffusion
from aldm.segmenter_stage import SegmenterStage
from aldm.stages import DiffusionStage, MSSpadeStage, VQGANStage
from aldm.trace import Trace
from aldm.uncertainty import UncertaintyStage

PLANNED_TRAININGS = (*ALDM_TRAININGS, "unet")
GIB = 2**30
LIBRARY_BYTES = 20 * 2**20
"""What oneDNN and MKL keep for themselves (compiled kernels, packing buffers): 10 to 25 MiB measured with
tests/measure_peaks.py for nearly all stages on sides of 48 to 128; diffusion in bf16 on a side of 96 had up to 43."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What one step of a training, or the translation of one volume, needs.

    Bytes are those beyond the running interpreter with torch loaded (about 0.4 GB). glibc may keep more in hand than is
    alive where tensors are smaller than 32 MiB; MALLOC_MMAP_THRESHOLD_=1048576 in the environment prevents that.

    Attributes:
        stage: vqgan, ms-spade, diffusion, unet, uncertainty, segmenter or inference.
        shape: sides of the volume, crop or slice that goes in.
        batch_size: samples of a step.
        precision: fp32, tf32 or bf16.
        activation_checkpointing: whether activations are recomputed.
        weights_bytes: parameters and buffers of all networks, frozen ones too.
        optimizer_bytes: Adam's two moments.
        average_bytes: the moving average of the weights.
        gradients_bytes: of the largest player.
        kept_bytes: most that a forward pass leaves for its backward pass.
        peak_bytes: the most that is held at any time, all of the above as far as it coincides.
        flops: operations of a step or of a volume; a multiplication and an addition are two.
        flops_of: the same part by part.
    """

    stage: str
    shape: tuple[int, ...]
    batch_size: int = 1
    precision: str
    activation_checkpointing: bool = False
    weights_bytes: int
    optimizer_bytes: int = 0
    average_bytes: int = 0
    gradients_bytes: int = 0
    kept_bytes: int = 0
    peak_bytes: int
    flops: int
    flops_of: dict[str, int] = field(default_factory=dict)

    def seconds(self, flops_per_second: float) -> float:
        """Return the time of a step or volume at that throughput."""
        return self.flops / flops_per_second

    def describe(self) -> str:
        """Return the plan as a few lines of text."""
        what = "one volume" if self.stage == "inference" else f"a step of {self.batch_size}"
        size = " x ".join(map(str, self.shape))
        recompute = ", activations recomputed" if self.activation_checkpointing else ""
        parts = [
            ("weights", self.weights_bytes),
            ("optimizer states", self.optimizer_bytes),
            ("averaged weights", self.average_bytes),
            ("gradients", self.gradients_bytes),
            ("kept for the backward pass", self.kept_bytes),
        ]
        listed = ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts if value)
        return (
            f"{self.stage}, {what} of {size} voxels, {self.precision}{recompute}:\n"
            f"  expected peak memory {self.peak_bytes / GIB:.2f} GiB ({listed}), {self.flops / 1e12:.3g} TFLOP"
        )


def plan_memory(config: Config, stage: str) -> MemoryPlan:
    """Return the plan of a training (PLANNED_TRAININGS, uncertainty, segmenter, a comparison method) or of "inference".

    Args:
        config: where it names no modalities, all of the vocabulary are taken.
        stage: what is planned.

    Raises:
        UserError: a stage that cannot be built from the configuration, such as vqgan with the haar codec.
    """
    config = with_modalities(config)
    if stage == "inference":
        return _plan_inference(config)
    assert stage in (*PLANNED_TRAININGS, "uncertainty", "segmenter", *METHODS), stage
    if stage in METHODS and config.pair is None:
        config = replace(config, pair=(config.modalities[0], config.modalities[1]))
    size = training_of(config, stage).batch_size
    # the ids have values: a loss may read them
    ids = {key: torch.zeros(size, dtype=torch.long) for key in ("source", "target", "flip")}
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _plan_training(config, stage, ids)


def with_modalities(config: Config) -> Config:
    """Return the configuration with modalities, those of the vocabulary where it names none."""
    return config if config.modalities else replace(config, modalities=MODALITIES)


class StandIn:
    """Stands for the volume and the latent store that a stage is built from."""

    def __init__(self, config: Config, codec: Codec) -> None:
        self.modalities = config.modalities
        self.preprocess = config.preprocess
        self.data = {"preprocess": asdict(config.preprocess)}
        self.codec = asdict(config.codec)
        self.latent_channels = codec.latent_channels
        self.sides = tuple(side // codec.downsampling for side in config.preprocess.spatial_shape)
        self.isometric = codec.isometric
        self.std = np.ones(codec.latent_channels, np.float32)


class StandInModel:
    """Stands for the trained model whose errors are learnt: an ALDM of the same configuration."""

    model_hash, takes_several = "", False

    def __init__(self, config: Config) -> None:
        self.config, self.predictor = config, _untrained(config)

    def to(self, device: torch.device) -> None:
        """Stay where it is."""

    @torch.no_grad()
    def predict(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Return what it makes of each sample, with one evaluation of the denoiser, and a copy of the volumes."""
        volumes = batch["volumes"][:, :1]
        made = [_evaluate_once(self.predictor, x[None], lambda part: None) for x in volumes]
        return torch.cat(made), batch["volumes"].clone()


def _plan_training(config: Config, name: str, ids: dict[str, Tensor]) -> MemoryPlan:
    """Trace one step in which every player plays."""
    training = training_of(config, name)
    stage, frozen, batch, shape = stage_and_batch(config, name, training, ids)
    engine = PlainEngine("cpu", config.precision)
    stage.connect(engine)
    trace = Trace()
    weights = trace.hold(_state(frozen) + [x for player in stage.players for x in _state(player.module)])
    trace.hold(value for value in batch.values() if isinstance(value, Tensor))
    optimizer, average, gradients, kept = 0, 0, 0, 0
    with trace:
        extra: list[Tensor] = []
        for player in stage.players:
            _prepare(player)
            parameters = [p for p in player.module.parameters() if p.requires_grad]
            before = trace.live_bytes
            extra += [torch.empty_like(p) for p in parameters for _ in range(2)]
            optimizer += trace.live_bytes - before
            gradients = max(gradients, (trace.live_bytes - before) // 2)
            before = trace.live_bytes
            extra += [torch.empty_like(x) for x in _state(player.module) if player.config.ema_decay > 0]
            average += trace.live_bytes - before
        generators = [torch.Generator() for _ in range(training.batch_size)]
        info = StepInfo(0, generators, frozenset(player.name for player in stage.players))
        flops_of = {}
        for player in stage.players:
            before, flops = trace.live_bytes, trace.flops
            with only_trainable(player, stage.players):
                with engine.autocast():
                    loss, values = player.loss(player.module, batch, info)
                kept = max(kept, trace.live_bytes - before)
                engine.backward(player, loss)
            player.module.zero_grad(set_to_none=True)
            del loss, values
            flops_of[player.name] = trace.flops - flops
    return MemoryPlan(
        stage=name,
        shape=shape,
        batch_size=training.batch_size,
        precision=config.precision,
        activation_checkpointing=config.activation_checkpointing,
        weights_bytes=weights,
        optimizer_bytes=optimizer,
        average_bytes=average,
        gradients_bytes=gradients,
        kept_bytes=kept,
        peak_bytes=trace.peak_bytes + LIBRARY_BYTES,
        flops=trace.flops,
        flops_of=flops_of,
    )


def _state(module: nn.Module | None) -> list[Tensor]:
    return [] if module is None else [*module.parameters(), *module.buffers()]


def _prepare(player: Player) -> None:
    """Put the module in training mode, all but what reads values, which fake tensors lack: codebook and image pools."""
    player.module.train()
    for part in player.module.modules():
        if isinstance(part, ImagePool):
            part.eval()
    if isinstance(player.module, Codec) and player.module.quantizer is not None:
        player.module.quantizer.eval()


def stage_and_batch(
    config: Config, name: str, training: TrainingConfig, ids: dict[str, Tensor]
) -> tuple[Stage, nn.Module | None, Batch, tuple[int, ...]]:
    """Return the stage, its frozen network, a batch without values, and the sides of the volume."""
    codec = build_codec(config.codec)
    data: Any = StandIn(config, codec)
    size = training.batch_size
    batch: Batch = {"subject_id": [""] * size, **ids}
    whole = config.preprocess.spatial_shape
    if name in ("vqgan", "unet"):
        shape = training.crop or whole
        names = ("volume",) if name == "vqgan" else ("source_volume", "target_volume")
        batch |= {key: torch.zeros(size, 1, *shape) for key in names}
        stage: Any = VQGANStage(config, data) if name == "vqgan" else RegressionStage(config, data)
        return stage, None, batch, shape
    if name == "segmenter":
        shape = training.crop or whole
        number = len(config.modalities)
        batch |= {"volumes": torch.zeros(size, number, *shape), "has": torch.ones(size, number)}
        batch["labels"] = torch.zeros(size, *shape, dtype=torch.uint8)
        return SegmenterStage(config, data, (*TISSUES, LESION)), None, batch, shape
    if name == "uncertainty":
        number = len(config.modalities)
        batch |= {"volumes": torch.zeros(size, number, *whole), "given": torch.ones(size, number)}
        batch |= {name: torch.ones(size, 1, *whole, dtype=torch.bool) for name in ("mask", "lesion")}
        model: Any = StandInModel(config)
        return UncertaintyStage(config, data, model), model.predictor, batch, whole
    if name in METHODS:
        pairs = method_stage(config, data, name)
        plane = image_shape(config, name, pairs.spatial_dims)
        batch |= {key: torch.zeros(size, 1, *plane) for key in ("source_volume", "target_volume")}
        return pairs, None, batch, plane
    sides = [side // codec.downsampling for side in whole]
    batch |= {key: torch.zeros(size, codec.latent_channels, *sides) for key in ("z_source", "z_target")}
    if name == "ms-spade":
        stage = MSSpadeStage(config, data)
        return stage, None, batch, whole
    if config.diffusion.any_sources:
        number = len(config.modalities)
        batch["z"] = torch.zeros(size, number * codec.latent_channels, *sides)
        batch |= {"given": torch.ones(size, number), "wanted": torch.ones(size, number)}
        batch["sources"] = [list(range(number - 1))] * size  # the most that there can be
    elif config.diffusion.together:
        number = len(config.modalities)
        batch |= {"z_targets": torch.zeros(size, number * codec.latent_channels, *sides)}
        batch |= {"wanted": torch.ones(size, number)}
    ms_spade = build_ms_spade(config, codec.latent_channels)
    return DiffusionStage(config, data, ms_spade, ""), ms_spade, batch, whole


def _plan_inference(config: Config) -> MemoryPlan:
    """Trace the translation of one volume; every step of the sampler is the same, so one stands for all."""
    shape, steps = config.preprocess.spatial_shape, config.sampling.num_inference_steps
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        predictor, x = _untrained(config), torch.zeros(1, 1, *shape)
        trace, flops_of = Trace(), dict[str, int]()
        weights = trace.hold(_state(predictor))
        with trace:
            _evaluate_once(predictor, x, lambda part: flops_of.update({part: trace.flops - sum(flops_of.values())}))
    total = sum(flops_of.values()) + (steps - 1) * flops_of["unet"]
    return MemoryPlan(
        stage="inference",
        shape=shape,
        precision=config.precision,
        weights_bytes=weights,
        peak_bytes=trace.peak_bytes + LIBRARY_BYTES,
        flops=total * config.sampling.num_samples,
        flops_of=flops_of,
    )


def _untrained(config: Config) -> LatentDiffusion:
    """Return the configuration's model."""
    codec = build_codec(config.codec)
    channels = codec.latent_channels
    networks = build_ms_spade(config, channels), build_denoiser(config, channels)
    return LatentDiffusion(config, codec, *networks, torch.zeros(channels), torch.ones(channels)).eval()


def _evaluate_once(predictor: LatentDiffusion, x: Tensor, done: Callable[[str], None]) -> Tensor:
    """Translate a volume without values with one evaluation of the denoiser; `done` is told of each part."""
    config = predictor.config
    code = predictor.encode(x)
    done("encode")
    ids = torch.zeros(1, dtype=torch.long)
    together = config.diffusion.together
    with predictor.autocast():  # with several sources: one, which is what a translation takes at least
        number = len(config.modalities) if together else 1
        z_target_like = torch.cat([predictor.ms_spade(code, ids, ids).float() for _ in range(number)], dim=1)
    done("ms-spade")
    z, *_held = (torch.empty_like(code) for _ in range(3))  # a sampler of second order: z, x0 and the last x0
    with predictor.autocast():
        if config.diffusion.any_sources:
            predictor.unet.refine_missing(z_target_like=z_target_like, given=torch.ones(1, number))
        elif together:
            predictor.unet.refine_all(z_source=code, z_target_like=z_target_like, source=ids)
        else:
            given = {"z_source": code, "z_target_like": z_target_like, "target": ids, "source": ids}
            predictor.unet.denoise(z_t=z, t=torch.zeros(1), **given)
    done("unet")
    del _held
    result = predictor.decode(z)
    done("decode")
    return result


def measure_throughput(device: torch.device | str, precision: str, seconds: float = 0.5) -> float:
    """Return the operations per second that a 3^3 convolution of 64 channels on 32^3 voxels reaches here.

    Small tensors, norms and memory traffic make a whole step slower: a step takes 1 to 3 times what this promises.
    """
    device, precision = torch.device(device), usable_precision(precision, device)
    conv = nn.Conv3d(64, 64, 3, padding=1).to(device)
    x = torch.zeros(1, 64, 32, 32, 32, device=device)
    flops = 2 * 64 * 64 * 27 * 32**3

    def run() -> None:
        conv(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.no_grad(), arithmetic(precision, device):
        run()
        start, runs = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds:
            run()
            runs += 1
    return flops * runs / elapsed
