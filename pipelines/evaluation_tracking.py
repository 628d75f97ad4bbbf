"""The MLflow run of an evaluation: mean scores as metrics, tables, card and pictures as artifacts."""

import csv
import json
import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aldm.errors import UserError
from pipelines.tracking_server import (
    EXPERIMENT,
    answering,
    connect,
    experiment_id,
    impatient,
    log_metrics,
    log_params,
    new_run,
    tracking_uri,
)

if TYPE_CHECKING:
    from aldm.score_rows import MethodKey, ScoreRow

logger = logging.getLogger(__name__)

MEANS = "mean_scores.json"
"""Artifact: the table of mean scores, which MLflow shows and compares."""


def log_evaluation(
    out: Path, *, experiment: str = EXPERIMENT, group: str | None = None, uri: str | None = None
) -> str | None:
    """Log the folder of `aldm evaluate` as a run.

    Metrics are the means over the translations (source and target differ) of a method and region, such as
    psnr_db/brain/aldm-ddim-10; the row reconstruction, which has none, is over its own volumes. Where the server does
    not answer, a warning is all: the scores are on the disk. To know before the work, call check_server.

    Args:
        out: the folder.
        experiment: MLflow's experiment; made if there is none.
        group: name of the parent run; made if there is none. None starts a run without a parent.
        uri: of the tracking server (default: tracking_uri(out)).

    Returns:
        The run's id, or None.
    """
    from mlflow.entities import Metric

    from aldm.evaluation_settings import EVALUATION_FILE, SCORES_FILE, TIMES
    from aldm.score_rows import read_csv

    uri = uri or tracking_uri(out)
    record = json.loads((out / EVALUATION_FILE).read_text())
    table = _mean_scores(read_csv(out / SCORES_FILE))
    now = int(time.time() * 1000)
    values = _metric_values(table) | _median_seconds(out / TIMES)
    metrics = [Metric(name, value, now, 0) for name, value in values.items() if math.isfinite(value)]
    params = {name: record[name] for name in ("layout", "split", "max_subjects", "seed")}
    params |= {f"{_plain(m['method'])}.{name}": m[name] for m in record["models"] for name in ("kind", "hash")}
    tags = {"stage": "evaluate", "input.store": record["store"], "input.store_fingerprint": record["store_fingerprint"]}
    try:
        with impatient(), answering(uri):
            client = connect(uri)
            run_id, _ = new_run(client, experiment_id(client, uri, experiment), out.name, group=group, tags=tags)
            log_params(client, run_id, params)
            log_metrics(client, run_id, metrics)
            client.log_table(run_id, {name: [row[name] for row in table] for name in table[0]}, MEANS)
            client.log_artifacts(run_id, str(out))
            client.set_terminated(run_id)
    except UserError as error:
        logger.warning("%s is not logged: %s", out, error)
        return None
    return run_id


def _mean_scores(rows: Sequence["ScoreRow"]) -> list[dict[str, Any]]:
    """Return a row per method and region."""
    from aldm.score_rows import OVERLAPS, SCORE_COLUMNS, MethodKey, mean_scores

    return [
        {
            "method": _method(MethodKey(line["method"], line["sampler"], line["num_inference_steps"])),
            "region": line["region"],
            "volumes": line["volumes"],
            **{name: line[name] for name in (*SCORE_COLUMNS, *OVERLAPS)},
        }
        for line in mean_scores(rows, with_codec=True).reset_index().to_dict("records")
    ]


def _metric_values(table: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    from aldm.score_rows import OVERLAPS, SCORE_COLUMNS

    names = (*SCORE_COLUMNS, *OVERLAPS)
    return {f"{score}/{row['region']}/{row['method']}": row[score] for row in table for score in names}


def _median_seconds(path: Path) -> dict[str, float]:
    """Return the median time of a volume, s, of every method that was timed."""
    import numpy as np

    from aldm.score_rows import MethodKey

    seconds: dict[str, list[float]] = {}
    with path.open(newline="") as stream:
        for line in csv.DictReader(stream):
            key = MethodKey(line["method"], line["sampler"], int(line["num_inference_steps"]))
            seconds.setdefault(f"seconds_per_volume/{_method(key)}", []).append(float(line["seconds"]))
    return {name: float(np.median(values)) for name, values in seconds.items()}


def _method(key: "MethodKey") -> str:
    """Return a method's name as a part of a metric's: aldm-ddim-10."""
    return "-".join(_plain(str(part)) for part in key if part)


def _plain(text: str) -> str:
    """Return the text in characters that MLflow takes in names."""
    return re.sub(r"[^\w.\- ]", "_", text, flags=re.ASCII)
