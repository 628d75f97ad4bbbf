"""Writes docs/scaling.md: what the presets need on 8 to 512 GPUs, from the planner and the formulas below.

    python docs/scaling.py

Every number is computed from the planner's, which stand in the page's first table in MiB: so the page can be checked
without planning all of it again. What was measured is kept: tests/benchmarks/scaling.py --write puts it there.
"""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from aldm.config import Config
from aldm.presets import brats, ixi

PAGE = Path(__file__).resolve().parent / "scaling.md"
BEGIN, END = "<!-- measured -->\n", "<!-- end of measured -->\n"
GPUS = (8, 64, 512)
PEAK_FLOPS, SHARE = 989e12, 0.35
"""Dense bf16 of an H100 SXM, and the share of it that a step is assumed to reach."""
USABLE_GIB = 77
"""Of an 80 GB GPU, after what CUDA and NCCL take."""
NODE, NVLINK, NETWORK, ETHERNET = 8, 450e9, 8 * 50e9, 12.5e9
"""GPUs of a node; bytes per second, one way: of a GPU in its node, of a node with 8 x 400 or 1 x 100 Gbit/s outside."""
BUCKET = 500_000_000
"""Elements of DeepSpeed's reduce_bucket_size, which the engine leaves at its default."""
TRAIN_SUBJECTS, NUM_MODALITIES = 1126, 4
"""BraTS 2021: 90 % of 1251 subjects, t1, t1ce, t2 and flair."""
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Need:
    """What the planner says of one step of one sample: a row of the first table, in MiB and GFLOP."""

    training: str
    voxels: str
    recomputing: str
    weights: int
    optimizer: int
    average: int
    gradients: int
    kept: int
    peak: int
    gflop: int
    low: int
    """Of the trained weights, those whose gradients DeepSpeed's autocast sends in bf16."""

    @property
    def trained(self) -> float:
        """Bytes of the trained weights, and of all players' gradients: Adam holds twice as much."""
        return self.optimizer / 2 * MIB


def configs() -> dict[str, tuple[Config, str]]:
    """Return the configuration and the stage of every training on the page, by its name there."""
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
    """Ask the planner."""
    from aldm.planner import plan_memory

    config, stage = configs()[training]
    found = plan_memory(replace(config, activation_checkpointing=recomputing), stage)
    sizes = ("weights", "optimizer", "average", "gradients", "kept", "peak")
    mib = [round(getattr(found, f"{name}_bytes") / MIB) for name in sizes]
    low = round(low_parameters(config, stage) * 4 / MIB)
    return Need(training, voxels(training), _yes(recomputing), *mib, round(found.flops / 1e9), low)


def voxels(training: str) -> str:
    """Return the sides of what goes in."""
    config, stage = configs()[training]
    shape = (config.train_vqgan.crop if stage == "vqgan" else None) or config.preprocess.spatial_shape
    return " x ".join(map(str, shape))


def low_parameters(config: Config, stage: str) -> int:
    """Return how many trained parameters belong to modules of the very classes that DeepSpeed sends in bf16.

    torch_autocast.LOWER_PRECISION_SAFE_MODULES of DeepSpeed 0.19: not their subclasses, so not blocks.Conv3.
    """
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode

    from aldm import planner

    config = planner.with_modalities(config)
    with FakeTensorMode():
        built, *_ = planner.stage_and_batch(config, stage, planner.training_of(config, stage), {})
    modules = [module for player in built.players for module in player.module.modules()]
    classes = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return sum(x.numel() for m in modules if type(m) in classes for x in m.parameters(recurse=False))


# Formulas


def memory_mib(row: Need, zero_stage: int, gpus: int, batch: int = 1) -> float:
    """Return the memory of a GPU: ZeRO shards Adam's moments (1), gradients too (2), weights too (3).

    At stage 0 it is the planner's peak. The planner's peak falls into the backward pass, when activations have begun to
    go and gradients to come; with the gradients sharded it is at least what the forward pass leaves.
    """
    spared = 1 - 1 / gpus
    states = row.weights + row.optimizer + row.average
    backward = row.peak - states
    if zero_stage >= 1:
        states -= spared * row.optimizer
    if zero_stage >= 2:
        backward = max(backward - spared * row.gradients, row.kept)
    if zero_stage >= 3:
        states -= spared * row.trained / MIB
    return states + backward + (batch - 1) * row.kept


