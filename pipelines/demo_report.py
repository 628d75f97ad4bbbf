"""The report of `aldm demo`: what was scored, pictures, and the commands that made it."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from aldm.report import Code, Figures, Picture, Section, Table, Text, write_report
from aldm.score_rows import REFERENCES, MethodKey, ScoreRow, mean_scores, read_csv
from pipelines.chain import REPORT

ROWS = {
    "aldm": "ALDM, all pairs in one model",
    "unet": "regression U-Net, all pairs in one model, about the same time",
    "training-mean": "training mean: the average target of the training subjects",
    "intensity-map": "intensity map: the mean target intensity for each of the source's",
    "histogram-matching": "histogram matching: the source with the target's mean histogram",
    "identity": "identity: the source as it is",
    "reconstruction": "the codec alone",
}
SUMMARY = """Simulated subjects were written as NIfTI files and prepared. The stages of the Adaptive Latent Diffusion
Model and a regression U-Net for all pairs were trained on them and scored on held-out subjects. The subjects are made
from the ICBM152 atlas: this shows that the path from data to result works, not how well a model does on patients."""
MARGINS_DB = {"identity": 3.0, "training-mean": 3.0, "intensity-map": 3.0, "unet": 1.0}
"""What ALDM's PSNR has to be above each: the rows that need no network, and the plain network of equal time."""
BESIDE = (*REFERENCES, "unet")
"""Rows that ALDM's PSNR is held against, where the scores have them: an older version's lack some."""
BUDGET_GB = 4.0
FOOTER = "Synthetic images, for research only; not a medical device."


def write_demo_report(out: Path, steps: Sequence[Mapping[str, Any]], *, source: str, target: str) -> str:
    """Write report.html and the pictures it shows from what the commands left in the demo's folder.

    Args:
        out: the demo's folder.
        steps: title, command, budget_s, seconds and peak_gb of every command.
        source, target: the pair that stands at the top.

    Returns:
        the verdict, which the report shows too.
    """
    rows = read_csv(out / "scores" / "scores.csv")
    region = next(name for name in ("brain", "foreground") if any(row.region == name for row in rows))
    pair = _pair_scores(rows, region, source, target)
    overall = _mean_scores(rows, region)
    verdict = " ".join((scores_verdict(overall, pair, region, source, target), cost_verdict(steps)))
    sections = [
        _headline(pair, region, source, target, verdict),
        _pictures(out, source, target),
        _all_pairs(rows, region),
        _trainings(out),
        _commands(steps),
    ]
    write_report(
        out / REPORT,
        "aldm demo: one model for every pair of modalities",
        sections,
        summary=SUMMARY,
        footer=FOOTER,
        overwrite=True,
    )
    return verdict


def scores_verdict(
    overall: Mapping[str, Sequence[float]],
    pair: Mapping[str, Sequence[float]],
    region: str,
    source: str,
    target: str,
) -> str:
    """Say how far ALDM is above the other rows and whether the margins hold, over all that its one model translates.

    Args:
        overall: method -> PSNR (dB) and further scores, mean over all pairs of two modalities.
        pair: the same of the pair that stands at the top.
        region, source, target: what was scored.
    """
    psnr = {method: scores[0] for method, scores in overall.items()}
    alone = [
        f"{'ALDM' if method == 'aldm' else method.replace('-', ' ')} {pair[method][0]:.2f}"
        for method in ("aldm", "unet", "intensity-map")
        if method in pair
    ]
    others = [
        f"{method.replace('-', ' ')} {psnr[method]:.2f} dB ({psnr['aldm'] - psnr[method]:+.2f})"
        for method in BESIDE
        if method in psnr
    ]
    short = [
        f"{method.replace('-', ' ')} ({margin:g} dB)"
        for method, margin in MARGINS_DB.items()
        if method in psnr and psnr["aldm"] - psnr[method] < margin
    ]
    return (
        f"All pairs, inside the {region}: ALDM {psnr['aldm']:.2f} dB, {', '.join(others)}. "
        + (f"The margin does NOT hold over {', '.join(short)}." if short else "All margins hold.")
        + f" {source.upper()} to {target.upper()} alone: {', '.join(alone)} dB."
    )


