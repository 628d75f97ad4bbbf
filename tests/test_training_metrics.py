"""The gauges of a training: what they are called, and what they are set to."""

from typing import Any

import pytest

from pipelines import training_metrics
from pipelines.training_metrics import LOSS, SAMPLES_PER_SECOND, TrainingGauges


class Recorded:
    """Stands for a gauge of Ray; remembers what it was set to."""

    made: dict[str, "Recorded"]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.tag_keys, self.default, self.values = tag_keys, {}, []
        Recorded.made[name] = self

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.default = tags

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        tags = self.default | (tags or {})
        assert set(tags) == set(self.tag_keys)
        self.values.append((tags.get("name"), value))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("ray.util.metrics.Gauge", Recorded)
    monkeypatch.setattr(training_metrics.time, "monotonic", lambda: now[0])
    Recorded.made = {}
    return now


def test_speed_is_samples_over_time_and_every_loss_is_told(clock: list[float]) -> None:
    gauges = TrainingGauges("ms-spade", "/shared/runs/ms-spade", batch_size=8)
    record: dict[str, Any] = {"step": 10, "generator/loss": 0.5, "discriminator/loss": 0.25, "learning_rate": 1e-3}
    gauges.log(record)
    clock[0] += 4
    gauges.log({"step": 10, "validation/loss": 0.1, "validation/psnr_db": 20.0})
    gauges.log(record | {"step": 20, "generator/loss": 0.4})
    speed, loss = Recorded.made[SAMPLES_PER_SECOND], Recorded.made[LOSS]
    assert speed.values == [(None, 20.0)]
    assert loss.values[:2] == [("generator/loss", 0.5), ("discriminator/loss", 0.25)]
    assert loss.values[2] == ("generator/loss", 0.4)


def test_a_resumed_step_gives_no_speed(clock: list[float]) -> None:
    gauges = TrainingGauges("vqgan", "r", batch_size=1)
    for step in (50, 40):
        clock[0] += 1
        gauges.log({"step": step, "codec/loss": 1.0})
    assert Recorded.made[SAMPLES_PER_SECOND].values == []
