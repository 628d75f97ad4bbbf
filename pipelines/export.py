"""aldm export: put trained stages together into a translator folder, which is all that using the model needs."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from aldm.errors import UserError
from aldm.pairs import pairs_in_words
from aldm.presets import load_preset
from pipelines.arguments import JobParser, job_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm export ARGUMENTS`."""
    parser = _parser()
    args = parser.parse_args(argv)
    _check_parts(parser, args)
    if args.alias is not None and args.register is None:
        parser.error("--alias names a version of a registered model: give --register NAME as well")
    from aldm.checkpoint import CONFIG
    from aldm.device import select_device
    from aldm.export import aldm_model, baseline_model, halved, used_config, with_uncertainty, write_model
    from aldm.files import check_folder
    from aldm.memory import gigabytes, resident_bytes

    if args.preset is not None:
        load_preset(args.preset)  # a model's configuration is its own, but a wrong name is refused
    check_folder(args.out, args.overwrite, marker=CONFIG)
    if args.register is not None:
        _check_registry(args)
    if args.model is not None:
        changes = args.set, args.precision
        model = with_uncertainty(args.model, args.uncertainty, args.store, select_device(args.device), changes)
    elif args.baseline is not None:
        model = baseline_model(args.baseline)
    else:
        model = aldm_model(args.codec, args.ms_spade, args.diffusion)
    model = replace(model, config=used_config(model.kind, model.config, args.set, args.precision))
    if args.half:
        model = replace(model, weights=halved(model.weights))
    number = sum(tensor.numel() for tensor in model.weights.values())
    if args.dry_run:
        print(f"would write {args.out}: a model of kind {model.kind}, {number:,} numbers")
        if args.register is not None:
            print(f"would register it as {args.register}")
        held, copy = resident_bytes(), sum(tensor.nbytes for tensor in model.weights.values())
        print(f"memory: program and weights {gigabytes(held)} GB, writing them {gigabytes(copy)} GB more")
        return 0
    digest = write_model(model, args.out, scores=args.scores, overwrite=args.overwrite)
    print(f"{args.out}: {model.kind} model for {pairs_in_words(model.config, model.kind)}, hash {digest[:12]}")
    if args.register is not None:
        _register(args)
    return 0


def _check_parts(parser: JobParser, args: argparse.Namespace) -> None:
    """Refuse flags of two of the three ways to name a model."""
    ways = {
        "--codec, --ms-spade and --diffusion": (args.codec, args.ms_spade, args.diffusion),
        "--baseline": (args.baseline,),
        "--model, --uncertainty and --store": (args.model, args.uncertainty, args.store),
    }
    begun = [name for name, parts in ways.items() if any(part is not None for part in parts)]
    if len(begun) != 1 or None in ways[begun[0]]:
        wanted = "; or ".join(ways)
        raise UserError(
            f"--out needs what it is made of, all of one kind: {wanted}; got {' with '.join(begun) or 'none'}"
        )


def _check_registry(args: argparse.Namespace) -> None:
    """Refuse names and a server that MLflow will not take, before anything is written."""
    from pipelines.registry import check_names
    from pipelines.tracking_server import check_server, tracking_uri

    check_names(args.register, args.alias)
    check_server(tracking_uri(args.out))


def _register(args: argparse.Namespace) -> None:
    from pipelines.registry import register
    from pipelines.tracking_server import tracking_uri

    uri = tracking_uri(args.out)
    try:
        version = register(args.out, args.register, args.alias, uri)
    except UserError as error:
        raise UserError(f"{args.out} is written, but not registered as {args.register}: {error}") from error
    address = f"models:/{args.register}@{args.alias}" if args.alias else f"models:/{args.register}/{version}"
    print(f"registered as {args.register} version {version}: MLFLOW_TRACKING_URI={uri}, {address}")


def _parser() -> JobParser:
    parser = job_parser("export", "Put trained stages together into a translator folder.")
    parser.add_argument("--codec", metavar="RUN|haar", help="run folder of stage 1, a translator folder, or haar")
    parser.add_argument("--ms-spade", type=Path, metavar="RUN", help="run folder of stage 2")
    parser.add_argument("--diffusion", type=Path, metavar="RUN", help="run folder of stage 3")
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="RUN",
        help="run folder of the regression U-Net or of a comparison method, instead of the three",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a translator folder, to which --uncertainty is added, instead of all that",
    )
    parser.add_argument(
        "--uncertainty",
        type=Path,
        metavar="RUN",
        help="with --model: run folder of aldm train uncertainty on it; its factors are fitted on the validation "
        "subjects of --store",
    )
    parser.add_argument("--store", type=Path, help="with --uncertainty: store of volumes, from aldm prepare")
    parser.add_argument("--out", type=Path, required=True, help="the translator folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in --out")
    parser.add_argument(
        "--half",
        action="store_true",
        help="keep the weights as 16-bit numbers: half the size; measure what that costs with aldm evaluate",
    )
    parser.add_argument(
        "--scores",
        type=Path,
        metavar="DIR",
        help="evaluation of this very model (aldm evaluate --out DIR), to be kept in its card, which the service shows "
        "(default: the card has the trainings' own validation scores alone)",
    )
    parser.add_argument(
        "--register",
        metavar="NAME",
        help="register the model with MLflow as a new version of NAME: at MLFLOW_TRACKING_URI, or in the file "
        "mlflow.db beside --out (default: not registered)",
    )
    parser.add_argument(
        "--alias",
        help="with --register: let this alias, such as champion, point to the new version (default: no alias)",
    )
    return parser
