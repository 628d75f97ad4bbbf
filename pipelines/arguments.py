"""What every job's command line shares: the common flags, the resolved configuration and the logging."""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from aldm.cli import with_flags
from aldm.config import PRECISIONS, Config, override
from aldm.presets import PRESETS, load_preset

COMMON_FLAGS = "flags of every job"
LOG_LEVELS = ("debug", "info", "warning", "error")


class JobParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one message and whose parsing sets up the logging."""

    def error(self, message: str) -> NoReturn:
        """Print the message and where the flags are explained; exit with code 2."""
        self.exit(2, f"{self.prog}: {message}\nSee {self.prog} --help\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse, then log at the level that was asked for."""
        parsed = super().parse_args(args, namespace)
        configure_logging(parsed.log_level)
        return parsed


class _HelpFormatter(argparse.HelpFormatter):
    """Says the default of every flag that has one; the usage line names only what must be given."""

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        needed = [action for action in actions if not action.option_strings or action.required]
        return super()._format_usage(usage, needed, [], prefix).rstrip() + " [flags]\n\n"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        silent = not action.option_strings or action.default in (None, argparse.SUPPRESS) or action.required
        if silent or "default" in text:
            return text
        return text + (" (default: off)" if action.default is False else " (default: %(default)s)")


def job_parser(job: str, description: str, *, default_preset: str = "small") -> JobParser:
    """Return a parser for `aldm JOB` with the flags that every job takes.

    Args:
        job: the words after `aldm`, such as "prepare" or "train vqgan".
        description: what the job does, in a sentence or two.
        default_preset: the preset that the job hands to `resolve_config`, for the help.
    """
    parser = JobParser(prog=f"aldm {job}", description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    common = parser.add_argument_group(COMMON_FLAGS)
    common.add_argument(
        "--preset",
        metavar="NAME|FILE.yaml",
        help=f"configuration to start from: {', '.join(PRESETS)}, or a YAML file (default: {default_preset})",
    )
    common.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="change one value of the configuration, such as train_diffusion.learning_rate=1e-4; repeatable "
        "(default: nothing changed)",
    )
    common.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute; auto takes a GPU if there is one",
    )
    common.add_argument(
        "--precision", choices=PRECISIONS, help="arithmetic of the networks (default: the configuration's)"
    )
    common.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="least severe messages to print")
    common.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be done, check the inputs, print the memory plan, and stop",
    )
    return parser


@dataclass(frozen=True, kw_only=True)
class ConfigChanges:
    """What --preset, --set and --precision say."""

    preset: str | None = None
    set: Sequence[str] = ()
    precision: str | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> "ConfigChanges":
        """Return what the flags of any job say."""
        return cls(preset=args.preset, set=args.set, precision=args.precision)


def resolve_config(args: argparse.Namespace, default_preset: str = "small") -> Config:
    """Return the configuration that --preset, --set and --precision ask for, in that order.

    Raises:
        UserError: no such preset or file, an unknown key, a bad value.
    """
    config = override(load_preset(args.preset or default_preset), args.set)
    return config if args.precision is None else replace(config, precision=args.precision)


class _StderrHandler(logging.Handler):
    """Writes log lines above a progress bar instead of through it, with flags for the library's parameters."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(with_flags(self.format(record)), file=sys.stderr)


def configure_logging(level: str) -> None:
    """Log messages of at least `level` to stderr, one line each; a second call changes the level only."""
    root = logging.getLogger()
    if not any(isinstance(handler, _StderrHandler) for handler in root.handlers):
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
    root.setLevel(logging.WARNING)  # other packages' chatter
    for package in ("aldm", "pipelines", "serve", "tune"):
        logging.getLogger(package).setLevel(level.upper())
