"""aldm encode: encode a store of volumes once into a store of latents."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aldm.config import Shape
from aldm.errors import UserError
from aldm.words import counted
from pipelines.arguments import JobParser, job_parser, resolve_config
from pipelines.ray_pool import WantedWorkers, add_worker_arguments, open_workers

if TYPE_CHECKING:
    from aldm.models.codecs import Codec


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm encode ARGUMENTS`."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.codec is None and args.like is None:
        parser.error("one of the arguments --codec, --like is required")
    config = resolve_config(args)
    if args.max_memory_gb is not None and not 0 < args.max_memory_gb < math.inf:
        raise UserError(f"--max-memory-gb is {args.max_memory_gb:g}, wanted a number above 0")
    from aldm.device import select_device
    from aldm.encoding import Encoding
    from aldm.precision import usable_precision

    device = select_device(args.device if args.num_workers is None else "cpu")
    store = args.store.absolute()  # workers elsewhere have another working folder
    encoding = Encoding.check(
        store, args.out, config=config, codec=args.codec, like=args.like, flips=args.flips, overwrite=args.overwrite
    )
    with open_workers(WantedWorkers.of(args), use_gpus=True) as workers:
        if workers is None:
            encode = encoding.encoder(device, args.max_memory_gb)
        else:
            encode = encoding.worker_encoder(workers.device, args.max_memory_gb)
        if args.dry_run:
            where = device if workers is None else workers.describe()
            subjects = counted(len(encoding.store.subjects()), "subject")
            print(f"would encode {subjects} into {args.out}: {encoding.needed_gib:.3f} GiB; {where}")
            precision = usable_precision(config.precision, device)
            print(_memory_plan(encoding.codec, encoding.shape, precision, args.max_memory_gb))
            return 0
        latents = encoding.run(encode, device, workers)
    print(f"{args.out}: latents of {counted(len(latents.subjects()), 'subject')}, codec {latents.codec_hash[:12]}")
    return 0


def _memory_plan(codec: "Codec", shape: Shape, precision: str, max_memory_gb: float | None) -> str:
    """Return the line of a dry run that says how much memory a process that encodes will hold."""
    from aldm.encoding import encoding_bytes
    from aldm.memory import gigabytes, resident_bytes

    bounded = max_memory_gb is not None
    needed = gigabytes(resident_bytes() + encoding_bytes(codec, shape, precision, bounded=bounded))
    if bounded:
        return f"memory: at most {max_memory_gb:g} GB a process (the least --max-memory-gb is about {needed} GB)"
    return f"memory: about {needed} GB a process"


def _parser() -> JobParser:
    parser = job_parser("encode", "Encode every volume of a store once, into a store of latents.")
    parser.add_argument("--store", type=Path, required=True, help="store of volumes, from aldm prepare")
    parser.add_argument(
        "--codec",
        metavar="RUN|haar",
        help="run folder of stage 1, a translator folder, or haar: the lossless codec, which needs no training "
        "(default: that of --like)",
    )
    parser.add_argument(
        "--like",
        metavar="MODEL",
        help="make the latents that aldm train --init-from MODEL fine-tunes on, standardised with the model's mean and "
        "standard deviation: a translator folder or default (the built-in one); a run folder of ms-spade or diffusion "
        "needs --codec as well (default: their own mean and standard deviation)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the latents")
    parser.add_argument(
        "--max-memory-gb",
        type=float,
        metavar="G",
        help="encode slab by slab, a process holding at most G GB (default: whole volumes at once)",
    )
    parser.add_argument("--flips", action="store_true", help="store every volume flipped left to right as well")
    parser.add_argument("--overwrite", action="store_true", help="replace the latents in --out")
    add_worker_arguments(parser, "a subject")
    return parser
