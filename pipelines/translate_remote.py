"""`aldm translate --server URL`: the same files in and out, made by a translation service instead of this machine."""

import argparse
import contextlib
import json
import logging
import os
import re
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

from aldm.data.dicom_files import SUFFIXES
from aldm.data.modalities import check_modality
from aldm.data.nifti_header import MAX_VOXELS
from aldm.errors import UserError
from aldm.likeness import Likeness
from aldm.pairs import check_several
from aldm.progress import progress
from aldm.provenance import likeness_of
from pipelines.translate_files import (
    DICOM,
    NO_SPREAD,
    NO_UNCERTAINTY,
    Files,
    Output,
    Task,
    writing,
)

if TYPE_CHECKING:
    import httpx

    from aldm.data.volume import Volume

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "ALDM_TOKEN"
TIMEOUT_S = 60.0
"""Longest silence of a service that answers."""
PATIENCE_S = 120.0
"""So long a service may be away in the middle of a translation: it may be restarting."""
BUSY_S = 3600.0
"""So long a service may have no place for a volume."""
LONGEST_PAUSE_S = 120.0
"""Retry-After may say more, but places become free when they do."""
POLL_S = 0.3
FINISHED = ("done", "failed", "cancelled")
_LOCAL_FLAGS: dict[str, Any] = {
    "model": None,
    "preset": None,
    "set": [],
    "precision": None,
    "device": "auto",
    "max_memory_gb": None,
    "scratch_dir": None,
    "eta": None,
    "intensity": "median",
    "keep_patient": False,
    "max_voxels": MAX_VOXELS,
}
"""Flags that a service decides by itself, and their defaults."""


