"""Where Ray Train keeps the checkpoints of a run: a folder that all nodes reach, or a bucket."""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aldm.errors import UserError
from aldm.run_folder import CHECKPOINTS, without_secrets

if TYPE_CHECKING:
    import pyarrow.fs


COMMITTED = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints that it goes on from."""


ANSWER_S = 30.0
"""How long a storage may take to answer; by itself one that cannot be reached is tried for minutes."""


@dataclass(frozen=True)
class Storage:
    """Where Ray Train keeps the checkpoints of one run: `parent`/`name`."""

    parent: str
    name: str
    flag: str
    """How the user named it, for messages."""
    in_run_folder: bool = False

    @classmethod
    def of(cls, run_dir: Path, storage_path: str | None) -> "Storage":
        """Return the storage of a run: a folder in it, or one of the run's name under --storage-path."""
        if storage_path is None:
            return cls(str(run_dir.resolve()), CHECKPOINTS, f"{run_dir}/{CHECKPOINTS}", in_run_folder=True)
        parent = storage_path if "://" in storage_path else str(Path(storage_path).resolve())
        return cls(parent, run_dir.resolve().name, f"--storage-path {without_secrets(storage_path)}")

    @property
    def record(self) -> str | None:
        """What run.json says of it: the folder or URI without secrets, None for the run folder."""
        return None if self.in_run_folder else without_secrets(self.parent)

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Check that it can be written and holds no other run.

        Raises:
            UserError: it cannot be reached or written, or it holds a run and neither flag is given.
        """
        if self.in_run_folder:
            return  # RunFolder.open checks that one
        from pyarrow.fs import FileType

        self._answered(self._probe)
        if self._holds("", FileType.Directory) and not resume and not overwrite:
            raise UserError(
                f"{self.flag} holds a run named {self.name} already: --resume continues it, --overwrite deletes it, "
                "or give another name or place"
            )

    def has_checkpoint(self) -> bool:
        """Whether Ray Train has committed a checkpoint of the run here."""
        from pyarrow.fs import FileType

        return self._holds(f"/{COMMITTED}", FileType.File)

    def clear(self) -> None:
        """Delete what an earlier run of this name left."""
        from pyarrow.fs import FileType

        filesystem, folder = self._filesystem()
        if filesystem.get_file_info(f"{folder}/{self.name}").type == FileType.Directory:
            filesystem.delete_dir(f"{folder}/{self.name}")

    def _holds(self, name: str, kind: "pyarrow.fs.FileType") -> bool:
        """Whether something of this kind lies in the run's storage."""

        def look() -> bool:
            filesystem, folder = self._filesystem()
            return bool(filesystem.get_file_info(f"{folder}/{self.name}{name}").type == kind)

        return bool(self._answered(look))

    def _probe(self) -> None:
        """Make the folder and write a file; a prefix in a bucket is made whole, a bucket or a folder's parent not."""
        from pyarrow.fs import LocalFileSystem

        filesystem, folder = self._filesystem()
        filesystem.create_dir(folder, recursive=not isinstance(filesystem, LocalFileSystem))
        probe = f"{folder}/.aldm-probe-{os.getpid()}"
        with filesystem.open_output_stream(probe) as stream:
            stream.write(b"aldm")
        filesystem.delete_file(probe)

    def _answered(self, ask: Callable[[], Any]) -> Any:
        """Return what `ask` returns.

        Raises:
            UserError: the storage refuses it, or has not answered in time.
        """
        from pyarrow import ArrowException

        answers: list[Any] = []

        def note() -> None:
            try:
                answers.append(ask())
            except (OSError, ValueError, ArrowException) as error:
                answers.append(error)

        thread = threading.Thread(target=note, name="storage", daemon=True)  # pyarrow cannot be interrupted
        thread.start()
        thread.join(ANSWER_S)
        if not answers:
            raise UserError(f"{self.flag} cannot be reached or written: no answer in {ANSWER_S:.0f} s")
        if isinstance(answers[0], Exception):
            why = without_secrets(str(answers[0]))
            raise UserError(f"{self.flag} cannot be reached or written: {why}") from answers[0]
        return answers[0]

    def _filesystem(self) -> tuple["pyarrow.fs.FileSystem", str]:
        from pyarrow.fs import FileSystem, LocalFileSystem

        if "://" in self.parent:
            filesystem, folder = FileSystem.from_uri(self.parent)
            return filesystem, folder
        return LocalFileSystem(), self.parent
