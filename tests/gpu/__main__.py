"""Measure speed, memory and agreement with the CPU on a machine with one GPU, without network, in under 7 minutes.

    PYTHONPATH=. python tests/gpu [--out FOLDER]

Writes check.json and check.md into FOLDER ($OUT, or gpu-check) after every measure. On a machine without a GPU the same
code runs at the size of preset tiny: that tests the check, its figures mean nothing. README.md beside this file says
what to bring.
"""

import argparse
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from apart import run_apart
from arithmetic import agreement, arithmetic
from built_in import train_built_in
from common import Setting
from report import page, with_shares
from speed import machine, training_step, translation

from aldm.planner import plan_memory
from aldm.presets import brats, tiny

MEASURES = {
    "machine": (machine, 30),
    **{f"train {name}": (partial(training_step, name=name), 45) for name in ("vqgan", "ms-spade", "diffusion", "unet")},
    **{f"translate {codec}": (partial(translation, codec=codec), 45) for codec in ("vqgan", "haar")},
    "agreement": (agreement, 40),
    **{f"arithmetic {part}": (partial(arithmetic, part=part), 80) for part in ("denoiser", "encoder")},
}
"""Name -> (what is measured, seconds after which it is stopped)."""
TOTAL_S = 400


def main() -> int:
    """Measure, write, and return 1 where a measure failed or a result is out of its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-check"), metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=MEASURES, metavar="MEASURE", help=", ".join(MEASURES))
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU: the size of preset tiny")
    parser.add_argument(
        "--train-minutes", type=float, metavar="F", help="train the built-in model for so long instead (10 is usual)"
    )
    args = parser.parse_args()
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looks for a GPU and leaves CUDA to the measures
    cuda = torch.cuda.is_available() and not args.cpu
    setting = (
        Setting("cuda", brats(), warm_up=3, seconds=8, most=20, compiled=True)
        if cuda
        else Setting("cpu", tiny(), warm_up=0, seconds=0, most=1, compiled=False)
    )
    args.out.mkdir(parents=True, exist_ok=True)
    chosen: dict[str, tuple[Any, float]] = {name: MEASURES[name] for name in args.only or MEASURES}
    total = TOTAL_S if cuda else math.inf
    if args.train_minutes is not None:
        train = partial(train_built_in, out=args.out, minutes=args.train_minutes)
        total = 60 * args.train_minutes + 300
        chosen = {"machine": MEASURES["machine"], "train the built-in model": (train, total)}
    return check(setting, chosen, args.out, total)


def load_libraries() -> None:
    """Load, before the measures are forked, what each of them would load.

    Without a backward pass, even on tensors without data: a torch with CUDA starts threads for it, and a fork of a
    process with such threads can do none itself.
    """
    plan_memory(tiny(), "inference")


def check(setting: Setting, measures: dict[str, tuple[Any, float]], out: Path, total_s: float) -> int:
    """Run the measures one after the other; what came out is written after each."""
    load_libraries()
    begin, rows = time.monotonic(), []
    for name, (measure, most_s) in measures.items():
        left = total_s - (time.monotonic() - begin)
        print(f"{name} ...", flush=True)
        for row in run_apart(partial(measure, setting), min(most_s if setting.device == "cuda" else math.inf, left)):
            rows.append({"measure": name, **row})
            print(f"  {row['what']}" + (f": {row['error']}" if "error" in row else ""), flush=True)
        seconds = time.monotonic() - begin
        record = {"preset": setting.config.preset, "seconds": seconds, "rows": with_shares(rows)}
        (out / "check.json").write_text(json.dumps(record, indent=1) + "\n")
        (out / "check.md").write_text(page(record))
    bad = [row for row in rows if "error" in row or row.get("difference", 0) > row.get("tolerance", float("inf"))]
    for row in bad:
        print(f"FAILED: {row['measure']}, {row['what']}: {row.get('error', 'out of tolerance')}", flush=True)
    print(f"{len(rows)} rows in {seconds:.0f} s: {out / 'check.md'}, {out / 'check.json'}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
