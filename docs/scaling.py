"""Prints the table of docs/scaling.md: what a step of each training needs on N GPUs, from the planner and the formulas.

python docs/scaling.py            # 64 GPUs, as on the page; half a minute
python docs/scaling.py --gpus 8
"""

import argparse
from dataclasses import dataclass, replace

from aldm.config import Config
from aldm.planner import plan_memory
from aldm.presets import brats, ixi

GPUS = 64
PEAK_FLOPS, SHARE = 989e12, 0.35
"""Dense bf16 of an H100 SXM, and the share of it that a step is assumed to reach."""
USABLE_GIB = 77
"""Of an 80 GB GPU, after what CUDA and NCCL take."""
NODE, NVLINK, NETWORK, ETHERNET = 8, 450e9, 8 * 50e9, 12.5e9
"""GPUs of a node; bytes per second, one way: of a GPU in its node, of a node with 8 x 400 or 1 x 100 Gbit/s outside."""
GIB = 2**30
NETWORKS = "8 x 400 / 1 x 100 Gbit/s"
COLUMNS = (
    "training",
    "voxels",
    "recomputing",
    "GiB DDP",
    "GiB ZeRO-1 / 2 / 3",
    "samples on 80 GB",
    "GB sent DDP / ZeRO-1 and 2 / ZeRO-3",
    "ms computing",
    f"ms sending {NETWORKS}",
    f"samples a second {NETWORKS}",
)


@dataclass(frozen=True, kw_only=True)
class Need:
    """What the planner says of one step of one sample, in bytes and floating-point operations."""

    weights: int
    optimizer: int
    """Adam's two moments."""
    average: int
    """The moving average of the weights, 0 where none is kept."""
    gradients: int
    """Of the largest player."""
    kept: int
    """What a forward pass leaves for its backward pass."""
    peak: int
    flops: int

    @property
    def trained(self) -> float:
        """Bytes of the trained weights, and of all players' gradients: Adam holds twice as much."""
        return self.optimizer / 2


def configs() -> dict[str, tuple[Config, str]]:
    """Return the configuration and the stage of every training of the table, by its name there."""
    whole = {p.__name__: replace(p(), train_vqgan=replace(p().train_vqgan, crop=None)) for p in (brats, ixi)}
    return {
        "vqgan, crops": (brats(), "vqgan"),
        "ms-spade": (brats(), "ms-spade"),
        "diffusion": (brats(), "diffusion"),
        "vqgan, whole": (whole["brats"], "vqgan"),
        "IXI: diffusion": (ixi(), "diffusion"),
        "IXI: vqgan, whole": (whole["ixi"], "vqgan"),
    }


def need(training: str, recomputing: bool) -> Need:
    """Ask the planner for a training, with or without activation checkpointing."""
    config, stage = configs()[training]
    found = plan_memory(replace(config, activation_checkpointing=recomputing), stage)
    sizes = ("weights", "optimizer", "average", "gradients", "kept", "peak")
    return Need(flops=found.flops, **{name: getattr(found, f"{name}_bytes") for name in sizes})


def memory_bytes(step: Need, zero_stage: int, gpus: int) -> float:
    """Return the memory of a GPU: ZeRO shards Adam's moments (1), gradients too (2), weights too (3).

    At stage 0 it is the planner's peak, which falls into the backward pass, when activations have begun to go and
    gradients to come; with the gradients sharded it is at least what the forward pass leaves.
    """
    spared = 1 - 1 / gpus
    states = step.weights + step.optimizer + step.average
    backward = step.peak - states
    if zero_stage >= 1:
        states -= spared * step.optimizer
    if zero_stage >= 2:
        backward = max(backward - spared * step.gradients, step.kept)
    if zero_stage >= 3:
        states -= spared * step.trained
    return states + backward


def wire_bytes(step: Need, zero_stage: int, gpus: int) -> float:
    """Return what a GPU sends in a step, with ring collectives: a pass over B bytes is (N - 1) / N B.

    DDP and ZeRO-0 make two passes, the all-reduce of the gradients. DeepSpeed's stages 1 and 2 also gather the weights.
    Stage 3 scatters the gradients and gathers the weights, once a step, and once more for the moving average.
    """
    passes = {0: 2, 1: 3, 2: 3, 3: 3 if step.average else 2}
    return passes[zero_stage] * (gpus - 1) / gpus * step.trained


def compute_s(step: Need) -> float:
    """Return the time of the operations of a step."""
    return step.flops / (PEAK_FLOPS * SHARE)


def send_s(step: Need, gpus: int, network: float) -> float:
    """Return the time of DDP's all-reduce: in a node over NVLink, else as fast as a node reaches the next one."""
    return wire_bytes(step, 0, gpus) / (NVLINK if gpus <= NODE else network)


def row(training: str, recomputing: bool, gpus: int = GPUS) -> str:
    """Return a training's row of the table as Markdown."""
    step = need(training, recomputing)
    config, stage = configs()[training]
    shape = (config.train_vqgan.crop if stage == "vqgan" else None) or config.preprocess.spatial_shape
    most = max(0, 1 + int((USABLE_GIB * GIB - step.peak) // step.kept))
    sending = [send_s(step, gpus, network) for network in (NETWORK, ETHERNET)]
    cells = (
        training,
        " x ".join(map(str, shape)),
        "yes" if recomputing else "no",
        f"{step.peak / GIB:.1f}",
        " / ".join(f"{memory_bytes(step, zero, gpus) / GIB:.1f}" for zero in (1, 2, 3)),
        str(most),
        " / ".join(f"{wire_bytes(step, zero, gpus) / 1e9:.2f}" for zero in (0, 1, 3)),
        f"{1e3 * compute_s(step):,.0f}",
        " / ".join(f"{1e3 * seconds:.1f}" for seconds in sending),
        " / ".join(f"{gpus / (compute_s(step) + seconds):,.0f}" for seconds in sending),
    )
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Plan everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=GPUS, help="default: %(default)s")
    gpus = parser.parse_args().gpus
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for training in configs():
        for recomputing in (False, True):
            print(row(training, recomputing, gpus), end="")


if __name__ == "__main__":
    main()
