"""Writes the generated pages of docs/ from the code: commands.md and configuration.md. Run by `make docs`."""

import argparse
import ast
import dataclasses
import importlib
import operator
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints
from unittest import mock

from aldm import config as config_module
from aldm import config_baselines, config_training
from aldm.cli import JOBS, usage
from aldm.config import Config
from aldm.presets import PRESETS
from pipelines.arguments import COMMON_FLAGS, JobParser, job_parser

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
NOTE = "<!-- Written by `make docs` from the code; edit the code instead. -->\n\n"


def main() -> int:
    """Write every page whose text has changed."""
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        changed = not path.is_file() or path.read_text(encoding="utf-8") != text
        if changed:
            path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {'written' if changed else 'current'}")
    return 0


# Commands


class _ParserFound(Exception):
    """Carries a job's parser out of its main."""


def parsers_of(job: str) -> list[JobParser]:
    """Return the parsers with which a job would read its arguments: one for each stage where it has several."""
    module = importlib.import_module(JOBS[job][0])

    def found(self: JobParser, *_: object) -> None:
        raise _ParserFound(self)

    parsers = []
    for arguments in [[stage] for stage in getattr(module, "SUBCOMMANDS", ())] or [[]]:
        with mock.patch.object(JobParser, "parse_args", found):
            try:
                module.main(arguments)
            except _ParserFound as error:
                parsers.append(error.args[0])
            else:
                raise RuntimeError(f"aldm {job} {' '.join(arguments)} does not parse its arguments with a JobParser")
    return parsers


def commands_page() -> str:
    """Return the page of every command, its arguments, defaults and units."""
    common = job_parser("JOB", "")
    parts = [
        f"{NOTE}# Commands\n\n```\n{usage()}\n```\n",
        "Errors that you can fix are one message and exit code 2. Ctrl-C is exit code 130 and SIGTERM 143; `aldm "
        "serve`, once it has started, is stopped by them and ends with 0.\n",
        "## Flags of every job\n\n" + _flag_table(_actions(common, COMMON_FLAGS)),
    ]
    for job in JOBS:
        parts += map(_command, parsers_of(job))
    return "\n".join(parts)


def _command(parser: argparse.ArgumentParser) -> str:
    actions = [action for group in parser._action_groups for action in _actions(parser, group.title)]
    own = [action for action in actions if action not in _actions(parser, COMMON_FLAGS)]
    positional = [action for action in own if not action.option_strings]
    required = [action for action in own if action.option_strings and action.required]
    words = [parser.prog, *map(_invocation, positional), *map(_invocation, required), "[flags]"]
    text = f"## {parser.prog}\n\n{_escape(parser.description or '')}\n\n```\n{' '.join(words)}\n```\n"
    if positional:
        text += "\n" + _flag_table(positional, heading="argument")
    flags = [action for action in own if action.option_strings]
    if flags:
        text += "\n" + _flag_table(flags)
    return f"{text}\n{_escape(parser.epilog)}\n" if parser.epilog else text


def _actions(parser: argparse.ArgumentParser, title: str | None) -> list[argparse.Action]:
    groups = [group for group in parser._action_groups if group.title == title]
    return [
        action
        for group in groups
        for action in group._group_actions
        if not isinstance(action, argparse._HelpAction) and action.help != argparse.SUPPRESS
    ]


def _invocation(action: argparse.Action) -> str:
    count = action.nargs if isinstance(action.nargs, int) else 1
    if isinstance(action.metavar, tuple):
        value = " ".join(action.metavar)
    elif action.metavar is not None:
        value = " ".join([action.metavar] * count)
    elif action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    else:
        name = action.dest if not action.option_strings else action.option_strings[-1].lstrip("-").replace("-", "_")
        value = " ".join([name.upper()] * count)
    value = {"+": f"{value} ...", "*": f"[{value} ...]", "?": f"[{value}]", 0: ""}.get(action.nargs, value)
    return " ".join([*action.option_strings[-1:], *([value] if value else [])])


