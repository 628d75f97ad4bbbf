"""Step time, communication and memory of every engine with 1 and 2 workers, measured on this machine.

    python tests/benchmarks/scaling.py            # prints the first table of docs/scaling.md

Stage 3 of preset small on simulated subjects at 4 mm, in fp32, BATCH samples and one thread a worker: two workers have
twice the batch, so each does what one worker does. Run it on a machine of two cores that does nothing else.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from aldm.config import TrainingConfig
    from aldm.players import Engine, Player, Stage

NUM_SUBJECTS = 9
"""The fewest simulated subjects whose names put one in each split."""
SPACING_MM, SHAPE = 4.0, (40, 56, 40)
BATCH = 1
"""Samples a worker and step."""
WARM_UP = 4
"""Steps before the clock counts: the first make buffers, and DeepSpeed's stage 3 learns the order of the layers."""
COUNTED = 2
"""Steps of the training whose bytes are counted, apart from the one that is timed: counting costs time."""
ENGINES = ("plain", "ddp", "zero-0", "zero-1", "zero-2", "zero-3")
MB = 1e6


class Wire(TorchDispatchMode):
    """Adds up what this rank sends in collectives, in bytes, as the ring algorithms would send it.

    The collectives of torch.distributed are operations like any other, those that DDP's reducer starts too.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.sent, self._share = 0.0, (world_size - 1) / world_size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; of a collective count the whole tensor: the gathered or reduced one, not a rank's part."""
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            if name.startswith("allreduce"):
                self.sent += 2 * self._share * _nbytes(args[0])
            elif name.startswith(("allgather", "_allgather", "broadcast")):
                self.sent += self._share * _nbytes(args[0])
            elif name.startswith(("reduce_scatter", "_reduce_scatter")):
                self.sent += self._share * _nbytes(args[1])
            elif name != "barrier":
                raise NotImplementedError(f"a collective that is not counted: {name}")
        return func(*args, **(kwargs or {}))


def _nbytes(tensors: Any) -> int:
    """Return the bytes of a tensor or of nested lists of tensors."""
    if isinstance(tensors, list | tuple):
        return sum(map(_nbytes, tensors))
    return int(tensors.numel() * tensors.element_size())


class Clock:
    """Notes time and bytes sent at the end of every step of an engine's first player."""

    def __init__(self, engine: "Engine", wire: Wire) -> None:
        self.times: list[float] = []
        self.sent: list[float] = []
        step = engine.step

        def noted(player: "Player", learning_rate: float) -> Any:
            norm = step(player, learning_rate)
            self.times.append(time.perf_counter())
            self.sent.append(wire.sent)
            return norm

        engine.step = noted  # type: ignore[method-assign]

    def seconds(self) -> float:
        """Median time from one step to the next, warm-up left out."""
        times = self.times[WARM_UP:]
        return statistics.median(after - before for before, after in pairwise(times))