def cost_verdict(steps: Sequence[Mapping[str, Any]]) -> str:
    """Say what time and memory the commands took, and whether that is within the budget."""
    minutes, budget = (sum(step[name] for step in steps) / 60 for name in ("seconds", "budget_s"))
    peak_gb = max(step.get("peak_gb", 0.0) for step in steps)  # a step that an older version ran has none
    within = minutes <= budget and peak_gb <= BUDGET_GB
    return (
        f"{minutes:.1f} of {budget:.1f} minutes and at most {peak_gb:.2f} of {BUDGET_GB:g} GB: "
        f"{'within' if within else 'NOT within'} the budget."
    )


def _headline(pair: Mapping[str, tuple[float, ...]], region: str, source: str, target: str, verdict: str) -> Section:
    """The pair's scores, and how far ALDM is above the rows that keep it honest."""
    psnr = {method: scores[0] for method, scores in pair.items()}
    gains = [
        (f"{psnr['aldm'] - psnr[method]:+.1f} dB", f"over {method.replace('-', ' ')}")
        for method in BESIDE
        if method in psnr
    ]
    table = Table(
        ["method", "PSNR (dB)", "NMSE", "SSIM"],
        [
            [ROWS[method], f"{scores[0]:.2f}", f"{scores[1]:.4f}", f"{scores[2]:.3f}"]
            for method, scores in pair.items()
            if method != "reconstruction"
        ],
        f"{source} to {target} inside the {region}, mean over the held-out subjects",
    )
    figures = Figures([(f"{psnr['aldm']:.1f} dB", f"PSNR {source} to {target}, {region}"), *gains])
    return Section(f"{source.upper()} to {target.upper()}", [Text(verdict), figures, table])


def _pictures(out: Path, source: str, target: str) -> Section:
    """A held-out subject against the truth, and the ICBM152 average on its own 1 mm grid."""
    panel = next(iter(sorted((out / "scores").rglob(f"*{source}*{target}*.png"))))
    template = out / "translated" / "icbm152.png"
    _template_panel(out, template, source, target)
    return Section(
        "Pictures",
        [
            Picture(panel, f"A held-out simulated subject: {source} in, {target} out, beside the truth."),
            Picture(
                template,
                "The ICBM152 T1 average (real MR, an average of many heads) on its own 1 mm grid. There is no true "
                f"{target} to compare with, and the simulated subjects stem from the same atlas: a check of the path, "
                "not of generalisation.",
            ),
        ],
    )


def _template_panel(out: Path, path: Path, source: str, target: str) -> None:
    """Draw the ICBM152 T1 average and its translation."""
    from aldm.data.phantom_anatomy import icbm152_file
    from aldm.data.volume import load_nifti
    from aldm.pictures import save_translation_panel

    given, _ = load_nifti(icbm152_file("t1"))
    made, _ = load_nifti(out / "translated" / f"icbm152_{target}.nii.gz")
    save_translation_panel(
        path,
        source=_unit(given.data),
        prediction=_unit(made.data),
        source_name=source,
        target_name=target,
        spacing_mm=given.spacing_mm,
        title="ICBM152 average",
    )


def _unit(data: np.ndarray) -> np.ndarray:
    """Rescale to [0, 1] for display."""
    low, high = np.percentile(data, (0.5, 99.5))
    return np.asarray(np.clip((data - low) / (high - low), 0, 1))


