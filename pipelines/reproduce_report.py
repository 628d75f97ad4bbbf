"""The report of `aldm reproduce ixi`: our table beside Table D, what differs, and what made it."""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aldm import __version__
from aldm.config import Config, TrainingConfig
from aldm.presets import ixi
from aldm.report import Code, Figures, Section, Table, Text, write_report
from aldm.run_folder import git_state
from aldm.score_rows import ScoreRow, read_csv
from aldm.score_table import TABLE_D, Summary, summarize
from pipelines.chain import REPORT, SPLITS_FILE, span
from pipelines.reproduce_data import MODALITIES

SUMMARY = """The Adaptive Latent Diffusion Model trained and scored on IXI, held against Table D of the paper's
supplement: PSNR (dB) / NMSE / SSIM, mean and standard deviation over the test subjects; a row per source, a column per
target, on the diagonal source = target."""
REGION_NOTE = """The paper does not say over which region its scores are. So both are given: the whole volume, air
included, and inside the head."""
FOOTER = """Data: IXI, https://brain-development.org/ixi-dataset, Creative Commons CC BY-SA 3.0: what is made from it
names it and carries the same licence. Synthetic images, for research only; not a medical device."""
PAPER, DIFFERENCE = "the paper's Table D", "ours less the paper's"
PACKAGES = ("torch", "numpy", "scipy", "SimpleITK", "monai", "nibabel")
Cells = Mapping[tuple[str, str], Summary]


def write_reproduction_report(
    out: Path, steps: Sequence[Mapping[str, Any]], command: str, config: Config, splits: str
) -> str:
    """Write report.html from what the commands left in the folder.

    Args:
        out: the folder of the reproduction.
        steps: title, command, budget_s, seconds and peak_gb of every command.
        command: what the user typed.
        config: of all of them.
        splits: a sentence on the splits.

    Returns:
        the tables and the verdict as text.
    """
    rows = read_csv(out / "scores" / "scores.csv")
    warning = caveats(config, splits)
    sections, texts = [], [f"{PAPER}\n{_markdown(_paper_body())}"]
    for region in _regions(rows):
        own = cells_of(rows, region)
        verdict = verdict_text(own, region)
        ours, gaps = _own_body(own), _difference_body(own)
        tables = [
            Table(["source", *_arrows()], body, title)
            for title, body in (("ours", ours), (PAPER, _paper_body()), (DIFFERENCE, gaps))
        ]
        figures = Figures([(f"{_mean_gap_db(own):+.2f} dB", "mean PSNR, ours less the paper's")])
        sections.append(Section(f"Table D over the {region}", [Text(verdict), Text(warning), figures, *tables]))
        texts += [f"ours, {region}\n{_markdown(ours)}", f"{DIFFERENCE}, {region}\n{_markdown(gaps)}", verdict]
    sections += [
        Section("What differs from the paper", _differences(config, splits)),
        Section("What was run", _runs(steps, command)),
        Section("Made of", [Table(["what", "value"], provenance(out))]),
    ]
    write_report(
        out / REPORT,
        "Table D of the paper: ours beside it",
        sections,
        summary=SUMMARY + " " + REGION_NOTE,
        footer=FOOTER,
        overwrite=True,
    )
    return "\n\n".join([*texts, *([warning] if warning else [])])


def cells_of(rows: Sequence[ScoreRow], region: str) -> Cells:
    """Return (source, target) -> summary of the model's scores over a region."""
    found: dict[tuple[str, str], list[ScoreRow]] = {}
    for row in rows:
        if row.method == "aldm" and row.region == region:
            found.setdefault((row.source, row.target), []).append(row)
    return {pair: summarize(found[pair]) for pair in TABLE_D}


def _body(cell: Callable[[tuple[str, str]], str]) -> list[list[str]]:
    return [[f"{source} ->", *(cell((source, target)) for target in MODALITIES)] for source in MODALITIES]


def _own_body(cells: Cells) -> list[list[str]]:
    return _body(lambda pair: cells[pair].text())


