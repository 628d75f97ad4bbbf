"""The folder of one training run: it explains itself and belongs to one process at a time.

config.yaml     the resolved configuration
run.json        stage, inputs, command, git commit and versions, once per start
metrics.jsonl   one line per log: training values and validations
last/ best/     checkpoints (aldm/checkpoint.py); last/ holds what --resume needs besides (without Ray)
checkpoints/    what a training on Ray resumes from
run.lock        held while a process trains here
"""

import datetime
import fcntl
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from aldm import __version__
from aldm.config import Config, from_dict, to_dict, training_name, training_of, with_training
from aldm.errors import UserError
from aldm.files import atomic_folder, atomic_path, existing_parent
from aldm.records import read_record

logger = logging.getLogger(__name__)

CONFIG_FILE, RUN_FILE, METRICS_FILE, LOCK_FILE = "config.yaml", "run.json", "metrics.jsonl", "run.lock"
LAST, BEST = "last", "best"
CHECKPOINTS = "checkpoints"
"""Folder of what a training on Ray resumes from, where no other storage is given."""
LOOP_STATE = "training.json"
"""The file of a checkpoint that training.fit goes on from."""
CHECKPOINT_FILES = ("weights.safetensors", "config.json")
"""What anybody but the training itself reads of a checkpoint."""
_WAY_OUT = "fix it from a copy, or delete the folder and train again"
LENGTH_FIELDS = ("epochs", "max_steps", "max_minutes")
PACE_FIELDS = (*LENGTH_FIELDS, "validate_every", "num_validation_samples", "checkpoint_every", "log_every")
"""Fields of the stage's training section that a resumed run may change."""
NETWORK_OF = {"haar_unet": "unet", "error_unet": "uncertainty", "segmenter": "segmenter"}
"""Sections of the configuration that only one training reads."""


