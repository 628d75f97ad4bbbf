"""The run folder: one process at a time, nothing lost, nothing overwritten unasked."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from aldm.config import Config, from_dict
from aldm.errors import UserError
from aldm.presets import small, tiny
from aldm.run_folder import RunFolder, check_run_folder, checkpoint_folder, git_state


def opened(path: Path, config: Config | None = None, **flags: bool) -> RunFolder:
    return RunFolder.open(path, stage="ms-spade", config=config or tiny(), inputs={"latents": "somewhere"}, **flags)


def write_step(step: int, text: str = "weights") -> object:
    def write(folder: Path) -> None:
        (folder / "weights.safetensors").write_text(text)
        (folder / "config.json").write_text("{}")
        (folder / "training.json").write_text(json.dumps({"step": step}))

    return write


def test_a_run_explains_itself(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        run.log({"step": 1, "loss": 0.5, "bad": float("nan")})
    assert from_dict(Config, yaml.safe_load((tmp_path / "run/config.yaml").read_text())) == tiny()
    start = json.loads((tmp_path / "run/run.json").read_text())["starts"][0]
    assert start["inputs"] == {"latents": "somewhere"}
    assert start["git_commit"] == git_state()["git_commit"]
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5, "bad": None}


def test_the_commit_is_that_of_the_checkout() -> None:
    here = Path(__file__).parent
    git = shutil.which("git")
    if git is None:
        pytest.skip("needs git")
    wanted = subprocess.run([git, "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    assert git_state()["git_commit"] == (wanted.stdout.strip() or None)


def test_without_git_a_run_knows_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() == {"git_commit": None, "git_changed": None}


def test_two_trainings_cannot_share_a_run(tmp_path: Path) -> None:
    with opened(tmp_path / "run"):
        for flags in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match=rf"another training runs in .*process {os.getpid()}"):
                opened(tmp_path / "run", **flags)
    opened(tmp_path / "run", overwrite=True).close()  # the lock is free again


def test_an_existing_run_needs_a_word(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        run.log({"step": 1})
    with pytest.raises(UserError, match="`resume` continues it, `overwrite` deletes it"):
        opened(tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").is_file()


def test_overwrite_starts_anew(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        run.log({"step": 1})
        run.save(write_step(1), is_best=True)
        (tmp_path / "run/.tmp-1-abc-last").mkdir()
    with opened(tmp_path / "run", replace(tiny(), seed=5), overwrite=True):
        left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"config.yaml", "run.json", "run.lock"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"resume": True}, "holds no run to resume"), ({"resume": True, "overwrite": True}, "give one of them")],
)
def test_flags_that_make_no_sense(tmp_path: Path, flags: dict[str, bool], message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "run", **flags)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_things_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds other things \(thesis.tex\)"):
            check_run_folder(tmp_path, resume=False, overwrite=overwrite)


def test_missing_folders_above_are_made_by_a_run_and_by_no_check(tmp_path: Path) -> None:
    check_run_folder(tmp_path / "runs" / "codec", resume=False, overwrite=False)
    assert list(tmp_path.iterdir()) == []
    with opened(tmp_path / "runs" / "codec") as run:
        assert run.path == tmp_path / "runs" / "codec"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "file/run", "file/runs/codec"):
        with pytest.raises(UserError, match="file is a file, wanted a"):
            check_run_folder(tmp_path / name, resume=False, overwrite=False)


def test_resuming_with_another_configuration_is_refused(tmp_path: Path) -> None:
    opened(tmp_path / "run").close()
    other = replace(tiny(), seed=7, train_ms_spade=replace(tiny().train_ms_spade, learning_rate=0.5))
    with pytest.raises(UserError, match=r"seed was 0, now 7; train_ms_spade.learning_rate was 0\.002, now 0\.5"):
        opened(tmp_path / "run", other, resume=True)


def test_what_only_other_trainings_read_may_differ(tmp_path: Path) -> None:
    opened(tmp_path / "run").close()
    others = {name: replace(getattr(tiny(), name), learning_rate=0.5) for name in ("train_unet", "train_diffusion")}
    other = replace(tiny(), haar_unet=small().haar_unet, **others)
    opened(tmp_path / "run", other, resume=True).close()
    with pytest.raises(UserError, match=r"configuration \(unet\.norm_groups was 4, now 8\)"):
        opened(tmp_path / "run", replace(other, unet=replace(other.unet, norm_groups=8)), resume=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "seed: [1", r"config\.yaml is damaged"),
        ("config.yaml", "- 1", r"config\.yaml is damaged .*wanted a mapping"),
        ("config.yaml", "seeds: 1", r"config\.yaml is damaged .*unknown key seeds"),
        ("run.json", "{", r"run\.json is damaged, it is not JSON"),
        ("run.json", "{}", r"run\.json is damaged: it lacks stage; it lacks starts"),
        ("run.json", '{"stage": "ms-spade", "starts": [1]}', r"run\.json is damaged: its starts are not mappings"),
        ("last/training.json", "", r"training\.json is damaged"),
        ("last/training.json", '{"step": "a"}', r"training\.json is damaged: step is 'a', wanted a whole number"),
        ("metrics.jsonl", "nothing\n", r"metrics\.jsonl is damaged"),
    ],
)
def test_resuming_a_damaged_run_is_explained(tmp_path: Path, name: str, text: str, message: str) -> None:
    with opened(tmp_path / "run") as run:
        run.log({"step": 1})
        run.save(write_step(1), is_best=False)
    (tmp_path / "run" / name).write_text(text)

    def resume() -> None:
        with opened(tmp_path / "run", resume=True) as run:
            run.resume_from()

    with pytest.raises(UserError, match=f"(?s){message}.*fix it from a copy, or delete the folder"):
        resume()


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_the_run_of_another_stage_is_neither_resumed_nor_deleted(tmp_path: Path, flag: str) -> None:
    with opened(tmp_path / "run") as run:
        run.log({"step": 1})
    with pytest.raises(UserError, match="run is a run of aldm train ms-spade, not of vqgan: give another `run_dir`"):
        RunFolder.open(tmp_path / "run", stage="vqgan", config=tiny(), inputs={}, **{flag: True})
    assert (tmp_path / "run/metrics.jsonl").is_file()


def test_a_resumed_run_may_be_longer(tmp_path: Path) -> None:
    opened(tmp_path / "run").close()
    longer = replace(tiny(), train_ms_spade=replace(tiny().train_ms_spade, max_steps=100, log_every=5))
    opened(tmp_path / "run", longer, resume=True).close()
    assert len(json.loads((tmp_path / "run/run.json").read_text())["starts"]) == 2


def test_resuming_drops_what_was_logged_after_the_checkpoint(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        for step in range(1, 5):
            run.log({"step": step})
            if step == 2:
                run.save(write_step(step), is_best=False)
        with (tmp_path / "run/metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')  # killed while writing
    with opened(tmp_path / "run", resume=True) as run:
        assert run.resume_from() == tmp_path / "run/last"
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_a_run_without_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        run.log({"step": 1})
    with opened(tmp_path / "run", resume=True) as run:
        assert run.resume_from() is None
    assert (tmp_path / "run/metrics.jsonl").read_text() == ""


def test_best_holds_the_best_and_last_the_last(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        run.save(write_step(1, "first"), is_best=True)
        run.save(write_step(2, "second"), is_best=False)
    assert (tmp_path / "run/best/weights.safetensors").read_text() == "first"
    assert (tmp_path / "run/last/weights.safetensors").read_text() == "second"
    assert checkpoint_folder(tmp_path / "run") == tmp_path / "run/best"


def test_a_failed_checkpoint_leaves_the_one_before(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "weights.safetensors").write_text("half")
        raise KeyboardInterrupt

    with opened(tmp_path / "run") as run:
        run.save(write_step(1, "first"), is_best=False)
        with pytest.raises(KeyboardInterrupt):
            run.save(fail, is_best=True)
    assert (tmp_path / "run/last/weights.safetensors").read_text() == "first"
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_a_process_killed_between_two_renames_loses_no_checkpoint(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        run.save(write_step(1, "first"), is_best=False)
    (tmp_path / "run/last").rename(tmp_path / "run/.tmp-1-a-last")  # the old one, moved aside
    half = tmp_path / "run/.tmp-1-b-last"
    half.mkdir()
    (half / "weights.safetensors").write_text("half")
    with opened(tmp_path / "run", resume=True) as run:
        assert run.resume_from() == tmp_path / "run/last"
    assert (tmp_path / "run/last/weights.safetensors").read_text() == "first"
    assert not list((tmp_path / "run").glob(".tmp-*"))


@pytest.mark.linux
def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        (tmp_path / "run/metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(UserError, match="No space left on device; fix that, then go on with `resume`"):
            run.log({"step": 1})


def test_the_checkpoint_of_a_run_is_found_or_missed_by_name(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        with pytest.raises(UserError, match="has not written one yet"):
            checkpoint_folder(tmp_path / "run")
        run.save(write_step(1), is_best=False)
    assert checkpoint_folder(tmp_path / "run") == tmp_path / "run/last"
    assert checkpoint_folder(tmp_path / "run/last") == tmp_path / "run/last"
    with pytest.raises(UserError, match="is not a run folder"):
        checkpoint_folder(tmp_path)
