"""Atomic writes: whole or not at all, whatever happens in between."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aldm.errors import UserError
from aldm.files import atomic_folder, atomic_path, check_folder


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_under_its_own_suffixes(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.nii.gz") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.endswith(".nii.gz")
        temporary.write_bytes(b"one")
        assert not (tmp_path / "a.nii.gz").exists()
    assert (tmp_path / "a.nii.gz").read_bytes() == b"one"
    assert listing(tmp_path) == ["a.nii.gz"]


def test_a_file_gets_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with atomic_path(tmp_path / "atomic") as temporary:
        temporary.write_text("")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_files_of_a_folder_get_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    """Another user's service reads what safetensors would write for its own user alone."""
    (tmp_path / "plain").write_text("")
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "weights").write_text("")
        (temporary / "weights").chmod(0o600)
    assert (tmp_path / "model/weights").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write() -> None:
        with atomic_path(target, overwrite=True) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert target.read_text() == "old"
    assert listing(tmp_path) == ["a.txt"]


def test_an_existing_file_needs_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(UserError, match=r"a\.txt exists.*`overwrite`"), atomic_path(target):
        pytest.fail("the block ran")
    with atomic_path(target, overwrite=True) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"

    def write() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("mine")
            target.write_text("theirs")

    with pytest.raises(UserError, match="exists"):
        write()
    assert target.read_text() == "theirs"
    assert listing(tmp_path) == ["a.txt"]


def test_a_parent_that_is_a_file_is_not_to_be_made(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with (
        pytest.raises(UserError, match=r"there is no folder .*a; give another name"),
        atomic_path(tmp_path / "a" / "b"),
    ):
        pytest.fail("the block ran")


def test_a_folder_is_no_file_and_a_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"), atomic_path(tmp_path, overwrite=True):
        pytest.fail("the block ran")
    with pytest.raises(UserError, match=r"there is no folder .*missing"), atomic_path(tmp_path / "missing" / "a"):
        pytest.fail("the block ran")
    with pytest.raises(UserError, match=r"there is no folder .*missing"), atomic_folder(tmp_path / "missing" / "a"):
        pytest.fail("the block ran")


@pytest.mark.parametrize("opened", [atomic_path, atomic_folder])
def test_a_folder_that_refuses_new_files_is_named(opened: object) -> None:
    """/proc refuses new files even to root, whom permission bits do not stop."""
    with pytest.raises(UserError, match="cannot write /proc/result"), opened("/proc/result"):  # type: ignore[operator]
        pytest.fail("the block ran")


def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    """In a child process that is not root, because permission bits do not stop root."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        os.chdir(tmp_path)  # the way here may be closed to the other user
        if os.getuid() == 0:
            tmp_path.chmod(0o755)
            os.setuid(65534)
        try:
            with atomic_path("closed/a"):
                pass
        except BaseException as error:  # noqa: BLE001 - the parent judges it
            os.write(sending, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(sending)
    with os.fdopen(receiving) as reader:
        assert reader.read() == "UserError: cannot write closed/a: the folder closed is read-only for this user"


def importable_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.linux
def test_a_full_disk_says_how_much_is_free(tmp_path: Path) -> None:
    """/dev/full answers every write as a full disk does."""

    def write() -> None:
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_text("x")

    with pytest.raises(UserError, match=r"a\.txt: disk full, [\d.]+ GiB free") as caught:
        write()
    assert isinstance(caught.value.__cause__, OSError)
    assert listing(tmp_path) == []


def test_a_full_disk_is_understood_where_a_library_does_not_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.save's error does not say why, with no cause to follow: the free space tells."""
    left = shutil.disk_usage(tmp_path)

    def write(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: left._replace(free=free))
        with atomic_folder(tmp_path / "last"):
            raise RuntimeError("unexpected pos 284928 vs 284816")

    with pytest.raises(UserError, match=r"last: disk full, 0\.00 GiB free"):
        write(4096)
    with pytest.raises(RuntimeError, match="unexpected pos"):
        write(2**30)
    assert listing(tmp_path) == []


@pytest.mark.linux
def test_a_full_disk_is_understood_in_a_librarys_own_words(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "model") as temporary:
            (temporary / "weights").symlink_to("/dev/full")
            try:
                (temporary / "weights").write_text("x")
            except OSError as error:
                raise RuntimeError("I/O error") from error

    with pytest.raises(UserError, match="model: disk full"):
        write()
    assert listing(tmp_path) == []


def test_a_file_size_limit_is_explained(tmp_path: Path) -> None:
    """A limit that the kernel enforces stands for a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write() -> None:
        with atomic_path(tmp_path / "a.bin") as temporary:
            temporary.write_bytes(bytes(100_000))

    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError, match="largest file allowed"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert listing(tmp_path) == []


def test_other_errors_keep_their_type(tmp_path: Path) -> None:
    def read_inside() -> None:
        with atomic_path(tmp_path / "a.txt"):
            (tmp_path / "no input").read_text()

    with pytest.raises(FileNotFoundError):
        read_inside()
    assert listing(tmp_path) == []


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a").write_text("one")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model" / "inner" / "a").read_text() == "one"
    assert listing(tmp_path) == ["model"]


def test_an_exception_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_text("old")

    def write() -> None:
        with atomic_folder(tmp_path / "model", overwrite=True) as temporary:
            (temporary / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert (tmp_path / "model" / "a").read_text() == "old"
    assert listing(tmp_path) == ["model"]


def test_an_empty_folder_may_be_filled_and_a_full_one_needs_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("one")
    with pytest.raises(UserError, match=r"not empty.*`overwrite`"), atomic_folder(target):
        pytest.fail("the block ran")
    with atomic_folder(target, overwrite=True) as temporary:
        (temporary / "b").write_text("two")
    assert listing(target) == ["b"]
    assert listing(tmp_path) == ["model"]


def test_overwrite_works_for_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may be started with a user number that no file knows: docker run --user 12345."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(RuntimeError):
        Path.home()
    (tmp_path / "old").write_text("")
    check_folder(tmp_path, overwrite=True)


def test_overwrite_deletes_earlier_results_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"no config\.json.*will not delete"):
        check_folder(thesis, overwrite=True, marker="config.json")
    monkeypatch.chdir(thesis)
    with pytest.raises(UserError, match="holds the working folder"):
        check_folder(tmp_path, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        check_folder(thesis / "chapter.tex", overwrite=True)
    assert (thesis / "chapter.tex").read_text() == "years of work"


def test_ctrl_c_in_the_middle_of_a_write_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom aldm.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n    print('writing', flush=True)\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.txt")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=importable_environment()
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == b"writing\n"
        assert len(listing(tmp_path)) == 1
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=180) != 0
    assert listing(tmp_path) == []
