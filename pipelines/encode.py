"""aldm encode: encode a store of volumes once into a store of latents."""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from aldm.config import CodecConfig, Config, Shape
from aldm.errors import UserError
from aldm.words import counted
from pipelines.arguments import JobParser, job_parser, resolve_config, select_device
from pipelines.ray_workers import add_worker_arguments, open_workers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from aldm.data.store import VolumeStore
    from aldm.latents import ModelLatents
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
    import torch

    from aldm.data.store import VolumeStore
    from aldm.files import check_folder, free_gib
    from aldm.latents import LATENTS_FILE, cache_bytes, codec_hash, encode_store
    from aldm.precision import usable_precision
    from aldm.starting_model import model_folder

    device = select_device(args) if args.num_workers is None else torch.device("cpu")
    store = VolumeStore.open(args.store.absolute())  # workers elsewhere have another working folder
    codec, codec_config = load_codec(args.codec or args.like, config)
    like = None if args.like is None else _like(args.like, store, codec_hash(codec_config, codec.state_dict()))
    check_folder(args.out, args.overwrite, marker=LATENTS_FILE)
    need_gib, have_gib = cache_bytes(store, codec, args.flips) / 2**30, free_gib(args.out.parent)
    if need_gib > have_gib:
        raise UserError(
            f"the latents need {need_gib:.2f} GiB and {args.out.parent} has {have_gib:.2f} GiB free: free some space "
            "or write elsewhere"
        )
    shape = store.preprocess.spatial_shape
    with open_workers(args, use_gpus=True) as workers:
        encode: Callable[[Tensor], Tensor]
        if workers is None:
            encode = encoder(codec, shape, device, config.precision, args.max_memory_gb)
        else:
            place = "haar" if args.codec == "haar" else str(model_folder(args.codec or args.like).absolute())
            encode = WorkerEncoder(place, config, shape, workers.device, args.max_memory_gb)
        if args.dry_run:
            where = device if workers is None else workers.describe()
            subjects = counted(len(store.subjects()), "subject")
            print(f"would encode {subjects} into {args.out}: {need_gib:.3f} GiB; {where}")
            print(memory_plan(codec, shape, usable_precision(config.precision, device), args.max_memory_gb))
            return 0
        latents = encode_store(
            store,
            codec,
            codec_config,
            args.out,
            flips=args.flips,
            device=device,
            encode=encode,
            overwrite=args.overwrite,
            workers=workers,
            like=like,
        )
    print(f"{args.out}: latents of {counted(len(latents.subjects()), 'subject')}, codec {latents.codec_hash[:12]}")
    return 0


def encoder(
    codec: "Codec", shape: Shape, device: "torch.device", precision: str, max_memory_gb: float | None
) -> Callable[["Tensor"], "Tensor"]:
    """Return the function that encodes a volume (1, 1, X, Y, Z): at once, or slab by slab within a memory limit.

    Args:
        codec: frozen.
        shape: of the volumes.
        device: where to encode.
        precision: fp32, tf32 or bf16 autocast; a lossless codec stays in fp32.
        max_memory_gb: the most that this process may hold on a CPU, GB (10^9); None takes the whole volume at once.

    Raises:
        UserError: the limit is below what the codec can do, or the whole volume does not fit into the memory.
    """
    import psutil

    from aldm.memory import gigabytes, resident_bytes
    from aldm.models.slabs import encode_bounded
    from aldm.precision import arithmetic, usable_precision

    precision = usable_precision(precision, device)
    autocast = arithmetic(precision, device, lower=not codec.isometric, cache_enabled=False)

    def whole(x: "Tensor") -> "Tensor":
        with autocast:
            return codec.encode(x)

    def bounded(x: "Tensor") -> "Tensor":
        with autocast:
            return encode_bounded(codec, x, int(max_memory_gb * 1e9) - resident_bytes())  # type: ignore[operator]

    if max_memory_gb is not None:
        needed = resident_bytes() + encoding_bytes(codec, shape, precision, bounded=True)
        if max_memory_gb * 1e9 < needed:
            raise UserError(f"--max-memory-gb {max_memory_gb} is too little: encoding needs {gigabytes(needed)} GB")
        return bounded
    free = psutil.virtual_memory().available
    if device.type == "cpu" and (needed := encoding_bytes(codec, shape, precision, bounded=False)) > free:
        raise UserError(
            f"encoding a whole volume of {' x '.join(map(str, shape))} voxels needs {gigabytes(needed)} GB and "
            f"{gigabytes(free)} GB of memory are free: give --max-memory-gb, then it is encoded slab by slab"
        )
    return whole