class RemoteService:
    """A translation service (`aldm serve`) that makes tasks."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Ask the service what it can do.

        Args:
            args: of `aldm translate`.

        Raises:
            UserError: no such service, no token for it, or flags that it does not take.
        """
        import httpx

        said = [f"--{name.replace('_', '-')}" for name, usual in _LOCAL_FLAGS.items() if getattr(args, name) != usual]
        if said:
            raise UserError(f"{', '.join(said)}: a service decides that by itself; leave it out with --server")
        url = urlsplit(args.server)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(f"--server {args.server}: wanted an address such as http://127.0.0.1:8000")
        token = _token(args.token_file)
        if token and url.scheme == "http" and url.hostname not in ("localhost", "127.0.0.1", "::1"):
            logger.warning("the token and the volumes go to %s unencrypted: use https where there is one", url.hostname)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._args = args
        self._client = httpx.Client(base_url=args.server.rstrip("/"), headers=headers, timeout=TIMEOUT_S)
        (self._model,) = self._answer("GET", "/v1/models")["models"]

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the service's model knows."""
        return tuple(self._model["modalities"])

    def translates(self, source: str, target: str) -> bool:
        """Whether it knows both: which pairs a model was trained for the service says when it is asked."""
        return source in self.modalities and target in self.modalities

    def check_pair(self, source: str, target: str) -> None:
        """Refuse a modality that the model does not know."""
        check_modality("source", source, self.modalities)
        check_modality("target", target, self.modalities)

    def check_sources(self, sources: Sequence[str], target: str) -> None:
        """Refuse several sources that the model does not translate together."""
        model = self._model
        several = bool(model.get("takes_several"))  # a service of before takes one
        check_several(sources, target, kind=model["kind"], modalities=self.modalities, takes_several=several)

    def load(self) -> None:
        """Refuse maps that the service's model is known not to give; it has loaded the model already.

        Raises:
            UserError: --uncertainty or --spread of a model without.
        """
        args, model = self._args, self._model
        samples = args.num_samples or model["default"]["num_samples"]
        if args.spread is not None and samples < 2:
            raise UserError(NO_SPREAD)
        if args.uncertainty is not None and model.get("uncertainty_level") is None:  # a service of before has none
            raise UserError(NO_UNCERTAINTY)

    def count_boxes(self, volume: "Volume") -> None:
        """The service says so when the translation is done."""

    def describe(self) -> list[str]:
        """Return what is known of the service."""
        return [f"{self._args.server}: {self._model['description']}, hash {self._model['hash'][:12]}"]

    def make(self, task: Task) -> Likeness | None:
        """Have one input translated into every target; all results appear, or none. Return its likeness.

        The service forgets it then, also when something goes wrong; it is asked to keep a translation only when it goes
        away before all results are here.

        Raises:
            UserError: what the service refuses, or it went away for good.
        """
        args = self._args
        likeness = None
        with writing(task, format=args.format, overwrite=args.overwrite, keep_patient=False) as writer:
            job = self._submit(task)
            try:
                self._follow(job, task.path.name)
                for output in task.outputs:
                    files = self._files(job, output, task)
                    likeness = likeness_of(files.provenance)
                    writer.put(output, files)
            except _Away:
                raise
            except BaseException:
                self._forget(job)
                raise
            self._forget(job)
        return likeness

    def _forget(self, job: dict[str, Any]) -> None:
        with contextlib.suppress(UserError):
            self._answer("DELETE", job["links"]["self"])

    def _submit(self, task: Task) -> dict[str, Any]:
        """Send the volumes, as often as it takes until the service has room for them, and return the job."""
        args = self._args
        fields = {
            "source": None if task.others else task.source,
            "target": [output.target for output in task.outputs],
            "sampler": args.sampler,
            "num_inference_steps": args.num_inference_steps,
            "num_samples": args.num_samples,
            "seed": args.seed,
            "series": args.series,
            "accept_unlike": "true" if args.accept_unlike else None,
            "format": "dicom" if args.format == DICOM else "nii.gz",
        }
        fields = {name: value for name, value in fields.items() if value is not None}
        until = time.monotonic() + BUSY_S
        with ExitStack() as stack:
            files = {field: stack.enter_context(_upload(path)) for field, path in _volumes(task).items()}
            while True:
                for _, stream in files.values():
                    stream.seek(0)
                answer = self._send("POST", "/v1/translations", files=files, data=fields)
                if answer.status_code != 503:
                    break
                seconds = _pause(answer)
                if time.monotonic() + seconds > until:
                    raise UserError(
                        f"--server {args.server} has had no place for {task.path.name} for {BUSY_S:g} s "
                        f"({_detail(answer)}): try again later"
                    )
                logger.info("the service is busy (%s)", _detail(answer))
                time.sleep(seconds)
        job: dict[str, Any] = self._checked(answer)
        given = job["links"]["results"].values()
        for kind, message in (("spread", NO_SPREAD), ("uncertainty", NO_UNCERTAINTY)):
            if getattr(args, kind) is not None and not all(links.get(kind) for links in given):
                self._answer("DELETE", job["links"]["self"])
                raise UserError(message)
        return job

    def _follow(self, job: dict[str, Any], name: str) -> None:
        """Wait for the end of a job.

        Raises:
            UserError: it failed, or somebody cancelled it.
        """
        total = job["num_inference_steps"] * job["num_samples"] * len(job["targets"])
        done = 0
        with progress(total=total, description=name, unit="step") as bar:
            while job["state"] not in FINISHED:
                time.sleep(POLL_S)
                job = self._checked(self._patiently(job["links"]["self"]))
                if job["queue_position"] is not None:
                    bar.note(f"place {job['queue_position'] + 1} in the queue")
                now = max(done, int(job["progress"] * total))
                bar.update(now - done)
                done = now
        if job["state"] != "done":
            why = job["error"]["detail"] if job["error"] else "it was cancelled"
            raise UserError(f"{name}: the service did not translate it: {why}")

    def _patiently(self, path: str, **more: Any) -> "httpx.Response":
        """Return an answer that is no server's error; ask again while the service is away.

        Raises:
            _Away: it stays away.
        """
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer = self._send("GET", path, **more)
                if answer.status_code < 500:
                    return answer
                message, seconds = _detail(answer), _pause(answer)
            except _Unreachable as error:
                message, seconds = str(error), 1.0
            if time.monotonic() + seconds > until:
                raise _Away(
                    f"--server {self._args.server} went away in the middle of a translation: {message}; what it has "
                    f"made is kept there for a while, at {path.partition('?')[0]}"
                )
            time.sleep(seconds)

    def _files(self, job: dict[str, Any], output: Output, task: Task) -> Files:
        links = job["links"]["results"][output.target]
        made = self._checked(self._patiently(f"{job['links']['self']}/provenance", params={"target": output.target}))
        maps = {kind: self._whole(links[kind]) for kind in output.maps}
        provenance = {**made, "input": task.path.name, **task.inputs, "server": self._args.server}
        provenance.pop("sources", None)  # inputs has them
        return Files(result=self._whole(links["result"]), maps=maps, provenance=provenance)

    def _whole(self, path: str) -> bytes:
        answer = self._patiently(path)
        if answer.is_error:
            raise UserError(f"--server {self._args.server}: {_detail(answer)}")
        return answer.content

    def _answer(self, method: str, path: str, **more: Any) -> Any:
        return self._checked(self._send(method, path, **more))

    def _send(self, method: str, path: str, **more: Any) -> "httpx.Response":
        import httpx

        try:
            return self._client.request(method, path, **more)
        except httpx.TransportError as error:
            raise _Unreachable(f"--server {self._args.server} does not answer: {error}") from error

    def _checked(self, answer: "httpx.Response") -> Any:
        """Return an answer's JSON; raises UserError for an error."""
        if answer.status_code == 401:
            raise UserError(
                f"--server {self._args.server} wants a token: put it into a file and give --token-file FILE, or set "
                f"{TOKEN_VARIABLE}"
            )
        if answer.is_error:
            raise UserError(f"--server {self._args.server}: {_detail(answer)}")
        if not answer.content:
            return None
        try:
            return answer.json()
        except json.JSONDecodeError as error:
            raise UserError(f"--server {self._args.server} is no translation service: it answers no JSON") from error


