"""Encoding with the codec of a model: a store of volumes becomes a store of latents."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

from aldm.checkpoint import load_checkpoint, load_weights
from aldm.config import CodecConfig, Config, Shape
from aldm.data.parallel import Workers
from aldm.data.store import VolumeStore
from aldm.device import select_device
from aldm.errors import UserError
from aldm.files import check_folder, free_gib
from aldm.latents import LATENTS_FILE, LatentStore, ModelLatents, cache_bytes, codec_hash, encode_store
from aldm.memory import gigabytes, peak_bytes, resident_bytes
from aldm.models.codecs import Codec, build_codec
from aldm.models.slabs import encode_bounded, floor_bytes
from aldm.precision import arithmetic, usable_precision
from aldm.starting_model import DEFAULT, StartingModel, model_folder, part_of

HAAR = "haar"
"""The word for the lossless codec, which needs no training."""


def encode_volumes(
    store: str | Path,
    out: str | Path,
    *,
    config: Config,
    codec: str | Path | None = None,
    like: str | Path | None = None,
    flips: bool = False,
    device: str = "auto",
    max_memory_gb: float | None = None,
    overwrite: bool = False,
) -> LatentStore:
    """Encode every volume of a store once, in this process, as `aldm encode` does.

    Args:
        store: folder of prepared volumes.
        out: folder of the latents; it appears when it is whole.
        config: what the haar codec is built from, and the precision.
        codec: haar, default (the built-in model), a run folder of stage 1 or an exported model; None takes that of
            `like`.
        like: model that is to be trained on with these latents, whose mean and standard deviation they get; None
            standardises them with their own.
        flips: store every volume flipped left to right too.
        device: cpu, cuda or auto.
        max_memory_gb: encode slab by slab, this process holding at most so many GB (10^9 bytes), on a CPU; None takes
            whole volumes.
        overwrite: replace latents in `out`.

    Raises:
        UserError: an input that is missing or does not go with the others, too little memory or disk, or `out` exists.
    """
    encoding = Encoding.check(store, out, config=config, codec=codec, like=like, flips=flips, overwrite=overwrite)
    place = select_device(device)
    return encoding.run(encoding.encoder(place, max_memory_gb), place)


@dataclass(frozen=True, eq=False, kw_only=True)
class Encoding:
    """A store, a codec and an output folder that go together."""

    store: VolumeStore
    out: Path
    config: Config
    codec_name: str
    """haar, or the folder of its weights, absolute."""
    codec: Codec
    codec_config: CodecConfig
    like: ModelLatents | None
    """What the latents take over from the model that is to be trained on with them."""
    flips: bool
    overwrite: bool
    needed_gib: float
    """Size of the latents on the disk."""

    @classmethod
    def check(
        cls,
        store: str | Path,
        out: str | Path,
        *,
        config: Config,
        codec: str | Path | None = None,
        like: str | Path | None = None,
        flips: bool = False,
        overwrite: bool = False,
    ) -> "Encoding":
        """Open everything and check that it goes together; arguments as of `encode_volumes`.

        Raises:
            UserError: neither `codec` nor `like`, one that is missing or does not fit, `out` exists, or the disk is
                too small.
        """
        word = codec or like
        if word is None:
            raise UserError("encoding needs a codec: name one as `codec`, or a model as `like`")
        opened = VolumeStore.open(store)
        name = str(word)
        module, codec_config = load_codec(name, config)
        own = None if like is None else _latents_of(str(like), opened, codec_hash(codec_config, module.state_dict()))
        check_folder(out, overwrite, marker=LATENTS_FILE)
        return cls(
            store=opened,
            out=Path(out),
            config=config,
            codec_name=HAAR if name == HAAR else str(model_folder(name).absolute()),
            codec=module,
            codec_config=codec_config,
            like=own,
            flips=flips,
            overwrite=overwrite,
            needed_gib=_check_disk(opened, module, flips, Path(out)),
        )

    @property
    def shape(self) -> Shape:
        """Voxels of a volume."""
        return self.store.preprocess.spatial_shape

    def encoder(self, device: torch.device, max_memory_gb: float | None) -> Callable[[Tensor], Tensor]:
        """Return what encodes a volume in this process: see `make_encoder`."""
        return make_encoder(self.codec, self.shape, device, self.config.precision, max_memory_gb)

    def worker_encoder(self, device: str, max_memory_gb: float | None) -> "WorkerEncoder":
        """Return what encodes a volume in another process, on cpu or cuda."""
        return WorkerEncoder(self.codec_name, self.config, self.shape, device, max_memory_gb)

    def run(
        self, encode: Callable[[Tensor], Tensor], device: torch.device, workers: Workers | None = None
    ) -> LatentStore:
        """Write the latents; `workers` encode a subject each instead of this process."""
        return encode_store(
            self.store,
            self.codec,
            self.codec_config,
            self.out,
            flips=self.flips,
            device=device,
            encode=encode,
            overwrite=self.overwrite,
            workers=workers,
            like=self.like,
        )


def load_codec(name_or_run: str, config: Config) -> tuple[Codec, CodecConfig]:
    """Return the codec of a run of stage 1 or of a translator folder, or the lossless haar codec, and its CodecConfig.

    Args:
        name_or_run: haar, default (the built-in model), or a folder.
        config: what haar is built from.

    Raises:
        UserError: no such word, or a folder that holds no trained codec.
    """
    if name_or_run == HAAR:
        codec_config = replace(config.codec, kind="haar")
        return build_codec(codec_config), codec_config
    if name_or_run != DEFAULT and not Path(name_or_run).is_dir():
        raise UserError(
            f"`codec` {name_or_run!r} is neither haar nor the run folder of an aldm train vqgan or a translator folder"
        )
    checkpoint = load_checkpoint(model_folder(name_or_run), "codec", "aldm")
    codec = build_codec(checkpoint.config.codec)
    names = codec.state_dict()
    load_weights(codec, part_of(checkpoint.weights, "codec") if names else {}, checkpoint.path)
    return codec, checkpoint.config.codec


def make_encoder(
    codec: Codec, shape: Shape, device: torch.device, precision: str, max_memory_gb: float | None
) -> Callable[[Tensor], Tensor]:
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
    precision = usable_precision(precision, device)
    autocast = arithmetic(precision, device, lower=not codec.isometric, cache_enabled=False)

    def whole(x: Tensor) -> Tensor:
        with autocast:
            return codec.encode(x)

    def bounded(x: Tensor) -> Tensor:
        with autocast:
            return encode_bounded(codec, x, int(max_memory_gb * 1e9) - resident_bytes())  # type: ignore[operator]

    if max_memory_gb is not None:
        needed = resident_bytes() + encoding_bytes(codec, shape, precision, bounded=True)
        if max_memory_gb * 1e9 < needed:
            raise UserError(f"`max_memory_gb` {max_memory_gb} is too little: encoding needs {gigabytes(needed)} GB")
        return bounded
    free = psutil.virtual_memory().available
    if device.type == "cpu" and (needed := encoding_bytes(codec, shape, precision, bounded=False)) > free:
        raise UserError(
            f"encoding a whole volume of {' x '.join(map(str, shape))} voxels needs {gigabytes(needed)} GB and "
            f"{gigabytes(free)} GB of memory are free: give `max_memory_gb`, then it is encoded slab by slab"
        )
    return whole


def encoding_bytes(codec: Codec, shape: Shape, precision: str, *, bounded: bool) -> int:
    """Return what encoding one volume needs beside the program and the codec, bytes; if bounded, the least.

    Args:
        codec: on the CPU.
        shape: of the volume.
        precision: fp32, tf32 or bf16.
        bounded: slab by slab instead of the whole volume at once.
    """
    if bounded:
        return floor_bytes(codec, shape)
    lower = precision == "bf16" and not codec.isometric
    with torch.autocast("cpu", torch.bfloat16, enabled=lower, cache_enabled=False):
        return peak_bytes(lambda: codec.encode(torch.zeros(1, 1, *shape)))


@dataclass(eq=False)
class WorkerEncoder:
    """The encoder of a worker: loads the codec there, for the first volume, and observes that machine's memory."""

    codec: str
    """haar, or the folder of its weights."""
    config: Config
    shape: Shape
    device: str
    max_memory_gb: float | None
    _encode: Callable[[Tensor], Tensor] | None = field(default=None, init=False)

    def __call__(self, x: Tensor) -> Tensor:
        if self._encode is None:
            device = select_device(self.device)
            codec, _ = load_codec(self.codec, self.config)
            codec = codec.to(device).eval()
            self._encode = make_encoder(codec, self.shape, device, self.config.precision, self.max_memory_gb)
        return self._encode(x.to(self.device))


def _latents_of(word: str, store: VolumeStore, codec_hash: str) -> ModelLatents:
    """Return what the latents take over from a model; refuse a store or a codec whose latents cannot be the model's."""
    model = StartingModel(load_checkpoint(model_folder(word)))
    found = model.latents()
    model.check_encoding(store, codec_hash)
    return found


def _check_disk(store: VolumeStore, codec: Codec, flips: bool, out: Path) -> float:
    """Return the size of the latents, GiB; refuse a disk that has less free."""
    need_gib, have_gib = cache_bytes(store, codec, flips) / 2**30, free_gib(out.parent)
    if need_gib > have_gib:
        raise UserError(
            f"the latents need {need_gib:.2f} GiB and {out.parent} has {have_gib:.2f} GiB free: free some space "
            "or write elsewhere"
        )
    return need_gib
