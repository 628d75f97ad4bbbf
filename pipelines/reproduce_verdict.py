"""Whether a reproduction fits the machine: planned memory, time by the measured throughput, disk."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from aldm.config import Config, training_of, with_training
from aldm.files import existing_parent, free_gib
from aldm.pace import planned_steps
from aldm.planner import GIB, MemoryPlan, measure_throughput, plan_memory
from aldm.precision import usable_precision
from pipelines.chain import SLOWEST, span
from pipelines.info import text_table
from pipelines.reproduce_data import MODALITIES

NAMES = ("vqgan", "encode", "ms-spade", "diffusion", "evaluate")
"""What is planned, in its order."""
WITHOUT_TRAINING = ("encode", "evaluate")
LONGEST_DAYS = 60.0
"""What takes longer at the least is refused."""
TRANSLATIONS, RECONSTRUCTIONS = len(MODALITIES) ** 2, len(MODALITIES)
"""Of a test subject: every pair with the diagonal, and the codec alone."""
FIELD_OF_VIEW_MM = (180.0, 240.0, 240.0)
"""Of IXI's T1, on whose grid the store keeps a subject."""
STORE_BYTES = 2.5
"""Of a voxel and volume in the store: 2, and a share of the region."""
START_MINUTES, PREPARE_SECONDS_PER_MVOXEL = 0.1, 0.15
"""Of preparing in one process: 2 s of processor time a volume of 14 million voxels, measured on simulated heads."""
CHECKPOINTS = 3
"""Of a training at a time: last, best, and the one that is being written."""


@dataclass(frozen=True)
class Machine:
    """What there is."""

    name: str
    """cpu, cuda or cuda:1."""
    memory_bytes: float
    """Free, of the CPU or the GPU."""
    flops_per_second: float
    """Of a convolution."""
    disk_bytes: float
    """Free where the results go."""
    num_workers: int = 1
    """Machines like this one that share each batch."""


@dataclass(frozen=True)
class Need:
    """What one step of the chain needs."""

    name: str
    """vqgan, encode, ms-spade, diffusion or evaluate."""
    plan: MemoryPlan
    work: str
    """How often that is done, such as 10 steps."""
    minutes: float
    """At the least."""


@dataclass(frozen=True)
class Verdict:
    """What all of it needs, and what is there."""

    machine: Machine
    needs: tuple[Need, ...]
    disk_bytes: float

    @property
    def minutes(self) -> float:
        """At the least, all needs together."""
        return sum(need.minutes for need in self.needs)

    def too_large(self) -> list[Need]:
        """Return what the memory does not hold."""
        return [need for need in self.needs if need.plan.peak_bytes > self.machine.memory_bytes]

    def reasons(self) -> list[str]:
        """Return why it does not fit; empty where it does."""
        there = self.machine.memory_bytes / GIB
        found = [f"{_job(n.name)} needs {n.plan.peak_bytes / GIB:.2f} GiB, {there:.2f} free" for n in self.too_large()]
        if self.disk_bytes > self.machine.disk_bytes:
            found.append(f"{self.disk_bytes / GIB:.1f} GiB of disk needed, {self.machine.disk_bytes / GIB:.1f} free")
        if self.minutes > LONGEST_DAYS * 24 * 60:
            found.append(f"it would take {span(self.minutes, SLOWEST)}, wanted {LONGEST_DAYS:.0f} days at the most")
        return found

    def describe(self) -> str:
        """Return the table of needs and a line that says whether they fit."""
        m = self.machine
        rows = [("", "needs (GiB)", "free (GiB)", "fits", "TFLOP", "work", "time")]
        for need in self.needs:
            peak = need.plan.peak_bytes
            fits = "yes" if peak <= m.memory_bytes else "NO"
            size, time = need.plan.flops / 1e12, span(need.minutes, SLOWEST)
            cells = f"{peak / GIB:.2f}", f"{m.memory_bytes / GIB:.2f}", fits, f"{size:.3g}", need.work, time
            rows.append((_job(need.name), *cells))
        workers = f" on {m.num_workers} such workers" if m.num_workers > 1 else ""
        return "\n".join(
            [
                f"this machine: {m.name}, {m.memory_bytes / GIB:.1f} GiB of memory free, "
                f"{m.flops_per_second / 1e9:,.0f} GFLOP/s in a convolution{workers}",
                text_table(rows, right=(1, 2, 4)),
                f"disk: {self.disk_bytes / GIB:.2f} GiB needed, {m.disk_bytes / GIB:.1f} free; all together "
                f"{span(self.minutes, SLOWEST)}",
                "verdict: " + ("it fits" if not self.reasons() else f"it does NOT fit: {'; '.join(self.reasons())}"),
            ]
        )