def wire_bytes(row: Need, engine: str, gpus: int) -> float:
    """Return what a GPU sends in a step, with ring collectives: a gather or a scatter of B bytes is (N - 1) / N B.

    Args:
        row: of the training.
        engine: ddp (all-reduce: scatter and gather of the gradients); zero-1 and zero-2 as Rajbhandari et al. (2020)
            define them (scatter of the gradients, gather of the weights) or as DeepSpeed runs them (deepspeed-1: all
            of ddp, and the gather); zero-3 as defined (two gathers of the weights, scatter of the gradients) or
            deepspeed-3 (one gather, for the weights stay from the forward to the backward pass; and one for the
            moving average). DeepSpeed in bf16 sends a few layers' gradients in bf16, and in stage 3 gathers their
            weights in bf16 for the forward pass.
        gpus: N.
    """
    ring, weights = (gpus - 1) / gpus, row.trained
    gradients = weights - row.low * MIB / 2
    average = weights if row.average else 0
    sent = {
        "ddp": 2 * weights,
        "zero-1": 2 * weights,
        "zero-3": 3 * weights,
        "deepspeed-1": 2 * gradients + weights,
        "deepspeed-3": 2 * gradients + average,
    }
    return ring * sent[engine]


def compute_s(row: Need, batch: int = 1) -> float:
    """Return the time of the operations of a step."""
    return row.gflop * 1e9 * batch / (PEAK_FLOPS * SHARE)


def send_s(row: Need, gpus: int, network: float = NETWORK) -> float:
    """Return the time of DDP's all-reduce: in a node over NVLink, else as fast as a node reaches the next one."""
    return wire_bytes(row, "ddp", gpus) / (NVLINK if gpus <= NODE else network)


def step_s(row: Need, gpus: int, network: float, batch: int = 1) -> tuple[float, float]:
    """Return the time of a step with the communication all hidden behind the computation, and with none."""
    compute, send = compute_s(row, batch), send_s(row, gpus, network)
    return max(compute, send), compute + send


def epoch_samples(training: str) -> int:
    """Return the samples of an epoch: volumes in stage 1, one pair per subject in the others."""
    return TRAIN_SUBJECTS * (NUM_MODALITIES if training.startswith("vqgan") else 1)


# Tables


def plan_table(rows: Sequence[Need]) -> str:
    """Return the planner's numbers."""
    columns = "training, voxels, recomputing, weights, Adam, average, gradients, kept, peak, GFLOP, in bf16"
    return _table(columns.split(", "), map(astuple, rows))


def memory_table(rows: Sequence[Need]) -> str:
    """Return GiB per GPU of every training and ZeRO stage."""
    cells = []
    for row in rows:
        sharded = [_over_gpus(lambda n, s=s, r=row: memory_mib(r, s, n) / 1024) for s in (1, 2, 3)]
        fits = [memory_mib(row, s, GPUS[-1]) / 1024 <= USABLE_GIB for s in (0, 3)]
        verdict = "yes" if fits[0] else "from some stage on" if fits[1] else "at no stage"
        cells.append((row.training, row.recomputing, f"{row.peak / 1024:.1f}", *sharded, verdict))
    stages = ("ZeRO-1", "ZeRO-2", "ZeRO-3")
    return _table(("training", "recomputing", "DDP, ZeRO-0", *stages, "fits 80 GB"), cells)


def library_table(rows: Sequence[Need]) -> str:
    """Return GiB per GPU that DDP and DeepSpeed hold besides, at 8 GPUs in bf16."""
    cells = []
    for row in rows:
        players = 1 if row.training == "diffusion" else 2
        shard = row.trained / GIB / NODE
        one_two, three = BUCKET * 8 / GIB + shard, players * BUCKET * 6 / GIB + row.trained / GIB
        cells.append((row.training, *(f"{x:.1f}" for x in (row.trained / GIB, one_two, three))))
    return _table(("training", "DDP", "DeepSpeed, stages 1 and 2", "DeepSpeed, stage 3"), cells)


