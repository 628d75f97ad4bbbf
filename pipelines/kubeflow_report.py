"""What the Kubeflow UI shows of a run: numbers of the steps, the table of scores, a report that opens offline."""

from pathlib import Path
from typing import Any

from pipelines.champion import MASKS, ChampionComparison, read_comparison
from pipelines.kubeflow_steps import STEP_NAMES, Parameters, commands, read_step

MOST_PANELS = 6
FOOTER = "Synthetic images, for research only; not a medical device."


def comparison_of(p: Parameters) -> ChampionComparison:
    """Return what the run's evaluation says."""
    return read_comparison(p.folder / "scores")


def training_numbers(stage: str, p: Parameters) -> dict[str, float]:
    """Return the numbers of a training that is done; none of one that was not needed."""
    from aldm.checkpoint import read_checkpoint_record
    from aldm.run_folder import checkpoint_folder

    if commands(p)[f"train-{stage}"] is None:
        return {}
    training = read_checkpoint_record(checkpoint_folder(p.folder / stage))["meta"].get("training", {})
    seconds = read_step(f"train-{stage}", p).get("seconds", 0.0)
    return {"step": training.get("step", 0), "seconds": seconds, **training.get("validation", {})}


def score_numbers(p: Parameters) -> dict[str, float]:
    """Return the numbers of the evaluation: the comparison, and each method's mean PSNR where that is taken."""
    comparison = comparison_of(p)
    numbers = {"psnr_db": comparison.psnr_db, "volumes": comparison.volumes}
    if comparison.champion_psnr_db is not None:
        numbers |= {"champion_psnr_db": comparison.champion_psnr_db}
    return numbers | {f"psnr_db {row[0]}": row[1] for row in _means(p, comparison.region)}


def plan_page(p: Parameters) -> str:
    """Return the commands of the run as Markdown."""
    lines = [f"# {p.run_name}", f"Everything of this run lies in `{p.folder}`, its MLflow runs at `{p.server}`."]
    for step in STEP_NAMES:
        words = commands(p)[step]
        lines.append(f"**{step}**: " + (f"`aldm {' '.join(words)}`" if words else "nothing to do"))
    return "\n\n".join(lines) + "\n"


def score_page(p: Parameters) -> str:
    """Return the verdict and the tables of scores as Markdown."""
    from aldm.score_rows import of_images, read_csv
    from aldm.score_table import overview

    rows = of_images(read_csv(p.folder / "scores" / "scores.csv"))
    tables = [overview(rows, region) for region in dict.fromkeys(row.region for row in rows)]
    return "\n\n".join([f"# {p.run_name}", comparison_of(p).verdict(p.min_gain_db), *tables, FOOTER]) + "\n"


def score_report(p: Parameters) -> str:
    """Return the report as HTML that needs nothing else."""
    from aldm.report import Code, Figures, Picture, Section, Table, Text, render_report

    comparison, scores = comparison_of(p), p.folder / "scores"
    figures = [(f"{comparison.psnr_db:.2f} dB", "the new model")]
    if comparison.champion_psnr_db is not None:
        figures.append((f"{comparison.champion_psnr_db:.2f} dB", "the champion"))
    columns = ["method", "PSNR (dB)", "NMSE", "SSIM"]
    caption = "means over all subjects and all pairs of two different modalities"
    tables = [Table(columns, rows, f"{region}: {caption}") for region in MASKS if (rows := _means(p, region))]
    panels = sorted((scores / "pictures").glob("*.png"))[:MOST_PANELS]
    pictures = [Picture(path, path.stem.replace("_", ", ")) for path in panels]
    card = [Picture(scores / "quality.png", "quality and time")] if (scores / "quality.png").is_file() else []
    times = [
        [step, record.get("state"), record.get("seconds")] for step in STEP_NAMES if (record := read_step(step, p))
    ]
    return render_report(
        f"aldm: {p.run_name}",
        [
            Section("Against the champion", [Text(comparison.verdict(p.min_gain_db)), Figures(figures), *tables]),
            Section("Pictures", [*card, *pictures]),
            Section("Steps", [Table(["step", "state", "seconds"], times), Code(plan_page(p).replace("*", ""))]),
        ],
        footer=FOOTER,
    )


def _means(p: Parameters, region: str) -> list[list[Any]]:
    """Return a row per method: its name and mean scores over translations in a region."""
    from aldm.score_rows import MethodKey, mean_scores, read_csv

    rows = [row for row in read_csv(p.folder / "scores" / "scores.csv") if row.region == region]
    return [
        [MethodKey(*key).label(), *(round(means[name], 4) for name in ("psnr_db", "nmse", "ssim"))]
        for (*key, _), means in mean_scores(rows).to_dict("index").items()
    ]


def write_text(path: str, text: str) -> None:
    """Write an artifact's file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
