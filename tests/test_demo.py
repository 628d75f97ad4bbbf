"""The demo: every job of the tiny preset in order, then nothing left to do."""

import json
import re

import pytest

from aldm.errors import UserError
from pipelines import demo
from pipelines.demo import main


@pytest.mark.slow
def test_the_demo_runs_every_step_and_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    out = tmp_path / "demo"
    arguments = ["--out", str(out), "--preset", "tiny", "--num-subjects", "8"]
    run = demo._run

    def stop_before_export(step, counter, *rest):
        if step.command[0] == "export":
            raise KeyboardInterrupt
        run(step, counter, *rest)

    monkeypatch.setattr(demo, "_run", stop_before_export)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    monkeypatch.setattr(demo, "_run", run)
    assert not (out / "report.html").exists()
    before = json.loads((out / "demo.json").read_text())["steps"]

    assert main(arguments) == 0
    assert capsys.readouterr().out.count("done before") == len(before) > 0
    after = json.loads((out / "demo.json").read_text())["steps"]
    assert after[: len(before)] == before
    page = (out / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/png;base64,") >= 3
    for step in after:
        assert step["title"] in page
    for name in ("held_out", "icbm152"):
        assert (out / "translated" / f"{name}_t2.nii.gz").is_file()


def test_a_demo_made_with_other_settings_is_not_continued(tmp_path):
    out = tmp_path / "demo"
    settings = {"preset": "tiny", "set": [], "precision": None, "num_subjects": 8, "seed": 0}
    demo._open(out, settings, overwrite=False)
    with pytest.raises(UserError, match="--overwrite"):
        main(["--out", str(out), "--preset", "tiny", "--num-subjects", "9"])


def test_a_dry_run_lists_every_command_and_writes_nothing(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "demo"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.count("$ aldm ") == 12
    assert re.search(r"memory: 0\.\d\d GiB for the largest training", text)
    assert not (tmp_path / "demo").exists()


def test_a_dry_run_says_that_the_folder_is_taken(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="exists and is not empty"):
        main(["--out", str(tmp_path), "--dry-run"])


def test_too_few_subjects_are_a_usage_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "demo"), "--num-subjects", "5"])
    assert stop.value.code == 2
    assert "--num-subjects" in capsys.readouterr().err
