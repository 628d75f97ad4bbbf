"""aldm promote: register a model and make it the champion if an evaluation says that it is better."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from aldm.errors import UserError
from pipelines.arguments import JobParser, job_parser
from pipelines.champion import ALIAS, FORMER, ChampionComparison, find_hash, read_comparison, set_champion, swap_back
from pipelines.registry import check_names, register
from pipelines.registry_download import Registered, find_alias
from pipelines.tracking_server import check_server, tracking_uri

DESCRIPTION = f"""Register a translator and let the champion's alias point to it, if it beat the champion in an
evaluation (aldm evaluate --champion NAME@ALIAS): its mean PSNR over the subjects and all pairs of two different
modalities that both translate, inside the brain or foreground, is higher. Where there is no champion yet it becomes
one. A model that cannot translate a small simulated volume is refused. The champion that it replaces keeps its version
and gets the alias {FORMER}. Run again it does nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm promote ARGUMENTS`.

    Raises:
        UserError: everything that the user can fix; a model that is not better is none of that.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    check_names(args.register, args.alias)
    if args.alias == FORMER:
        raise UserError(f"--alias {FORMER} is what the champion before gets: take another")
    if args.rollback:
        return _rollback(args)
    if args.model is None or args.scores is None:
        parser.error("give --model and --scores, or --rollback")
    comparison = _checked(args)
    server = tracking_uri(args.model)
    check_server(server)
    now = find_alias(args.register, args.alias, server)
    print(comparison.verdict(args.min_gain_db))
    if now is not None and now.hash == comparison.model_hash:
        print(f"it is the {args.alias} already: {now.address}")
        return 0
    if now != comparison.champion:
        raise UserError(
            f"the {args.alias} of {args.register} is {'none' if now is None else now.address}, and not the one that "
            f"{args.scores} compares with: run aldm evaluate --champion {args.register}@{args.alias} again"
        )
    if not comparison.wins(args.min_gain_db):
        print(f"not registered: {args.register}@{args.alias} stays as it is")
        return 0
    _try_out(args.model, args)
    if args.dry_run:
        print(f"would register {args.model} as {args.register} and make it the {args.alias}")
        return 0
    made = _register(args, comparison, server)
    set_champion(made, args.alias, now, server)
    former = "" if now is None else f"; the one before it, {now.address}, is {args.register}@{FORMER}"
    print(f"registered: {made.address} is {args.register}@{args.alias} at {server}{former}")
    return 0


def _checked(args: argparse.Namespace) -> ChampionComparison:
    """Return what the evaluation says, which has to be of this very model."""
    from aldm.checkpoint import read_checkpoint_record

    comparison = read_comparison(args.scores)
    if comparison.model_hash != read_checkpoint_record(args.model)["hash"]:
        raise UserError(f"{args.scores} is an evaluation of another model than {args.model}: evaluate this one")
    return comparison


def _try_out(model: Path, args: argparse.Namespace) -> None:
    """Make one translation with the model, as `aldm k8s roll` does: nobody is pointed to one that does not work.

    Raises:
        UserError: it does not work.
    """
    from aldm.device import select_device
    from aldm.smoke_test import smoke_test

    device = "cpu" if args.device == "auto" else str(select_device(args.device))
    try:
        print(smoke_test(model, device=device), flush=True)
    except UserError as error:
        raise UserError(f"not registered: {error}") from error


def _register(args: argparse.Namespace, comparison: ChampionComparison, server: str) -> Registered:
    """Register the model; a version with these weights, left by a start that was stopped, will do."""
    found = find_hash(args.register, comparison.model_hash, server)
    if found is not None:
        return found
    return Registered(args.register, register(args.model, args.register, None, server), comparison.model_hash)


def _rollback(args: argparse.Namespace) -> int:
    if args.model is not None or args.scores is not None:
        raise UserError("--rollback goes without --model and --scores")
    server = tracking_uri(Path.cwd() / "model")
    if args.dry_run:
        print(f"would let {args.alias} and {FORMER} of {args.register} change places")
        return 0
    champion, before = swap_back(args.register, args.alias, server)
    print(f"{champion.address} is {args.register}@{args.alias} again, {before.address} is {args.register}@{FORMER}")
    return 0


def _parser() -> JobParser:
    parser = job_parser("promote", DESCRIPTION)
    parser.add_argument("--model", type=Path, metavar="DIR", help="translator folder, written by aldm export")
    parser.add_argument(
        "--scores", type=Path, metavar="DIR", help="its evaluation: the --out of aldm evaluate --champion NAME@ALIAS"
    )
    parser.add_argument(
        "--register",
        required=True,
        metavar="NAME",
        help="registered model, at MLFLOW_TRACKING_URI or in the file mlflow.db beside --model",
    )
    parser.add_argument("--alias", default=ALIAS, help="alias of the champion")
    parser.add_argument(
        "--min-gain-db", type=float, default=0.0, metavar="G", help="by how much the PSNR has to be higher, dB"
    )
    parser.add_argument(
        "--rollback",
        action="store_true",
        help=f"let the champion and the one before it (alias {FORMER}) change places instead",
    )
    return parser
