"""The outcome of `aldm benchmark --codecs`: all scores, one table (Markdown and CSV), and the picture of both rates."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from aldm.files import atomic_path
from aldm.words import counted
from pipelines.benchmark_codecs import CodecEntry, CodecTerms
from pipelines.benchmark_codecs_scores import BEFORE, Facts, Measured
from pipelines.benchmark_table import interval, means_of, minutes_of, samples_of, with_interval

if TYPE_CHECKING:
    from aldm.data.store import VolumeStore
    from aldm.score_rows import ScoreRow

TABLE, TABLE_CSV, ALL_SCORES, PICTURE = "codecs.md", "codecs.csv", "scores.csv", "codecs.png"
LOSSLESS_DB = 100.0
"""What rounding leaves of a lossless codec's PSNR lies above this, what a codec that loses something has far below."""
NOTE = """Reconstructions of the held-out volumes: mean over subjects and the 95 % interval of that mean (t; a subject's
value is its mean over modalities and seeds). `before` is the PSNR when the decoder is given the latent before
quantisation. `voxels / scalar` counts the latent's numbers, whatever their precision; `bits / voxel` the codes, log2 of
how many there are for every latent voxel. `codes used` is the share of them that the held-out volumes come to,
`perplexity` how many there would be if all were used alike. `samples` are the crops that the training saw, `s / volume`
is the median time of encoding, quantising and decoding one volume. `haar` rows are Haar transforms of which some bands
are kept, `linear` rows the best linear codecs of blocks of voxels, fitted on the training split: they need no training,
and their scalars are not quantised."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the table."""

    codec: str
    facts: Facts
    """Means over the seeds."""
    psnr_db: dict[str, tuple[float, float]]
    """Region -> mean, and half width of its 95 % interval."""
    before_db: dict[str, float]
    """Region -> mean before quantisation; empty where nothing is quantised."""
    ssim: dict[str, float]
    """Region -> mean."""
    spread_db: float
    """Standard deviation (n - 1) of the mean PSNR inside the mask from training to training; NaN for fewer than two."""
    samples: int | None
    minutes: float | None


def write_codecs(
    terms: CodecTerms, entries: Sequence[CodecEntry], measured: Sequence[Measured], store: "VolumeStore"
) -> str:
    """Write scores.csv, codecs.csv, codecs.md and codecs.png into the benchmark's folder; return the table."""
    lines = [
        line_of(codec, [each for each in measured if each.codec == codec], [e for e in entries if e.method == codec])
        for codec in dict.fromkeys(each.codec for each in measured)
    ]
    lines.sort(key=lambda line: (-line.facts.scalars_per_voxel, -line.psnr_db["volume"][0]))
    regions = list(dict.fromkeys(row.region for each in measured for row in each.rows))
    _write_scores(terms, measured)
    _write_csv(terms, lines, regions)
    text = codecs_table(lines, regions)
    seeds = len({entry.seed for entry in entries})
    title = f"# Codecs, {terms.minutes:g} minutes of training each"
    train, test = (len(store.subjects(split)) for split in ("train", terms.split))
    subjects = f"{counted(train, 'training subject')}, {test} held out"
    lead = f"{subjects}, {counted(seeds, 'seed')}, configuration {' '.join(terms.flags)}."
    with atomic_path(terms.out / TABLE, overwrite=True) as temporary:
        temporary.write_text("\n\n".join([title, lead, NOTE, text, f"![PSNR against rates]({PICTURE})"]) + "\n")
    _draw(terms, lines, regions)
    return text


def line_of(codec: str, measured: Sequence[Measured], entries: Sequence[CodecEntry]) -> Line:
    """Return a codec's row: means over its seeds.

    Args:
        codec: its name.
        measured: its seeds.
        entries: their trainings; none for a codec in closed form.
    """
    rows = [row for each in measured for row in each.rows]
    regions = dict.fromkeys(row.region for row in rows)
    by_seed = [_mean(row.psnr_db for row in each.rows if _is_masked(row, codec)) for each in measured]
    first = measured[0].facts
    return Line(
        codec=codec,
        facts=Facts(
            scalars_per_voxel=first.scalars_per_voxel,
            bits_per_voxel=first.bits_per_voxel,
            codes=first.codes,
            parameters=first.parameters,
            codes_used=_mean_or_none([each.facts.codes_used for each in measured]),
            perplexity=_mean_or_none([each.facts.perplexity for each in measured]),
            seconds_per_volume=_mean_or_none([each.facts.seconds_per_volume for each in measured]),
        ),
        psnr_db={region: interval(_of_subjects(rows, codec, region, "psnr_db")) for region in regions},
        before_db={
            region: _mean(_of_subjects(rows, codec + BEFORE, region, "psnr_db"))
            for region in regions
            if any(row.method == codec + BEFORE for row in rows)
        },
        ssim={region: _mean(_of_subjects(rows, codec, region, "ssim")) for region in regions},
        spread_db=float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else math.nan,
        samples=round(_mean(samples_of(entry.training) for entry in entries)) if entries else None,
        minutes=_mean(minutes_of(entry.training) for entry in entries) if entries else None,
    )


