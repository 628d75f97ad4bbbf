"""Runs the files of failed tests again, one test at a time: python .ci/again.py REPORT.xml; fails if they do."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

MOST_FILES = 3


def failed_files(report: str) -> list[str]:
    """Return the files of the tests that a junit report calls failed or in error."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    for case in bad:
        print(f"failed once: {case.get('classname')}::{case.get('name')}", flush=True)
    if not all(case.get("classname") for case in bad):
        return []  # the tests could not be collected: nothing to run again
    return sorted({str(case.get("classname")).replace(".", "/") + ".py" for case in bad})


def main() -> int:
    """Return pytest's exit code, or 1 where too much failed to be the machine's fault, or no test at all."""
    files = failed_files(sys.argv[1])
    if not 0 < len(files) <= MOST_FILES:
        return 1
    return subprocess.call([sys.executable, "-m", "pytest", *files, "-m", "not image"])


if __name__ == "__main__":
    sys.exit(main())
