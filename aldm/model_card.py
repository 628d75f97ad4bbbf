"""What a translator folder says of itself: README.md for people, card.json with measured scores for the service."""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from aldm.config import Config
from aldm.config_baselines import BOTH_WAYS, METHODS
from aldm.errors import UserError
from aldm.evaluation_settings import EVALUATION_FILE, SCORES_FILE, TIMES
from aldm.likeness import modality_of
from aldm.score_rows import SCORE_COLUMNS as NAMES
from aldm.score_rows import mean_scores, of_images, read_csv
from aldm.words import counted

README_FILE, CARD_FILE = "README.md", "card.json"


@dataclass(frozen=True)
class ExportedModel:
    """What the folder of a model holds: kind aldm, unet or a comparison method, and every training's record."""

    kind: str
    config: Config
    weights: Mapping[str, Tensor]
    meta: dict[str, Any]


def model_card(model: ExportedModel, digest: str, scores: list[dict[str, Any]] | None) -> str:
    """Return the README.md of a translator folder.

    Args:
        model: what the folder holds.
        digest: hash of its weights.
        scores: what `read_card_scores` returned; None where the model was not evaluated.
    """
    data, config = model.meta["data"], model.config
    spacing = " x ".join(f"{side:g}" for side in config.preprocess.spacing_mm)
    shape = " x ".join(map(str, config.preprocess.spatial_shape))
    shading = "" if config.preprocess.bias_correction == "none" else ", after a bias correction by N4"
    subjects = ", ".join(f"{number} {split}" for split, number in data["num_subjects"].items())
    names = ", ".join(config.modalities)
    if model.kind == "aldm":
        how = (
            f"Codec {config.codec.kind}, MS-SPADE and a U-Net with objective {config.diffusion.objective}; by default "
            f"sampled with {config.sampling.sampler}, "
            f"{counted(config.sampling.num_inference_steps, 'network evaluation')}."
        )
    elif model.kind == "unet":
        how = "A regression U-Net on Haar bands: source volume in, target volume out, one evaluation."
    else:
        how = f"The comparison method {model.kind}: {METHODS[model.kind]}."
    pairs = f"any of {names} into any other of them"
    if config.pair is not None:
        pairs = " to ".join(config.pair) + (" and back" if model.kind in BOTH_WAYS else "")
    source, target = config.pair or (config.modalities[0], config.modalities[-1])
    validation = [
        f"| {run['stage']} | {run['step']} | {name} | {value:.4g} |"
        for run in model.meta["training"]
        for name, value in run["validation"].items()
    ]
    return "\n".join(
        [
            f"# {model.kind}: translation, {pairs}",
            "",
            f"Translates a 3D MR volume, {pairs}. {how}",
            "",
            f"    aldm translate INPUT OUTPUT --model THIS_FOLDER --source {source} --target {target}",
            "",
            "## Data",
            "",
            f"Layout {data['layout']}, subjects: {subjects}. Volumes are resampled to {spacing} mm, a box of {shape} "
            f"voxels, intensities scaled to [-1, 1] by the rule {config.preprocess.intensity}{shading}. "
            f"Fingerprint {data['fingerprint']}.",
            "",
            *_origin(config.init_from),
            _likeness(data),
            "",
            _uncertainty(model.meta.get("uncertainty")),
            "",
            "## Scores",
            "",
            "On validation subjects, whole volumes, measured while training; `aldm evaluate` measures the test split.",
            "",
            "| training | steps | score | value |",
            "|---|---|---|---|",
            *(validation or ["| - | - | no validation subjects | - |"]),
            "",
            *_measured(scores),
            "## Limits",
            "",
            "For research use only. Not a medical device and not for diagnosis: the result is synthetic, it can invent "
            "structures and leave out lesions. It is fit for volumes like its training data only: other scanners, "
            "sequences, ages, pathologies and parts of the body are not covered unless the data above hold them.",
            "",
            f"Preset {config.preset}, seed {config.seed}, weights {digest}.",
            "",
        ]
    )


