"""aldm reproduce ixi: from a downloaded IXI folder to Table D of the paper, every step of the method in one command."""

import argparse
import hashlib
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aldm.config import ALDM_TRAININGS, Config
from aldm.errors import UserError
from aldm.files import atomic_path
from aldm.run_folder import without_secrets
from pipelines.arguments import JobParser, job_parser, resolve_config
from pipelines.chain import REPORT, SLOWEST, SPLITS_FILE, Chain, Step, is_done, span
from pipelines.ray_training import add_cluster_arguments, cluster_of
from pipelines.reproduce_data import LAYOUT, SOURCE, find_subjects, paper_splits, splits_csv, splits_text

if TYPE_CHECKING:
    from pipelines.reproduce_data import Data

SUBCOMMANDS = {"ixi": "Table D of the paper's supplement: all pairs of T1, T2 and PD of IXI"}
PRESET = "ixi"
REPRODUCTION_FILE = "reproduction.json"
SHORT_MINUTES = 0.1
"""Of a step that is not planned."""
DESCRIPTION = f"""From a downloaded IXI folder to Table D of the paper's supplement. Check the folder, give the subjects
the paper's splits (459 for training, 115 for the test) by a hash of their names, say what memory and time the trainings
and the translations need and what this machine has, then prepare, train the three stages, encode, export and score on
the test split, and write {REPORT}: our table, the paper's, the difference, and what else differs. What does not fit is
refused before anything is written, with the ways out. Each step is an aldm command that is printed first. Stopped in
the middle, by Ctrl-C too, the same command goes on. IXI is to be had from {SOURCE}."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm reproduce TABLE ARGUMENTS`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in SUBCOMMANDS:
        return _no_table(arguments)
    args = _parser(arguments[0]).parse_args(arguments[1:])
    args.data, args.out = args.data.absolute(), args.out.absolute()
    config = resolve_config(args, PRESET)
    for stage in ALDM_TRAININGS:
        cluster_of(args, config, stage)  # flags that do not go together are refused first
    data = find_subjects(args.data)
    splits = paper_splits(data)
    chain = Chain(args.out, REPRODUCTION_FILE, "reproduction", _settings(args, splits), spread=SLOWEST)
    record = chain.earlier_record(args.overwrite) or {"steps": []}
    print(f"{args.data}: {data.describe()}\nsplits: {splits_text(data, splits)}", flush=True)
    steps = plan_reproduction(args, config)
    done = frozenset(name for name, step in steps.items() if is_done(step, record))
    if len(done) < len(steps):
        steps = _judged(steps, done, args, config, data, splits)
    if args.dry_run:
        return 0
    record = chain.open(args.overwrite, ("runs",))
    with atomic_path(args.out / SPLITS_FILE, overwrite=True) as temporary:
        temporary.write_text(splits_csv(splits))
    try:
        chain.run(list(steps.values()), record)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        raise
    from pipelines.reproduce_report import write_reproduction_report

    command = without_secrets(shlex.join(["aldm", "reproduce", *arguments]))
    print(write_reproduction_report(args.out, record["steps"], command, config, splits_text(data, splits)))
    print(f"report: {args.out / REPORT}")
    return 0


def _judged(
    steps: dict[str, Step],
    done: frozenset[str],
    args: argparse.Namespace,
    config: Config,
    data: "Data",
    splits: dict[str, str],
) -> dict[str, Step]:
    """Print the planner's verdict on what is left to do; return the steps with their times, as far as they are known.

    Raises:
        UserError: it does not fit this machine, and --anyway was not given.
    """
    from aldm.device import select_device
    from aldm.precision import usable_precision
    from pipelines.reproduce_verdict import judge, machine_here, prepare_minutes, ways_out

    device = select_device(args.device)
    num_workers = cluster_of(args, config, ALDM_TRAININGS[0]).min_workers
    machine = machine_here(args.out, device, usable_precision(config.precision, device), num_workers)
    verdict = judge(config, machine, data.volumes(), Counter(splits.values()), done)
    print(verdict.describe(), flush=True)
    minutes = {"prepare": prepare_minutes(config, data.volumes())}
    minutes |= {need.name: SHORT_MINUTES + need.minutes for need in verdict.needs}
    steps = {name: replace(step, budget_minutes=minutes.get(name, SHORT_MINUTES)) for name, step in steps.items()}
    if args.dry_run:
        for name, step in steps.items():
            state = "done before" if name in done else span(step.budget_minutes, SLOWEST)
            print(f"{step.title} ({state})\n  $ {step.typed}")
    if verdict.reasons() and not args.anyway:
        raise UserError(f"it does not fit here: {'; '.join(verdict.reasons())}. {ways_out(config, verdict)}")
    return steps


def plan_reproduction(args: argparse.Namespace, config: Config) -> dict[str, Step]:
    """Return the commands, in order, by name; their budgets are not known yet."""
    out: Path = args.out
    runs, store, latents, model = out / "runs", out / "store", out / "latents", out / "model"
    haar = config.codec.kind == "haar"
    codec = "haar" if haar else runs / "vqgan"
    setup = _setup(args)
    place = ("--device", args.device)

    def step(title: str, output: Path, *words: object, again: str | None = "--overwrite") -> Step:
        return Step(title, list(map(str, words)), output, SHORT_MINUTES, again, place)

    def train(stage: str, title: str, *inputs: object) -> Step:
        run = runs / stage
        words = ["train", stage, *map(str, inputs), "--run-dir", str(run), *setup, "--seed", str(args.seed)]
        where = (*place, *_engine_words(args), "--group", out.name)
        return Step(title, words, run / "config.yaml", SHORT_MINUTES, "--resume", where)

    source = ("--layout", LAYOUT, "--splits", out / SPLITS_FILE)
    stages = ("--ms-spade", runs / "ms-spade", "--diffusion", runs / "diffusion")
    scores = ("--store", store, "--split", "test", "--out", out / "scores", "--group", out.name)
    prepared = store / "store.json"
    steps = {
        "prepare": step(
            "check and prepare the data", prepared, "prepare", args.data, store, *source, *setup, again=None
        ),
        "vqgan": train("vqgan", "stage 1: the codec", "--store", store),
        "encode": step(
            "encode every volume", latents, "encode", "--store", store, "--codec", codec, "--out", latents, *setup
        ),
        "ms-spade": train("ms-spade", "stage 2: MS-SPADE", "--latents", latents),
        "diffusion": train("diffusion", "stage 3: diffusion", "--latents", latents, "--ms-spade", runs / "ms-spade"),
        "export": step("export the translator", model, "export", "--codec", codec, *stages, "--out", model),
        "evaluate": step("score the test split", out / "scores", "evaluate", "--model", model, *scores),
    }
    return {name: step for name, step in steps.items() if name != "vqgan" or not haar}


def _setup(args: argparse.Namespace) -> list[str]:
    """Return the flags of the configuration for every command."""
    preset = args.preset or PRESET
    words = ["--preset", str(Path(preset).absolute()) if Path(preset).suffix else preset]
    words += [word for assignment in args.set for word in ("--set", assignment)]
    return words + (["--precision", args.precision] if args.precision else [])


def _engine_words(args: argparse.Namespace) -> list[str]:
    """Return the cluster's flags for every training, as they were given."""
    words = ["--engine", args.engine]
    for name in ("zero_stage", "num_workers", "use_gpu", "storage_path", "max_failures", "keep_checkpoints"):
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        if value is not None and value is not False:
            words += [flag] if value is True else [flag, str(value)]
    return words + (["--autoscaling"] if args.autoscaling else [])


