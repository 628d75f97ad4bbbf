"""k8s/Dockerfile read and replayed: its instructions, the files that a build gets, the environment that it makes."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "k8s" / "Dockerfile"
REPLAY_S = 1800
"""The longest that one RUN may take; downloads are most of it."""
SYSTEM_STEP = re.compile(r"apt-get|groupadd|useradd")
"""RUN instructions that change the base image's system and are not replayed."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, continued lines joined."""

    word: str
    text: str


@dataclass
class Stage:
    """The instructions from one FROM to the next."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


def read_dockerfile(text: str) -> tuple[dict[str, str], dict[str, Stage]]:
    """Return the arguments before the first FROM, and the stages by name."""
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, _, name = rest.split()
            stage = stages[name] = Stage(name, base)
        elif stage is not None:
            stage.instructions.append(Instruction(word, rest))
        else:
            assert word == "ARG", line
            arguments |= assignments(rest)
    return arguments, stages


def assignments(text: str) -> dict[str, str]:
    """Return NAME=VALUE pairs of an ARG, ENV or LABEL; an ARG without a value is left out."""
    pairs = re.findall(r'([\w.]+)=("(?:[^"\\]|\\.)*"|\S*)', text)
    return {name: value.strip('"') for name, value in pairs}


def expanded(text: str, values: dict[str, str]) -> str:
    """Return the text with $NAME and ${NAME} filled in, as Docker does outside RUN."""
    return re.sub(r"\$\{?(\w+)\}?", lambda match: values.get(match[1], ""), text)


def chain(last: str, values: dict[str, str]) -> tuple[str, list[Stage]]:
    """Return the base image of a stage and all stages from that to it."""
    arguments, stages = read_dockerfile(DOCKERFILE.read_text())
    arguments |= values
    found: list[Stage] = []
    name = last
    while name in stages:
        found.insert(0, stages[name])
        name = expanded(stages[name].base, arguments)
    return name, found


def environment(last: str, values: dict[str, str], path: str) -> dict[str, str]:
    """Return what ENV sets on the way to a stage, over PATH of the base image."""
    names, result = dict(values), {"PATH": path}
    for stage in chain(last, values)[1]:
        for instruction in stage.instructions:
            if instruction.word == "ARG":
                names = assignments(instruction.text) | names
            elif instruction.word == "ENV":
                given = assignments(instruction.text)
                result |= {name: expanded(value, names | result) for name, value in given.items()}
    return result


def ignored(path: str, patterns: list[str]) -> bool:
    """Return whether .dockerignore leaves a file out: the last pattern that is its path, or a folder of it, decides."""
    parts = path.split("/")
    prefixes = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
    out = False
    for pattern in patterns:
        regex = "".join(
            {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(piece, re.escape(piece))
            for piece in re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("!").strip("/"))
        )
        if any(re.fullmatch(regex, prefix) for prefix in prefixes):
            out = not pattern.startswith("!")
    return out


def ignore_patterns() -> list[str]:
    """Return the patterns of .dockerignore."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def context_files(source: str) -> list[str]:
    """Return the files that a COPY of `source` gets, relative to the repository."""
    start = ROOT / source
    files = [start] if start.is_file() else sorted(path for path in start.rglob("*") if path.is_file())
    names = [str(path.relative_to(ROOT)) for path in files]
    return [name for name in names if not ignored(name, ignore_patterns())]


class Replay:
    """The build of the CPU variant's environment, done in a folder instead of an image.

    Attributes:
        root: stands for / of the image.
        skipped: RUN instructions that were left out.
    """

    def __init__(self, root: Path, values: dict[str, str]) -> None:
        self.root, self.values = root, {"VARIANT": "cpu", **values}
        self.skipped: list[str] = []
        self._folder = root

    def build(self, last: str) -> None:
        """Carry out the stages up to `last`."""
        for stage in chain(last, self.values)[1]:
            for instruction in stage.instructions:
                self._do(instruction)

    def inside(self, text: str) -> str:
        """Return the text with the image's paths turned into those of the folder."""
        return text.replace("/opt/aldm", str(self.root / "opt/aldm"))

    def _do(self, instruction: Instruction) -> None:
        if instruction.word == "ARG":
            self.values = assignments(instruction.text) | self.values
        elif instruction.word == "WORKDIR":
            self._folder = self.root / instruction.text.lstrip("/")
            self._folder.mkdir(parents=True, exist_ok=True)
        elif instruction.word == "COPY":
            self._copy(*instruction.text.split())
        elif instruction.word == "RUN" and SYSTEM_STEP.search(instruction.text):
            self.skipped.append(instruction.text)
        elif instruction.word == "RUN":
            self._run(self.inside(instruction.text))
        else:
            assert instruction.word in ("ENV", "LABEL"), instruction

    def _copy(self, *words: str) -> None:
        *sources, target = words
        assert all(source in (".", "./") or not source.startswith(("-", "/")) for source in sources), words
        for source in sources:
            folder = (ROOT / source).is_dir()
            for name in context_files(source):
                to = self._folder / target / (Path(name).relative_to(source) if folder else Path(name).name)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, to)

    def _run(self, command: str) -> None:
        """pip's own settings of this machine stay: where packages come from is not the Dockerfile's to say."""
        made = environment("build", self.values, os.environ["PATH"])
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        env |= self.values | {name: self.inside(value) for name, value in made.items() if name != "PIP_NO_CACHE_DIR"}
        env |= {"SYSTEM_PYTHON": getattr(sys, "_base_executable", sys.executable), "PIP_NO_COMPILE": "1"}
        done = subprocess.run(
            ["/bin/sh", "-ec", command], cwd=self._folder, env=env, capture_output=True, text=True, timeout=REPLAY_S
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