def _paper_body() -> list[list[str]]:
    return _body(
        lambda pair: " / ".join(
            f"{mean:.{digits}f} ± {std:.{digits}f}"
            for (mean, std), digits in zip(TABLE_D[pair], (2, 3, 3), strict=True)
        )
    )


def _difference_body(cells: Cells) -> list[list[str]]:
    def gap(pair: tuple[str, str]) -> str:
        psnr_db, nmse, ssim = (ours - paper[0] for ours, paper in zip(cells[pair].mean, TABLE_D[pair], strict=True))
        return f"{psnr_db:+.2f} / {nmse:+.3f} / {ssim:+.3f}"

    return _body(gap)


def verdict_text(cells: Cells, region: str) -> str:
    """Say in a sentence how ours stands to the paper's, over the nine cells."""
    ours = sum(cells[pair].mean[0] for pair in TABLE_D) / len(TABLE_D)
    better = sum(cells[pair].mean[0] >= TABLE_D[pair][0][0] for pair in TABLE_D)
    within = sum(abs(cells[pair].mean[0] - TABLE_D[pair][0][0]) <= TABLE_D[pair][0][1] for pair in TABLE_D)
    subjects = min(cells[pair].count for pair in TABLE_D)
    return (
        f"Mean PSNR of the nine cells over the {region}, {subjects} subjects: {ours:.2f} dB, the paper's "
        f"{ours - _mean_gap_db(cells):.2f} ({_mean_gap_db(cells):+.2f}); in {better} of {len(TABLE_D)} cells ours "
        f"is at least the paper's, in {within} within its standard deviation."
    )


def caveats(config: Config, splits: str) -> str:
    """Return a sentence that names what keeps the two tables from being the same experiment; empty where nothing does.

    Args:
        config: of all trainings.
        splits: from `splits_text`.
    """
    found = [f"{part}: {here}" for part, _, here in differences(config) if here.startswith("NOT ")]
    found += ["splits: NOT the paper's sizes"] if "NOT the paper's" in splits else []
    return f"Not the paper's experiment ({'; '.join(found)}): the difference says nothing about it." if found else ""


def differences(config: Config) -> list[tuple[str, str, str]]:
    """Return what differs from the paper: part, paper, here. Where the paper does not say, the row says that."""

    def other(same: bool, text: str) -> str:
        return text if same else f"NOT the paper's: {text}"

    preset, paper = config.preprocess, ixi()
    widths = (config.codec, config.ms_spade, config.unet) == (paper.codec, paper.ms_spade, paper.unet)
    standard = paper.preprocess
    same_grid = (preset.spatial_shape, preset.spacing_mm) == (standard.spatial_shape, standard.spacing_mm)
    grid = f"{_sides(preset.spatial_shape)} of {_sides(preset.spacing_mm)} mm"
    crop = "whole volumes" if config.train_vqgan.crop is None else f"crops of {_sides(config.train_vqgan.crop)}"
    length = "; ".join(f"stage {i}: {_length(one)}" for i, one in enumerate(_trainings(config), start=1))
    same_lengths = list(map(_length, _trainings(config))) == list(map(_length, _trainings(paper)))
    sampling = config.sampling
    intensities = {
        "paper": "the same",
        "tissue": "by the 95th percentile of the foreground (--set preprocess.intensity=paper)",
        "foreground": "by the 99.9th percentile of the foreground (--set preprocess.intensity=paper)",
    }
    return [
        ("test subjects", "115, not named", "by the SHA-256 of their names, see the splits above"),
        ("grid", "256 x 160 x 224 (RAS+: 160 x 256 x 224) of 0.9375 and 1.2 mm", other(same_grid, grid)),
        ("T1, T2 and PD on one grid", "not said", "by the affines" + _registered(preset.register)),
        ("skull", "not said", "not stripped: whole heads"),
        ("shading of the coil", "not said", f"correction {preset.bias_correction} (preprocess.bias_correction)"),
        ("intensities", "0.5 and 99.5 percentile (public code)", intensities[preset.intensity]),
        ("networks", "Tables A, B and C", other(widths, f"widths of preset {config.preset}")),
        ("codec", "VQGAN", other(config.codec.kind == "vqgan", config.codec.kind)),
        ("stage 1 sees", "whole volumes", crop if config.codec.kind != "haar" else "nothing: the codec is fixed"),
        ("length", "500 epochs of stage 1, 800 of stage 3, batch 1", other(same_lengths, length)),
        ("sampler", "not said (public code: ddim, 200 steps)", f"{sampling.sampler}, {sampling.num_inference_steps}"),
        ("region of the scores", "not said", "volume and foreground, both given"),
    ]


