"""docs/add_a_method.md, followed in a copy of the project: the method that it adds is trained, exported and scored."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "add_a_method.md"


def apply_change(folder: Path, change: str) -> None:
    """Apply a block of the page: its first line names the file, lines with + are added, those with - taken away."""
    name, _, text = change.removeprefix("--- ").partition("\n")
    file = folder / name
    for hunk in text.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(line[1:] or "\n" for line in lines if line[0] not in sign) for sign in "+-")
        content = file.read_text(encoding="utf-8")
        assert content.count(before) == 1, f"{name} does not have these lines once:\n{before}"
        file.write_text(content.replace(before, after), encoding="utf-8")


@pytest.fixture(scope="module")
def aldm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`aldm` of a copy of the project that has the page's method; returns what it prints."""
    copy = tmp_path_factory.mktemp("copy")
    for package in ("aldm", "pipelines"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    blocks = re.findall(r"^```(diff|python)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for language, block in blocks:
        if language == "diff":
            apply_change(copy, block)
        else:
            name, _, text = block.removeprefix("# ").partition("\n")
            (copy / name).write_text(text, encoding="utf-8")

    def run(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(copy), "MLFLOW_TRACKING_URI": f"sqlite:///{copy}/mlflow.db"}
        command = [sys.executable, "-m", "aldm.cli", *words]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_the_method_of_the_page_is_trained_exported_and_scored(aldm: Callable[..., str]) -> None:
    pair = ("--store", "store", "--source", "t1", "--target", "t2")
    aldm("phantom", "--layout", "ixi", "raw", "--num-subjects", "9", "--spacing-mm", "8")
    aldm("prepare", "--layout", "ixi", "raw", "store", "--preset", "tiny")
    aldm("train", "l1-unet", *pair, "--run-dir", "run", "--preset", "tiny", "--engine", "plain")
    aldm("export", "--baseline", "run", "--out", "model")
    assert "psnr" in aldm("evaluate", "--model", "model", *pair, "--out", "scores").lower()
