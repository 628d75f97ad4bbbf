"""Registered translators: what MLflow loads back translates as `aldm translate` does, in a process of its own."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jobs
import nibabel
import pytest
from untrained import save_untrained

from aldm.checkpoint import load_checkpoint, save_checkpoint
from aldm.data.phantom import simulate_subject
from aldm.errors import UserError
from pipelines.registry import check_names, register, requirements
from pipelines.tracking_server import connect

ROOT = Path(__file__).resolve().parent.parent
NOT_NEEDED = ("SimpleITK", "deepspeed", "diffusers", "matplotlib", "monai", "nilearn", "optuna", "pydicom", "ray")
LOAD = """
import base64, gzip, json, sys
for name in sys.argv[2:]:
    sys.modules[name] = None  # to import it is an error
import mlflow, pandas
rows = json.load(open(sys.argv[1]))
table = pandas.DataFrame([row | {"volume": base64.b64decode(row["volume"])} for row in rows])
results = []
for name in ("aldm", "unet"):
    model = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    made = [base64.b64encode(content).decode() for content in model.predict(table)["volume"]]
    example = len(gzip.decompress(model.predict(model.input_example)["volume"][0]))
    signature = model.metadata.signature.to_dict()
    results.append({"made": made, "example": example, "signature": signature, "program": sys.modules["aldm"].__file__})
print(json.dumps(results))
"""


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a registry that has it."""
    folder = tmp_path_factory.mktemp("registry")
    register(save_untrained(folder / "model"), "first", None, f"sqlite:///{folder}/mlflow.db")
    return folder


def run(*words: object) -> int:
    return jobs.run(*words, "--device", "cpu", "--log-level", "warning")


def unet_run(model: Path, run_dir: Path) -> Path:
    """Write what a training of the regression U-Net leaves."""
    made = load_checkpoint(model)
    data = made.meta["data"] | {"layout": "ixi", "num_subjects": {"train": 3}, "fingerprint": "abc123"}
    training = {"stage": "unet", "step": 1, "num_steps": 1, "score": "psnr_db", "validation": {"psnr_db": 9.0}}
    weights = {name.removeprefix("unet."): tensor for name, tensor in made.weights.items()}
    meta = {"modalities": list(made.config.modalities), "data": data, "training": training}
    save_checkpoint(run_dir, kind="unet", config=made.config, weights=weights, meta=meta)
    return run_dir


@pytest.mark.slow
def test_a_loaded_model_gives_the_bytes_of_aldm_translate(folder: Path, tmp_path: Path) -> None:
    """One registered from Python, one by `aldm export`; loaded where packages that they should not need are missing."""
    uri = f"sqlite:///{folder}/mlflow.db"
    models = {"aldm": folder / "model", "unet": folder / "exported"}
    assert register(models["aldm"], "aldm", "champion", uri) == 1
    run_dir = unet_run(save_untrained(tmp_path / "unet", kind="unet"), tmp_path / "run")
    words = ("--baseline", run_dir, "--out", models["unet"], "--register", "unet", "--alias", "champion")
    assert run("export", *words) == 0
    assert "Not a medical device" in connect(uri).get_model_version("unet", "1").description

    rows, wanted = [], []
    for source, target, suffix in (("t1", "t2", ".nii.gz"), ("pd", "t1", ".nii")):
        volume = simulate_subject(1, 0, "ixi", 12.0)[source]
        given = tmp_path / f"{source}{suffix}"
        nibabel.save(nibabel.Nifti1Image(volume.data, volume.affine), given)
        rows.append({"volume": base64.b64encode(given.read_bytes()).decode(), "source": source, "target": target})
        for kind, model in models.items():
            made = tmp_path / f"{kind}-{target}{suffix}"
            assert run("translate", given, made, "--model", model, "--source", source, "--target", target) == 0
            wanted.append((kind, made.read_bytes()))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "rows.json"), *NOT_NEEDED],
        env=os.environ | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true", "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for kind, result in zip(models, results, strict=True):
        assert [base64.b64decode(content) for content in result["made"]] == [made for of, made in wanted if of == kind]
        assert result["example"] > 352  # bytes: more than a NIfTI header
        assert Path(result["program"]).parent.parent.name == "code"  # what was registered with it, not this checkout
        inputs, outputs = (json.loads(result["signature"][side]) for side in ("inputs", "outputs"))
        columns = [(column["name"], column["type"]) for column in inputs]
        assert columns == [("volume", "binary"), ("source", "string"), ("target", "string")]
        assert [column["type"] for column in outputs] == ["binary"]


def test_each_registering_is_a_version_and_the_alias_goes_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, model = f"sqlite:///{folder}/mlflow.db", folder / "model"
    monkeypatch.chdir(tmp_path)
    assert register(model, "aliased", "champion", uri) == 1
    assert register(model, "aliased", None, uri) == 2
    client = connect(uri)
    assert client.get_model_version_by_alias("aliased", "champion").version == 1
    assert register(model, "aliased", "champion", uri) == 3
    version = client.get_model_version_by_alias("aliased", "champion")
    assert version.version == 3
    assert version.tags["hash"] == load_checkpoint(model).hash
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "alias"),
    [("a/b", None), ("", None), ("good", "has space"), ("good", "latest"), ("good", "v12"), ("bad:er", "fine")],
)
def test_names_that_mlflow_does_not_take_are_refused_first(name: str, alias: str | None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--register" if alias in (None, "fine") else "--alias"):
        register(tmp_path / "no model", name, alias, f"sqlite:///{tmp_path}/mlflow.db")
    assert list(tmp_path.iterdir()) == []


def test_good_names_are_taken() -> None:
    check_names("synth_2-b", "champion")
    check_names("synth", "v12b")
    check_names("synth", None)


def test_export_refuses_a_registry_that_does_not_answer_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = unet_run(save_untrained(tmp_path / "model", kind="unet"), tmp_path / "run")
    words = ("export", "--baseline", run_dir, "--out", tmp_path / "out")
    with pytest.raises(SystemExit):
        run(*words, "--alias", "champion")
    assert "--register" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert run(*words, "--register", "synth") == 2
    assert "http://127.0.0.1:9" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert run(*words, "--register", "synth", "--dry-run") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_the_requirements_are_the_project_s_versions() -> None:
    pinned = re.findall(r"^\S+==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {line.lower() for line in requirements()} <= {line.lower() for line in pinned}
