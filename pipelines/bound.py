"""`python -m pipelines.bound PARENT JOB ARGUMENTS`: an `aldm` job that does not outlive the process that started it.

A worker of a cluster is killed without notice when its driver stops or its node is drained. What it had started would
go on by itself, hold the run folder's lock and compute for nobody; so the kernel is asked to kill it as well.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

from aldm.cli import main as run_job

PR_SET_PDEATHSIG = 1
"""Of prctl(2), Linux; elsewhere the job merely outlives a parent that is killed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job and return its exit code; at once -SIGKILL's where the parent has gone already."""
    parent, *job = sys.argv[1:] if argv is None else argv
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        return 128 + signal.SIGKILL
    return run_job(job)


if __name__ == "__main__":
    sys.exit(main())
