"""Whether what the jobs and the service of a setup do fits into the memory of a worker."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aldm.config import ALDM_TRAININGS, training_name, training_of, with_training
from aldm.errors import UserError
from pipelines.kubernetes_checks import of_kind
from pipelines.kubernetes_commands import cluster_spec, has_gpu, words_of
from pipelines.kubernetes_fill import Setup
from pipelines.kubernetes_quantities import quantity
from pipelines.kubernetes_schemas import Manifest

if TYPE_CHECKING:
    from aldm.planner import MemoryPlan

GIB = 2**30
GPUS_GIB = {
    "l4-24gb": 22.5,
    "a10g-24gb": 22.5,
    "a100-40gb": 40.0,
    "l40s-48gb": 45.0,
    "a100-80gb": 80.0,
    "h100-80gb": 79.6,
    "h100-94gb": 93.6,
    "h200-141gb": 140.4,
    "b200-180gb": 178.0,
}
"""Memory of a GPU as the driver tells it, GiB; GPUs that compute in bf16 alone, as the large presets do."""
CUDA_GIB, GPU_SHARE = 1.0, 0.9
"""What CUDA keeps for itself, and the share of the rest that is planned with: fragments, cuDNN's work space."""
PYTHON_GIB = 1.0
"""A worker's process with torch and Ray beside the training."""


NOT_PLANNED = "aldm-prepare, aldm-benchmark"
"""Jobs whose memory is not known here: that of the data set's files, and that of every comparison method."""


@dataclass(frozen=True)
class Fit:
    """What a part of the setup needs of a worker's memory, and what there is, GiB."""

    what: str
    needed_gib: float
    room_gib: float | None
    """None on GPUs that --gpu left open."""
    beside: bool = False
    """A job beside the chain: where it does not fit that is said, and the rest is not refused for it."""

    @property
    def fits(self) -> bool:
        """Whether it does; where the GPU is left open, whether there is one that does."""
        if self.room_gib is None:
            return smallest_gpu(self.needed_gib) is not None
        return self.needed_gib <= self.room_gib

    def describe(self) -> str:
        """Return a line."""
        if self.room_gib is None:
            gpu = smallest_gpu(self.needed_gib)
            return f"{self.what}: {self.needed_gib:.1f} GiB: " + ("FITS NO GPU" if gpu is None else f"fits {gpu}")
        verdict = "fits" if self.fits else "DOES NOT FIT"
        return f"{self.what}: {self.needed_gib:.1f} GiB of {self.room_gib:.1f} GiB: {verdict}"


def smallest_gpu(needed_gib: float) -> str | None:
    """Return the GPU with the least memory that is enough; None where none has."""
    able = [name for name in GPUS_GIB if needed_gib <= _usable(GPUS_GIB[name])]
    return min(able, key=GPUS_GIB.__getitem__) if able else None


def fits_of(manifests: Sequence[Manifest], setup: Setup) -> list[Fit]:
    """Return what the planner expects of the service and of each job but those NOT_PLANNED, and whether that fits."""
    plans = _Plans(setup)
    found = []
    for job in of_kind(manifests, "RayJob"):
        planned = plans.of_job(words_of(job))
        if planned is not None:
            found.append(Fit(*planned, _room(job, setup), beside=words_of(job)[1] == "tune"))
    for service in of_kind(manifests, "RayService"):
        found.append(Fit("the service, one volume", plans.of_translating(), _room(service, setup)))
    return found


