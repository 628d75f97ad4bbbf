"""What holds for the project as a whole: names that resolve, versions that agree, layers that cover every module."""

import ast
import gzip
import importlib
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from conftest import pytest_make_parametrize_id

import aldm
from aldm.cli import JOBS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PLATFORM = {"ray", "mlflow", "deepspeed", "kfp", "fastapi", "serve", "tune", "pipelines"}
HEAVY = {"SimpleITK", "diffusers", "monai", "matplotlib", "nilearn", *PLATFORM}
LIBRARY = sorted((ROOT / "aldm").rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__")


@pytest.mark.parametrize("job", JOBS)
def test_every_job_resolves(job: str) -> None:
    assert callable(importlib.import_module(JOBS[job][0]).main)


def test_every_module_of_the_library_has_its_layer() -> None:
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["name"] == "Layers inside the library")
    listed = [name for layer in layers for name in re.findall(r"[\w.]+", layer)]
    assert len(listed) == len(set(listed))
    missing = [name for name in listed if not (ROOT / name.replace(".", "/")).with_suffix(".py").exists()]
    assert [name for name in missing if not (ROOT / name.replace(".", "/")).is_dir()] == []
    packages = {module_name(path) for path in LIBRARY if path.name == "__init__.py"}
    modules = {module_name(path) for path in LIBRARY} - packages
    assert [name for name in sorted(modules) if not any(f"{name}.".startswith(f"{layer}.") for layer in listed)] == []


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["project"]["version"]
    assert aldm.__version__ == version
    assert metadata.version("aldm") == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_torch_is_pinned() -> None:
    assert "torch==2.13.0" in PROJECT["project"]["dependencies"]
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()


def test_every_dependency_is_pinned_and_has_its_notice() -> None:
    project = PROJECT["project"]
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    notices = (ROOT / "THIRD_PARTY_NOTICES.md").read_text().lower()
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    for requirement in [*project["dependencies"], *extras]:
        name = re.match(r"[\w.-]+", requirement)
        assert name is not None
        assert name[0].lower() in {entry.lower() for entry in pinned}
        assert name[0].lower() in notices


def test_the_installed_versions_meet_the_constraints() -> None:
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE):
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        assert installed.split("+")[0] == version, name


@pytest.mark.parametrize("package", ["aldm", "pipelines", "serve", "tune"])
def test_packages_are_typed(package: str) -> None:
    """py.typed says so to who uses them: every function names the types of its arguments and of its result."""
    assert (ROOT / package / "py.typed").is_file()
    assert (ROOT / package / "__init__.py").is_file()
    untyped = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_typed(node):
                untyped.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert untyped == []


def is_typed(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function's signature is annotated; a Kubeflow pipeline and its steps name only outputs."""
    args = function.args
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    named = [arg.annotation is not None or arg.arg in ("self", "cls") for arg in every]
    step = any(
        ast.unparse(decorator).startswith(("component", "dsl.pipeline")) for decorator in function.decorator_list
    )
    return all(named) and (step or function.returns is not None)


def test_tests_are_flat() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_importing_the_library_does_nothing(tmp_path: Path) -> None:
    """No file appears, nothing is printed, no argument is read and no heavy optional library is loaded."""
    names = [module_name(path) for path in LIBRARY]
    code = (
        f"import sys\nsys.argv = ['nothing']\nfor name in {names!r}: __import__(name)\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert printed.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []


def test_the_licence_is_complete() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "THIRD_PARTY_NOTICES.md",
        *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
    ],
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    path = ROOT / page
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_are_told_from_broken_ones() -> None:
    assert anchors("# One `two.three`\n\n## A, b") == {"one-twothree", "a-b"}


def test_tests_that_share_a_service_run_in_one_process(request: pytest.FixtureRequest) -> None:
    """pytest-xdist groups by a suffix of the name, which some versions of pytest do not let it set."""
    if "PYTEST_XDIST_WORKER" in os.environ and request.config.getvalue("loadgroup"):
        assert request.node.nodeid.endswith("@test_project")


def test_a_long_value_is_no_part_of_a_test_s_name() -> None:
    """What two processes make each, such as a gzip with its time, would give one test two names."""
    assert pytest_make_parametrize_id(gzip.compress(bytes(range(256))), "content") == "content"
    assert pytest_make_parametrize_id("t1.nii", "name") is None
