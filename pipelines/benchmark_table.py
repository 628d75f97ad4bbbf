"""The outcome of a benchmark: all scores in one file, one table a region, and the methods' pictures side by side."""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from aldm.words import counted
from pipelines.benchmark_plan import MODEL, RECORD_FILE, SCORES_FOLDER, Entry, MethodsBenchmark

if TYPE_CHECKING:
    from aldm.data.store import VolumeStore
    from aldm.score_rows import ScoreRow

K = TypeVar("K")

TABLE, ALL_SCORES, PICTURE = "benchmark.md", "scores.csv", "methods.png"
VALUES = ("psnr_db", "nmse", "ssim")
CODEC = "reconstruction of "
"""Before a method's name: the row of its trained codec alone."""
NOTE = """Mean over the held-out subjects, and the 95 % interval of that mean (t, over subjects; with several seeds a
subject's value is its mean over them). `samples` are the volumes, or the slices of 2D methods, that the trainings saw.
`parameters` are those of what translates: no discriminators, nor RegGAN's registration; both directions where a method
learns both. `minutes` is the time that the trainings of a method took, validation and checkpoints included, `host peak`
the most memory of the host (not of a GPU) that one of them took, Python and libraries included; `s / volume` is the
median time of a translation. `p`: two-sided Wilcoxon signed-rank test on the subjects' PSNR, the first row that
translates against each other one, corrected by Holm's method for the number of these comparisons. `SD over seeds`: the
standard deviation (n - 1) of a method's mean PSNR from training to training. Synthetic images, for research use
only."""


@dataclass(frozen=True)
class Cost:
    """What a method took."""

    parameters: int
    samples: int
    minutes: float
    seconds_per_volume: float
    peak_gb: float


def write_benchmark(benchmark: MethodsBenchmark, entries: Sequence[Entry], store: "VolumeStore") -> str:
    """Write scores.csv, benchmark.md and methods.png into the benchmark's folder; return the tables."""
    rows = read_benchmark_scores(entries)
    with (benchmark.out / ALL_SCORES).open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["seed", "subject_id", "method", "region", *VALUES])
        writer.writerows(
            [seed, row.subject_id, row.method, row.region, *(getattr(row, value) for value in VALUES)]
            for seed, row in rows
        )
    costs = {method: cost_of([entry for entry in entries if entry.method == method]) for method in _methods(entries)}
    regions = dict.fromkeys(row.region for _, row in rows)
    tables = "\n\n".join(methods_table(rows, region, costs) for region in regions)
    source, target = benchmark.pair
    title = f"# {source} to {target}, {benchmark.minutes:g} minutes of training each"
    seeds = len({entry.seed for entry in entries})
    subjects = counted(len(store.subjects("train")), "training subject")
    lead = f"{subjects}, {counted(seeds, 'seed')}, configuration {' '.join(benchmark.flags)}."
    if "resvit" in costs:
        weights = "from random weights" if benchmark.vit_weights is None else f"from {benchmark.vit_weights.name}"
        lead += f" The transformer of resvit began {weights}."
    (benchmark.out / TABLE).write_text("\n\n".join([title, lead, NOTE, tables]) + "\n")
    _draw(benchmark, entries, store)
    return tables


def read_benchmark_scores(entries: Sequence[Entry]) -> list[tuple[int, "ScoreRow"]]:
    """Return (seed, row) of all entries, their trained codecs among them; rows that all evaluations repeat once."""
    from dataclasses import replace

    from aldm.score_rows import REFERENCES, read_csv

    rows: list[tuple[int, ScoreRow]] = []
    references: dict[tuple[str, str, str], ScoreRow] = {}
    for entry in entries:
        codec_is_trained = any(training[1] == "vqgan" for training in entry.trainings)
        for row in read_csv(entry.folder / SCORES_FOLDER / "scores.csv"):
            if row.method in REFERENCES:
                references.setdefault((row.method, row.subject_id, row.region), row)
            elif row.method != "reconstruction":
                rows.append((entry.seed, replace(row, method=entry.method)))
            elif codec_is_trained:  # else there is none, or it is lossless
                rows.append((entry.seed, replace(row, method=CODEC + entry.method)))
    return [(0, row) for row in references.values()] + rows