def measure(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Run every engine, one after the other, on all workers; returns rank 0's results (Ray Train calls this)."""
    import torch

    torch.set_num_threads(1)
    return [_case(settings, engine) for engine in ENGINES]


def _case(settings: dict[str, Any], engine: str) -> dict[str, Any]:
    """Train twice: once for the time and the memory, once for the bytes."""
    import torch.distributed as dist

    workers = dist.get_world_size()
    dist.barrier()
    made, clock, _ = _train(settings, engine, settings["steps"] + WARM_UP + 1)
    case = {"workers": workers, "engine": engine, "seconds": clock.seconds()}
    if hasattr(made, "memory_bytes"):
        case |= {name: value / MB for name, value in made.memory_bytes().items()}
    with Wire(workers) as counted:
        _, clock, _ = _train(settings, engine, COUNTED + 1, counted)
    return case | {"sent": (clock.sent[-1] - clock.sent[0]) / COUNTED / MB}


def _train(settings: dict[str, Any], engine: str, steps: int, wire: Wire | None = None) -> tuple["Engine", Clock, Wire]:
    from aldm.training import fit

    wire = wire or Wire(1)
    stage, training = _stage(settings["inputs"])
    batch = BATCH * (1 if engine == "plain" else settings["workers"])
    training = replace(training, batch_size=batch, max_steps=steps)
    made = _engine(engine, batch)
    clock = Clock(made, wire)
    fit(stage, made, training, seed=0, on_log=lambda _: None, on_checkpoint=lambda _: None)
    return made, clock, wire


def _engine(name: str, batch: int) -> "Engine":
    """Return plain (every worker by itself, nothing is sent), ddp or zero-N."""
    from aldm.engine import PlainEngine
    from pipelines.distributed_engines import DDPEngine, DeepSpeedEngine

    if name == "plain":
        return PlainEngine()
    if name == "ddp":
        return DDPEngine()
    return DeepSpeedEngine(zero_stage=int(name[-1]), batch_size=batch)


def _stage(inputs: dict[str, str]) -> tuple["Stage", "TrainingConfig"]:
    """Return stage 3 with nothing but training in it: one validation sample at the end."""
    from aldm.presets import small
    from aldm.stage_inputs import StageInputs
    from aldm.training_build import build_stage

    often: Any = {"log_every": 10**6, "validate_every": 10**6, "checkpoint_every": 10**6, "num_validation_samples": 1}
    config = replace(small(), precision="fp32")
    config = replace(config, train_diffusion=replace(config.train_diffusion, **often))
    paths = StageInputs(**{name: Path(path) for name, path in inputs.items()})
    stage, _ = build_stage("diffusion", config, paths)
    return stage, stage.config.train_diffusion


def run(workers: int, inputs: dict[str, str], steps: int, folder: Path) -> list[Any]:
    """Measure every engine on so many Ray Train workers."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        measure,
        train_loop_config={"inputs": inputs, "steps": steps, "workers": workers},
        scaling_config=ScalingConfig(num_workers=workers),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(name=f"workers-{workers}", storage_path=str(folder)),
    )
    found: list[Any] = trainer.fit().return_value
    return found


def prepare(folder: Path) -> dict[str, str]:
    """Make what stage 3 is built from: latents, and an MS-SPADE that one step has trained."""
    from aldm.data.phantom import write_phantom
    from aldm.data.preparing import prepare_store
    from aldm.presets import small
    from pipelines.encode import main as encode
    from pipelines.train import main as train

    tree, store, latents, run_dir = (folder / name for name in ("tree", "store", "latents", "ms-spade"))
    write_phantom(tree, "ixi", NUM_SUBJECTS, 0, SPACING_MM)
    grid = replace(small().preprocess, spacing_mm=(SPACING_MM,) * 3, spatial_shape=SHAPE)
    prepare_store(tree, store, layout="ixi", config=grid, num_processes=1)
    common = ["--preset", "small", "--log-level", "warning"]
    encode(["--store", str(store), "--codec", "haar", "--out", str(latents), *common])
    changes = [f"train_ms_spade.{name}" for name in ("max_steps=1", "num_validation_samples=1")]
    settings = [word for change in changes for word in ("--set", change)]
    train(
        [
            "ms-spade",
            "--latents",
            str(latents),
            "--run-dir",
            str(run_dir),
            "--engine",
            "plain",
            "--no-tracking",
            *settings,
            *common,
        ]
    )
    return {"latents": str(latents), "ms_spade": str(run_dir)}


def table(found: list[dict[str, Any]]) -> str:
    """Return what was measured as Markdown, a row an engine.

    Communication is what 2 workers take longer than 1 worker of the same engine, less what 2 workers on one machine
    take longer without a word between them (plain), as a share of the step.
    """
    by = {(case["engine"], case["workers"]): case for case in found}
    crowding = by["plain", 2]["seconds"] / by["plain", 1]["seconds"]
    heads = ("engine", "ms, 1 worker", "ms, 2 workers", "2 / 1", "communication", "MB sent a step, 2 workers")
    heads += ("MB of weights, 1 / 2 workers", "MB of Adam, 1 / 2 workers")
    lines = [heads, tuple("---" for _ in heads)]
    for engine in ENGINES:
        one, two = by[engine, 1], by[engine, 2]
        ratio = two["seconds"] / one["seconds"]
        share = "none" if engine == "plain" else f"{1 - crowding / ratio:.0%}"
        times = (f"{1e3 * one['seconds']:.0f}", f"{1e3 * two['seconds']:.0f}", f"{ratio:.2f}")
        held = (_held(one, two, "weights"), _held(one, two, "optimizer_states"))
        lines.append((engine, *times, share, f"{two['sent']:.1f}", *held))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _held(one: dict[str, Any], two: dict[str, Any], name: str) -> str:
    return f"{one[name]:.1f} / {two[name]:.1f}" if name in one else "whole"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="timed steps of an engine (default: %(default)s)")
    args = parser.parse_args()
    from pipelines.ray_session import ray_session

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="aldm-scaling-") as folder, ray_session():
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        inputs = prepare(Path(folder))
        for workers in (1, 2):
            found += run(workers, inputs, args.steps, Path(folder))
    print(table(found))


if __name__ == "__main__":
    main()