class _Plans:
    """The planner's word on the parts of a setup; what several parts have in common is traced once."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._inference: MemoryPlan | None = None

    def of_job(self, words: Sequence[str]) -> tuple[str, float] | None:
        """Return what a worker does in a job, and what it needs, GiB; None for a job that is not planned."""
        batch, workers = self.setup.batch_size, self.setup.num_workers
        match words[1:3]:
            case ["train", stage]:
                share = batch(stage) // workers
                what = f"train {stage}, {share} of a batch of {batch(stage)} on each of {workers} workers"
                return what, self._training(stage, share, shared=workers > 1)
            case ["encode", _]:
                return "encode, one volume", self._encoding()
            case ["evaluate", _]:  # the champion's weights lie beside the model's
                return "evaluate, one volume", self.of_translating(num_models=2)
            case ["tune", _]:
                size = training_of(self.setup.config, "diffusion").batch_size
                return f"tune, a trial with a batch of {size}", self._training("diffusion", size, shared=False)
        return None

    def of_translating(self, num_models: int = 1) -> float:
        """Return what the translation of a volume needs, GiB, with the weights of so many models loaded."""
        from aldm.planner import plan_memory

        if self._inference is None:
            self._inference = plan_memory(self.setup.config, "inference")
        return (self._inference.peak_bytes + (num_models - 1) * self._inference.weights_bytes) / GIB

    def _training(self, stage: str, batch_size: int, *, shared: bool) -> float:
        from aldm.planner import plan_memory

        expected = plan_memory(with_training(self.setup.config, stage, batch_size=batch_size), stage)
        # DDP sends the gradients from buckets of their size
        return (expected.peak_bytes + (expected.gradients_bytes if shared else 0)) / GIB

    def _encoding(self) -> float:
        from aldm.encoding import encoding_bytes
        from aldm.models.codecs import build_codec

        config = self.setup.config
        codec = build_codec(config.codec)
        weights = sum(tensor.nbytes for tensor in codec.state_dict().values())
        needed = encoding_bytes(codec, config.preprocess.spatial_shape, config.precision, bounded=False)
        return (needed + weights) / GIB


def check_fits(fits: Sequence[Fit], setup: Setup, overlay: str) -> None:
    """Refuse a setup of which a part does not fit.

    Raises:
        UserError: names each part, and the way out.
    """
    bad = [fit for fit in fits if not fit.fits and not fit.beside]
    if not bad:
        return
    open_gpu = any(fit.room_gib is None for fit in bad)
    larger = smallest_gpu(max(fit.needed_gib for fit in bad))
    where = f"a GPU {setup.gpu}" if setup.gpu is not None else f"a worker of overlay {overlay}"
    where = "any GPU that is known" if open_gpu else where
    training = all(fit.what.startswith("train ") for fit in bad)  # what is not trained keeps no activations
    ways = ["say --set activation_checkpointing=true"] if training else []
    ways += [f"say --gpu {larger}"] if setup.gpu is not None and larger is not None else []
    ways += ["say --overlay gpu"] if setup.gpu is None and not open_gpu else []
    raise UserError(
        f"preset {setup.preset} does not fit {where}: "
        + "; ".join(fit.describe() for fit in bad)
        + f": {', or '.join([*ways, 'take a smaller preset or crop'])}"
    )


def told(fits: Sequence[Fit]) -> list[str]:
    """Return the lines that say what was planned and which GPU it takes where that was left open."""
    lines = [fit.describe() for fit in fits]
    if any(fit.room_gib is None for fit in fits):
        least = smallest_gpu(max(fit.needed_gib for fit in fits if not fit.beside))
        least = (
            "no GPU that is known is enough"
            if least is None
            else f"{least} or a larger one takes the chain and the service"
        )
        lines.append(f"no --gpu: {least} (known: {', '.join(GPUS_GIB)})")
    return [*lines, f"not planned: {NOT_PLANNED}"]


def check_shared_batches(setup: Setup) -> None:
    """Refuse workers that cannot share a batch that was asked for.

    Raises:
        UserError: the batch size is no multiple of the number of workers.
    """
    for stage in ALDM_TRAININGS:
        size = setup.batch_size(stage)
        if size % setup.num_workers:
            key = f"{training_name(stage)}.batch_size"
            good = (size // setup.num_workers + 1) * setup.num_workers
            raise UserError(
                f"--num-workers {setup.num_workers} cannot share batches of {size}: "
                f"say --set {key}={good}, leave it out, or take another number of workers"
            )


def _usable(gib: float) -> float:
    return (gib - CUDA_GIB) * GPU_SHARE


def _room(manifest: Manifest, setup: Setup) -> float | None:
    """Return what a worker has for it: its GPU's memory, or on a CPU its container's."""
    group: dict[str, Any] = cluster_spec(manifest)["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    if has_gpu(group):
        return None if setup.gpu is None else _usable(GPUS_GIB[setup.gpu])
    return quantity(limits["memory"]) / GIB - PYTHON_GIB
