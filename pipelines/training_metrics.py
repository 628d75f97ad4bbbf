"""The speed and the losses of a training as gauges of Ray, which its nodes tell Prometheus."""

import time
from typing import Any

SAMPLES_PER_SECOND, LOSS = "aldm_training_samples_per_second", "aldm_training_loss"
"""Prometheus sees them with ray_ in front."""


class TrainingGauges:
    """Sets the gauges from what a training logs; made on rank 0, inside a Ray worker."""

    def __init__(self, stage: str, run: str, batch_size: int) -> None:
        """Declare the gauges.

        Args:
            stage: name of the training.
            run: its run folder, to tell trainings apart.
            batch_size: samples of a step, over all workers.
        """
        from ray.util.metrics import Gauge

        tags = {"stage": stage, "run": run}
        self._speed = Gauge(SAMPLES_PER_SECOND, "Samples of a training per second, over all workers.", tuple(tags))
        self._loss = Gauge(LOSS, "A loss of a training, by name.", (*tags, "name"))
        self._speed.set_default_tags(tags)
        self._loss.set_default_tags(tags)
        self._batch_size = batch_size
        self._last: tuple[int, float] | None = None

    def log(self, record: dict[str, Any]) -> None:
        """Take a record of `fit`; those of a validation are not heard."""
        losses = {name: value for name, value in record.items() if name.endswith("/loss") and "validation" not in name}
        if not losses:
            return
        now, step = time.monotonic(), int(record["step"])
        if self._last is not None and step > self._last[0] and now > self._last[1]:
            self._speed.set(self._batch_size * (step - self._last[0]) / (now - self._last[1]))
        self._last = (step, now)
        for name, value in losses.items():
            self._loss.set(float(value), {"name": name})
