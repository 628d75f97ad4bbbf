"""The front door: jobs are found by name, and every way out has its message and exit code."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from aldm import __version__, cli
from aldm.errors import UserError

Job = Callable[[Sequence[str]], int | None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Job], None]:
    """Put a function in the place of `aldm info`."""

    def put(job: Job) -> None:
        monkeypatch.setitem(sys.modules, "pipelines.info", SimpleNamespace(main=job))

    return put


def test_help_lists_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for job, (_, summary) in cli.JOBS.items():
        assert f"  {job} " in printed
        assert summary in printed


def test_no_job_prints_the_help_and_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().out == cli.usage() + "\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"aldm {__version__}\n"


def test_the_rest_of_the_line_goes_to_the_job(install: Callable[[Job], None]) -> None:
    seen: list[Sequence[str]] = []
    install(lambda argv: seen.append(argv))
    assert cli.main(["info", "--preset", "tiny", "--help"]) == 0
    assert seen == [["--preset", "tiny", "--help"]]


def test_the_jobs_exit_code_is_handed_on(install: Callable[[Job], None]) -> None:
    install(lambda argv: 3)
    assert cli.main(["info"]) == 3


@pytest.mark.parametrize(
    ("job", "message"),
    [("trian", "no job 'trian' (did you mean train?): the jobs are phantom, prepare,"), ("x", "no job 'x': the jobs")],
)
def test_an_unknown_job_lists_the_known_ones(job: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([job]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"aldm: {message}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_user_error_is_one_message_and_exit_code_2(
    install: Callable[[Job], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def job(argv: Sequence[str]) -> None:
        raise UserError("scan.nii.gz is empty: give a NIfTI file")

    install(job)
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "aldm info: scan.nii.gz is empty: give a NIfTI file\n"


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError, ModuleNotFoundError])
def test_a_bug_keeps_its_traceback(install: Callable[[Job], None], error: type[Exception]) -> None:
    def job(argv: Sequence[str]) -> None:
        raise error("bug")

    install(job)
    with pytest.raises(error, match="bug"):
        cli.main(["info"])


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_what_breaks_after_a_swallowed_signal_is_no_bug(
    install: Callable[[Job], None], capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int, word: str
) -> None:
    """Importing torch swallows Ctrl-C while it loads numpy, which is missing from then on."""

    def job(argv: Sequence[str]) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        raise RecursionError("half an import")

    install(job)
    assert cli.main(["info"]) == code
    assert capsys.readouterr().err == f"aldm info: {word}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_signal_handlers_are_put_back(install: Callable[[Job], None], number: signal.Signals) -> None:
    before = signal.getsignal(number)
    inside = []
    install(lambda argv: inside.append(signal.getsignal(number)))
    cli.main(["info"])
    assert inside != [before]
    assert signal.getsignal(number) is before


def test_an_ignored_ctrl_c_stays_ignored(install: Callable[[Job], None]) -> None:
    """As under nohup, or in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        install(lambda argv: os.kill(os.getpid(), signal.SIGINT))
        assert cli.main(["info"]) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


JOB_THAT_WRITES = """
import sys, time, types
from aldm import cli
from aldm.files import atomic_path

def job(argv):
    with atomic_path(argv[0]) as temporary:
        temporary.write_text("half")
        print("writing", flush=True)
        time.sleep(600)

sys.modules["pipelines.info"] = types.SimpleNamespace(main=job)
sys.exit(cli.main(["info", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "aldm info: interrupted\n"), (signal.SIGTERM, 143, "aldm info: terminated\n")],
)
def test_a_signal_leaves_nothing_half_written(tmp_path: Path, number: signal.Signals, code: int, message: str) -> None:
    command = [sys.executable, "-c", JOB_THAT_WRITES, str(tmp_path / "out.nii")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 1
        job.send_signal(number)
        _, errors = job.communicate(timeout=180)
    assert (job.returncode, errors) == (code, message)
    assert list(tmp_path.iterdir()) == []


def test_a_forked_worker_dies_of_sigterm_in_silence(install: Callable[[Job], None], tmp_path: Path) -> None:
    """Pools end their workers with SIGTERM; none of them may unwind through its parent's code."""

    def job(argv: Sequence[str]) -> int:
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                (tmp_path / "unwound").touch()
                os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    install(job)
    assert cli.main(["info"]) == 143
    assert not (tmp_path / "unwound").exists()


def test_a_closed_pipe_is_no_traceback() -> None:
    code = (
        "import sys, types\nfrom aldm import cli\n"
        "def job(argv):\n    for _ in range(100_000): print('a line of a long table')\n"
        "sys.modules['pipelines.info'] = types.SimpleNamespace(main=job)\nsys.exit(cli.main(['info']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        job.stdout.readline()
        job.stdout.close()
        assert job.stderr is not None
        assert job.stderr.read() == ""
    assert job.returncode == 141


def test_the_installed_command_is_this_one() -> None:
    command = Path(sys.executable).parent / "aldm"
    printed = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert printed.stdout == f"aldm {__version__}\n"
    wrong = subprocess.run([sys.executable, "-m", "aldm.cli", "nothing"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2


def test_help_loads_no_heavy_library() -> None:
    """The table of jobs imports none of them: asking for help loads neither torch nor numpy."""
    code = "import sys; from aldm import cli; cli.main(['--help']); print({'torch', 'numpy'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.endswith("set()\n")


def test_no_job_loads_a_heavy_library_before_its_flags_are_read() -> None:
    heavy = {"torch", "pandas", "ray", "mlflow", "matplotlib"}
    code = (
        "import sys, importlib; from aldm.cli import JOBS;"
        "[importlib.import_module(name) for name, _ in JOBS.values()];"
        f"print({heavy} & set(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.endswith("set()\n")
