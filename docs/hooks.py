"""Hooks of mkdocs: pages of the API, one a module; pages outside docs/; arguments that share a line of a docstring."""

import ast
import os
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("aldm", "pipelines", "serve", "tune")
OUTSIDE = {
    "aldm/default_model/README.md": "default_model.md",
    "CONTRIBUTING.md": "contributing.md",
    "tests/gpu/README.md": "gpu_check.md",
}
"""Pages outside docs/, and what each is called on the site."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the API behind the last door: a section a package, a page a module."""
    assert config.nav is not None
    (change_the_code,) = config.nav[-1].values()
    sections = [{package: [{Path(page).stem: page} for page in pages]} for package, pages in packages().items()]
    change_the_code.append({"API": sections})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files of docs/."""
    for pages in packages().values():
        for page in pages:
            name = page.removeprefix("api/").removesuffix(".md").replace("/", ".")
            files.append(File.generated(config, page, content=f"::: {name}\n"))
    for path, page in OUTSIDE.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=links_on_the_site(text, Path(path).parent)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where pages are on the site, and give code in tables its bars back.

    GitHub wants a bar in a table escaped even in code, mkdocs does not.
    """
    if page.file.src_uri not in OUTSIDE.values():
        markdown = links_on_the_site(markdown, Path("docs"))
    rows = re.compile(r"^\|.*$", re.MULTILINE)
    return rows.sub(lambda row: re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), row[0]), markdown)


def links_on_the_site(text: str, folder: Path) -> str:
    """Return a page with its links to files of the repository as they are on the site.

    Args:
        text: Markdown.
        folder: of the page, in the repository.
    """

    def on_the_site(link: re.Match[str]) -> str:
        path = os.path.normpath(folder / link[1])
        return f"]({OUTSIDE.get(path, path.removeprefix('docs/'))}"

    return re.sub(r"\]\((?!\w+:)([^)#\s]+)", on_the_site, text)


def packages() -> dict[str, list[str]]:
    """Return the pages of each package's modules, by the package's name."""
    found: dict[str, list[str]] = {}
    for path in sorted(path for top in PACKAGES for path in (ROOT / top).rglob("*.py")):
        if path.name != "__init__.py" and ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))):
            module = path.relative_to(ROOT)
            found.setdefault(".".join(module.parent.parts), []).append(f"api/{module.with_suffix('.md').as_posix()}")
    return dict(sorted(found.items()))


class OneArgumentALine(griffe.Extension):
    """Gives each of the arguments in `width, height: in voxels` a line of its own."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite an object's docstring before it is read."""
        if obj.docstring:
            obj.docstring.value = one_argument_a_line(obj.docstring.value)


def one_argument_a_line(docstring: str) -> str:
    """Repeat the text of arguments that share it; nothing else changes."""

    def apart(match: re.Match[str]) -> str:
        return "\n".join(f"    {name}: {match[2]}" for name in re.split(r",\s+", match[1]))

    return re.sub(r"^    (\w+(?:,\s+\w+)+): (.*(?:\n {5,}.*)*)", apart, docstring, flags=re.MULTILINE)