def codecs_table(lines: Sequence[Line], regions: Sequence[str]) -> str:
    """Return the Markdown table."""
    has_seeds = any(not math.isnan(line.spread_db) for line in lines)
    columns = ["codec", "voxels / scalar", "bits / voxel"]
    for region in regions:
        columns += [f"PSNR, {region} (dB)", "before (dB)", "SSIM"]
    columns += ["codes", "codes used", "perplexity", "parameters", "samples", "minutes", "s / volume"]
    columns += ["SD over seeds (dB)"] * has_seeds
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(_cells(line, regions, has_seeds))} |" for line in lines)])


def _cells(line: Line, regions: Sequence[str], has_seeds: bool) -> list[str]:
    facts = line.facts
    cells = [line.codec, f"{1 / facts.scalars_per_voxel:g}", _text(facts.bits_per_voxel, ".3f")]
    for region in regions:
        mean, half = line.psnr_db[region]
        cells.append("lossless" if mean > LOSSLESS_DB else with_interval(mean, half, 2))
        cells += [_text(line.before_db.get(region), ".2f"), f"{line.ssim[region]:.3f}"]
    cells += [_text(facts.codes, ","), _text(facts.codes_used, ".1%"), _text(facts.perplexity, ",.0f")]
    cells += [_text(facts.parameters, ","), _text(line.samples, ","), _text(line.minutes, ".1f")]
    cells.append(_text(facts.seconds_per_volume, ".2f"))
    return [*cells, *["-" if math.isnan(line.spread_db) else f"{line.spread_db:.2f}"] * has_seeds]


def _text(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def _write_scores(terms: CodecTerms, measured: Sequence[Measured]) -> None:
    with (
        atomic_path(terms.out / ALL_SCORES, overwrite=True) as temporary,
        temporary.open("w", newline="") as stream,
    ):
        writer = csv.writer(stream)
        writer.writerow(["seed", "subject_id", "codec", "modality", "region", "psnr_db", "nmse", "ssim"])
        for each in measured:
            for row in each.rows:
                scores = (row.psnr_db, row.nmse, row.ssim)
                writer.writerow([each.seed, row.subject_id, row.method, row.source, row.region, *scores])


def _write_csv(terms: CodecTerms, lines: Sequence[Line], regions: Sequence[str]) -> None:
    """Write the table's numbers, not rounded; what a codec does not have is empty."""
    names = ["codec", "scalars_per_voxel", "bits_per_voxel"]
    for region in regions:
        names += [f"{region}_psnr_db", f"{region}_psnr_half_width_db", f"{region}_before_psnr_db", f"{region}_ssim"]
    names += ["codes", "codes_used", "perplexity", "parameters", "samples", "minutes", "seconds_per_volume"]
    names.append("seeds_sd_db")
    with atomic_path(terms.out / TABLE_CSV, overwrite=True) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(names)
        for line in lines:
            facts = line.facts
            values: list[object] = [line.codec, facts.scalars_per_voxel, facts.bits_per_voxel]
            for region in regions:
                values += [*line.psnr_db[region], line.before_db.get(region), line.ssim[region]]
            values += [facts.codes, facts.codes_used, facts.perplexity, facts.parameters, line.samples, line.minutes]
            values += [facts.seconds_per_volume, line.spread_db]
            writer.writerow("" if isinstance(v, float) and math.isnan(v) else v for v in values)


def _draw(terms: CodecTerms, lines: Sequence[Line], regions: Sequence[str]) -> None:
    from aldm.pictures import RatePoint, save_rates

    region = regions[-1]
    points = [
        RatePoint(
            codec=line.codec,
            family=line.codec.split(" ")[0].rstrip(","),
            voxels_per_scalar=1 / line.facts.scalars_per_voxel,
            bits_per_voxel=line.facts.bits_per_voxel,
            psnr_db=line.psnr_db[region][0],
            before_db=line.before_db.get(region),
        )
        for line in lines
        if line.psnr_db[region][0] < LOSSLESS_DB
    ]
    title = f"codecs, {terms.minutes:g} minutes of training each"
    save_rates(terms.out / PICTURE, points, title=title, region=region)


def _of_subjects(rows: Iterable["ScoreRow"], method: str, region: str, value: str) -> list[float]:
    """Return a score of every subject, its mean over modalities and seeds."""
    own = ((row.subject_id, getattr(row, value)) for row in rows if (row.method, row.region) == (method, region))
    return list(means_of(own).values())


def _is_masked(row: "ScoreRow", codec: str) -> bool:
    return row.method == codec and row.region != "volume"


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None
