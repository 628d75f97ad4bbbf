"""The service's numbers: counted by the job store, told in Prometheus' text format."""

from collections import Counter
from typing import Any

SECONDS_EDGES = (1, 2, 5, 10, 30, 60, 120, 300, 900)
"""Upper edges of the histogram of a job's seconds."""

_HELP = {
    "jobs_queued": "Jobs that wait for a worker.",
    "uploads_open": "Uploads that have a place in the queue and are not there yet.",
    "jobs_running": "Jobs that a worker is making.",
    "folder_bytes": "Size of the kept uploads and results.",
    "jobs_total": "Jobs by what became of them, since the job store started.",
    "job_seconds": "Seconds from a job's last start to its result.",
}


class Tally:
    """What became of jobs, and how long they took, since the job store started."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self._last: list[float] = []
        self._histogram: Counter[float] = Counter()
        self._seconds = 0.0

    def took(self, seconds: float) -> None:
        """Note how long a finished job took."""
        self._seconds += seconds
        self._histogram[next((edge for edge in SECONDS_EDGES if seconds <= edge), float("inf"))] += 1
        self._last = [*self._last[-19:], seconds]

    def expected_wait(self) -> int:
        """Return in how many seconds a place may be free: the mean of the last jobs."""
        return max(1, min(120, round(sum(self._last) / len(self._last)))) if self._last else 5

    def counts(self) -> dict[str, Any]:
        """Return the numbers for `prometheus_text`."""
        histogram = [(edge, self._histogram[edge]) for edge in (*SECONDS_EDGES, float("inf"))]
        return {"totals": dict(self.totals), "histogram": histogram, "seconds": self._seconds}


def prometheus_text(counts: dict[str, Any]) -> str:
    """Return what `JobStore.counts` counted as metrics named aldm_service_*."""
    lines: list[str] = []

    def begin(name: str, kind: str) -> str:
        lines.extend([f"# HELP aldm_service_{name} {_HELP[name]}", f"# TYPE aldm_service_{name} {kind}"])
        return f"aldm_service_{name}"

    gauges = {"jobs_queued": "queued", "uploads_open": "uploading", "jobs_running": "running"}
    for name, key in (gauges | {"folder_bytes": "folder_bytes"}).items():
        lines.append(f"{begin(name, 'gauge')} {counts[key]}")
    total = begin("jobs_total", "counter")
    for state in ("accepted", "done", "failed", "cancelled", "retried"):
        lines.append(f'{total}{{state="{state}"}} {counts["totals"].get(state, 0)}')
    seconds = begin("job_seconds", "histogram")
    so_far = 0
    for edge, count in counts["histogram"]:
        so_far += count
        label = "+Inf" if edge == float("inf") else f"{edge:g}"
        lines.append(f'{seconds}_bucket{{le="{label}"}} {so_far}')
    lines.extend([f"{seconds}_sum {counts['seconds']:.3f}", f"{seconds}_count {so_far}"])
    return "\n".join(lines) + "\n"
