"""The flags that every job shares."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aldm.device import select_device
from aldm.errors import UserError
from aldm.presets import brats, small
from pipelines.arguments import JobParser, job_parser, resolve_config


@pytest.fixture
def parser() -> JobParser:
    parser = job_parser("prepare", "Do it.")
    parser.add_argument("store", help="folder to write")
    parser.add_argument("--spacing-mm", type=float, default=1.0, metavar="F", help="voxel size, mm")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser


def test_presets_overrides_and_precision_apply_in_that_order(parser: JobParser) -> None:
    assert resolve_config(parser.parse_args(["s"])) == small()
    assert resolve_config(parser.parse_args(["s"]), default_preset="brats") == brats()
    arguments = ["s", "--preset", "brats", "--set", "seed=4", "--set", "precision=bf16", "--precision", "fp32"]
    assert resolve_config(parser.parse_args(arguments)) == replace(brats(), seed=4, precision="fp32")


def test_a_preset_may_be_a_file(parser: JobParser, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("preset: small\nseed: 9\n")
    assert resolve_config(parser.parse_args(["s", "--preset", str(tmp_path / "p.yaml")])) == replace(small(), seed=9)


def test_a_bad_override_is_a_user_error(parser: JobParser) -> None:
    with pytest.raises(UserError, match="unknown key 'seeed'"):
        resolve_config(parser.parse_args(["s", "--set", "seeed=4"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: store"),
        (["s", "--spacing-mm", "thin"], "argument --spacing-mm: invalid float value: 'thin'"),
        (["s", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["s", "--spacing", "2"], "unrecognized arguments: --spacing 2"),
        (["s", "--set"], "argument --set: expected one argument"),
    ],
)
def test_a_usage_error_is_one_message_and_exit_code_2(
    parser: JobParser, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(arguments)
    assert caught.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"aldm prepare: {message}")
    assert second == "See aldm prepare --help"


def test_help_shows_every_default_and_unit(parser: JobParser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "voxel size, mm (default: 1.0)" in text
    assert "replace what is there (default: off)" in text
    assert "a YAML file (default: small)" in text
    assert text.startswith("usage: aldm prepare store [flags] Do it.")
    optional = [action for action in parser._actions if action.option_strings and action.dest != "help"]
    assert text.count("(default: ") == len(optional)


def test_the_device_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device() == torch.device("cpu")
    with pytest.raises(UserError, match=r"`device` cuda: torch .* sees no GPU here"):
        select_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select_device() == torch.device("cuda")
    assert select_device("cpu") == torch.device("cpu")


def test_the_log_level_is_the_one_asked_for(parser: JobParser, capsys: pytest.CaptureFixture[str]) -> None:
    def logged(*arguments: str) -> str:
        parser.parse_args(["s", *arguments])
        logging.getLogger("aldm.training").info("ours")
        logging.getLogger("aldm.training").debug("detail")
        logging.getLogger("somebody.else").info("chatter")
        return capsys.readouterr().err

    first = logged()
    assert first.count("INFO ours") == 1
    assert "detail" not in first
    assert "chatter" not in first
    assert "DEBUG detail" in logged("--log-level", "debug")
    assert logged("--log-level", "warning") == ""
