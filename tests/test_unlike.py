"""A volume unlike the training data: measured from the store to the model, told by the command and the service."""

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from scans import blob, write
from series import eight_times, make_series
from service import RunningService
from test_serve_guard import Service, scan
from test_serve_worker import LIMIT, accepted
from untrained import save_untrained

from aldm import likeness
from aldm.cli import main
from aldm.data.preprocess import prepare_volume, prepare_volumes
from aldm.data.store import VolumeStore
from aldm.data.volume import Volume
from aldm.latents import data_record
from aldm.likeness import features
from aldm.presets import tiny
from aldm.translate import Translator
from serve.problems import Problem
from serve.worker import translate

MM = np.diag([8.0, 8, 8, 1])
WORDS = "is unlike the t1 volumes that the model was trained on"


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that finds every T1 unlike its own, and that it looks like T2."""
    return save_untrained(tmp_path_factory.mktemp("translators") / "strict", limits={"t1": 1e-2, "t2": 1e3})


# ------------------------------------------------------------------------------------------- from the store to a model


def test_a_store_keeps_the_features_of_what_a_training_sees(ixi_store: VolumeStore) -> None:
    for record in ixi_store.subjects()[:2]:
        for name in record.modalities:
            wanted = features(ixi_store.volume(record.subject_id, name))
            np.testing.assert_allclose(record.likeness[name], wanted, atol=0.01)


def test_a_volume_alone_is_measured_like_in_its_store(ixi_store: VolumeStore, ixi_tree: Path) -> None:
    from aldm.data.volume import load_nifti

    record = ixi_store.subjects()[0]
    volume, _ = load_nifti(ixi_tree / record.sources["t1"]["path"])
    _, found = prepare_volume(volume, ixi_store.preprocess)
    np.testing.assert_allclose(found.features[0], record.likeness["t1"], atol=0.3)
    assert np.abs(np.subtract(found.features[0], record.likeness["t1"])).mean() < 0.06  # a voxel of 8 mm is much


def test_the_record_of_the_data_has_statistics_where_there_are_enough_volumes(
    ixi_store: VolumeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert data_record(ixi_store, ("t1",))["likeness"] is None
    monkeypatch.setattr(likeness, "MIN_VOLUMES", 6)
    record = data_record(ixi_store, ("t1", "t2"))
    assert set(record["likeness"]["modalities"]) == {"t1", "t2"}
    assert json.loads(json.dumps(record["likeness"])) == record["likeness"]


def test_the_boxes_of_one_volume_are_measured_as_one(tmp_path: Path) -> None:
    config = tiny().preprocess
    volume = Volume(np.tile(blob(), (3, 1, 1)).astype(np.float32), MM)
    boxes, record = prepare_volume(volume, config)
    assert len(boxes) > 1
    assert [len(row) for row in record.features] == [likeness.NUM_FEATURES]
    assert record.features[0] != features(boxes[0])


def test_of_several_sources_the_one_that_is_most_unlike_counts(strict: Path) -> None:
    translator = Translator.load(strict)
    first, second = (Volume((blob() + shift).astype(np.float32), MM) for shift in (0, 50))
    _, record = prepare_volumes([first, second], tiny().preprocess)
    _, alone = prepare_volumes([second], tiny().preprocess)
    assert record.features[1] == alone.features[0]
    for names in (("t1", "t2"), ("t2", "t1"), ("pd", "t1")):
        found = translator.likeness(record, names)
        assert found is not None
        assert (found.source, found.is_unlike) == ("t1", True)
    assert translator.likeness(record, ("pd", "t1ce")) is None


# -------------------------------------------------------------------------------------------------------- the command


def run(*words: object, model: Path) -> int:
    return main(["translate", *map(str, words), "--model", str(model), "--source", "t1", "--target", "pd"])


def test_the_sidecar_says_it_and_the_command_warns(strict: Path, tmp_path: Path, caplog: Any) -> None:
    source = write(tmp_path / "scan.nii", affine=MM)
    assert run(source, tmp_path / "out.nii", model=strict) == 0
    made = json.loads((tmp_path / "out.json").read_text())["likeness"]
    assert made["distance"] > 1
    assert made["looks_like"] == "t2"
    assert made["differs_in"] in likeness.GROUPS
    (said,) = [record.getMessage() for record in caplog.records if WORDS in record.getMessage()]
    assert str(source) in said
    assert f"likeness {made['distance']:.3g}, most of all in {made['differs_in']}, wanted at most 1" in said
    assert "looks more like t2" in said
    assert "--accept-unlike" in said
    caplog.clear()
    assert run(source, tmp_path / "again.nii", "--accept-unlike", model=strict) == 0
    assert WORDS not in caplog.text
    assert json.loads((tmp_path / "again.json").read_text())["likeness"] == made


@pytest.mark.parametrize("limits", [None, {"t2": 1.0}, {"t1": 1e3}])
def test_nothing_is_said_of_what_is_like_or_not_measured(limits: Any, tmp_path: Path, caplog: Any) -> None:
    model = save_untrained(tmp_path / "model", limits=limits)
    source = write(tmp_path / "scan.nii", affine=MM)
    assert run(source, tmp_path / "out.nii", model=model) == 0
    assert WORDS not in caplog.text
    made = json.loads((tmp_path / "out.json").read_text())["likeness"]
    if limits is not None and "t1" in limits:
        assert made["distance"] < 1
    else:
        assert made == "not measured"


def test_the_table_of_a_batch_has_it(strict: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.nii", affine=MM)
    (tmp_path / "in" / "b.nii").write_bytes(b"no NIfTI file at all")
    assert run(tmp_path / "in", tmp_path / "out", model=strict) == 2
    first, second = csv.DictReader((tmp_path / "out" / "results.csv").open())
    made = json.loads((tmp_path / "out" / "a_synthetic-pd.json").read_text())["likeness"]
    assert float(first["likeness"]) == made["distance"]
    assert second["likeness"] == ""


def test_a_dicom_series_says_it(strict: Path, tmp_path: Path) -> None:
    make_series(tmp_path / "series", edit=eight_times)
    assert run(tmp_path / "series", tmp_path / "out", "--format", "dicom", model=strict) == 0
    made = json.loads((tmp_path / "out.dicom.json").read_text())["likeness"]
    for file in (tmp_path / "out").iterdir():
        assert json.dumps(made) in pydicom.dcmread(file).DerivationDescription


# -------------------------------------------------------------------------------------------------------- the service


def test_a_worker_refuses_it_with_the_measure_and_makes_the_others(strict: Path, tmp_path: Path) -> None:
    folder, translator = tmp_path / "jobs", Translator.load(strict)
    refused, taken = (accepted(folder, number) for number in (0, 2))
    taken.accept_unlike = True
    problems: dict[str, Problem] = {}
    translate(translator, folder, [refused, taken], problems, set(), lambda jobs, share: None, LIMIT)
    assert set(problems) == {refused.id}
    assert problems[refused.id].status == 422
    assert refused.likeness is not None
    assert taken.likeness is not None
    detail = problems[refused.id].detail
    assert detail.startswith(f"volume: it {WORDS}: likeness {refused.likeness['distance']:.3g}")
    assert "say accept_unlike" in detail


@pytest.mark.parametrize("accept", [None, "false", "true"])
def test_a_job_is_refused_unless_its_form_accepts_it(
    accept: str | None, strict: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The application, the queue and the worker's batch, without Ray."""
    monkeypatch.setattr(tempfile, "tempdir", None)  # the service sets its own
    service = Service(strict, tmp_path / "work", {})
    form = {"source": "t1", "target": "pd"} | ({} if accept is None else {"accept_unlike": accept})
    answer = service.ask("POST", "/v1/translations", files={"volume": ("scan.nii", scan())}, data=form)
    assert answer.status_code == 202, answer.text
    assert answer.json()["accept_unlike"] == (accept == "true")
    assert answer.json()["likeness"] is None
    (job,) = service.store.claim("w", 1, "1", service.model.hash)
    problems: dict[str, Problem] = {}
    translate(Translator.load(strict), service.store.folder, [job], problems, set(), lambda jobs, share: None, LIMIT)
    error = problems[job.id].as_dict() if problems else None
    service.store.finish("w", job.id, error, job.num_boxes, job.share_outside, job.likeness)
    view = service.ask("GET", f"/v1/translations/{job.id}").json()
    assert view["likeness"]["distance"] > 1
    assert view["likeness"]["looks_like"] == "t2"
    if accept == "true":
        assert (view["state"], view["error"]) == ("done", None)
        made = service.ask("GET", f"/v1/translations/{job.id}/provenance?target=pd").json()
        assert made["likeness"] == view["likeness"]
    else:
        assert (view["state"], view["error"]["status"]) == ("failed", 422)
        assert f"likeness {view['likeness']['distance']:.3g}" in view["error"]["detail"]