class _Unreachable(UserError):
    """Nobody answers."""


class _Away(UserError):
    """Nobody has answered for long, in the middle of a translation."""


def _files_of(series: Path) -> list[Path]:
    """Return the files of a series that are sent: all but those that macOS leaves beside others."""
    inside = series.iterdir() if series.is_dir() else [series]
    return sorted(path for path in inside if path.is_file() and not path.name.startswith("._"))


def _token(file: Path | None) -> str:
    if file is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    try:
        words = file.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {file} cannot be read: {error}") from error
    if len(words) != 1:
        raise UserError(f"--token-file {file} holds {len(words)} words, wanted the token alone")
    return words[0]


def _pause(answer: "httpx.Response") -> float:
    """Return the seconds that Retry-After asks for (RFC 9110: a number of them, or a date), within reason."""
    said = answer.headers.get("Retry-After", "")
    seconds = 5.0 if answer.status_code == 503 else 1.0
    if re.fullmatch(r"[0-9]{1,9}", said.strip()):
        seconds = float(said)
    else:
        with contextlib.suppress(ValueError, TypeError):
            when = parsedate_to_datetime(said)
            seconds = when.replace(tzinfo=when.tzinfo or UTC).timestamp() - time.time()
    return min(max(seconds, 0.5), LONGEST_PAUSE_S)


def _detail(answer: "httpx.Response") -> str:
    """Return what an error says."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(answer.json()["detail"])
    return f"{answer.status_code} {answer.reason_phrase}"


def _volumes(task: Task) -> dict[str, Path]:
    """Return the form's fields of a task's volumes, the first one first."""
    if not task.others:
        return {"volume": task.path}
    return {f"volume_{name}": path for name, path in ((task.source, task.path), *task.others)}


@contextlib.contextmanager
def _upload(path: Path) -> Iterator[tuple[str, BinaryIO]]:
    """Open what is sent for a volume: the file itself, or a zip of the series."""
    from aldm.data.dicom import is_series

    try:
        if not is_series(path):
            with path.open("rb") as stream:
                yield path.name, stream
            return
        with tempfile.TemporaryFile() as stream:
            with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                for number, file in enumerate(_files_of(path)):
                    promised = file.suffix.lower() in SUFFIXES  # other names may say who the patient is
                    archive.write(file, f"{number:05d}.{'dcm' if promised else 'file'}")
            yield f"{path.name}.zip", stream
    except OSError as error:
        raise UserError(f"{path}: cannot be sent: {error.strerror or error}") from error
