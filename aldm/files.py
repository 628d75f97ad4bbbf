"""Atomic writes: a file or a folder appears under its name whole or not at all."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aldm.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_BYTES = 2**20
"""Less free space than this explains a RuntimeError: torch.save does not say why it could not write."""


@contextmanager
def atomic_path(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary name beside `path` (same suffixes); it becomes `path` when the block ends without an exception.

    On any exception, Ctrl-C included, the temporary file is removed and `path` is as it was before.

    Raises:
        UserError: `path` exists and `overwrite` is False, its folder is missing or cannot be written to, or the disk is
            full (also when a library inside the block says so in its own words).
    """
    target = Path(path)
    _check_file(target, overwrite)
    temporary = _temporary_name(target)
    _probe(target, temporary)
    try:
        with _explained(target):
            yield temporary
            _sync(temporary)
            _check_file(target, overwrite)
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str], overwrite: bool = False, *, marker: str | None = None
) -> Iterator[Path]:
    """Yield a new temporary folder beside `path`; it becomes `path` when the block ends without an exception.

    An empty folder may stand at `path`. With `overwrite` an earlier result is replaced whole, once the new one is
    there.

    Args:
        path: the folder to make.
        overwrite: whether a folder that holds something may be replaced.
        marker: a file that every result of this kind holds; a folder without it is not one and is never replaced.

    Raises:
        UserError: as `atomic_path`, and when `path` is not an earlier result or holds the working or home folder.
    """
    target = Path(path)
    check_folder(target, overwrite, marker=marker)
    temporary = _temporary_name(target)
    _probe(target, temporary)
    try:
        with _explained(target):
            temporary.mkdir()
            permissions = temporary.stat().st_mode & 0o666
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    file.chmod(permissions)  # those of any new file: some writers (safetensors) make theirs private
                    _sync(file)
            check_folder(target, overwrite, marker=marker)
            _replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_folder(path: str | os.PathLike[str], overwrite: bool = False, *, marker: str | None = None) -> None:
    """Check what `atomic_folder` would refuse, before long work and without touching anything.

    Raises:
        UserError: as `atomic_folder`, the disk-full case excepted.
    """
    target = Path(path)
    _check_parent(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file, wanted a folder to write: give another name")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{target} exists and is not empty: give another name, or `overwrite` to replace it")
    resolved = target.resolve()
    if any(resolved in (place, *place.parents) for place in (Path.cwd(), *_home())):
        raise UserError(f"{target} holds the working folder or the home folder: `overwrite` would delete them")
    if marker is not None and not (target / marker).is_file():
        raise UserError(f"{target} holds no {marker}, so it is not an earlier result: `overwrite` will not delete it")


def _home() -> list[Path]:
    """Return the home folder, none for a user without one, such as a number that a container is started with."""
    try:
        return [Path.home().resolve()]
    except RuntimeError:
        return []


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder where there is none.

    Raises:
        UserError: it cannot be made, or the disk is full.
    """
    target = Path(path)
    with _explained(target):
        try:
            target.mkdir(exist_ok=True)
        except OSError as error:
            if _is_disk_full(error):
                raise
            raise UserError(f"cannot make the folder {target}: {error.strerror}") from error


def existing_parent(path: str | os.PathLike[str]) -> Path:
    """Return the nearest folder above a path that is there: those between can be made.

    Raises:
        UserError: that is a file.
    """
    found = next(folder for folder in Path(os.path.abspath(path)).parents if folder.exists())
    if not found.is_dir():
        raise UserError(f"{found} is a file, wanted a folder for {path}: give another name")
    return found


def free_gib(folder: str | os.PathLike[str]) -> float:
    """Return the free space of the file system that holds `folder`, GiB."""
    return shutil.disk_usage(folder).free / 2**30


def _check_file(target: Path, overwrite: bool) -> None:
    _check_parent(target)
    if target.is_dir():
        raise UserError(f"{target} is a folder, wanted the name of a file to write")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists: give another name, or `overwrite` to replace it")


def _check_parent(target: Path) -> None:
    if not target.parent.is_dir():
        way_out = "give another name" if target.parent.exists() else "make it first"
        raise UserError(f"cannot write {target}: there is no folder {target.parent}; {way_out}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {target}: the folder {target.parent} is read-only for this user")


def _temporary_name(target: Path) -> Path:
    """A hidden name with the target's own suffixes, because writers choose the format by them."""
    return target.parent / f".tmp-{os.getpid()}-{secrets.token_hex(4)}-{target.name}"


def _probe(target: Path, temporary: Path) -> None:
    """Find out whether a file can be made here: permission bits do not tell of read-only mounts, nor for root."""
    with _explained(target):
        try:
            temporary.open("xb").close()
            temporary.unlink()
        except OSError as error:
            if _is_disk_full(error):
                raise
            raise UserError(f"cannot write {target}: {error.strerror}") from error


def _sync(file: Path) -> None:
    """Wait until the file is on the disk: some file systems find out only now that they are full."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_folder(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
        return
    old = _temporary_name(target)
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn what the file system refuses into a UserError that names the target."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        free = shutil.disk_usage(target.parent).free
        if _is_disk_full(error) or (isinstance(error, RuntimeError) and free < _FULL_BYTES):
            raise UserError(
                f"cannot write {target}: disk full, {free / 2**30:.2f} GiB free in {target.parent}; "
                "free some space or write elsewhere"
            ) from error
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            raise UserError(f"cannot write {target}: larger than the largest file allowed here (ulimit -f)") from error
        if isinstance(error, OSError) and _concerns(error, target):
            raise UserError(f"cannot write {target}: {error.strerror}") from error
        raise


def _is_disk_full(error: BaseException) -> bool:
    """Whether the error, or one that caused it, is a full disk (native libraries raise their own types)."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if any(os.strerror(number) in str(seen) for number in _FULL):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _concerns(error: OSError, target: Path) -> bool:
    """Whether the system refused to write at the target (and not, say, to read an input inside the block)."""
    refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
    names = (error.filename, error.filename2)
    return refused and any(name is not None and Path(os.fsdecode(name)).parent == target.parent for name in names)