def encoding_bytes(codec: "Codec", shape: Shape, precision: str, *, bounded: bool) -> int:
    """Return what encoding one volume needs beside the program and the codec, bytes; if bounded, the least.

    Args:
        codec: on the CPU.
        shape: of the volume.
        precision: fp32, tf32 or bf16.
        bounded: slab by slab instead of the whole volume at once.
    """
    import torch

    from aldm.memory import peak_bytes
    from aldm.models.slabs import floor_bytes

    if bounded:
        return floor_bytes(codec, shape)
    lower = precision == "bf16" and not codec.isometric
    with torch.autocast("cpu", torch.bfloat16, enabled=lower, cache_enabled=False):
        return peak_bytes(lambda: codec.encode(torch.zeros(1, 1, *shape)))


def memory_plan(codec: "Codec", shape: Shape, precision: str, max_memory_gb: float | None) -> str:
    """Return the line of a dry run that says how much memory a process that encodes will hold."""
    from aldm.memory import gigabytes, resident_bytes

    bounded = max_memory_gb is not None
    needed = gigabytes(resident_bytes() + encoding_bytes(codec, shape, precision, bounded=bounded))
    if bounded:
        return f"memory: at most {max_memory_gb:g} GB a process (the least --max-memory-gb is about {needed} GB)"
    return f"memory: about {needed} GB a process"


@dataclass(eq=False)
class WorkerEncoder:
    """The `encoder` of a worker: loads the codec there, for the first volume, and heeds that machine's memory."""

    codec: str
    """haar, or the run folder of stage 1."""
    config: Config
    shape: Shape
    device: str
    max_memory_gb: float | None
    _encode: Callable[["Tensor"], "Tensor"] | None = field(default=None, init=False)

    def __call__(self, x: "Tensor") -> "Tensor":
        if self._encode is None:
            device = select_device(argparse.Namespace(device=self.device))
            codec, _ = load_codec(self.codec, self.config)
            codec = codec.to(device).eval()
            self._encode = encoder(codec, self.shape, device, self.config.precision, self.max_memory_gb)
        return self._encode(x.to(self.device))


def load_codec(name_or_run: str, config: Config) -> tuple["Codec", CodecConfig]:
    """Return the codec of a run of stage 1 or of a translator folder, or the lossless haar codec, and its CodecConfig.

    Args:
        name_or_run: haar, default (the built-in model), or a folder.
        config: what haar is built from.

    Raises:
        UserError: no such word, or a folder that holds no trained codec.
    """
    from aldm.checkpoint import load_checkpoint, load_weights
    from aldm.models.codecs import build_codec
    from aldm.starting_model import DEFAULT, model_folder, part_of

    if name_or_run == "haar":
        codec_config = replace(config.codec, kind="haar")
        return build_codec(codec_config), codec_config
    if name_or_run != DEFAULT and not Path(name_or_run).is_dir():
        raise UserError(
            f"--codec {name_or_run!r} is neither haar nor the run folder of an aldm train vqgan or a translator folder"
        )
    checkpoint = load_checkpoint(model_folder(name_or_run), "codec", "aldm")
    codec = build_codec(checkpoint.config.codec)
    names = codec.state_dict()
    load_weights(codec, part_of(checkpoint.weights, "codec") if names else {}, checkpoint.path)
    return codec, checkpoint.config.codec


def _like(word: str, store: "VolumeStore", codec_hash: str) -> "ModelLatents":
    """Return what the latents take over from the model that is to be trained on with them."""
    from aldm.checkpoint import load_checkpoint
    from aldm.starting_model import StartingModel, model_folder

    model = StartingModel(load_checkpoint(model_folder(word)))
    found = model.latents()
    model.check_encoding(store, codec_hash)
    return found


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