def _flag_table(actions: list[argparse.Action], heading: str = "flag") -> str:
    formatter = job_parser("JOB", "").formatter_class("aldm")
    rows = []
    for action in actions:
        parameters = {**vars(action), "prog": "aldm"}
        parameters["choices"] = ", ".join(map(str, action.choices)) if action.choices is not None else ""
        text = (formatter._get_help_string(action) or "") % parameters
        rows.append((f"`{_invocation(action)}`", _escape(text)))
    return _table((heading, "meaning"), rows)


# Configuration


def configuration_page() -> str:
    """Return the page of every configuration field and of the values that the presets give it."""
    parts = [
        f"{NOTE}# Configuration\n\nA run's configuration is a preset plus `--set key.path=value`. A YAML file given to "
        "`--preset` may name a preset under `preset` and change keys of it; unknown keys are errors. Every run folder "
        "holds the resolved configuration as `config.yaml`.\n",
        _dataclass_section(Config, "Top level", ""),
    ]
    documented: dict[type, str] = {}
    for name, cls in _sections(Config, ""):
        if cls in documented:
            anchor = documented[cls].replace(".", "")
            parts.append(f"## `{name}`\n\nThe same fields as [`{documented[cls]}`](#{anchor}).\n")
            parts.append(_preset_table(name))
        else:
            documented[cls] = name
            parts.append(_dataclass_section(cls, f"`{name}`", name))
    return "\n".join(part for part in parts if part)


def _sections(owner: type, prefix: str) -> Iterator[tuple[str, type]]:
    """Yield path and class of every section below a configuration class, outer ones first."""
    for name, cls in get_type_hints(owner).items():
        if dataclasses.is_dataclass(cls):
            yield prefix + name, cls
            yield from _sections(cls, f"{prefix}{name}.")


def _dataclass_section(cls: type, title: str, path: str) -> str:
    texts = _field_docstrings()[cls.__name__]
    rows = []
    for item in dataclasses.fields(cls):
        hint = get_type_hints(cls)[item.name]
        text = texts.get(item.name, "")
        if dataclasses.is_dataclass(hint):
            text = text or (hint.__doc__ or "")
            rows.append((f"`{item.name}`", "section", "see below", _escape(text)))
        else:
            rows.append((f"`{item.name}`", f"`{_type_name(hint)}`", f"`{_value(item.default)}`", _escape(text)))
    lead = f"{_escape((cls.__doc__ or '').strip())}\n\n"
    section = f"## {title}\n\n{lead}" + _table(("key", "type", "default", "meaning"), rows)
    return section + _preset_table(path)


def _preset_table(path: str) -> str:
    """Return a table of the presets' values where any of them differs from the default."""

    def section(config: Config) -> Any:
        return operator.attrgetter(path)(config) if path else config

    presets = {name: section(make()) for name, make in PRESETS.items()}
    default = section(Config())
    rows = []
    for item in dataclasses.fields(default):
        values = [getattr(preset, item.name) for preset in presets.values()]
        plain = not any(map(dataclasses.is_dataclass, values)) and item.name != "preset"
        if plain and any(value != getattr(default, item.name) for value in values):
            rows.append((f"`{item.name}`", *(f"`{_value(value)}`" for value in values)))
    if not rows:
        return "\nNo preset differs from the defaults here.\n"
    return "\nValues of the presets, where any differs from the default:\n\n" + _table(("key", *presets), rows)


def _field_docstrings() -> dict[str, dict[str, str]]:
    """Return class name -> field name -> the string that stands under the field in the source."""
    modules = (config_module, config_training, config_baselines)
    trees = [ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")) for module in modules]
    result: dict[str, dict[str, str]] = {}
    for node in [node for tree in trees for node in tree.body]:
        if not isinstance(node, ast.ClassDef):
            continue
        texts = result.setdefault(node.name, {})
        for field, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[field.target.id] = " ".join(str(text.value.value).split())  # type: ignore[union-attr]
    return result


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not getattr(hint, "__args__", None) else str(hint)


def _value(value: Any) -> str:
    """Return a value as YAML writes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


# Markdown


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _escape(text: str) -> str:
    """Escape what Markdown would read as markup, outside code spans."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*<>\[\]\\])", r"\\\1", part) for part in parts)


PAGES: dict[str, Callable[[], str]] = {"commands.md": commands_page, "configuration.md": configuration_page}

if __name__ == "__main__":
    sys.exit(main())
