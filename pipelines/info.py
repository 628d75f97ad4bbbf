"""`aldm info`: what a preset is made of and what it will need, before anything runs."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from aldm.config import Config
from aldm.errors import UserError
from aldm.words import counted
from pipelines.arguments import job_parser, resolve_config

if TYPE_CHECKING:
    from aldm.planner import MemoryPlan

DESCRIPTION = """Print the layers of a preset's networks, their parameter counts beside Tables A to C of the paper's
supplement, the operations of one translated volume, and the memory and time that a translation and each training are
expected to need."""
GIB = 2**30
TRACING_BYTES = 130 * 10**6
"""What tracing all networks and measuring the speed take beside the program (measured: 0.12 GB for brats and small)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm info ARGUMENTS`."""
    parser = job_parser("info", DESCRIPTION)
    parser.add_argument("--no-layers", action="store_true", help="leave the table of layers out")
    args = parser.parse_args(argv)
    config = resolve_config(args)
    from aldm.device import select_device
    from aldm.planner import with_modalities

    device = select_device(args.device)
    if args.dry_run:
        from aldm.memory import gigabytes, resident_bytes

        print(f"would describe preset {config.preset} and measure the speed of {device} for half a second")
        print(f"memory: about {gigabytes(resident_bytes() + TRACING_BYTES)} GB: the networks are traced without data")
        return 0

    config = with_modalities(config)
    size = " x ".join(map(str, config.preprocess.spatial_shape))
    print(f"preset {config.preset}: {size} voxels, modalities {', '.join(config.modalities)}, {config.precision}")
    if not args.no_layers:
        print("\n" + layers_text(config))
    print("\n" + parameters_text(config))
    print("\n" + needs_text(config, args, str(device)))
    return 0


def layers_text(config: Config) -> str:
    """Return the table of layers, a line each."""
    from aldm.layer_table import layer_table

    rows = [("part", "layer", "kind", "output", "parameters", "GFLOP")]
    for layer in layer_table(config):
        shape = " x ".join(map(str, layer.shape))
        row = (layer.part, layer.name, layer.kind, shape, f"{layer.parameters:,}", f"{layer.flops / 1e9:,.1f}")
        rows.append(row)
    return text_table(rows, right=(4, 5))


def parameters_text(config: Config) -> str:
    """Return the parameter counts, with the supplement's beside those of its own networks."""
    from aldm.layer_table import parameter_counts
    from aldm.presets import brats

    counts, paper = parameter_counts(config), brats()
    own = (config.codec, config.ms_spade) == (paper.codec, paper.ms_spade)
    together = counts.encoder + counts.decoder + counts.ms_spade_one_target
    number = len(config.modalities)
    rows = [
        ("parameters", "millions", "supplement"),
        ("encoder", _millions(counts.encoder), ""),
        ("decoder", _millions(counts.decoder), ""),
        ("MS-SPADE, one target", _millions(counts.ms_spade_one_target), ""),
        ("these three", _millions(together), "237 (Table A)" if own else ""),
        (f"MS-SPADE, {counted(number, 'target')}", _millions(counts.ms_spade), ""),
        ("codebook", _millions(counts.codebook), ""),
        ("U-Net", _millions(counts.unet), "658 (Table C)" if config.unet == paper.unet else ""),
    ]
    text = text_table(rows, right=(1,))
    if own and config.unet == paper.unet:
        size = 4 * counts.unet / 1e6
        text += (
            f"\nNo U-Net of Table C's widths has its 658 M parameters (this one is {size:.0f} MB in fp32; see"
            "\ndocs/method.md, section 4), and no reading of the model sizes is known, 749 M in Table A and 722 M in"
            "\nTable C."
        )
    return text


def needs_text(config: Config, args: argparse.Namespace, device: str) -> str:
    """Return operations of one volume, and expected memory and time of everything."""
    from aldm.planner import measure_throughput, plan_memory

    inference = plan_memory(config, "inference")
    steps, samples = config.sampling.num_inference_steps, config.sampling.num_samples
    speed = measure_throughput(device, config.precision)
    lines = [_flops_text(inference, steps, samples), ""]
    rows: list[tuple[str, ...]] = [("expected", "voxels", "batch", "peak GiB", "recomputing", "TFLOP", "seconds")]
    rows.append(_row("translate", inference, None, speed))
    for name, changed in trainings(config):
        try:
            plain = plan_memory(replace(changed, activation_checkpointing=False), name)
        except UserError:  # such as the vqgan stage of a codec that has nothing to train
            continue
        recomputing = plan_memory(replace(changed, activation_checkpointing=True), name)
        rows.append(_row(f"train {name}", plain, recomputing, speed))
    lines.append(text_table(rows, right=(2, 3, 4, 5, 6)))
    lines.append(
        f"Peak memory beyond Python and torch (about 0.4 GB), {config.precision}; 'recomputing' is with "
        "--activation-checkpointing.\nTFLOP and seconds are those of one volume or one step, at "
        f"{speed / 1e9:,.0f} GFLOP/s that a convolution reaches on {device} here;\nexpect up to 3 times as long."
    )
    lines.append(_bounded_text(config))
    return "\n".join(lines)


def trainings(config: Config) -> list[tuple[str, Config]]:
    """Return each training with its configuration; stage 1 a second time on whole volumes where it takes crops."""
    from aldm.planner import PLANNED_TRAININGS

    listed = [(name, config) for name in PLANNED_TRAININGS]
    if config.train_vqgan.crop not in (None, config.preprocess.spatial_shape):
        listed.insert(1, ("vqgan", replace(config, train_vqgan=replace(config.train_vqgan, crop=None))))
    return listed


def _flops_text(inference: "MemoryPlan", steps: int, samples: int) -> str:
    parts = inference.flops_of
    rows = [("operations of one volume", "TFLOP"), *((name, f"{value / 1e12:.3g}") for name, value in parts.items())]
    rows[3] = ("unet, one evaluation", rows[3][1])
    what = f"all, {counted(steps, 'evaluation')}" + (f" in each of {samples} samples" if samples > 1 else "")
    return text_table([*rows, (what, f"{inference.flops / 1e12:.3g}")], right=(1,))


def _row(name: str, plain: "MemoryPlan", recomputing: "MemoryPlan | None", speed: float) -> tuple[str, ...]:
    size = " x ".join(map(str, plain.shape))
    less = "" if recomputing is None else f"{recomputing.peak_bytes / GIB:.2f}"
    seconds = f"{plain.seconds(speed):.3g}"
    return (
        name,
        size,
        str(plain.batch_size),
        f"{plain.peak_bytes / GIB:.2f}",
        less,
        f"{plain.flops / 1e12:.3g}",
        seconds,
    )


def _bounded_text(config: Config) -> str:
    """Say how little memory encode and decode can do with."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from aldm.models.codecs import build_codec
    from aldm.models.slabs import floor_bytes

    with FakeTensorMode():
        floor = floor_bytes(build_codec(config.codec), config.preprocess.spatial_shape)
    return (
        f"In bounded memory (--max-memory-gb) the codec itself needs at least {floor / GIB:.2f} GiB beyond the weights."
    )


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f}"


def text_table(rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = ()) -> str:
    """Return rows as aligned columns, the first row underlined."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: tuple[str, ...]) -> str:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * width for width in widths), *map(line, rows[1:])])
