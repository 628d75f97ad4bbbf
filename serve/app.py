"""The Ray Serve application: `serve run serve.app:build_app model=DIR token_file=FILE`, or a `serve deploy` config."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.models import find_model
from serve.security import check_no_proxy, read_tokens
from serve.settings import Settings
from serve.store import start_store
from serve.worker import Worker

if TYPE_CHECKING:
    from ray.serve import Application

MAX_REQUESTS = 512
"""Open requests of the ingress, event streams included: far above the queue, whose own limit acts first."""
GROW_S, SHRINK_S = 5.0, 300.0
"""Jobs wait for so long before a copy is added, and copies are idle for so long before one goes."""
LONGEST_JOB_S = 1800.0
"""A copy of the model that is replaced may finish its batch for so long."""
SURGE_PERCENT = 100
"""Deployed again, as many new copies as there are old ones are started before the old ones end. Ray Serve's own 0 would
end the only copy first. Without room for them the old copies go on, and the new ones wait for it."""
WAIT_S = 0.5


def build_app(args: Settings) -> "Application":
    """Return the application: one ingress, and `num_replicas` copies of the model.

    Without a token file only clients on the machine of the HTTP proxy are answered, whatever it listens on.

    Deployed again with another model, the old ingress answers and the old copies work until a copy of the new model is
    loaded and warm; then the new ingress takes over.

    Args:
        args: how the service is run; `serve run` and `serve deploy` make it of their arguments.

    Raises:
        UserError: no such model, or a token file that cannot be used.
    """
    from ray import serve

    token_file = Path(args.token_file).expanduser().absolute() if args.token_file else None
    if token_file is not None:
        read_tokens(token_file)  # a file that cannot be used is refused now
    model = find_model(args.model, args.folder)
    settings = args.model_dump()

    def build() -> Any:  # in the replica; it is kept by Ray, so it holds no token
        from serve.api import build_api
        from serve.tokens import TokenFile

        if token_file is None:
            check_no_proxy()
        store = start_store(args)
        while not store.call("may_serve", model.hash):  # or it would take jobs that nobody makes; the old one goes on
            time.sleep(WAIT_S)
        store.call("configure", settings, {"name": model.name, "hash": model.hash})
        return build_api(args, model, {} if token_file is None else TokenFile(token_file), store)

    worker = serve.deployment()(Worker).options(
        name="model",
        **copies(args),
        max_surge_percent=SURGE_PERCENT,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if args.use_gpu else 0},
        graceful_shutdown_timeout_s=LONGEST_JOB_S,
        health_check_period_s=2,
        logging_config={"enable_access_log": False},
    )
    api = serve.deployment()(serve.ingress(build)()).options(
        name="api",
        max_ongoing_requests=MAX_REQUESTS,
        max_queued_requests=MAX_REQUESTS,
        max_surge_percent=SURGE_PERCENT,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=2,
        logging_config={"enable_access_log": False},
    )
    return api.bind(worker.bind(str(model.folder), settings))


def copies(args: Settings) -> dict[str, Any]:
    """Return the options that say how many copies of the model there are.

    Workers fetch their jobs, so no request of theirs waits that Ray Serve could count: its own measure would never add
    a copy. The policy goes by what the job store says instead.
    """
    if args.max_replicas is None:
        return {"num_replicas": args.num_replicas}
    scaling = {
        "min_replicas": args.num_replicas,
        "max_replicas": args.max_replicas,
        "upscale_delay_s": GROW_S,
        "downscale_delay_s": SHRINK_S,
        "metrics_interval_s": GROW_S,
        "policy": {"policy_function": "serve.autoscaling:copies_for_jobs"},
    }
    return {"num_replicas": "auto", "autoscaling_config": scaling}
