"""What event streams and blocking calls wait for: one look at the job store, for all of them together."""

import asyncio
import contextvars
import time
from typing import Any

from serve.schemas import JobView, job_view
from serve.store import StoreHandle

LOOK_S = 0.2
"""How often the store is asked, however many wait."""

_Key = tuple[str, str]
_Answer = tuple[dict[str, Any] | None, BaseException | None]


class News:
    """Asks the store for every job that somebody waits for, in one call."""

    def __init__(self, store: StoreHandle) -> None:
        self._store = store
        self._waited: dict[_Key, asyncio.Future[_Answer]] = {}
        self._looking: asyncio.Task[None] | None = None

    async def next(self, job_id: str, owner: str) -> JobView:
        """Return a job as it is at the next look.

        Raises:
            Problem: 404, there is no such job of this owner; 503, the store does not answer.
        """
        loop = asyncio.get_running_loop()
        answer = self._waited.setdefault((job_id, owner), loop.create_future())
        if self._looking is None or self._looking.done():
            self._looking = loop.create_task(self._look(), context=contextvars.Context())  # of no single request
        values, error = await asyncio.shield(answer)  # others may wait for it as well
        if error is not None:
            raise error
        assert values is not None
        return job_view(values, time.time())

    async def _look(self) -> None:
        """Look at the store until nobody waits."""
        while self._waited:
            await asyncio.sleep(LOOK_S)
            waited, self._waited = self._waited, {}
            found = (await asyncio.gather(self._store.acall("views", list(waited)), return_exceptions=True))[0]
            answers: list[_Answer] = [(None, found)] * len(waited) if isinstance(found, BaseException) else found
            for future, answer in zip(waited.values(), answers, strict=True):
                future.set_result(answer)
