"""The site of docs/ is built without a warning, and its navigation is that of docs/index.md."""

import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "docs" / "index.md"


@pytest.fixture(scope="module")
def hooks() -> Any:
    """docs/hooks.py, which is a module of no package."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import hooks
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return hooks


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: strictly, so a link that leads nowhere fails."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def navigation() -> dict[str, list[str]]:
    """Return the pages behind each door, as mkdocs.yml names them."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    doors = yaml.safe_load(text[text.index("\nnav:") :])["nav"]
    return {
        door: [page for entry in pages for page in entry.values()]
        for item in doors
        for door, pages in item.items()
        if isinstance(pages, list)
    }


def test_the_index_has_the_doors_and_pages_of_the_navigation(hooks: Any) -> None:
    """With a sentence a page; those outside docs/ have another name on the site."""
    _, *sections = re.split(r"^## ", INDEX.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {
        section.partition("\n")[0]: re.findall(r"^- \[[^]]+\]\(([^)]+)\): .+\.$", section, re.MULTILINE)
        for section in sections
    }
    outside = {f"../{path}": place for path, place in hooks.OUTSIDE.items()}
    assert {door: [outside.get(page, page) for page in pages] for door, pages in found.items()} == navigation()
    assert list(found) == ["Try it", "Train on your data", "Run the platform", "Change the code"]


def test_the_picture_of_the_layers_is_current() -> None:
    layers = runpy.run_path(str(ROOT / "docs" / "layers.py"))
    current = layers["PICTURE"].read_text(encoding="utf-8")
    assert current == layers["drawn"](), "run make docs and commit docs/images/layers.svg"


def test_every_module_of_the_library_is_in_the_picture() -> None:
    layers = runpy.run_path(str(ROOT / "docs" / "layers.py"))
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    library = next(contract["layers"] for contract in contracts if contract["name"] == "Layers inside the library")
    wanted = [name.removeprefix("aldm.") for layer in library for name in re.findall(r"[\w.]+", layer)]
    bands = layers["bands"]((ROOT / "pyproject.toml").read_text())
    assert [name for band in bands if band.colours is layers["LIBRARY"] for name in band.modules] == wanted
    assert all(band.modules for band in bands)


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/add_a_method.md", "CONTRIBUTING.md"])
def test_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:aldm|pipelines|serve|tune|tests|docs)/[\w/.]*)`", text))
    assert len(named) > 2
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_links_lead_to_where_pages_are_on_the_site(hooks: Any) -> None:
    text = "[a](../CONTRIBUTING.md#tests), [b](data.md), [c](#x), [d](https://mlflow.org), [e](images/page.png)"
    wanted = text.replace("../CONTRIBUTING.md", "contributing.md")
    assert hooks.links_on_the_site(text, Path("docs")) == wanted
    assert (
        hooks.links_on_the_site("[a](docs/data.md) [b](tests/gpu/README.md)", Path())
        == "[a](data.md) [b](gpu_check.md)"
    )


def test_arguments_that_share_a_line_get_one_each(hooks: Any) -> None:
    text = "Do it.\n\nArgs:\n    width, height,\n        depth: in voxels,\n        of the grid.\n    name: a, b: c"
    lines = [f"    {name}: in voxels,\n        of the grid." for name in ("width", "height", "depth")]
    assert hooks.one_argument_a_line(text) == "\n".join(["Do it.\n\nArgs:", *lines, "    name: a, b: c"])


@pytest.mark.slow
def test_the_site_has_a_page_for_every_module_and_fetches_nothing_from_elsewhere(site: Path, hooks: Any) -> None:
    """Its links are checked where it is built."""
    pages = [page for pages in hooks.packages().values() for page in pages]
    assert len(pages) > 100
    assert [page for page in pages if not (site / page).with_suffix(".html").is_file()] == []
    fetched = r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(https?:[^"]+)"'
    found = {address for page in site.rglob("*.html") for address in re.findall(fetched, page.read_text("utf-8"))}
    assert found == set()
