"""How many copies of the model there are: as many as the job store has jobs for, within bounds."""

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from aldm.errors import UserError
from serve.app import copies
from serve.autoscaling import WANTED, copies_for_jobs
from serve.settings import Settings


def context(*reports: list[tuple[float, float]], now: int = 1, least: int = 1, most: int = 4) -> Any:
    """What Ray Serve hands to a policy: each copy's (time, copies wanted)."""
    series = {
        f"replica-{number}": [SimpleNamespace(timestamp=at, value=value) for at, value in report]
        for number, report in enumerate(reports)
    }
    return SimpleNamespace(
        raw_metrics={WANTED: series} if reports else {},
        target_num_replicas=now,
        capacity_adjusted_min_replicas=least,
        capacity_adjusted_max_replicas=most,
    )


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (context([(1, 3)]), 3),
        (context([(1, 9)]), 4),
        (context([(1, 0)]), 1),
        (context([(1, 4), (2, 2)], [(1, 3)]), 2),  # the newest report, whoever made it
        (context(now=3), 3),  # nobody has reported yet
        (context([], now=2), 2),
    ],
)
def test_the_newest_report_counts_within_the_bounds(given: Any, wanted: int) -> None:
    assert copies_for_jobs(given) == (wanted, {})


def test_a_fixed_number_of_copies_is_not_scaled() -> None:
    assert copies(Settings(num_replicas=3)) == {"num_replicas": 3}


def test_ray_serve_takes_the_policy() -> None:
    from ray.serve.config import AutoscalingConfig

    options = copies(Settings(num_replicas=1, max_replicas=5))
    config = AutoscalingConfig(**options["autoscaling_config"])
    assert (config.min_replicas, config.max_replicas) == (1, 5)
    assert config.policy.get_policy()(context([(1, 2)])) == (2, {})


def test_fewer_at_most_than_at_least_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_replicas is 1, wanted at least num_replicas, 2"):
        Settings(num_replicas=2, max_replicas=1)


def test_a_work_folder_may_be_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """So two clusters, one of which replaces the other, do not meet in one folder."""
    settings = Settings(work_dir="/shared/aldm-service/$RAY_CLUSTER_NAME")
    monkeypatch.setenv("RAY_CLUSTER_NAME", "translator-x1")
    assert str(settings.folder) == "/shared/aldm-service/translator-x1"
    monkeypatch.delenv("RAY_CLUSTER_NAME")
    with pytest.raises(UserError, match=r"\$RAY_CLUSTER_NAME: there is no such variable"):
        _ = settings.folder