def wire_table(rows: Sequence[Need]) -> str:
    """Return GB per step and GPU."""
    names = {
        "ddp": "DDP, ZeRO-0: 2 G",
        "zero-1": "ZeRO-1, ZeRO-2 as defined: G + W",
        "deepspeed-1": "ZeRO-1, ZeRO-2 as DeepSpeed runs them: 2 G + W",
        "zero-3": "ZeRO-3 as defined: 2 W + G",
        "deepspeed-3": "ZeRO-3 as DeepSpeed runs it: W + G, and W for the average",
    }
    cells = [
        (text, *(_over_gpus(lambda n, e=engine, r=row: wire_bytes(r, e, n) / 1e9, 2) for row in rows))
        for engine, text in names.items()
    ]
    return _table(("what is sent, times (N - 1) / N", *(row.training for row in rows)), cells)


def speed_table(rows: Sequence[Need]) -> str:
    """Return samples per second at one sample per GPU, all communication hidden and none."""
    cells = []
    for row in rows:
        for gpus in (1, 8, 16, 64, 128, 256, 512):
            cell = [row.training, str(gpus), f"{1e3 * compute_s(row):.0f}"]
            for network in (NETWORK, ETHERNET):
                hidden, shown = step_s(row, gpus, network)
                cell += [
                    f"{1e3 * send_s(row, gpus, network):.1f}",
                    f"{_number(gpus / shown)} to {_number(gpus / hidden)}",
                ]
            cells.append(cell)
    fast, slow = "8 x 400 Gbit/s", "100 Gbit/s"
    heads = [f"{what}, {network}" for network in (fast, slow) for what in ("sending, ms", "samples/s")]
    return _table(("training", "GPUs", "computing, ms", *heads), cells)


def budget_table(rows: Sequence[Need]) -> str:
    """Return steps and hours of the preset's epochs at one sample per GPU."""
    cells = []
    for row in rows:
        samples, epochs = epoch_samples(row.training), _epochs(row)
        for gpus in (1, *GPUS):
            steps = samples / gpus
            hours = epochs * steps * step_s(row, gpus, NETWORK)[1] / 3600
            cells.append(
                (row.training, str(gpus), _number(steps), f"{epochs:,}", f"{epochs * steps:,.0f}", _number(hours))
            )
    return _table(("training", "GPUs", "steps per epoch", "epochs", "steps in all", "hours"), cells)