def test_over_http_it_is_422_unless_it_is_accepted(service: RunningService, tmp_path: Path) -> None:
    """The service's model finds every PD unlike its own and knows nothing of the other modalities."""
    source = write(tmp_path / "scan.nii.gz", affine=MM)
    answer = service.post("/v1/translate", source, source="pd", target="t1")
    assert answer.status_code == 422
    assert "is unlike the pd volumes" in answer.json()["detail"]
    job = service.wait(service.submit(source, source="pd", target="t1"))
    assert (job["state"], job["error"]["status"], job["accept_unlike"]) == ("failed", 422, False)
    assert job["error"]["detail"] == answer.json()["detail"]
    assert job["likeness"]["distance"] > 1
    assert service.post("/v1/translate", source, source="pd", target="t1", accept_unlike="true").status_code == 200
    job = service.wait(service.submit(source, source="pd", target="t1", accept_unlike="true"))
    made = service.client.get(f"{job['links']['self']}/provenance", params={"target": "t1"}).json()
    assert made["likeness"] == job["likeness"]
    job = service.wait(service.submit(source, source="t1", target="pd"))
    assert (job["state"], job["likeness"]) == ("done", None)


def test_the_command_asks_a_service_to_accept_it(service: RunningService, tmp_path: Path, capsys: Any) -> None:
    source = write(tmp_path / "scan.nii.gz", affine=MM)
    words = ["translate", str(source), str(tmp_path / "out.nii.gz"), "--server", service.url, "--source", "pd"]
    assert main([*words, "--target", "t1"]) != 0
    assert "is unlike the pd volumes" in capsys.readouterr().err
    assert not (tmp_path / "out.nii.gz").exists()
    assert main([*words, "--target", "t1", "--accept-unlike"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["likeness"]["distance"] > 1