def machine_here(out: Path, device: torch.device, precision: str, num_workers: int = 1) -> Machine:
    """Look at this machine; takes half a second of computing."""
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0]
    else:
        memory = psutil.virtual_memory().available
    speed = measure_throughput(device, precision)
    return Machine(str(device), memory, speed, free_gib(existing_parent(out)) * GIB, num_workers)


def judge(
    config: Config, machine: Machine, volumes: int, sizes: Mapping[str, int], done: frozenset[str] = frozenset()
) -> Verdict:
    """Plan every training and the translation.

    Args:
        config: of all of them.
        machine: where they are to run.
        volumes: of the whole data set.
        sizes: subjects of the splits train and test; each has all modalities.
        done: names of needs that are not needed any more.
    """
    config = replace(
        config, modalities=MODALITIES, precision=usable_precision(config.precision, torch.device(machine.name))
    )
    translation = plan_memory(config, "inference")
    encode, decode = translation.flops_of["encode"], translation.flops_of["decode"]
    needs = []

    def add(name: str, one: MemoryPlan, number: int, unit: str, flops: float) -> None:
        needs.append(Need(name, one, f"{number:,} {unit}", flops / machine.flops_per_second / 60))

    for name in (name for name in NAMES if name not in done):
        if name == "encode":
            add(name, replace(translation, flops=encode), volumes, "volumes", volumes * encode)
        elif name == "evaluate":
            subjects = sizes["test"]
            flops = subjects * (TRANSLATIONS * translation.flops + RECONSTRUCTIONS * (encode + decode))
            add(name, translation, subjects * TRANSLATIONS, "translations", flops)
        elif name != "vqgan" or config.codec.kind != "haar":
            training = training_of(config, name)
            share = with_training(config, name, batch_size=training.batch_size // machine.num_workers)
            one = plan_memory(share, name)
            steps = planned_steps(training, sizes["train"] * (len(MODALITIES) if name == "vqgan" else 1))
            add(name, one, steps, "steps", steps * one.flops)
    return Verdict(machine, tuple(needs), _disk_bytes(config, needs, volumes))


def prepare_minutes(config: Config, volumes: int) -> float:
    """Return what preparing so many volumes takes in one process, about."""
    return START_MINUTES + volumes * _grid_voxels(config) / 1e6 * PREPARE_SECONDS_PER_MVOXEL / 60


def ways_out(config: Config, verdict: Verdict) -> str:
    """Say what can be done where it does not fit, only what helps."""
    ways = []
    large = [need.name for need in verdict.too_large() if need.name not in WITHOUT_TRAINING]
    if large and not config.activation_checkpointing:
        less = [_recomputing_gib(config, name) for name in large]
        gains = ", ".join(f"{_job(name)} then needs {gib:.2f} GiB" for name, gib in zip(large, less, strict=True))
        ways.append(f"--set activation_checkpointing=true ({gains}, a third more time)")
    ways.append("--preset small (the same chain at 3 mm with a lossless codec)")
    if verdict.machine.name == "cpu":
        ways.append("a machine with a GPU")
    ways.append(
        "several GPUs (--engine ddp or deepspeed --num-workers N --use-gpu, with --set train_vqgan.batch_size=N and so "
        "on, which is no longer the paper's batch of 1)"
    )
    ways.append("a cluster (docs/jobs.md; python -m pipelines.kubeflow runs the same chain on one)")
    return f"Ways out: {'; '.join(ways)}; or --anyway to start all the same"


def _recomputing_gib(config: Config, name: str) -> float:
    changed = replace(config, modalities=MODALITIES, activation_checkpointing=True)
    return plan_memory(changed, name).peak_bytes / GIB


def _disk_bytes(config: Config, needs: list[Need], volumes: int) -> float:
    """Return about what the store and the checkpoints take; latents are small beside them."""
    trainings = [need.plan for need in needs if need.name not in WITHOUT_TRAINING]
    checkpoints = CHECKPOINTS * sum(p.weights_bytes + p.optimizer_bytes + p.average_bytes for p in trainings)
    return checkpoints + volumes * _grid_voxels(config) * STORE_BYTES


def _grid_voxels(config: Config) -> float:
    return math.prod(FIELD_OF_VIEW_MM) / math.prod(config.preprocess.spacing_mm)


def _job(name: str) -> str:
    return name if name in WITHOUT_TRAINING else f"train {name}"
