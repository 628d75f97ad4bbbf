"""A command as a job of a Ray cluster, by its job server: submitted, followed to its end, found again, stopped.

A job lives on the cluster, not in the process that submitted it: when that is killed, the job goes on. So whoever
submits one notes its address and id first, and may follow it later from elsewhere.
"""

import asyncio
import contextlib
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aldm.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

logger = logging.getLogger(__name__)

PENDING, RUNNING, SUCCEEDED = "PENDING", "RUNNING", "SUCCEEDED"
LIVE = (PENDING, RUNNING)
POLL_S = 2.0


@dataclass(frozen=True)
class RayJob:
    """A job of a cluster, which need not know it (yet, or any more)."""

    address: str
    """Of the job server, such as http://aldm-head-svc:8265."""
    id: str
    """The submission id."""

    def state(self) -> str | None:
        """Return PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; None where the cluster does not know the job.

        Raises:
            UserError: the job server does not answer.
        """
        found = self._details()
        return None if found is None else str(found.status)

    def submit(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        """Give a command to the cluster, which runs it on the head.

        Args:
            words: of the command.
            environment: variables that it has besides.

        Raises:
            UserError: the job server does not take it.
        """
        with self._client() as client:
            client.submit_job(
                entrypoint=shlex.join(words), submission_id=self.id, runtime_env={"env_vars": dict(environment)}
            )

    def follow(self, show: Callable[[str], None]) -> tuple[int, str]:
        """Show what the job has printed and prints until it has ended; return its exit code and Ray's word on its end.

        Args:
            show: is given pieces of its output, in their order.

        Raises:
            UserError: the job server does not answer, or does not know the job any more.
        """
        shown = 0  # characters

        async def show_rest(client: Any) -> None:
            nonlocal shown
            seen = 0
            async for text in client.tail_job_logs(self.id):  # from the beginning
                rest = text[max(0, shown - seen) :]
                seen += len(text)
                if rest:
                    shown = seen
                    show(rest)

        while True:
            try:
                with self._client() as client:
                    asyncio.run(show_rest(client))
            except UserError as error:  # a connection that is lost in the middle is no end of the job
                logger.warning("the output of job %s is interrupted: %s", self.id, error)
            details = self._details()
            if details is None:
                raise UserError(f"the cluster at {self.address} does not know the job {self.id} any more")
            if details.status not in LIVE:
                code = 0 if details.status == SUCCEEDED else details.driver_exit_code or 1
                return code, details.message or str(details.status)
            time.sleep(POLL_S)

    def stop(self, timeout_s: float) -> None:
        """Ask the cluster to end the job, and wait until it has, but not forever.

        Raises:
            UserError: the job server does not answer.
        """
        deadline = time.monotonic() + timeout_s
        if self.state() in LIVE:
            with self._client() as client:
                client.stop_job(self.id)
        while self.state() in LIVE and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def _details(self) -> "JobDetails | None":
        with self._client() as client:
            return next((job for job in client.list_jobs() if job.submission_id == self.id), None)

    @contextlib.contextmanager
    def _client(self) -> Iterator["JobSubmissionClient"]:
        """Yield a client; what it raises in the block is a UserError."""
        import aiohttp
        import requests
        from ray.exceptions import RayError
        from ray.job_submission import JobSubmissionClient

        try:
            yield JobSubmissionClient(self.address)
        except (OSError, RuntimeError, RayError, requests.RequestException, aiohttp.ClientError) as error:
            raise UserError(f"Ray's job server at {self.address} does not do it: {error}") from error