def methods_table(rows: Sequence[tuple[int, "ScoreRow"]], region: str, costs: Mapping[str, Cost]) -> str:
    """Return the Markdown table of a region, the best PSNR first.

    Args:
        rows: (seed, row) of all methods.
        region: the one that counts.
        costs: of the methods that were trained.
    """
    by_method: dict[str, list[tuple[int, ScoreRow]]] = defaultdict(list)
    for seed, row in rows:
        if row.region == region:
            by_method[row.method].append((seed, row))
    subjects = {
        method: [means_of((row.subject_id, getattr(row, value)) for _, row in own) for value in VALUES]
        for method, own in by_method.items()
    }
    summaries = {method: [interval(list(of.values())) for of in scores] for method, scores in subjects.items()}
    ranked = sorted(summaries, key=lambda name: -summaries[name][0][0])
    p_values, heading = _against_best({method: subjects[method][0] for method in ranked})
    spreads = {method: _spread(by_method[method]) for method in ranked}
    has_seeds = any(not math.isnan(spread) for spread in spreads.values())
    columns = ["method", "PSNR (dB)", "NMSE", "SSIM", "parameters", "samples", "minutes", "s / volume"]
    columns += ["host peak (GB)", heading, *["SD over seeds (dB)"] * has_seeds]
    lines = [f"## {region}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for method in ranked:
        cells = [with_interval(*value, digits) for value, digits in zip(summaries[method], (2, 3, 3), strict=True)]
        cells += _cost_cells(costs.get(method))
        cells.append(p_values.get(method, "-"))
        cells += ["-" if math.isnan(spreads[method]) else f"{spreads[method]:.2f}"] * has_seeds
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _against_best(psnr_db: Mapping[str, Mapping[str, float]]) -> tuple[dict[str, str], str]:
    """Return a cell for every method that is compared with the best one, and the heading.

    Args:
        psnr_db: method -> subject -> PSNR, dB, the best first; a codec's reconstruction does not translate.
    """
    from aldm.significance import holm_texts, signed_rank_p

    best, *others = [method for method in psnr_db if not method.startswith(CODEC)]
    return holm_texts(
        {other: signed_rank_p([db - psnr_db[other][name] for name, db in psnr_db[best].items()]) for other in others}
    )


def _spread(rows: Sequence[tuple[int, "ScoreRow"]]) -> float:
    """Return the standard deviation (n - 1) over seeds of a method's mean PSNR, dB; NaN for a single seed."""
    seeds = list(means_of((seed, row.psnr_db) for seed, row in rows).values())
    return float(np.std(seeds, ddof=1)) if len(seeds) > 1 else math.nan


def _cost_cells(cost: Cost | None) -> list[str]:
    if cost is None:
        return ["-"] * 5
    cells = [f"{cost.parameters:,}", f"{cost.samples:,}", f"{cost.minutes:.1f}"]
    return [*cells, f"{cost.seconds_per_volume:.2f}", f"{cost.peak_gb:.2f}"]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % interval (t); NaN for a single value."""
    from scipy import stats

    count = len(values)
    half = math.nan
    if count > 1:
        half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return float(np.mean(values)), half


def cost_of(entries: Sequence[Entry]) -> Cost:
    """Return what a method took: means over its seeds, the largest peak."""
    records = [json.loads((entry.folder / RECORD_FILE).read_text())["done"] for entry in entries]
    trainings = [
        [done[" ".join(command)] for command in entry.trainings] for entry, done in zip(entries, records, strict=True)
    ]
    seconds = [
        float(line["seconds"])
        for entry in entries
        for line in csv.DictReader((entry.folder / SCORES_FOLDER / "times.csv").read_text().splitlines())
    ]
    return Cost(
        parameters=_parameters(entries[0].folder / MODEL),
        samples=round(_mean(sum(map(samples_of, entry.trainings)) for entry in entries)),
        minutes=_mean(sum(map(minutes_of, entry.trainings)) for entry in entries),
        seconds_per_volume=float(np.median(seconds)),
        peak_gb=max(each["peak_bytes"] for of_entry in trainings for each in of_entry) / 1e9,
    )


def _parameters(model: Path) -> int:
    """Return the parameters of a translator folder's networks, statistics of batch norms and the like not counted."""
    from aldm.layer_table import count
    from aldm.translate import Translator

    return count(Translator.load(model).predictor)


def samples_of(training: Sequence[str]) -> int:
    """Return the samples that a training saw: its steps times its batch."""
    import yaml

    from aldm.config import Config, from_dict, training_of

    config = from_dict(Config, yaml.safe_load((_run_dir(training) / "config.yaml").read_text()))
    return int(_metrics(training)[-1]["step"]) * training_of(config, training[1]).batch_size


def minutes_of(training: Sequence[str]) -> float:
    """Return the time that a training took, earlier starts of one that was interrupted included."""
    return float(max(record.get("elapsed_s", 0.0) for record in _metrics(training))) / 60


def _metrics(training: Sequence[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (_run_dir(training) / "metrics.jsonl").read_text().splitlines()]


def _run_dir(training: Sequence[str]) -> Path:
    return Path(training[training.index("--run-dir") + 1])


def _draw(benchmark: MethodsBenchmark, entries: Sequence[Entry], store: "VolumeStore") -> None:
    """Draw truth, source and every method's result of the first held-out subject beside each other."""
    from aldm.metrics import psnr_db
    from aldm.pictures import save_gallery
    from aldm.translate import Translator

    source, target = benchmark.pair
    record = next(one for one in store.subjects(benchmark.split) if {source, target} <= set(one.modalities))
    x, truth = (store.volume(record.subject_id, name) for name in benchmark.pair)
    made: dict[str, Any] = {f"source {source}": x}
    for entry in entries:
        if entry.seed == 0:
            translator = Translator.load(entry.folder / MODEL)
            made[entry.method] = translator.translate_encoded(translator.encode(x), source, target).mean
    truth, *volumes = ((np.clip(volume, -1, 1) + 1) / 2 for volume in (truth, *made.values()))
    scored = {f"{name}\n{psnr_db(truth, volume):.1f} dB": volume for name, volume in zip(made, volumes, strict=True)}
    save_gallery(benchmark.out / PICTURE, truth, scored, f"{record.subject_id}, {source} to {target}")


def _methods(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(entry.method for entry in entries))


def means_of(values: Iterable[tuple[K, float]]) -> dict[K, float]:
    """Return the mean of the values of every key."""
    groups: dict[K, list[float]] = defaultdict(list)
    for key, value in values:
        groups[key].append(value)
    return {key: _mean(group) for key, group in groups.items()}


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def with_interval(mean: float, half: float, digits: int) -> str:
    text = f"{mean:.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"