def _all_pairs(rows: Sequence[ScoreRow], region: str) -> Section:
    """ALDM's PSNR for every pair, the means of every method, and the sampler's card."""
    names = list(dict.fromkeys(row.source for row in rows if row.method == "aldm"))
    body = [
        [f"{source} to", *(f"{_pair_scores(rows, region, source, target)['aldm'][0]:.2f}" for target in names)]
        for source in names
    ]
    means = mean_scores([row for row in rows if row.region == region])
    overall = [
        [_label(*key), f"{of['psnr_db']:.2f}", f"{of['nmse']:.4f}", f"{of['ssim']:.3f}", f"{of['sharpness']:.2f}"]
        for (*key, _), of in means.to_dict("index").items()
    ]
    return Section(
        "Every pair",
        [
            Table(["source", *names], body, f"ALDM: PSNR (dB) inside the {region}; on the diagonal source = target"),
            Table(
                ["method", "PSNR (dB)", "NMSE", "SSIM", "sharpness"],
                overall,
                f"mean over all pairs off the diagonal, {region}",
            ),
        ],
    )


def _label(method: str, sampler: str, steps: int) -> str:
    return method + (f" ({sampler}, {steps} steps)" if sampler else "")


def _trainings(out: Path) -> Section:
    """Validation curves of all trainings and what stage 1 reached."""
    from aldm.pictures import save_training_curves

    curves: dict[str, list[tuple[int, float]]] = {}
    for run in ("vqgan", "ms-spade", "diffusion", "unet"):
        records = _metrics(out / "runs" / run)
        curves[run] = [(r["step"], r["validation/psnr_db"]) for r in records if "validation/psnr_db" in r]
    picture = out / "training.png"
    save_training_curves(picture, curves, label="PSNR over the whole volume (dB)")
    codebook = [record for record in _metrics(out / "runs" / "vqgan") if "codec/codebook_usage" in record][-1]
    text = (
        f"Stage 1 trained a VQGAN between Haar transforms; it reconstructs held-out volumes at "
        f"{curves['vqgan'][-1][1]:.1f} dB and uses {100 * codebook['codec/codebook_usage']:.0f} % of its codebook. The "
        "translator above runs on the lossless Haar codec, which measures better at this size; stage 1 is here so that "
        "every training of the paper is seen."
    )
    return Section("Trainings", [Picture(picture, "Every dot is a validation."), Text(text)])


def _commands(steps: Iterable[Mapping[str, Any]]) -> Section:
    steps = list(steps)
    rows = [
        [step["title"], f"{step['budget_s']:.0f} s", f"{step['seconds']:.0f} s", _peak(step.get("peak_gb"))]
        for step in steps
    ]
    total = sum(step["seconds"] for step in steps)
    largest = _peak(max(step.get("peak_gb", 0.0) for step in steps))
    rows.append(["all", f"{sum(step['budget_s'] for step in steps):.0f} s", f"{total:.0f} s", largest])
    return Section(
        "What was run",
        [
            Table(["step", "budget", "used", "peak memory (GB)"], rows),
            Code("\n".join(step["command"] for step in steps)),
        ],
    )


def _peak(peak_gb: float | None) -> str:
    return "-" if peak_gb is None else f"{peak_gb:.2f}"


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _pair_scores(rows: Iterable[ScoreRow], region: str, source: str, target: str) -> dict[str, tuple[float, ...]]:
    """Return method -> mean PSNR, NMSE, SSIM of a pair; a model's first sampler counts."""
    found: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    first: dict[str, MethodKey] = {}
    for row in rows:
        if (row.region, row.source, row.target) != (region, source, target):
            continue
        if first.setdefault(row.method, row.key) == row.key:
            found[row.method].append((row.psnr_db, row.nmse, row.ssim))
    return {
        method: tuple(mean(column) for column in zip(*found[method], strict=True)) for method in ROWS if method in found
    }


def _mean_scores(rows: Iterable[ScoreRow], region: str) -> dict[str, tuple[float, ...]]:
    """Return method -> mean PSNR, NMSE, SSIM over all translations; a model's first sampler counts."""
    found: dict[str, tuple[float, ...]] = {}
    for (method, *_), means in mean_scores([row for row in rows if row.region == region]).to_dict("index").items():
        found.setdefault(method, (means["psnr_db"], means["nmse"], means["ssim"]))
    return {method: found[method] for method in ROWS if method in found}
