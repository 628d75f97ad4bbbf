"""Speed and memory against the plain way, each as a ratio measured in one run. Prints a Markdown table.

    python tests/benchmarks/ratios.py

Simulated subjects at 3 mm, preset small; times are medians, memory is the peak of a process of its own.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aldm.presets import small

if TYPE_CHECKING:
    from aldm.data.store import VolumeStore
    from aldm.latents import LatentStore
    from aldm.models.codecs import Codec

STEPS = 50
"""Steps over which a training step's time is the mean."""


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of a call after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def peak_mb(case: str) -> float:
    """Peak memory of `case` above the imports, MB, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, case], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def _codec(kind: str) -> torch.nn.Module:
    from aldm.models.codecs import build_codec

    torch.manual_seed(0)
    return build_codec(replace(small().codec, kind=kind)).eval()


def _memory_case(case: str) -> None:
    """Run one case and print its peak above where it began."""
    from aldm.models.quantizer import nearest_code
    from aldm.models.slabs import decode_bounded

    torch.manual_seed(0)
    prepare = {
        "search": lambda: (torch.randn(20_736, 3), torch.randn(8192, 3)),
        "decode": lambda: (_codec("vqgan"), torch.randn(1, 4, 32, 32, 24)),
    }[case.split("-")[0]]
    first, second = prepare()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    begin = _status_kb("VmRSS")
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        if case == "search-chunked":
            nearest_code(first, second)
        elif case == "search-naive":
            torch.cdist(first, second).argmin(dim=1)
        elif case == "decode-bounded":
            decode_bounded(first, second, 192 * 2**20, Path(scratch))
        else:
            first.decode(second)
    print((_status_kb("VmHWM") - begin) / 1000)


def _status_kb(name: str) -> int:
    """Return a field of /proc/self/status, kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def training_step(folder: Path) -> tuple[float, float]:
    """Seconds of a stage 3 step that reads latents, and of one that encodes the pair's volumes with the vqgan first.

    Both are steps of `fit` on a DiffusionStage: the U-Net, its optimizer, the moving average, MS-SPADE's outputs from
    memory once they are there. The mean over the last STEPS of three times as many.
    """
    from aldm.data.store import VolumeStore
    from aldm.denoising import build_ms_spade
    from aldm.latents import LatentStore, encode_store
    from aldm.stages import DiffusionStage
    from aldm.training import PlainEngine, fit

    store, codec = VolumeStore.open(folder), _codec("vqgan")
    config = small()
    training = replace(
        config.train_diffusion,
        image_space_loss=False,  # the vqgan's latents have none
        max_steps=3 * STEPS,
        log_every=STEPS,
        validate_every=10**6,
        checkpoint_every=10**6,
    )
    config = replace(
        config,
        modalities=store.modalities,
        codec=replace(config.codec, kind="vqgan"),
        ms_spade=replace(config.ms_spade, intensity_map=False),  # which needs the lossless codec
        train_diffusion=training,
    )
    path = folder.parent / "latents"
    encode_store(store, codec, config.codec, path)

    def step_seconds(encoding: bool) -> float:
        torch.manual_seed(0)
        latents = LatentStore.open(path)
        if encoding:
            latents = _EncodedAtOnce(latents, store, codec, config.precision)
        stage = DiffusionStage(config, latents, build_ms_spade(config, latents.latent_channels), "0" * 64)
        elapsed: dict[int, float] = {}

        def on_log(record: dict[str, Any]) -> None:
            if "elapsed_s" in record:
                elapsed[record["step"]] = record["elapsed_s"]

        fit(
            stage,
            PlainEngine("cpu", config.precision),
            training,
            seed=0,
            on_log=on_log,
            on_checkpoint=lambda snapshot: None,
        )
        return (elapsed[3 * STEPS] - elapsed[2 * STEPS]) / STEPS

    return step_seconds(encoding=False), step_seconds(encoding=True)


class _EncodedAtOnce:
    """A latent store that encodes a volume of the store of volumes whenever its latent is asked for."""

    def __init__(self, latents: "LatentStore", store: "VolumeStore", codec: "Codec", precision: str) -> None:
        self._latents, self._store, self._codec, self._precision = latents, store, codec, precision

    def __getattr__(self, name: str) -> Any:
        return getattr(self._latents, name)

    @torch.no_grad()
    def latent(self, subject_id: str, modality: str, flip: int = 0) -> np.ndarray:
        """Return what the latent store would, computed now in the precision that aldm encode takes."""
        volume = torch.from_numpy(self._store.volume(subject_id, modality))[None, None]
        with torch.autocast("cpu", torch.bfloat16, enabled=self._precision == "bf16"):
            z = self._codec.encode(volume)[0].float().numpy()
        mean, std = self._latents.mean, self._latents.std
        return (z - mean[:, None, None, None]) / std[:, None, None, None]


