"""The folder that `aldm evaluate` writes: scores, tables, times, card, panels, and the record of what was measured."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from aldm import subsets
from aldm.config import to_dict
from aldm.data.store import VolumeStore
from aldm.evaluation import Candidate, Evaluation, Example
from aldm.evaluation_settings import (
    PARQUET,
    PICTURES,
    QUALITY_PICTURE,
    SCORES_FILE,
    SUBSETS,
    SUBSETS_PICTURE,
    TABLES,
    TIMES,
    EvaluationSettings,
)
from aldm.pictures import CardPoint, save_quality_card, save_subsets, save_translation_panel
from aldm.run_folder import git_state
from aldm.score_rows import MethodKey, mean_scores, of_images, write_csv, write_parquet
from aldm.score_table import document


def draw_panel(example: Example, *, pictured: set[str], store: VolumeStore, folder: Path) -> None:
    """Write the panel of a translation, where it is one of those wanted."""
    if example.subject_id not in pictured or example.source_name == example.target_name:
        return
    (folder / PICTURES).mkdir(exist_ok=True)
    name = f"{example.subject_id}_{example.key.method}_{example.source_name}-to-{example.target_name}.png"
    save_translation_panel(
        folder / PICTURES / name,
        source=example.source,
        prediction=example.prediction,
        target=example.target,
        uncertainty=example.uncertainty,
        source_name=example.source_name,
        target_name=example.target_name,
        spacing_mm=store.preprocess.spacing_mm,
        title=f"{example.subject_id}, {example.key.label()}",
    )


def write_evaluation(folder: Path, result: Evaluation, store: VolumeStore, split: str) -> None:
    """Write all files but the panels and the record."""
    write_csv(folder / SCORES_FILE, result.rows)
    write_parquet(folder / PARQUET, result.rows)
    _write_times(folder / TIMES, result.seconds)
    tables = document(
        result.rows, title=f"{split} split of {store.path.name}", layout=store.layout, seconds=result.seconds
    )
    (folder / TABLES).write_text(tables + _any_sources(folder, result))
    _draw_card(folder / QUALITY_PICTURE, result)


def _any_sources(folder: Path, result: Evaluation) -> str:
    """Write the scores of translations from several sources and their picture, if there are any; return the tables."""
    if not result.several:
        return ""
    write_csv(folder / SUBSETS, result.several)
    keys = list(dict.fromkeys(row.key for row in result.several))
    rows = of_images([row for row in result.rows if row.key in keys] + result.several)
    regions = list(dict.fromkeys(row.region for row in rows))
    region = next((name for name in ("brain", "foreground") if name in regions), "volume")
    cells = subsets.psnr_of(rows, keys[0], region)
    means = {place: sum(psnr.values()) / len(psnr) for place, psnr in cells.items()}
    save_subsets(folder / SUBSETS_PICTURE, means, title=f"{keys[0].label()}: mean PSNR, {region} (dB)")
    return "\n" + "\n".join(subsets.document(rows, key, regions) for key in keys)


def write_record(
    path: Path,
    candidates: Sequence[Candidate],
    store: VolumeStore,
    settings: EvaluationSettings,
    segmenter_hash: str | None,
) -> None:
    """Write what was measured with what, so that the scores explain themselves."""
    segmenter = {"folder": str(settings.segmenter), "hash": segmenter_hash}
    record = {
        "store": str(settings.store),
        "store_fingerprint": store.fingerprint,
        "layout": store.layout,
        "split": settings.split,
        "max_subjects": settings.max_subjects,
        "seed": settings.seed,
        "champion": settings.champion,
        "segmenter": None if segmenter_hash is None else segmenter,
        **git_state(),
        "models": [
            {
                "method": candidate.method,
                "kind": candidate.translator.kind,
                "hash": candidate.translator.model_hash,
                "samplings": [to_dict(sampling) for sampling in candidate.samplings],
                "config": to_dict(candidate.translator.config),
            }
            for candidate in candidates
        ],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def _write_times(path: Path, seconds: Mapping[MethodKey, Sequence[float]]) -> None:
    """Write times.csv: a line per translated volume."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["method", "sampler", "num_inference_steps", "seconds"])
        for key, values in seconds.items():
            writer.writerows([*key, f"{value:.4f}"] for value in values)


def _draw_card(path: Path, result: Evaluation) -> None:
    """Draw mean PSNR of the translations (source and target differ) against the median time of a volume."""
    regions = {row.region for row in result.rows}
    region = next((name for name in ("brain", "foreground") if name in regions), "volume")
    means_db = mean_scores(result.rows)["psnr_db"]
    points = [
        CardPoint(*key, seconds=float(np.median(values)), psnr_db=float(means_db[*key, region]))
        for key, values in result.seconds.items()
        if (*key, region) in means_db.index
    ]
    if points:  # a store of one modality has no translation to show
        save_quality_card(path, points, title="quality and latency", region=region)