class RunFolder:
    """A run folder; `RunFolder.open` locks it, use that in a `with` block."""

    def __init__(self, path: Path, lock: IO[str] | None = None) -> None:
        """Join a run whose folder another process of the same training has opened and keeps locked."""
        self.path = path
        self._lock = lock

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        stage: str,
        config: Config,
        inputs: Mapping[str, str],
        engine: str = "plain",
        storage: str | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> "RunFolder":
        """Lock the folder and write what it is about.

        Args:
            path: the folder; made if it is missing, with those above it.
            stage: the stage's name; its section of the configuration may change its length when it is resumed.
            config: resolved.
            inputs: name -> path or hash of what the run is made from, for run.json.
            engine: what the run trains with; it continues with the same.
            storage: where the states that resuming needs are kept, if not in the folder; it continues with the same.
            resume: go on with the run in the folder.
            overwrite: delete the run in the folder.

        Raises:
            UserError: another process trains there; a run is there and neither `resume` nor `overwrite` is given; there
                is none to resume, or it has another configuration, engine or storage; the folder holds something else;
                it cannot be written.
        """
        path = Path(path)
        check_run_folder(path, resume, overwrite, stage)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _locked(path)
        except OSError as error:
            raise UserError(f"cannot write into {path}: {error.strerror}") from error
        run = cls(path, lock)
        try:
            check_run_folder(path, resume, overwrite, stage)
            if resume:
                check_same_run(path, stage, config, engine, storage)
                run._recover()
            else:
                run._clear()
            run._write_config(config)
            run._write_record(stage, engine, storage, inputs)
        except BaseException:
            run.close()
            raise
        return run

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()

    def resume_from(self) -> Path | None:
        """Return the checkpoint to go on from, or None where the run was stopped before its first one.

        Lines of metrics.jsonl that were logged after that checkpoint are dropped: they will be computed again.
        """
        step = step_of(self.path / LAST) if (self.path / LAST / LOOP_STATE).is_file() else 0
        self.rewind(step)
        if step == 0:
            logger.info("%s has no checkpoint yet: starting from the beginning", self.path)
            return None
        return self.path / LAST

    def rewind(self, step: int) -> None:
        """Drop the lines of metrics.jsonl after a step, and a last line that was not written to its end."""
        metrics = self.path / METRICS_FILE
        if metrics.is_file():
            whole = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
            try:
                kept = [line for line in whole if json.loads(line)["step"] <= step]
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{metrics} is damaged ({error!r}): {_WAY_OUT}") from error
            with atomic_path(metrics, overwrite=True) as temporary:
                temporary.write_text("".join(kept))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; numbers that are not finite become null."""
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        try:
            with (self.path / METRICS_FILE).open("a") as file:
                file.write(json.dumps(plain) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self.path / METRICS_FILE}: {error.strerror}; fix that, then go on with `resume`"
            ) from error

    def save(self, write: Callable[[Path], None], is_best: bool) -> None:
        """Replace last/, and best/ with its weights and config.json where this is the best so far.

        A folder is written under a temporary name and renamed: whatever happens, a whole checkpoint is left.

        Args:
            write: writes everything into the folder that it is given.
            is_best: whether best/ is to be replaced too.
        """
        with atomic_folder(self.path / LAST, overwrite=True) as temporary:
            write(temporary)
        if is_best:
            self._copy(self.path / LAST, BEST)

    def publish(self, checkpoint: Path, is_best: bool) -> None:
        """Replace last/, and best/ where it is the best, by weights and config.json of a checkpoint kept elsewhere."""
        for name in (LAST, BEST) if is_best else (LAST,):
            self._copy(checkpoint, name)

    def _copy(self, checkpoint: Path, name: str) -> None:
        with atomic_folder(self.path / name, overwrite=True) as temporary:
            for file in CHECKPOINT_FILES:
                shutil.copyfile(checkpoint / file, temporary / file)

    def _recover(self) -> None:
        """Remove what a killed process has left unfinished; keep a checkpoint whose replacement it did not live to see.

        training.json is written last, so a folder that has it is whole.
        """
        left = list(self.path.glob(f".tmp-*-{LAST}"))
        whole = {step_of(folder): folder for folder in left if (folder / LOOP_STATE).is_file()}
        if whole and not (self.path / LAST).exists():
            os.rename(whole[max(whole)], self.path / LAST)
        for folder in self.path.glob(".tmp-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _clear(self) -> None:
        """Remove an earlier run."""
        for name in (CONFIG_FILE, RUN_FILE, METRICS_FILE):
            (self.path / name).unlink(missing_ok=True)
        for folder in (*(self.path / name for name in (LAST, BEST, CHECKPOINTS)), *self.path.glob(".tmp-*")):
            shutil.rmtree(folder, ignore_errors=True)

    def _write_config(self, config: Config) -> None:
        import yaml

        with atomic_path(self.path / CONFIG_FILE, overwrite=True) as temporary:
            temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))

    def _write_record(self, stage: str, engine: str, storage: str | None, inputs: Mapping[str, str]) -> None:
        """Add this start to run.json."""
        import torch

        file = self.path / RUN_FILE
        record: dict[str, Any] = _run_record(self.path) if file.is_file() else {"stage": stage, "starts": []}
        record["starts"].append(
            {
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "command": [without_secrets(word) for word in sys.argv],
                "engine": engine,
                "storage": storage,
                "inputs": dict(inputs),
                "aldm": __version__,
                "torch": torch.__version__,
                **git_state(),
            }
        )
        with atomic_path(file, overwrite=True) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")


def checkpoint_folder(run: str | os.PathLike[str]) -> Path:
    """Return the checkpoint of a run to go on with: best/, or last/ where nothing was validated.

    A checkpoint folder itself is returned as it is.

    Raises:
        UserError: the folder holds no checkpoint.
    """
    path = Path(run)
    for folder in (path / BEST, path / LAST, path):
        if (folder / "config.json").is_file():
            return folder
    hint = "its training has not written one yet" if (path / CONFIG_FILE).is_file() else "it is not a run folder"
    raise UserError(f"{path} holds no checkpoint: {hint}")


def check_run_folder(path: Path, resume: bool, overwrite: bool, stage: str | None = None) -> None:
    """Check what RunFolder.open would refuse, without touching anything.

    Args:
        path: the run folder.
        resume, overwrite: as for RunFolder.open.
        stage: what is to be trained; the run of another stage is neither gone on with nor deleted. None takes any.

    Raises:
        UserError: as RunFolder.open, the lock, the configuration and the disk excepted.
    """
    if resume and overwrite:
        raise UserError("`resume` continues a run and `overwrite` deletes it: give one of them")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, wanted a run folder: give another name")
    existing = path if path.exists() else existing_parent(path)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into {path}: {existing} is read-only for this user")
    is_run = (path / CONFIG_FILE).is_file()
    if is_run and stage is not None and (resume or overwrite):
        _check_stage(path, stage)
    if resume and not is_run:
        raise UserError(f"{path} holds no run to resume (no {CONFIG_FILE}): leave out `resume` to start one")
    if is_run and not resume and not overwrite:
        raise UserError(f"{path} holds a run already: `resume` continues it, `overwrite` deletes it first")
    foreign = [] if is_run or not path.exists() else [file.name for file in path.iterdir() if file.name != LOCK_FILE]
    if foreign:
        raise UserError(
            f"{path} holds other things ({', '.join(sorted(foreign)[:3])}), it is not a run: give another name"
        )


def git_state() -> dict[str, str | bool | None]:
    """Return the commit of this program's checkout and whether it has changes; None where it is not one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", Path(__file__).name) else None
    if commit is None:
        return {"git_commit": None, "git_changed": None}
    return {"git_commit": commit, "git_changed": bool(git("status", "--porcelain", "--untracked-files=no"))}


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint to resume from was written after; UserError for a damaged one."""
    return int(read_record(checkpoint / LOOP_STATE, {"step": int}, _WAY_OUT)["step"])


def _run_record(path: Path) -> dict[str, Any]:
    """Return what run.json says; UserError for a damaged one."""
    record = read_record(path / RUN_FILE, {"stage": str, "starts": list}, _WAY_OUT)
    if not all(isinstance(start, dict) for start in record["starts"]):
        raise UserError(f"{path / RUN_FILE} is damaged: its starts are not mappings; {_WAY_OUT}")
    return record


def without_secrets(text: str) -> str:
    """Return a text with what names a user or a key in a URI (s3://key:secret@bucket) replaced by ***."""
    text = re.sub(r"(?<=://)[^/@\s]+@", "***@", text)
    return re.sub(r"(?i)([?&][^=&\s]*(?:key|secret|token|password|credential)[^=&\s]*=)[^&\s]*", r"\1***", text)


def _locked(path: Path) -> IO[str]:
    """Open and lock run.lock; the lock goes with the process, however it ends."""
    lock = (path / LOCK_FILE).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        owner = lock.read().strip()
        lock.close()
        raise UserError(f"another training runs in {path} ({owner}): wait for it, or give another `run_dir`") from error
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {os.uname().nodename}")
    lock.flush()
    return lock


def check_same_run(path: Path, stage: str, config: Config, engine: str, storage: str | None) -> None:
    """Check what only resuming asks for: a configuration with the same results, the same engine and storage.

    Raises:
        UserError: another configuration, another engine (each keeps its states in its own way), or another storage,
            which does not hold what this run goes on from.
    """
    _check_same(path, stage, config)
    starts = _run_record(path)["starts"]
    last = starts[-1] if starts else {}
    before = last.get("engine", "plain") if starts else engine
    if before != engine:
        raise UserError(f"`engine` {engine}: {path} was trained with `engine` {before}; resume with that")
    kept = last.get("storage", storage)  # the first version did not record it
    if kept != storage:
        got = "no `storage_path`" if storage is None else f"`storage_path` {storage}"
        way_out = "resume without it" if kept is None else f"resume with `storage_path` {kept}"
        raise UserError(f"{got}: {path} keeps what it goes on from in {kept or path / CHECKPOINTS}; {way_out}")


def _check_stage(path: Path, stage: str) -> None:
    """Refuse the run of another stage: the run directory was given by mistake."""
    file = path / RUN_FILE
    before = _run_record(path)["stage"] if file.is_file() else stage
    if before != stage:
        raise UserError(f"{path} is a run of aldm train {before}, not of {stage}: give another `run_dir`")


def _check_same(path: Path, stage: str, config: Config) -> None:
    """Refuse to resume with another configuration; what changes no step's result may differ.

    That is the stage's length and cadence, whether activations are recomputed (the way out when memory was short), and
    what only other trainings read: a preset may change there from one version to the next.
    """
    import yaml

    try:
        before = from_dict(Config, yaml.safe_load((path / CONFIG_FILE).read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path / CONFIG_FILE} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path / CONFIG_FILE} is damaged ({error}): {_WAY_OUT}") from error
    training = training_of(config, stage)
    before = with_training(before, stage, **{field: getattr(training, field) for field in PACE_FIELDS})
    others = [name for name in to_dict(config) if name.startswith("train_") and name != training_name(stage)]
    others += [name for name, reader in NETWORK_OF.items() if stage != reader]
    free = {name: getattr(config, name) for name in ("activation_checkpointing", *others)}
    before = replace(before, **free)
    different = _differences(to_dict(before), to_dict(config))
    if different:
        raise UserError(
            f"{path} was trained with another configuration ({'; '.join(different[:5])}): resume with the same flags, "
            f"or with `preset` {path / CONFIG_FILE}"
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in now.items():
        old = before[key]
        if isinstance(value, dict):
            found += _differences(old, value, f"{prefix}{key}.")
        elif old != value:
            found.append(f"{prefix}{key} was {old}, now {value}")
    return found
