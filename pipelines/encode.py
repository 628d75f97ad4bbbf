"""aldm encode: encode a store of volumes once into a store of latents."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aldm.config import Config
from aldm.errors import UserError
from pipelines.arguments import JobParser, job_parser, resolve_config, select_device

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm encode ARGUMENTS`."""
    args = _parser().parse_args(argv)
    config = resolve_config(args)
    device = select_device(args)
    from aldm.data.store import VolumeStore
    from aldm.files import check_folder, free_gib
    from aldm.latents import LATENTS_FILE, cache_bytes, encode_store

    store = VolumeStore.open(args.store)
    codec, codec_config = load_codec(args.codec, config)
    check_folder(args.out, args.overwrite, marker=LATENTS_FILE)
    need_gib, have_gib = cache_bytes(store, codec, args.flips) / 2**30, free_gib(args.out.parent)
    if need_gib > have_gib:
        raise UserError(
            f"the latents need {need_gib:.2f} GiB and {args.out.parent} has {have_gib:.2f} GiB free: free some space "
            "or write elsewhere"
        )
    if args.dry_run:
        print(f"would encode {len(store.subjects())} subjects into {args.out}: {need_gib:.3f} GiB on {device}")
        return 0
    latents = encode_store(
        store, codec, codec_config, args.out, flips=args.flips, device=device, overwrite=args.overwrite
    )
    print(f"{args.out}: latents of {len(latents.subjects())} subjects, codec {latents.codec_hash[:12]}")
    return 0


def load_codec(name_or_run: str, config: Config) -> tuple[Any, Any]:
    """Return the codec of a run of stage 1, or the lossless haar codec, and its CodecConfig.

    Raises:
        UserError: neither "haar" nor a folder that holds a trained codec.
    """
    from aldm.checkpoint import load_checkpoint, load_weights
    from aldm.models.codecs import build_codec
    from aldm.run_folder import checkpoint_folder

    if name_or_run == "haar":
        codec_config = replace(config.codec, kind="haar")
        return build_codec(codec_config), codec_config
    if not Path(name_or_run).is_dir():
        raise UserError(f"--codec {name_or_run!r} is neither haar nor the run folder of an aldm train vqgan")
    checkpoint = load_checkpoint(checkpoint_folder(name_or_run), "codec")
    codec = build_codec(checkpoint.config.codec)
    load_weights(codec, checkpoint.weights, checkpoint.path)
    return codec, checkpoint.config.codec


def _parser() -> JobParser:
    parser = job_parser("encode", "Encode every volume of a store once, into a store of latents.")
    parser.add_argument("--store", type=Path, required=True, help="store of volumes, from aldm prepare")
    parser.add_argument(
        "--codec",
        required=True,
        metavar="RUN|haar",
        help="run folder of stage 1, or haar: the lossless codec, which needs no training",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the latents")
    parser.add_argument("--flips", action="store_true", help="store every volume flipped left to right as well")
    parser.add_argument("--overwrite", action="store_true", help="replace the latents in --out")
    return parser