def _settings(args: argparse.Namespace, splits: dict[str, str]) -> dict[str, Any]:
    """Return what the results depend on."""
    return {
        "data": str(args.data),
        "splits_sha256": hashlib.sha256(splits_csv(splits).encode()).hexdigest(),
        "preset": args.preset or PRESET,
        "set": args.set,
        "precision": args.precision,
        "seed": args.seed,
    }


def _parser(table: str) -> JobParser:
    parser = job_parser(f"reproduce {table}", DESCRIPTION, default_preset=PRESET)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of IXI: IXI-T1, IXI-T2 and IXI-PD in it, unpacked"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the trainings")
    parser.add_argument(
        "--anyway", action="store_true", help="start also where the verdict is that it does not fit this machine"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete the reproduction in --out and start again")
    add_cluster_arguments(parser)
    parser.set_defaults(engine="plain")
    return parser


def _no_table(arguments: list[str]) -> int:
    asked = bool(arguments) and arguments[0] in ("-h", "--help")
    if arguments and not asked:
        print(f"aldm reproduce: there is no table {arguments[0]!r}", file=sys.stderr)
    wanted = "\n".join(f"  {name:<11} {text}" for name, text in SUBCOMMANDS.items())
    print(
        f"usage: aldm reproduce TABLE [ARGUMENTS]\n\ntables:\n{wanted}\n\naldm reproduce TABLE --help explains the "
        "arguments.",
        file=sys.stdout if asked else sys.stderr,
    )
    return 0 if asked else 2
