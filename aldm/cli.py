"""The front door `aldm JOB ...`: a table of job name -> module, imported when called."""

import difflib
import importlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from aldm import __version__
from aldm.errors import UserError

JOBS: dict[str, tuple[str, str]] = {
    "phantom": ("pipelines.phantom", "write simulated subjects as a BraTS or IXI tree"),
    "prepare": ("pipelines.prepare", "turn a BraTS, IXI, BIDS or table data set into a store of volumes"),
    "train": (
        "pipelines.train",
        "train vqgan, ms-spade, diffusion, the regression unet or a comparison method",
    ),
    "encode": ("pipelines.encode", "encode a store into a store of latents"),
    "export": ("pipelines.export", "put trained stages together into a translator folder"),
    "translate": ("pipelines.translate", "translate NIfTI or DICOM volumes to another modality"),
    "evaluate": ("pipelines.evaluate", "score a translator over all pairs of modalities of a store"),
    "promote": ("pipelines.promote", "register a model and make it the champion if it beat that"),
    "benchmark": ("pipelines.benchmark", "train methods under one budget, score them, and put them into one table"),
    "reproduce": ("pipelines.reproduce", "from a downloaded IXI folder to Table D of the paper, in one command"),
    "tune": ("tune.main", "sweep noise schedules, objectives and samplers with Ray Tune"),
    "serve": ("serve.main", "translate over HTTP: a page, an interface for programs"),
    "k8s": ("pipelines.kubernetes", "manifests for Kubernetes: filled in, checked, planned"),
    "info": ("pipelines.info", "layers, parameters, FLOPs and expected memory of a preset"),
    "demo": ("pipelines.demo", "everything once on simulated data, with a report"),
}
_PARAMETER = re.compile(r"`([a-z][a-z0-9_]*)`")
_SETTING = re.compile(r"`([a-z][a-z0-9_.]*=[^`\n]*)`")
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
EXIT_TERMINATED = 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised like Ctrl-C so that temporary files and locks are given back on the way out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm JOB ARGUMENTS` and return the exit code.

    A UserError is one message on stderr and code 2; Ctrl-C is 130 and SIGTERM 143, each with one line; any other
    exception is a bug and keeps its traceback, unless Ctrl-C or SIGTERM came first: some libraries swallow it while
    they are loaded (torch, where it loads numpy) and break later for want of what was not loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve whoever shares the CPU
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else EXIT_USER_ERROR
    if arguments[0] == "--version":
        print(f"aldm {__version__}")
        return 0
    job, *rest = arguments
    signals = _Signals()
    try:
        module = _module_of(job)
        return int(importlib.import_module(module).main(rest) or 0)
    except UserError as error:
        print(f"aldm {job}: {with_flags(str(error))}" if job in JOBS else f"aldm: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt as stop:
        return _stopped(job, stop)
    except BrokenPipeError:  # `aldm info | head`: point stdout elsewhere, or Python complains again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception:
        if signals.raised is None:
            raise
        return _stopped(job, signals.raised)
    finally:
        signals.put_back()


def with_flags(message: str) -> str:
    """Return a message of the library with the parameters that it names as flags: `max_voxels` is --max-voxels.

    A value of the configuration goes with --set: `codec.kind=haar` is --set codec.kind=haar.
    """
    message = _PARAMETER.sub(lambda match: "--" + match[1].replace("_", "-"), message)
    return _SETTING.sub(r"--set \1", message)


def usage() -> str:
    """Return the text of `aldm --help`."""
    width = max(map(len, JOBS))
    lines = [f"  {job:<{width}}  {summary}" for job, (_, summary) in JOBS.items()]
    return "\n".join(
        [
            "usage: aldm JOB [ARGUMENTS]",
            "",
            "Translate 3D MR volumes between modalities. For research, not a medical device.",
            "",
            "jobs:",
            *lines,
            "",
            "aldm JOB --help explains the arguments of a job; aldm --version prints the version.",
        ]
    )


def _module_of(job: str) -> str:
    if job in JOBS:
        return JOBS[job][0]
    near = difflib.get_close_matches(job, JOBS, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UserError(f"no job {job!r}{hint}: the jobs are {', '.join(JOBS)}; see aldm --help")


def _stopped(job: str, stop: KeyboardInterrupt) -> int:
    """Say what ended the job and return the exit code."""
    terminated = isinstance(stop, Terminated)
    print(f"aldm {job}: {'terminated' if terminated else 'interrupted'}", file=sys.stderr)
    return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED


class _Signals:
    """Makes SIGTERM raise Terminated in this process (a forked worker dies of it as usual) and remembers Ctrl-C too.

    Attributes:
        raised: what the last of the two signals raised; None before.
    """

    def __init__(self) -> None:
        self.raised: KeyboardInterrupt | None = None
        self._owner = os.getpid()
        self._previous: dict[signal.Signals, Any] = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._terminate)}
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup, for one, has it ignored
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)

    def put_back(self) -> None:
        """Restore the handlers of before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _terminate(self, number: int, frame: FrameType | None) -> NoReturn:
        if os.getpid() != self._owner:
            os._exit(EXIT_TERMINATED)
        self.raised = Terminated()
        raise self.raised

    def _interrupt(self, number: int, frame: FrameType | None) -> NoReturn:
        self.raised = KeyboardInterrupt()
        raise self.raised


if __name__ == "__main__":
    sys.exit(main())
