"""How many copies of the model there should be: as many as there are jobs for.

Ray Serve pickles this module and calls the function in its controller, so it imports nothing of ours.
"""

from typing import Any

WANTED = "copies_wanted"
"""What every copy of the model reports: how many of them the unfinished jobs would keep busy."""


def copies_for_jobs(context: Any) -> tuple[int, dict[str, Any]]:
    """Return the number of copies that the newest report asks for, within the deployment's bounds.

    Args:
        context: of Ray Serve: an `AutoscalingContext`.
    """
    reports = (context.raw_metrics or {}).get(WANTED, {}).values()
    newest = max((value for series in reports for value in series), key=lambda value: value.timestamp, default=None)
    wanted = context.target_num_replicas if newest is None else round(newest.value)
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(least, min(most, wanted)), {}