def batch_table(rows: Sequence[Need]) -> str:
    """Return how many samples a GPU can take in a step, and from how many on it computes longer than it sends."""
    cells = []
    for row in rows:
        most = 1 + int((USABLE_GIB * 1024 - row.peak) // row.kept)
        enough = [max(1, -int(-send_s(row, 512, network) // compute_s(row))) for network in (NETWORK, ETHERNET)]
        cells.append((row.training, row.recomputing, f"{row.kept / 1024:.2f}", str(most), *map(str, enough)))
    heads = ("GiB a sample", "most on 80 GB", "hides 8 x 400 Gbit/s from", "hides 100 Gbit/s from")
    return _table(("training", "recomputing", *heads), cells)


def _epochs(row: Need) -> int:
    config, stage = configs()[row.training]
    epochs: int = getattr(config, f"train_{stage.replace('-', '_')}").epochs
    return epochs


def _over_gpus(value: Callable[[int], float], digits: int = 1) -> str:
    """Return a value at 8, 64 and 512 GPUs."""
    return " / ".join(f"{value(n):.{digits}f}" for n in GPUS)


def _number(value: float) -> str:
    """Return a number with three digits at least where it has them."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _table(columns: Iterable[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [tuple(columns)]
    lines += [tuple("---" for _ in lines[0]), *(tuple(f"{x:,}" if isinstance(x, int) else x for x in r) for r in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# Page


def page(rows: Sequence[Need], measured: str) -> str:
    """Return the page.

    Args:
        rows: of the first table, all of them.
        measured: the text that stands between the markers.
    """
    of = {(row.training, row.recomputing): row for row in rows}
    main = [of[name, "no"] for name in ("vqgan, crops", "ms-spade", "diffusion")]
    whole, again = of["vqgan, whole", "no"], of["vqgan, whole", "yes"]
    ixi_again, latent = of["IXI: vqgan, whole", "yes"], of["diffusion", "no"]
    sharded = memory_mib(whole, 3, 512) / 1024
    hops = 2 * (512 - 1)
    codec = configs()[main[0].training][0].codec
    codebook_kb = codec.codebook_size * (codec.embedding_dim + 1) * 4 / 1e3
    steps = _epochs(latent) * epoch_samples("diffusion") / 512
    return f"""# Scaling

How the trainings spread over workers: measured with 1 and 2 workers on a CPU, computed for 8 to 512 GPUs at the paper's
size. Nothing below the first section was run: it is what the planner (`aldm info`) says of one step and what the formulas
of `docs/scaling.py` make of it. `python docs/scaling.py` writes this page.

## Measured

{BEGIN}{measured}{END}
## One step of one sample

From the planner, in MiB and GFLOP, bf16 autocast over fp32 weights. *Adam* is its two moments, *average* the moving average
of the weights, *gradients* those of the largest player, *kept* what a forward pass leaves for its backward pass, *peak* the
most at any time. *in bf16*: the weights whose gradients DeepSpeed sends in bf16. The planner counts what a CPU's
convolutions copy; a GPU's workspaces differ. The diffusion step includes the frozen MS-SPADE, which a sample seen before
does without.

{plan_table(rows)}
## Memory of a GPU

GiB at 8 / 64 / 512 GPUs, one sample each. ZeRO divides by N: stage 1 Adam's moments, stage 2 the gradients too, stage 3 the
weights too (Rajbhandari et al. 2020, section 5). Activations it does not divide, nor do we the moving average and the
frozen MS-SPADE of the diffusion stage: every rank has them whole. 80 GB are taken as {USABLE_GIB} GiB to use.

{memory_table(rows)}
Activations decide. All of Adam, gradients and weights of stage 1 together are {(3 * main[0].trained / GIB) + main[0].gradients / 1024:.1f} GiB, so
a whole BraTS volume, {whole.peak / 1024:.0f} GiB in one process, needs {sharded:.0f} GiB with everything sharded over 512 GPUs: it fits an
80 GB GPU at no ZeRO stage. With activation checkpointing it needs {again.peak / 1024:.0f} GiB and fits without any. A whole IXI volume needs
{ixi_again.peak / 1024:.0f} GiB even so: a 141 GB GPU, or crops.

What the libraries hold besides, GiB at {NODE} GPUs in bf16:

{library_table(main)}
DDP keeps a flat copy of the gradients. DeepSpeed allocates `reduce_bucket_size` elements ({BUCKET / 1e6:.0f} M, its default) for each of
the two types that it sends, in stages 1 and 2 while a backward pass runs, in stage 3 for every player all the time; stages
1 and 2 keep a second copy of the rank's part of the weights. In stage 3 gathered weights stay from the forward to the
backward pass (`stage3_max_reuse_distance` is 1e9 elements, more than any network here has), so the peak holds
them whole. At these sizes ZeRO spares less than its buffers take: `--engine ddp` is the right choice, and where
memory is short `--activation-checkpointing` or a smaller crop is what helps.

## Bytes on the wire

GB that a GPU sends in a step, at 8 / 64 / 512 GPUs, with ring collectives. W are the trained weights, G their gradients: 4
bytes a parameter each, for weights are fp32 and DDP averages gradients as they are. DeepSpeed's `torch_autocast` sends the
gradients of plain `nn.Conv3d` and `nn.Linear` layers in bf16, and in stage 3 gathers their weights in bf16; most
convolutions here are a subclass (`blocks.Conv3`) and go in fp32. Besides, stage 1 sums the codebook's statistics
({codebook_kb:.0f} kB).

{wire_table(main)}
Rajbhandari et al. (2020, section 7) find the volume of DDP in stages 1 and 2 and 1.5 times that in stage 3. DeepSpeed 0.19
averages whole buckets in stages 1 and 2 (`use_multi_rank_bucket_allreduce`) and gathers the weights besides: 1.5 times
DDP. In stage 3 it gathers once a step, not twice, and our moving average gathers once more: 1.5 times too, or once where no
average is kept. The bytes measured above are those of the formulas as DeepSpeed runs them, with N = 2 and all in fp32.

## Speed

One sample per GPU, so the batch is the number of GPUs. Assumed: {SHARE:.0%} of an H100's {PEAK_FLOPS / 1e12:.0f} TFLOP/s (dense bf16); {NVLINK / 1e9:.0f} GB/s
one way between the GPUs of a node (NVLink's 900 GB/s count both); between nodes of {NODE}, either 50 GB/s for each GPU, all {NODE} used
at once by as many rings, or one 100 Gbit/s link for the node. DDP, no latency; the first of two values has none
of the communication hidden behind the computation, the second all of it.

{speed_table(main)}
A ring over 512 GPUs makes {hops:,} hops a collective: at 5 microseconds a hop {hops * 5e-3:.1f} ms, where the bytes of the diffusion stage
take {1e3 * send_s(latent, 512):.1f} ms; NCCL changes to trees for that reason. Other times that do not shrink: validation and checkpoints, and the slowest of N loaders.

## Where it stops, and what then

The paper's batch is 1: such a run uses one GPU, and `--num-workers 2` refuses it. To scale means to set `batch_size` to N times the
samples per GPU, and then to choose the learning rate and the number of steps anew. BraTS gives {TRAIN_SUBJECTS} training subjects, a pair
of each an epoch, or {TRAIN_SUBJECTS * NUM_MODALITIES:,} volumes in stage 1. The presets' epochs at one sample per GPU, with 8 x 400 Gbit/s and nothing
hidden:

{budget_table(main)}
- **Steps run out first.** With 512 GPUs a diffusion epoch is {epoch_samples("diffusion") / 512:.1f} steps and all {_epochs(latent)} epochs are {steps:,.0f}: fewer than the 10,000 that
  the moving average of decay 0.9999 looks back on, and the learning rate's warm-up of 1,000 steps is cut to a tenth of the training. The
  samples are seen as often as before, the weights move {steps:,.0f} times instead of {512 * steps:,.0f}. 64 GPUs leave {8 * steps:,.0f} steps, which is
  about as far as one run should go.
- **The network stops it only where it is slow.** Over one 100 Gbit/s link a node, the latent stages send longer than they compute:
  {1e3 * send_s(latent, 512, ETHERNET):.0f} ms against {1e3 * compute_s(latent):.0f} ms in the diffusion stage. More samples per GPU mend that, since the bytes of a step stay the
  same:

{batch_table([of[row.training, again] for row in main for again in ("no", "yes")])}
What then, in this order:

1. Fill a GPU before taking the next: a diffusion step of 8 samples on one GPU is a batch of 8 with nothing sent.
2. Stay inside a node ({NODE} GPUs) for the latent stages; they end in hours. Give the many GPUs to stage 1, which has {main[0].gflop / latent.gflop:.0f} times the
   operations a sample and four times the samples.
3. More runs instead of larger ones: `aldm tune` on 512 GPUs is 64 trials of 8, or 512 of one, and sends nothing between them.
4. Prepare, encode and evaluate have no gradients: they spread over subjects, up to one worker per subject.
"""


def read(text: str) -> tuple[list[Need], str]:
    """Return the planner's rows and the measured part of a page."""
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 11 and re.fullmatch(r"[\d,]+", cells[3]):
            rows.append(Need(*cells[:3], *(int(cell.replace(",", "")) for cell in cells[3:])))  # type: ignore[arg-type]
    return rows, text.split(BEGIN)[1].split(END)[0]


def main() -> int:
    """Plan everything anew and write the page."""
    measured = "To be measured: `python tests/benchmarks/scaling.py --write`\n"
    if PAGE.is_file():
        _, measured = read(PAGE.read_text(encoding="utf-8"))
    rows = [need(training, recomputing) for training in configs() for recomputing in (False, True)]
    PAGE.write_text(page(rows, measured), encoding="utf-8")
    print(f"{PAGE.name}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
