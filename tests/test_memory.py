"""What a process and its children hold, measured: in a process of its own, as the test run's has children already."""

import subprocess
import sys

import pytest

MEASURES = """
import subprocess, sys, time
from aldm.memory import PeakMemory, resident_bytes

MEGABYTE = 10**6

def look(least):  # a busy machine lets the watching thread wait
    deadline = time.monotonic() + 60
    while memory.peak_bytes < least and time.monotonic() < deadline:
        time.sleep(0.02)

with PeakMemory(interval_s=0.02) as memory:
    before = memory.peak_bytes
    assert 0.3 * resident_bytes() < before < 1.2 * resident_bytes()
    block = bytearray(b"x") * (200 * MEGABYTE)
    look(before + 190 * MEGABYTE)
    del block
    held = memory.peak_bytes
    assert before + 190 * MEGABYTE < held < before + 260 * MEGABYTE
    code = "import sys; block = bytearray(b'x') * 500_000_000; print(len(block), flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    look(before + 490 * MEGABYTE)
    child.communicate("")
assert before + 490 * MEGABYTE < memory.peak_bytes < before + 600 * MEGABYTE
print("measured")
"""


@pytest.mark.linux
def test_the_peak_counts_what_was_given_back_and_what_children_hold() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURES], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, "measured\n"), done.stderr