def provenance(out: Path) -> list[tuple[str, str]]:
    """Return versions, fingerprints and hashes of what was made."""
    record = json.loads((out / "scores" / "evaluation.json").read_text())
    (model,) = record["models"]
    state = git_state()
    changed = " with changes" if state["git_changed"] else ""
    commit = [("commit", f"{state['git_commit']}{changed}")] if state["git_commit"] else []
    return [
        ("aldm", __version__),
        *commit,
        ("Python", platform.python_version()),
        *((name, version(name)) for name in PACKAGES),
        ("splits.csv, SHA-256", hashlib.sha256((out / SPLITS_FILE).read_bytes()).hexdigest()),
        ("store, fingerprint", record["store_fingerprint"]),
        ("model, hash", model["hash"]),
        ("scores.csv, SHA-256", hashlib.sha256((out / "scores" / "scores.csv").read_bytes()).hexdigest()),
    ]


def _differences(config: Config, splits: str) -> list[Text | Table]:
    more = (
        "docs/method.md, section 4, has the rest, with reasons: codebook, adversarial terms, latents, learning rates."
    )
    return [Text(f"Splits: {splits}."), Table(["part", "paper", "here"], differences(config)), Text(more)]


def _runs(steps: Sequence[Mapping[str, Any]], command: str) -> list[Table | Code]:
    def row(title: str, budget_s: float, seconds: float, peak_gb: float) -> list[str]:
        return [title, span(budget_s / 60), span(seconds / 60), f"{peak_gb:.2f}"]

    body = [row(step["title"], step["budget_s"], step["seconds"], step["peak_gb"]) for step in steps]
    budget_s, seconds = (sum(step[name] for step in steps) for name in ("budget_s", "seconds"))
    body.append(row("all", budget_s, seconds, max(step["peak_gb"] for step in steps)))
    columns = ["step", "planned, at the least", "used in its last start", "peak memory (GB)"]
    return [Code(command), Table(columns, body), Code("\n".join(step["command"] for step in steps))]


def _regions(rows: Sequence[ScoreRow]) -> list[str]:
    there = {row.region for row in rows}
    return [name for name in ("volume", "brain", "foreground") if name in there]


def _mean_gap_db(cells: Cells) -> float:
    return sum(cells[pair].mean[0] - TABLE_D[pair][0][0] for pair in TABLE_D) / len(TABLE_D)


def _arrows() -> list[str]:
    return [f"-> {name}" for name in MODALITIES]


def _markdown(body: Sequence[Sequence[str]]) -> str:
    head = ["PSNR (dB) / NMSE / SSIM", *_arrows()]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def _trainings(config: Config) -> tuple[TrainingConfig, ...]:
    return config.train_vqgan, config.train_ms_spade, config.train_diffusion


def _length(training: TrainingConfig) -> str:
    text = f"{training.max_steps:,} steps" if training.max_steps else f"{training.epochs} epochs"
    minutes = "" if training.max_minutes is None else f", at most {training.max_minutes:g} minutes"
    return f"{text} of batch {training.batch_size}{minutes}"


def _sides(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _registered(register: str) -> str:
    return " alone (--set preprocess.register=rigid registers as well)" if register == "none" else " after registration"