def epoch(tree: Path, folder: Path) -> tuple[float, float]:
    """Seconds to read every volume once from the store, and from NIfTI files with the preprocessing."""
    from aldm.data.preprocess import prepare_volume
    from aldm.data.store import VolumeStore
    from aldm.data.volume import load_nifti

    store = VolumeStore.open(folder)
    files = sorted(tree.rglob("*.nii.gz"))
    config = store.preprocess

    def from_store() -> None:
        for record in store.subjects():
            for name in record.modalities:
                store.volume(record.subject_id, name)

    def from_files() -> None:
        for file in files:
            prepare_volume(load_nifti(file)[0], config)

    return seconds(from_store, 3), seconds(from_files, 1)


def codec_step(kind: str) -> float:
    """Seconds of one forward and backward pass of a codec on a 48^3 crop."""
    codec = _codec(kind)
    codec.train()
    x = torch.randn(1, 1, 48, 48, 48)

    def step() -> None:
        codec(x).reconstruction.square().mean().backward()

    return seconds(step, 3)


def training_rate(name: str) -> tuple[float, float]:
    """Seconds of a training step of small() for four modalities, its data in memory, and its operations."""
    from aldm.config import training_of
    from aldm.planner import plan_memory, stage_and_batch
    from aldm.players import StepInfo
    from aldm.training import PlainEngine

    config = replace(small(), modalities=("t1", "t1ce", "t2", "flair"))
    training = training_of(config, name)
    ids = {key: torch.zeros(training.batch_size, dtype=torch.long) for key in ("source", "target", "flip")}
    ids["target"] += 1
    stage, _, batch, _ = stage_and_batch(config, name, training, ids)
    engine, (player,) = PlainEngine("cpu", config.precision), stage.players
    module = engine.prepare(player)
    stage.connect(engine)
    info = StepInfo(0, [torch.Generator() for _ in range(training.batch_size)], frozenset({player.name}))

    def step() -> None:
        with engine.autocast():
            loss, _ = player.loss(module, batch, info)
        engine.backward(player, loss)
        engine.step(player, 1e-4)

    return seconds(step, 9) / training.batch_size, plan_memory(config, name).flops / training.batch_size


def main() -> None:
    """Measure and print."""
    from aldm.data.phantom import write_phantom
    from aldm.data.preparing import prepare_store
    from aldm.planner import measure_throughput

    rows: list[tuple[str, str, str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        tree, folder = Path(name) / "tree", Path(name) / "store"
        write_phantom(tree, "ixi", 6, 0, 3.0)
        prepare_store(tree, folder, layout="ixi", config=small().preprocess, num_processes=1)
        ours, plain = training_step(folder)
        rows.append(
            ("stage 3 step: cached latents / encoding in the step", f"{ours:.3f} s", f"{plain:.3f} s", plain / ours)
        )
        ours, plain = epoch(tree, folder)
        rows.append(("epoch: store / NIfTI and transforms", f"{ours:.3f} s", f"{plain:.3f} s", plain / ours))
    for label, case, way in (
        ("code search, 20,736 x 8,192: chunked / naive", "search", "chunked"),
        ("decode 128 x 128 x 96, small vqgan: bounded / whole", "decode", "bounded"),
    ):
        plain_way = "naive" if case == "search" else "whole"
        ours, plain = peak_mb(f"{case}-{way}"), peak_mb(f"{case}-{plain_way}")
        rows.append((label, f"{ours:.0f} MB", f"{plain:.0f} MB", plain / ours))
    ours, plain = codec_step("haar-vqgan"), codec_step("vqgan")
    rows.append(("codec step at equal width: haar-vqgan / vqgan", f"{ours:.3f} s", f"{plain:.3f} s", plain / ours))
    (ours, operations), (plain, _) = training_rate("diffusion"), training_rate("unet")
    rows.append(("training sample: stage 3 / the plain U-Net", f"{ours:.3f} s", f"{plain:.3f} s", plain / ours))
    ours, plain = operations / ours / 1e9, measure_throughput("cpu", small().precision, 2.0) / 1e9
    rows.append(("operations a second, 1e9: stage 3 / a bf16 convolution", f"{ours:.0f}", f"{plain:.0f}", plain / ours))
    print("| ours / plain | ours | plain | plain / ours |\n|---|---|---|---|")
    for label, mine, other, ratio in rows:
        print(f"| {label} | {mine} | {other} | {ratio:.1f} |")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        _memory_case(sys.argv[1])
    else:
        main()
