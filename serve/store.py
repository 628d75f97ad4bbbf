"""The job store as a named actor, and how ingress and workers talk to it across its restarts."""

import asyncio
import contextlib
import contextvars
import os
import threading
import time
from collections.abc import Coroutine
from typing import Any

from serve.jobs import JobStore
from serve.problems import Problem, busy
from serve.settings import JOB_STORE, NAMESPACE, Settings

CALL_S = 5.0
"""A call without an answer for so long is made again."""
PATIENCE_S = 60.0
"""So long the store may be away (it is started again within seconds) before callers give up."""
IDLE_S = float(os.environ.get("ALDM_SERVE_IDLE_S", "30"))
"""A store that nobody calls for so long ends: workers call it many times in it, so there are none any more."""


class StoreActor:
    """`JobStore` in an actor: problems are returned, because Ray would wrap them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import ray

        again = ray.get_runtime_context().was_current_actor_reconstructed  # its settings are those of the first time
        self._store = JobStore(Settings(**settings), as_configured=again)
        self._heard = time.monotonic()
        threading.Thread(target=self._end_with_the_service, daemon=True).start()

    def call(self, method: str, *args: Any) -> tuple[Any, Problem | None]:
        """Call a method of the store."""
        self._heard = time.monotonic()
        try:
            return getattr(self._store, method)(*args), None
        except Problem as problem:
            return None, problem
        except OSError as error:
            return None, busy(f"the service's folder cannot be used: {error.strerror}", 30)
        finally:
            self._heard = time.monotonic()

    def _end_with_the_service(self) -> None:
        """End when nobody calls any more: Ray would keep a detached actor for as long as the cluster runs."""
        import ray

        while time.monotonic() - self._heard < IDLE_S:
            time.sleep(1)
        ray.kill(ray.get_actor(JOB_STORE, namespace=NAMESPACE))


def start_store(settings: Settings) -> "StoreHandle":
    """Return the store; the first caller starts it. Ray starts it again when its process dies."""
    return StoreHandle(settings)


def end_store() -> None:
    """End the store, where there is one; what it knows is in the work folder."""
    import ray

    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(JOB_STORE, namespace=NAMESPACE))


def _actor(settings: Settings) -> Any:
    import ray

    actor = ray.remote(StoreActor).options(
        name=JOB_STORE,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        allow_out_of_order_execution=True,  # otherwise one call that is lost holds up all that follow it for 30 s
    )
    return actor.remote(settings.model_dump())


class StoreHandle:
    """Calls the store, and again while it is being restarted; every method of the store can be called twice.

    Ray cancels what a request has called when its client hangs up. A call to the store goes on: it belongs to a task
    without a context, of which Ray does not know the request.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.actor = _actor(settings)
        self._open: set[asyncio.Task[Any]] = set()

    def call(self, method: str, *args: Any, patience_s: float = PATIENCE_S) -> Any:
        """Call a method of `JobStore` and wait for its result.

        Raises:
            Problem: what the store refuses; 503 when it does not answer.
        """
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        until = time.monotonic() + patience_s
        while True:
            try:
                return _result(ray.get(self.actor.call.remote(method, *args), timeout=CALL_S))
            except (RayActorError, GetTimeoutError) as error:
                if time.monotonic() > until:
                    raise _gone() from error
                time.sleep(0.3)
                self._find_again(error)

    async def acall(self, method: str, *args: Any) -> Any:
        """As `call`, for coroutines; where the caller is cancelled the call goes on to its end."""
        return await asyncio.shield(self._start(self._acall(method, *args)))

    def tell(self, method: str, *args: Any) -> None:
        """Call a method of `JobStore` without waiting, once every call that was made before has ended.

        For coroutines: what a request that was cut off has begun is undone by what is told afterwards.
        """
        self._start(self._told(set(self._open), method, *args))

    def _start(self, call: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        task = asyncio.get_running_loop().create_task(call, context=contextvars.Context())
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        return task

    async def _told(self, before: "set[asyncio.Task[Any]]", method: str, *args: Any) -> None:
        if before:
            await asyncio.wait(before)
        with contextlib.suppress(Problem):
            await self._acall(method, *args)

    async def _acall(self, method: str, *args: Any) -> Any:
        from ray.exceptions import RayActorError

        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                return _result(await asyncio.wait_for(self.actor.call.remote(method, *args), CALL_S))
            except (RayActorError, TimeoutError) as error:
                if time.monotonic() > until:
                    raise _gone() from error
                await asyncio.sleep(0.3)
                self._find_again(error)

    def _find_again(self, error: Exception) -> None:
        """Start the store again where it has ended for good."""
        from ray.exceptions import ActorDiedError

        if isinstance(error, ActorDiedError):
            self.actor = _actor(self._settings)


def _result(answer: tuple[Any, Problem | None]) -> Any:
    value, problem = answer
    if problem is not None:
        raise problem
    return value


def _gone() -> Problem:
    return Problem(503, "the job store does not answer; it is being restarted", headers={"Retry-After": "5"})
