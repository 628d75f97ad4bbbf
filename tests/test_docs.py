"""The generated pages of docs/ are those of the code as it is, and the commands on all pages are ones that it takes."""

import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from aldm.cli import JOBS
from aldm.config import Config
from pipelines.arguments import COMMON_FLAGS, job_parser
from pipelines.ray_training import cluster_of
from pipelines.train import parse

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py, which is a script of no package."""
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["commands.md", "configuration.md"])
def test_a_generated_page_is_current(generate: ModuleType, name: str) -> None:
    committed = (DOCS / name).read_text(encoding="utf-8")
    assert committed == generate.PAGES[name](), f"docs/{name} is not of this code: run make docs and commit it"


def test_every_generated_page_is_tested_and_linked(generate: ModuleType) -> None:
    assert set(generate.PAGES) == {"commands.md", "configuration.md"}
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in sorted(DOCS.glob("*.md")) if page.name not in index and page.name != "index.md"] == []


@pytest.mark.parametrize("job", JOBS)
def test_every_flag_of_every_job_is_explained(generate: ModuleType, job: str) -> None:
    """With the common flags among them, which a job's own parser brings by being made with job_parser."""
    common = {action.dest for action in generate._actions(job_parser("x", ""), COMMON_FLAGS)}
    for parser in generate.parsers_of(job):
        assert [action.dest for action in parser._actions if not (action.help or "").strip()] == []
        assert common <= {action.dest for action in parser._actions}
        assert (parser.description or "").strip()


def test_every_configuration_field_is_explained(generate: ModuleType) -> None:
    texts = generate._field_docstrings()
    for cls in {Config, *(type(value) for value in vars(Config()).values() if dataclasses.is_dataclass(value))}:
        plain = [
            item.name for item in dataclasses.fields(cls) if not dataclasses.is_dataclass(getattr(cls(), item.name))
        ]
        assert [name for name in plain if not texts[cls.__name__].get(name)] == []


def test_tables_survive_bars(generate: ModuleType) -> None:
    assert generate._table(("a",), [("x|y",)]) == "| a |\n| --- |\n| x\\|y |\n"


def documented_trainings() -> list[str]:
    """Return what follows `aldm train` in each command of README.md and the written pages.

    That of add_a_method.md is run by its own test: its method exists in a copy alone.
    """
    pages = [DOCS.parent / "README.md", *sorted(set(DOCS.glob("*.md")) - {DOCS / "add_a_method.md"})]
    text = "\n".join(page.read_text(encoding="utf-8").replace("\\\n", " ") for page in pages)
    commands = re.findall(r"^(?:ray job submit .*-- +)?aldm train (.+)$", text, re.MULTILINE)
    return [command for command in commands if "--run-dir" in command and "[flags]" not in command]


@pytest.mark.parametrize("command", documented_trainings())
def test_every_documented_training_is_one_that_the_job_takes(command: str) -> None:
    """Its flags are known, its workers share its batch, and its preset has a codec to train where it trains one."""
    stage, *words = shlex.split(command, comments=True)
    args, config = parse(stage, words)
    cluster = cluster_of(args, config, stage)
    assert cluster.max_workers > 1 or args.num_workers is None
    assert stage != "vqgan" or config.codec.kind != "haar"


def test_trainings_on_several_workers_are_documented() -> None:
    workers = [command for command in documented_trainings() if "--num-workers" in command]
    assert len(workers) >= 5
    assert any(":" in command.partition("--num-workers ")[2][:3] for command in workers)
