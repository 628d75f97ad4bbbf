"""`aldm benchmark`: train methods or codecs under one budget on one split, score them, put them into one table."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aldm.errors import UserError
from aldm.words import counted
from pipelines.arguments import JobParser, job_parser, resolve_config
from pipelines.benchmark_codecs import CODECS, CodecTerms, check_codecs, plan_codec
from pipelines.benchmark_plan import BENCHMARKED, MethodsBenchmark, Terms, check_methods, plan_entry
from pipelines.benchmark_run import Planned, check_folder, finished, flags_of, open_folder, run_all
from pipelines.ray_pool import add_worker_arguments

if TYPE_CHECKING:
    from aldm.config import Config
    from aldm.data.store import VolumeStore

DESCRIPTION = """Train methods under one time budget on one split, score them on the held-out subjects, and write one
table with the rows that keep a model honest, pictures side by side and MLflow runs under one parent. With --codecs it
trains codecs instead, and writes what their reconstructions are worth per scalar and per bit. Started again with the
same --out it goes on where it stopped; more methods, codecs and seeds may be added then, and the table holds all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm benchmark ARGUMENTS`.

    Raises:
        UserError: everything that the user can fix; what is finished is kept.
    """
    args = _parser().parse_args(argv)
    _check_mode(args)
    if args.seeds < 1:
        raise UserError(f"--seeds is {args.seeds}, wanted at least 1")
    if not args.budget > 0:
        raise UserError(f"--budget is {args.budget}, wanted minutes above 0")
    config = resolve_config(args)
    from aldm.data.store import VolumeStore

    store = VolumeStore.open(args.store.absolute())
    return _methods(args, config, store) if args.codecs is None else _codecs(args, config, store)


def _methods(args: argparse.Namespace, config: "Config", store: "VolumeStore") -> int:
    """Benchmark methods of translation."""
    methods = args.methods or list(BENCHMARKED)
    check_methods(methods)
    _check_pair(store, args.source, args.target)
    benchmark = MethodsBenchmark(
        store=args.store.absolute(),
        fingerprint=store.fingerprint,
        out=args.out.absolute(),
        pair=(args.source, args.target),
        minutes=args.budget,
        flags=flags_of(args),
        vit_weights=None if args.vit_weights is None else args.vit_weights.absolute(),
    )
    plan = partial(plan_entry, benchmark=benchmark, config=config)
    entries = [plan(method, seed) for seed in range(args.seeds) for method in methods]
    if not _begin(entries, benchmark, args):
        return 0
    run_all(entries, benchmark, args)
    from pipelines.benchmark_table import TABLE, write_benchmark

    print(write_benchmark(benchmark, finished(benchmark.out, BENCHMARKED, plan), store))
    print(f"\neverything: {args.out / TABLE}")
    return 0


def _codecs(args: argparse.Namespace, config: "Config", store: "VolumeStore") -> int:
    """Benchmark codecs."""
    names = args.codecs or list(CODECS)
    check_codecs(names, config, store)
    terms = CodecTerms(
        store=args.store.absolute(),
        fingerprint=store.fingerprint,
        out=args.out.absolute(),
        minutes=args.budget,
        flags=flags_of(args),
    )
    plan = partial(plan_codec, terms=terms, config=config)
    entries = [plan(name, seed) for seed in range(args.seeds) for name in names]
    if not _begin(entries, terms, args):
        return 0
    run_all(entries, terms, args)
    from aldm.device import select_device
    from pipelines.benchmark_codecs_scores import score_all
    from pipelines.benchmark_codecs_table import TABLE, write_codecs

    done = finished(terms.out, list(CODECS), plan)
    print(write_codecs(terms, done, score_all(terms, done, store, select_device(args.device)), store))
    print(f"\neverything: {args.out / TABLE}")
    return 0


def _begin(entries: Sequence[Planned], terms: Terms, args: argparse.Namespace) -> bool:
    """Say how long it takes and open the folder; in a dry run print the commands instead, and return False."""
    hours = len(entries) * args.budget / 60
    print(f"{counted(len(entries), 'training')} of {args.budget:g} min: about {hours:.1f} h one after another")
    if args.dry_run:
        check_folder(terms.out, terms.settings())
        print("\n".join(f"aldm {' '.join(command)}" for entry in entries for command in entry.commands()))
        return False
    open_folder(terms.out, terms.settings())
    return True


def _check_mode(args: argparse.Namespace) -> None:
    """Methods need a pair; codecs take nothing of the methods'."""
    own = {"--source": args.source, "--target": args.target, "--methods": args.methods}
    own["--vit-weights"] = args.vit_weights
    if args.codecs is None and None in (args.source, args.target):
        raise UserError("give the pair to translate, --source and --target, or --codecs to measure codecs instead")
    given = [flag for flag, value in own.items() if value is not None]
    if args.codecs is not None and given:
        raise UserError(f"--codecs measures codecs, which translate nothing: leave out {', '.join(given)}")


def _check_pair(store: "VolumeStore", source: str, target: str) -> None:
    from aldm.data.modalities import check_modality

    check_modality("source", source, store.modalities)
    check_modality("target", target, store.modalities)
    if source == target:
        raise UserError(f"--source and --target are both {source}, wanted two different modalities")
    for split in ("train", "test"):
        if not any({source, target} <= set(record.modalities) for record in store.subjects(split)):
            raise UserError(f"the store {store.path} has no subject in the split {split} with {source} and {target}")


def _parser() -> JobParser:
    parser = job_parser("benchmark", DESCRIPTION)
    parser.add_argument("--store", type=Path, required=True, help="store of volumes, from aldm prepare")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that the benchmark makes")
    parser.add_argument("--source", metavar="MODALITY", help="translate from this one (needed without --codecs)")
    parser.add_argument("--target", metavar="MODALITY", help="into this one (needed without --codecs)")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"of {', '.join(BENCHMARKED)} (default: all)",
    )
    parser.add_argument(
        "--codecs",
        nargs="*",
        metavar="CODEC",
        help=f"measure codecs instead of methods: of {', '.join(CODECS)} (without a name all of them)",
    )
    parser.add_argument(
        "--budget", type=float, default=10, metavar="MINUTES", help="training time of each method or codec"
    )
    parser.add_argument(
        "--vit-weights", type=Path, metavar="FILE", help="as of aldm train resvit (default: random, and said so)"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="trainings of each of them, seeds 0 to N - 1")
    add_worker_arguments(parser, "a method or codec with one seed")
    return parser
