"""Whether the trainings of a setup, and the translation of a volume, fit into the memory of a worker."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aldm.config import training_name, with_training
from aldm.errors import UserError
from pipelines.kubernetes_checks import of_kind
from pipelines.kubernetes_commands import cluster_spec
from pipelines.kubernetes_fill import GPU, TRAININGS, Setup
from pipelines.kubernetes_quantities import quantity
from pipelines.kubernetes_schemas import Manifest

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


@dataclass(frozen=True)
class Fit:
    """What a part of the setup needs of a worker's memory, and what there is, GiB; None where that is not known."""

    what: str
    needed_gib: float
    room_gib: float | None

    @property
    def fits(self) -> bool:
        """Whether it does, as far as is known."""
        return self.room_gib is None or self.needed_gib <= self.room_gib

    def describe(self) -> str:
        """Return a line."""
        if self.room_gib is None:
            return f"{self.what}: {self.needed_gib:.1f} GiB; no --gpu, so not compared"
        verdict = "fits" if self.fits else "DOES NOT FIT"
        return f"{self.what}: {self.needed_gib:.1f} GiB of {self.room_gib:.1f} GiB: {verdict}"


def fits_of(manifests: Sequence[Manifest], setup: Setup) -> list[Fit]:
    """Return the planner's verdict on each training of the manifests, and on the service."""
    from aldm.planner import plan

    found = []
    for job in of_kind(manifests, "RayJob"):
        stage = TRAININGS.get(job["metadata"]["name"])
        if stage is None:
            continue
        share = setup.batch_size(stage) // setup.num_workers
        expected = plan(with_training(setup.config, stage, batch_size=share), stage)
        # DDP sends the gradients from buckets of their size
        needed = expected.peak_bytes + (expected.gradients_bytes if setup.num_workers > 1 else 0)
        what = f"train {stage}, {share} of a batch of {setup.batch_size(stage)} on each of {setup.num_workers} workers"
        found.append(Fit(what, needed / GIB, _room(job, setup)))
    for service in of_kind(manifests, "RayService"):
        expected = plan(setup.config, "inference")
        found.append(Fit("translate one volume (the service)", expected.peak_bytes / GIB, _room(service, setup)))
    return found


def check_fits(fits: Sequence[Fit], setup: Setup, overlay: str) -> None:
    """Refuse a setup of which a part does not fit.

    Raises:
        UserError: names each part, and the way out.
    """
    bad = [fit for fit in fits if not fit.fits]
    if not bad:
        return
    where = f"a GPU {setup.gpu}" if setup.gpu is not None else f"a worker of overlay {overlay}"
    larger = [name for name, gib in GPUS_GIB.items() if max(fit.needed_gib for fit in bad) <= _usable(gib)]
    ways = ["--set activation_checkpointing=true"]
    ways += [f"--gpu {larger[0]}"] if setup.gpu is not None and larger else []
    ways += ["--overlay gpu"] if setup.gpu is None else []
    raise UserError(
        f"preset {setup.preset} does not fit {where}: "
        + "; ".join(fit.describe() for fit in bad)
        + f": say {', or '.join(ways)}, or take a smaller preset or crop"
    )


def check_workers(setup: Setup) -> None:
    """Refuse workers that cannot share a batch that was asked for.

    Raises:
        UserError: so.
    """
    for stage in TRAININGS.values():
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
    container: dict[str, Any] = cluster_spec(manifest)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    limits = container["resources"]["limits"]
    if GPU in limits:
        return None if setup.gpu is None else _usable(GPUS_GIB[setup.gpu])
    return quantity(limits["memory"]) / GIB - PYTHON_GIB
