"""The GPU check runs where there is no GPU, at the size of preset tiny, with the few packages that it may need."""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest
import torch

CHECK = Path(__file__).parent / "gpu"
NEEDED = ("torch", "numpy", "scipy", "nibabel", "pydicom", "SimpleITK", "safetensors", "pyarrow")
STAGES = ("vqgan", "ms-spade", "diffusion", "unet")
RUN = """
import json, runpy, sys
names = set(json.loads(sys.argv.pop(1)))
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in names else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
sys.path[0] = sys.argv.pop(1)
runpy.run_path(sys.path[0], run_name="__main__")
"""


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _with_requirements(names: tuple[str, ...]) -> set[str]:
    """Return distributions and all that they require, extras left out."""
    found: set[str] = set()
    waiting = [_normal(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            lines = [line for line in distribution(name).requires or [] if "extra ==" not in line]
            parts = [(line, re.match(r"[\w.-]+", line)) for line in lines]
            waiting += [_normal(match[0]) for line, match in parts if match and not _elsewhere(line)]
    return found


def _elsewhere(requirement: str) -> bool:
    """Whether a requirement is for another platform or Python, seen from whether it is installed."""
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    try:
        distribution(match[0])
    except ModuleNotFoundError:
        return True
    return False


@pytest.fixture(scope="module")
def blocked() -> list[str]:
    """Top-level modules of every installed package that the check may not need, and of the platform's packages."""
    allowed = _with_requirements(NEEDED)
    packages = packages_distributions()
    names = [name for name, owners in packages.items() if not {_normal(owner) for owner in owners} & allowed]
    assert {"ray", "deepspeed", "psutil", "yaml", "tqdm", "matplotlib", "nilearn", "monai"} <= set(names)
    return [*(name for name in names if name != "aldm"), "pipelines", "serve", "tune"]


def _check(blocked: list[str], out: Path, *flags: str) -> dict[str, Any]:
    words = [sys.executable, "-c", RUN, json.dumps(blocked), str(CHECK), "--cpu", "--out", str(out), *flags]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record: dict[str, Any] = json.loads((out / "check.json").read_text())
    assert [row for row in record["rows"] if "error" in row] == []
    return record


def test_every_stage_and_translation_is_measured(blocked: list[str], tmp_path: Path) -> None:
    record = _check(blocked, tmp_path)
    rows = {row["measure"]: row for row in record["rows"]}
    for name in [f"train {stage}" for stage in STAGES] + ["translate vqgan", "translate haar"]:
        row = rows[name]
        for key in ("seconds", "flops", "planned_bytes", "flops_per_second", "share_of_product"):
            assert math.isfinite(row[key])
            assert row[key] > 0, (name, key)
        assert row["peak_bytes"] >= 0
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"])
    assert all(row["finite"] for row in record["rows"] if row["measure"].startswith("translate"))
    compared = [row for row in record["rows"] if "tolerance" in row]
    assert len(compared) == len(STAGES) + 3
    assert all(row["difference"] == 0 for row in compared), "here the CPU is compared with itself"
    assert {row["what"] for row in record["rows"] if row["measure"] == "arithmetic denoiser"} == {
        f"denoiser, {name}" for name in ("fp32", "tf32", "bf16", "bf16 cudnn.benchmark", "bf16 channels_last_3d")
    }
    page = (tmp_path / "check.md").read_text()
    assert all(f"| {row['what']} |" in page for row in record["rows"] if "planned_bytes" in row)
    assert "Not measured" not in page


@pytest.mark.slow
def test_the_built_in_models_training_leaves_a_translator(blocked: list[str], tmp_path: Path) -> None:
    from aldm.translate import Translator

    blocked = [name for name in blocked if name != "nilearn"]  # its data files are read, its code is not
    record = _check(blocked, tmp_path, "--train-minutes", "0.01")
    assert [row["num_steps"] > 0 for row in record["rows"] if "num_steps" in row] == [True, True]
    assert Translator.load(tmp_path / "model").modalities == ("t1", "t1ce", "t2", "flair", "pd")


def test_no_backward_pass_before_the_measures_are_forked() -> None:
    """A torch with CUDA starts threads for one, and a fork of that process can do none itself; a CPU build does not."""
    code = """
import runpy, sys, torch
def never(*args, **kwargs):
    raise AssertionError("a backward pass")
sys.path.insert(0, sys.argv[1])
load_libraries = runpy.run_path(sys.argv[1], run_name="check")["load_libraries"]
load_libraries()  # torch lists its own functions while it is loaded: they are replaced afterwards
torch.autograd.backward = torch.autograd.grad = never
load_libraries()
"""
    done = subprocess.run([sys.executable, "-c", code, str(CHECK)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _raising(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("end", "limit_s", "words"),
    [
        (lambda: _raising(ValueError("broken\nin two")), 60.0, "ValueError: broken"),
        (lambda: _raising(torch.OutOfMemoryError("tried 9 GiB. GPU 0 has less")), 60.0, "out of memory: tried 9 GiB"),
        (lambda: time.sleep(600), 1.0, "stopped after 1 s"),
        (lambda: os._exit(9), 60.0, "its process ended with code 9"),
    ],
    ids=["an error", "out of memory", "too slow", "a crash"],
)
def test_a_measure_that_fails_is_a_row_beside_what_it_had(
    end: Callable[[], None], limit_s: float, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(CHECK))
    from apart import run_apart

    def measure() -> Iterator[dict[str, Any]]:
        yield {"what": "one"}
        end()

    assert list(run_apart(measure, limit_s)) == [{"what": "one"}, {"what": "the rest", "error": words}]
