"""What a benchmark runs: for every method and seed its trainings, its export and its evaluation, as `aldm` commands."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aldm.config import Config
from aldm.config_baselines import METHODS
from aldm.errors import UserError

ALL_PAIRS = "-all-pairs"
"""Ending of a method's name: trained for every pair, scored on the benchmark's one."""
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "aldm-epsilon": (
        "diffusion.objective=epsilon",
        "sampling.sampler=dpm-solver++",
        "sampling.num_inference_steps=10",
        "train_diffusion.image_space_loss=false",
    ),
    "aldm-regression": (
        "diffusion.objective=regression",
        "sampling.sampler=one-step",
        "sampling.num_inference_steps=1",
    ),
}
"""ALDM with the paper's objective and with regression: what is set for each."""
BENCHMARKED = (
    "unet",
    *(name for name in METHODS if name != "resvit-cnn"),
    *OBJECTIVES,
    "unet" + ALL_PAIRS,
    *(name + ALL_PAIRS for name in OBJECTIVES),
)
RESVIT_SHARES = {"resvit-cnn": 2 / 3, "resvit": 1 / 3}
ALDM_SHARES = {"ms-spade": 0.16, "diffusion": 0.84}
"""Shares of the budget; a codec that has to be trained takes CODEC_SHARE of it first."""
CODEC_SHARE = 0.4
ENDLESS = 10**6
"""Steps that no budget reaches."""
MODEL, SCORES_FOLDER, RECORD_FILE, LOG = "model", "scores", "record.json", "log.txt"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What is equal for all that a benchmark trains."""

    store: Path
    fingerprint: str
    """Of the store: subjects that are added make another benchmark."""
    out: Path
    minutes: float
    """Training time of a row of the table, all its trainings together."""
    flags: tuple[str, ...]
    """--preset and the like, handed to every training."""
    split: str = "test"

    @property
    def group(self) -> str:
        """The parent run in MLflow: the whole path, for others have a folder of that name too."""
        return str(self.out)

    def settings(self) -> dict[str, Any]:
        """Return what the folder notes: with something else in it, it is another benchmark (JSON-able)."""
        return {
            "store": str(self.store),
            "store_fingerprint": self.fingerprint,
            "minutes": self.minutes,
            "flags": list(self.flags),
        }


@dataclass(frozen=True, kw_only=True)
class MethodsBenchmark(Terms):
    """A benchmark of methods, on one pair of modalities."""

    pair: tuple[str, str]
    vit_weights: Path | None = None
    """ImageNet weights of ResViT's transformer."""

    def settings(self) -> dict[str, Any]:
        """Return what the folder notes."""
        weights = None if self.vit_weights is None else str(self.vit_weights)
        return super().settings() | {"pair": list(self.pair), "vit_weights": weights}


@dataclass(frozen=True)
class Entry:
    """One method with one seed; all that it makes lies in `folder`."""

    method: str
    seed: int
    folder: Path
    trainings: tuple[tuple[str, ...], ...]
    """Commands without `aldm`; the run folder stands behind --run-dir."""
    encode: tuple[str, ...] | None
    """Comes after the first training where a codec is trained, else before all."""
    export: tuple[str, ...]
    evaluate: tuple[str, ...]

    def commands(self) -> list[tuple[str, ...]]:
        """Return the commands in their order."""
        trainings = list(self.trainings)
        if self.encode is not None:
            trainings.insert(1 if trainings[0][1] == "vqgan" else 0, self.encode)
        return [*trainings, self.export, self.evaluate]


def check_methods(names: Sequence[str]) -> None:
    """Refuse a method that there is not.

    Raises:
        UserError: an unknown name (the known ones are listed), or one twice.
    """
    unknown = [name for name in names if name not in BENCHMARKED]
    if unknown:
        known = ", ".join(BENCHMARKED)
        raise UserError(f"--methods (with spaces between): unknown {', '.join(unknown)}; known are {known}")
    if len(set(names)) < len(names):
        raise UserError("--methods names a method twice")


def plan_entry(method: str, seed: int, benchmark: MethodsBenchmark, config: Config) -> Entry:
    """Return what is run for a method and a seed.

    Args:
        method: one of BENCHMARKED.
        seed: of its trainings.
        benchmark: what is equal for all.
        config: what the flags of the benchmark make; its codec says whether one has to be trained.
    """
    folder = benchmark.out / method / f"seed-{seed}"
    name = method.removesuffix(ALL_PAIRS)
    pair = () if method.endswith(ALL_PAIRS) else ("--source", benchmark.pair[0], "--target", benchmark.pair[1])

    def train(stage: str, share: float, *words: object) -> tuple[str, ...]:
        minutes = f"{benchmark.minutes * share:.4g}"
        command = ["train", stage, *benchmark.flags, *words, "--run-dir", folder / stage, "--max-minutes", minutes]
        command += ["--seed", seed, "--engine", "plain", "--group", benchmark.group]
        return tuple(map(str, command))

    store = ("--store", benchmark.store)
    endless = ("--max-steps", ENDLESS)
    encode: tuple[str, ...] | None = None
    if name in OBJECTIVES:
        settings = tuple(word for text in OBJECTIVES[name] for word in ("--set", text))
        trained = config.codec.kind != "haar"
        codec = folder / "vqgan" if trained else "haar"
        latents = folder / "latents"
        encode = tuple(map(str, ("encode", *benchmark.flags, *store, "--codec", codec, "--out", latents)))
        left = 1 - CODEC_SHARE if trained else 1.0
        trainings = [train("vqgan", CODEC_SHARE, *store)] if trained else []
        own = ("--latents", latents, *pair, *settings)
        trainings.append(train("ms-spade", left * ALDM_SHARES["ms-spade"], *own))
        ms_spade = ("--ms-spade", folder / "ms-spade")
        trainings.append(train("diffusion", left * ALDM_SHARES["diffusion"], *own, *ms_spade))
        parts: Sequence[Any] = ("--codec", codec, *ms_spade, "--diffusion", folder / "diffusion")
    elif name == "resvit":
        first: tuple[object, ...] = ("--pretrained", folder / "resvit-cnn")
        first += () if benchmark.vit_weights is None else ("--vit-weights", benchmark.vit_weights)
        trainings = [train("resvit-cnn", RESVIT_SHARES["resvit-cnn"], *store, *pair, *endless)]
        trainings.append(train("resvit", RESVIT_SHARES["resvit"], *store, *pair, *endless, *first))
        parts = ("--baseline", folder / "resvit")
    else:
        trainings = [train(name, 1.0, *store, *pair, *endless)]
        parts = ("--baseline", folder / name)
    model = folder / MODEL
    evaluate: tuple[object, ...] = ("evaluate", "--model", model, *store, "--split", benchmark.split)
    evaluate += ("--source", benchmark.pair[0], "--target", benchmark.pair[1], "--group", benchmark.group)
    evaluate += ("--out", folder / SCORES_FOLDER)
    return Entry(
        method,
        seed,
        folder,
        tuple(trainings),
        encode,
        tuple(map(str, ("export", *parts, "--out", model))),
        tuple(map(str, evaluate)),
    )