def read_card_scores(folder: Path, digest: str) -> list[dict[str, Any]]:
    """Return the means of an evaluation over its translations (source and target differ), per method and region.

    Args:
        folder: written by `aldm evaluate`.
        digest: hash of the model that it has to have measured.

    Raises:
        UserError: no evaluation, or one of another model.
    """
    try:
        record = json.loads((folder / EVALUATION_FILE).read_text())
        rows = of_images(read_csv(folder / SCORES_FILE))
        times = list(csv.DictReader((folder / TIMES).read_text().splitlines()))
    except (OSError, ValueError) as error:
        raise UserError(f"`scores` {folder} is no evaluation ({error}): make one with aldm evaluate `out`") from error
    measured = [model["hash"] for model in record["models"]]
    if digest not in measured:
        raise UserError(
            f"`scores` {folder} measured the models {', '.join(one[:12] for one in measured)}, this one is "
            f"{digest[:12]}: evaluate it first, then export it again with `overwrite`"
        )
    seconds = defaultdict(list)
    for row in times:
        seconds[row["method"], row["sampler"], int(row["num_inference_steps"])].append(float(row["seconds"]))
    return [
        {
            "method": method,
            "sampler": sampler or None,
            "num_inference_steps": steps or None,
            "region": region,
            **{name: _rounded(means[name]) for name in NAMES},
            "seconds": _rounded(fmean(own)) if (own := seconds[method, sampler, steps]) else None,
        }
        for (method, sampler, steps, region), means in mean_scores(rows).to_dict("index").items()
    ]


def _rounded(value: float) -> float | None:
    """Return what the card holds of a mean: None where it is not defined, which JSON has no number for."""
    return None if math.isnan(value) else round(value, 4)


def _origin(init_from: str) -> list[str]:
    """Return the lines of the README that say what model was fine-tuned on these data, if one was."""
    if not init_from:
        return []
    name, _, digest = init_from.partition("@")
    return [
        f"Fine-tuned: the weights began as those of the model {name} (hash {digest}), which had learnt from other data "
        "than these.",
        "",
    ]


def _likeness(data: dict[str, Any]) -> str:
    """Return the line of the README that says whether an input's likeness to the data is measured."""
    names = list(dict.fromkeys(modality_of(kind) for kind in (data.get("likeness") or {}).get("modalities", ())))
    if not names:
        return "How unlike an input is to these volumes is not measured: their statistics were not kept."
    return (
        f"How unlike an input is to these volumes is measured for {', '.join(names)}: `likeness` in the sidecar, 1 at "
        "the limit that hardly any volume of the kind exceeds."
    )


def _uncertainty(calibration: dict[str, Any] | None) -> str:
    """Return the line of the README that says whether the model knows how far off it may be."""
    if calibration is None:
        return "How far off a result may be is not known: no `uncertainty` was trained."
    return (
        f"How far off a result may be: `--uncertainty` gives half the width of an interval that held the truth in "
        f"{calibration['level']:.0%} of the voxels of {counted(calibration['num_subjects'], 'validation subject')}. It "
        "promises nothing for subjects unlike those; what it held on the test split is below, if that was measured."
    )


def _measured(scores: list[dict[str, Any]] | None) -> list[str]:
    """Return the lines of the README that show an evaluation."""
    if scores is None:
        return []
    lines = [
        "On the test split (`aldm evaluate`), means over all subjects and all pairs of two modalities:",
        "",
        "Coverage: share of the voxels whose true value lay within the uncertainty; error ratio: RMS error by the RMS "
        "standard deviation that it stands for.",
        "",
        "| method | region | PSNR (dB) | NMSE | SSIM | coverage | error ratio | seconds per volume |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in scores:
        how = f" ({row['sampler']} {row['num_inference_steps']})" if row["sampler"] else ""
        time = "-" if row["seconds"] is None else f"{row['seconds']:.2f}"
        values = f"{row['psnr_db']:.2f} | {row['nmse']:.3f} | {row['ssim']:.3f}"
        for name in ("coverage", "error_ratio"):
            values += " | -" if row[name] is None else f" | {row[name]:.3f}"
        lines.append(f"| {row['method']}{how} | {row['region']} | {values} | {time} |")
    return [*lines, ""]
