"""`aldm translate` from the command line: exact grids, many kinds of input, and nothing left behind by what fails."""

import csv
import errno
import gzip
import itertools
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from benchmarks.translate_memory import measure, whole_volume_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scans import blob, write
from scipy.spatial.transform import Rotation
from series import make_series
from test_translate import translator
from untrained import save_untrained

import pipelines.translate_local
from aldm.cli import main
from aldm.default_model import default_model
from aldm.presets import small

CODES = ["".join(axes) for order in itertools.permutations(("RL", "AP", "SI")) for axes in itertools.product(*order)]
"""The 48 ways to lay a volume's axes."""


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("translators") / "model")


@pytest.fixture
def echo(monkeypatch):
    """Let the job translate with a predictor that returns the source, on the grid of the caller's choice."""

    def install(**preprocess):
        known = translator(**preprocess)
        monkeypatch.setattr(pipelines.translate_local, "load_translator", lambda *_: known)

    return install


def run(*arguments: object, model: Path, source="t1", target="t2") -> int:
    return main(["translate", *map(str, arguments), "--model", str(model), "--source", source, "--target", target])


# ---------------------------------------------------------------------------------------------------------- geometry


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    codes=st.sampled_from(CODES),
    spacing=st.tuples(*[st.floats(0.8, 2.5)] * 3),
    angles=st.tuples(*[st.floats(-40, 40)] * 3),
    origin=st.tuples(*[st.floats(-90, 90)] * 3),
    form_codes=st.sampled_from([(1, 1), (0, 2), (3, 0), (4, 1), (2, 4)]),
    units=st.sampled_from(["mm", "unknown"]),
    suffix=st.sampled_from([".nii", ".nii.gz"]),
    version=st.sampled_from([nibabel.Nifti1Image, nibabel.Nifti2Image]),
    dtype=st.sampled_from([np.int16, np.uint8, np.float32, np.float64]),
)
def test_the_result_has_exactly_the_input_s_grid(
    codes, spacing, angles, origin, form_codes, units, suffix, version, dtype, echo, model, tmp_path
):
    echo(spacing_mm=(1.0, 1.0, 1.0), spatial_shape=(56, 56, 56))
    orientation = nibabel.orientations.axcodes2ornt(codes)
    axes = np.zeros((3, 3))
    for axis, (world, direction) in enumerate(orientation):
        axes[int(world), axis] = direction
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ axes @ np.diag(spacing)
    affine[:3, 3] = origin
    image = version((blob() / 4).astype(dtype), affine)
    image.set_qform(affine, code=form_codes[0])
    image.set_sform(affine, code=form_codes[1])
    image.header.set_xyzt_units(units, "sec")
    source, output = tmp_path / f"in{suffix}", tmp_path / f"out-{len(suffix)}{suffix}"  # out.json is of one alone
    nibabel.save(image, source)
    assert run(source, output, "--overwrite", "--intensity", "unit", model=model, target="t1") == 0
    given_image, result = nibabel.load(source), nibabel.load(output)
    assert type(result) is type(given_image)
    assert result.shape == given_image.shape
    np.testing.assert_array_equal(result.affine, given_image.affine)
    for name in (
        "qform_code",
        "sform_code",
        "xyzt_units",
        "pixdim",
        "srow_x",
        "srow_y",
        "srow_z",
        "quatern_b",
        "qoffset_x",
    ):
        np.testing.assert_array_equal(result.header[name], given_image.header[name], err_msg=name)
    assert result.get_data_dtype() == np.float32
    # the voxels too: a predictor that returns the source gives the input back, up to two interpolations
    wanted, got = np.asarray(given_image.dataobj, float), np.asarray(result.dataobj, float)
    assert np.corrcoef(wanted.ravel(), got.ravel())[0, 1] > 0.9
    for axis in range(3):
        assert (
            np.corrcoef(wanted.ravel(), np.flip(got, axis).ravel())[0, 1]
            < np.corrcoef(wanted.ravel(), got.ravel())[0, 1]
        )


def test_on_an_aligned_grid_every_voxel_comes_back(echo, model, tmp_path):
    echo(spacing_mm=(2.0, 2.0, 2.0), spatial_shape=(16, 16, 16))
    affine = nibabel.orientations.inv_ornt_aff(nibabel.orientations.axcodes2ornt("PIR"), (14, 12, 10)) * 2.0
    affine[3, 3] = 1
    source = write(tmp_path / "in.nii.gz", affine=affine)
    assert run(source, tmp_path / "out.nii.gz", "--intensity", "unit", model=model, target="t1") == 0
    given = nibabel.load(source).get_fdata()
    low, high = np.percentile(given[given > 0], (0.1, 95))
    wanted = np.where(given > 0, np.clip((given - low) / (2 * (high - low)), 0, 1), 0)
    np.testing.assert_allclose(nibabel.load(tmp_path / "out.nii.gz").get_fdata(), wanted, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ outputs


def test_one_file_with_sidecar_and_description(model, tmp_path, capsys):
    source = write(tmp_path / "scan.nii.gz", affine=np.diag([8.0, 8, 8, 1]))
    assert run(source, tmp_path / "out.nii.gz", "--seed", 7, "--sampler", "ddim", model=model) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out.nii.gz: t2 from t1, synthetic; made as out.json says\n"
    made = json.loads((tmp_path / "out.json").read_text())
    assert made["synthetic"] is True
    assert (made["input"], made["output"]) == ("scan.nii.gz", "out.nii.gz")
    assert (made["source"], made["target"], made["sampler"], made["seed"]) == ("t1", "t2", "ddim", 7)
    assert made["num_inference_steps"] == 10
    assert made["model_hash"] == json.loads((model / "config.json").read_text())["hash"]
    description = nibabel.load(tmp_path / "out.nii.gz").header["descrip"].item().decode()
    assert description == f"synthetic t2 from t1, aldm {made['model_hash'][:8]} ddim 10 seed 7"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.nii.gz", "scan.nii.gz"]


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(model, tmp_path):
    source = write(tmp_path / "in.nii", affine=np.diag([8.0, 8, 8, 1]))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(source, tmp_path / f"{name}.nii", "--seed", seed, model=model) == 0
    first, again, other = ((tmp_path / f"{name}.nii").read_bytes() for name in "abc")
    assert first == again
    assert first != other


def test_the_spread_is_that_of_the_samples_on_the_same_grid(model, tmp_path):
    source = write(tmp_path / "in.nii", affine=np.diag([8.0, 8, 8, 1]))
    spread = tmp_path / "std.nii.gz"
    arguments = ("--num-samples", 3, "--spread", spread, "--num-inference-steps", 1)
    assert run(source, tmp_path / "mean.nii", *arguments, model=model) == 0
    assert "uncertainty" not in (tmp_path / "mean.json").read_text()
    samples = []
    for seed in range(3):
        assert run(source, tmp_path / f"{seed}.nii", "--seed", seed, "--num-inference-steps", 1, model=model) == 0
        samples.append(nibabel.load(tmp_path / f"{seed}.nii").get_fdata())
    np.testing.assert_allclose(nibabel.load(tmp_path / "mean.nii").get_fdata(), np.mean(samples, axis=0), atol=1e-3)
    written = nibabel.load(spread)
    np.testing.assert_array_equal(written.affine, nibabel.load(source).affine)
    # on the model's own grid no interpolation stands between: the standard deviation is that of the samples
    np.testing.assert_allclose(written.get_fdata(), np.std(samples, axis=0, ddof=1), atol=2e-3)
    assert json.loads((tmp_path / "mean.json").read_text())["spread"] == "std.nii.gz"


def test_target_all_writes_every_modality_into_a_folder(model, tmp_path):
    source = write(tmp_path / "scan.nii.gz", affine=np.diag([8.0, 8, 8, 1]))
    assert run(source, tmp_path / "out", model=model, target="all") == 0
    names = {f"scan_synthetic-{name}{end}" for name in ("t1", "t2", "pd") for end in (".nii.gz", ".json")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_a_folder_is_a_batch_and_one_failure_stops_nothing_else(model, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "b.nii", affine=np.diag([8.0, 8, 8, 1]))
    write(folder / "d.nii.gz", affine=np.diag([8.0, 8, 8, 1]))
    (folder / "a.nii").write_bytes(b"no NIfTI file at all")
    (folder / "c.nii.gz").write_bytes(gzip.compress(b"nor this"))
    (folder / "notes.txt").write_text("not an input")
    assert run(folder, tmp_path / "out", model=model) == 2
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [(Path(r["input"]).name, r["status"]) for r in rows] == [
        ("a.nii", "failed"),
        ("b.nii", "ok"),
        ("c.nii.gz", "failed"),
        ("d.nii.gz", "ok"),
    ]
    assert "not a NIfTI file" in rows[0]["message"]
    assert all(Path(r["output"]).is_file() for r in rows if r["status"] == "ok")
    names = {"results.csv"} | {
        f"{n}_synthetic-t2{e}" for n, e in (("b", ".nii"), ("d", ".nii.gz"), ("b", ".json"), ("d", ".json"))
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert run(folder, tmp_path / "out", model=model) == 2
    assert "earlier batch" in capsys.readouterr().err


def test_a_bug_on_one_file_is_told_and_the_others_go_on(model, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in "abc":
        write(tmp_path / "in" / f"{name}.nii", affine=np.diag([8.0, 8, 8, 1]))
    read = pipelines.translate_local.read_input

    def broken(task, *more):
        if task.path.name == "b.nii":
            raise ZeroDivisionError("oh")
        return read(task, *more)

    monkeypatch.setattr(pipelines.translate_local, "read_input", broken)
    assert run(tmp_path / "in", tmp_path / "out", model=model) == 2
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [r["status"] for r in rows] == ["ok", "failed", "ok"]
    assert rows[1]["message"] == "internal error: ZeroDivisionError: oh"


def test_a_glob_finds_files_in_many_folders(model, tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / f"{name}_t1.nii.gz", affine=np.diag([8.0, 8, 8, 1]))
        write(tmp_path / name / f"{name}_t2.nii.gz", affine=np.diag([8.0, 8, 8, 1]))
    assert run(tmp_path / "*" / "*_t1.nii.gz", tmp_path / "out", model=model) == 0
    made = {path.name for path in (tmp_path / "out").glob("*.nii.gz")}
    assert made == {"x_t1_synthetic-t2.nii.gz", "y_t1_synthetic-t2.nii.gz"}


@pytest.mark.parametrize("form", ["nifti", "dicom"])
def test_a_dicom_series_is_an_input_and_may_be_the_output(form, echo, model, tmp_path):
    echo(spacing_mm=(1.0, 1.0, 1.0), spatial_shape=(16, 16, 16))
    make_series(tmp_path / "series", angles=(4, -7, 12))
    output = tmp_path / ("out" if form == "dicom" else "out.nii.gz")
    assert run(tmp_path / "series", output, "--format", form, model=model) == 0
    sidecar = tmp_path / ("out.dicom.json" if form == "dicom" else "out.json")
    assert json.loads(sidecar.read_text())["synthetic"] is True
    from aldm.data.dicom import read_series
    from aldm.data.volume import load_nifti

    volume, _ = read_series(tmp_path / "series")
    result = (read_series if form == "dicom" else load_nifti)(output)[0]
    np.testing.assert_allclose(result.affine, volume.affine, atol=1e-5)
    assert result.data.shape == volume.data.shape
    if form == "dicom":
        header = pydicom.dcmread(sorted(output.iterdir())[0])
        assert "SYNTHETIC t2 from t1" in header.SeriesDescription
        assert header.PatientName != "Doe^Jane"


def test_one_of_several_series_is_chosen_alone_and_in_a_batch(echo, model, tmp_path, capsys):
    echo(spacing_mm=(1.0, 1.0, 1.0), spatial_shape=(16, 16, 16))
    for patient in ("x", "y"):
        for number in (3, 4):
            make_series(tmp_path / "one", edit=lambda k, header, number=number: setattr(header, "SeriesNumber", number))
            (tmp_path / "in" / patient).mkdir(parents=True, exist_ok=True)
            for path in (tmp_path / "one").iterdir():
                path.rename(tmp_path / "in" / patient / f"{number}-{path.name}")
    assert run(tmp_path / "in" / "x", tmp_path / "out.nii.gz", model=model) == 2
    said = "2 series in one folder (3: MR, 7x6x5; 4: MR, 7x6x5); choose one with --series"
    assert said in capsys.readouterr().err
    assert run(tmp_path / "in" / "x", tmp_path / "out.nii.gz", "--series", "4", model=model) == 0
    assert run(tmp_path / "in" / "*", tmp_path / "none", model=model) == 2
    assert "choose one with --series" in (tmp_path / "none" / "results.csv").read_text()
    assert run(tmp_path / "in" / "*", tmp_path / "out", "--series", "4", model=model) == 0
    made = {path.name for path in (tmp_path / "out").glob("*.nii.gz")}
    assert made == {"x_synthetic-t2.nii.gz", "y_synthetic-t2.nii.gz"}
    scan = write(tmp_path / "scan.nii", affine=np.diag([8.0, 8, 8, 1]))
    assert run(scan, tmp_path / "o.nii", "--series", "4", model=model) == 2
    assert "--series chooses among DICOM series, and this is none" in capsys.readouterr().err


def test_dry_run_reads_the_inputs_and_writes_nothing(model, tmp_path, capsys):
    source = write(tmp_path / "in.nii", affine=np.diag([8.0, 8, 8, 1]))
    assert run(source, tmp_path / "out.nii", "--dry-run", model=model) == 0
    said = capsys.readouterr().out
    assert "14 x 12 x 10 voxels" in said
    assert "dpm-solver++, 3 steps" in said
    assert "GB" in said
    assert run(source, tmp_path / "out", "--dry-run", model=model, target="all") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["in.nii"]


def test_a_plain_unet_translates_through_the_same_door(tmp_path):
    plain = save_untrained(tmp_path / "plain", kind="unet")
    source = write(tmp_path / "in.nii", affine=np.diag([8.0, 8, 8, 1]))
    assert run(source, tmp_path / "out.nii", model=plain) == 0
    made = json.loads((tmp_path / "out.json").read_text())
    assert made["model_kind"] == "unet"
    assert "sampler" not in made


# ---------------------------------------------------------------------------------------------------------- bad input


def truncated(path: Path) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[:-500])


def gzip_bomb(path: Path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape((40, 40, 40))
    header.set_data_dtype(np.uint8)
    header["magic"], header["vox_offset"] = b"n+1", 352
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4) + bytes(40**3) + bytes(50 * 2**20)))


def huge_claim(path: Path) -> None:
    header = nibabel.Nifti1Header()
    header["dim"] = [3, 30000, 30000, 30000, 1, 1, 1, 1]
    header["datatype"], header["bitpix"], header["magic"], header["vox_offset"] = 16, 32, b"n+1", 352
    header.set_sform(np.eye(4), code=1)
    path.write_bytes(header.binaryblock + bytes(4) + bytes(1000))


def singular(path: Path) -> None:
    write(path)
    content = bytearray(path.read_bytes())
    content[254:256] = struct.pack("<h", 1)
    content[280:328] = np.zeros((3, 4), "<f4").tobytes()
    path.write_bytes(content)


def colours(path: Path) -> None:
    data = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), path)


def spoiled(value: float) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        data = blob().astype(np.float32)
        data[3, 4, 5] = value
        write(path, data)

    return make


BAD_FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "not a NIfTI": (".nii", lambda path: path.write_bytes(os.urandom(2000)), r"in\.nii: not a NIfTI file"),
    "truncated": (".nii", truncated, r"in\.nii: truncated, 6,720 bytes of voxels wanted"),
    "truncated gzip": (".nii.gz", truncated, r"in\.nii\.gz: truncated, 6,720 bytes of voxels wanted"),
    "empty": (".nii", lambda path: path.write_bytes(b""), r"in\.nii: the file is empty"),
    "gzip bomb": (".nii.gz", gzip_bomb, "far more than the 64,000 bytes"),
    "too many voxels": (".nii", huge_claim, "claims 30000x30000x30000"),
    "2D": (
        ".nii",
        lambda path: write(path, blob()[:, :, 0].astype(np.float32)),
        "2D data of shape 14x12, wanted one 3D volume",
    ),
    "4D": (
        ".nii",
        lambda path: write(path, np.stack([blob()] * 2, axis=3).astype(np.float32)),
        "4D data of shape 14x12x10x2, wanted one 3D volume",
    ),
    "complex": (".nii", lambda path: write(path, blob().astype(np.complex64)), r"in\.nii: complex voxels"),
    "RGB": (".nii", colours, r"in\.nii: RGB voxels"),
    "all zero": (".nii", lambda path: write(path, np.zeros((8, 8, 8), np.float32)), "every voxel is zero"),
    "constant": (".nii", lambda path: write(path, np.full((8, 8, 8), 7, np.float32)), r"every voxel is 7 \(constant\)"),
    "NaN": (".nii", spoiled(np.nan), "1 of 1680 voxels are NaN inside the patient"),
    "infinite": (".nii", spoiled(np.inf), "1 of 1680 voxels are infinite"),
    "singular affine": (".nii", singular, r"in\.nii: singular affine"),
    "wrong suffix": (
        ".img",
        lambda path: path.write_bytes(b"x"),
        r"in\.img: not a NIfTI file by its name, wanted \.nii or \.nii\.gz",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_input_is_one_message_and_nothing_is_written(name, model, tmp_path, capsys):
    suffix, make, words = BAD_FILES[name]
    path = tmp_path / f"in{suffix}"
    make(path)
    refused(run(path, tmp_path / "out.nii.gz", model=model), capsys, words, tmp_path, [path.name])


def refused(code: int, capsys: pytest.CaptureFixture[str], words: str, folder: Path, left: list[str]) -> None:
    """Check the exit code, the one message without a traceback, and what lies in the folder."""
    said = capsys.readouterr().err
    assert code == 2
    assert re.search(words, said), said
    assert said.startswith("aldm translate: ")
    assert "Traceback" not in said
    assert sorted(path.name for path in folder.iterdir()) == sorted(left)


BAD_ARGUMENTS: dict[str, tuple[dict[str, object], tuple[object, ...], str]] = {
    "unknown modality": ({"source": "t3"}, (), "--source is 't3', wanted one of: t1, t2, pd"),
    "modality of another model": ({"target": "flair"}, (), "--target is 'flair', wanted one of: t1, t2, pd"),
    "neither name nor header says the source": (
        {"source": "auto"},
        (),
        r"in\.nii: neither its name nor its header .* give --source",
    ),
    "missing input": ({"input": "absent.nii"}, (), r"absent\.nii does not exist"),
    "nothing matches": ({"input": "absent*.nii"}, (), r"nothing matches absent\*\.nii"),
    "empty folder": ({"input": "empty"}, (), "empty holds no NIfTI file"),
    "missing output folder": (
        {"output": "absent/out.nii"},
        (),
        r"cannot write absent/out\.nii: there is no folder absent",
    ),
    "missing parent of an output folder": (
        {"output": "absent/out", "target": "all"},
        (),
        "cannot write absent/out: there is no folder absent",
    ),
    "existing output": ({"output": "taken.nii"}, (), r"taken\.nii exists: .*--overwrite"),
    "existing sidecar": ({"output": "side.nii"}, (), r"side\.json exists: .*--overwrite"),
    "output is the input": ({"output": "in.nii"}, ("--overwrite",), "is an input"),
    "output is a folder": ({"output": "empty.nii"}, (), r"empty\.nii is a folder, wanted the name of a file"),
    "not a NIfTI name": ({"output": "out.png"}, (), r"out\.png: wanted a name that ends in \.nii or \.nii\.gz"),
    "dicom from nifti": ({"output": "out"}, ("--format", "dicom"), "--format dicom needs a DICOM series folder"),
    "uncertainty of a model without": (
        {},
        ("--uncertainty", "u.nii"),
        "needs a model that knows how far off it may be",
    ),
    "spread of one sample": ({}, ("--spread", "u.nii"), "give --num-samples of at least 2"),
    "sampler of another objective": (
        {},
        ("--sampler", "one-step"),
        "'one-step' cannot be used with a model of objective 'v'",
    ),
    "too many steps": ({}, ("--num-inference-steps", "51"), "--num-inference-steps is 51 .*, wanted 1 to 50"),
    "a glob without quotes": ({}, ("b.nii", "c.nii", "out"), "got 5 names: put a glob into quotes"),
    "too little memory": (
        {},
        ("--max-memory-gb", "0.05"),
        r"--max-memory-gb 0\.05 is too little for a volume of 16 x 24 x 16 voxels",
    ),
    "no scratch folder": ({}, ("--scratch-dir", "absent"), "--scratch-dir absent is not a folder"),
    "no memory": ({}, ("--max-memory-gb", "nan"), "--max-memory-gb is nan, wanted a number above 0"),
    "networks changed": ({}, ("--set", "unet.channels=[8]"), "changes unet, which the trained model .* carries"),
    "unknown setting": ({}, ("--set", "sampling.speed=1"), r"unknown key 'sampling\.speed'"),
    "too many voxels for the user": ({}, ("--max-voxels", "1000"), "voxels, the limit is 1,000: resample it"),
    "fewer voxels than one": ({}, ("--max-voxels", "-1"), "--max-voxels is -1, wanted at least 1"),
    "a seed beyond 64 bits": ({}, ("--seed", str(2**64)), "--seed is 18446744073709551616, wanted 0 to"),
    "a negative seed": ({}, ("--seed", "-1"), "--seed is -1, wanted 0 to"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_one_message_and_nothing_is_written(name, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.nii", affine=np.diag([8.0, 8, 8, 1]))
    (tmp_path / "taken.nii").write_text("mine")
    (tmp_path / "side.json").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.nii").mkdir()
    changes, flags, words = BAD_ARGUMENTS[name]
    values: dict[str, object] = {"input": "in.nii", "output": "out.nii", "source": "t1", "target": "t2"} | changes
    names = {"source": str(values["source"]), "target": str(values["target"])}
    code = run(values["input"], values["output"], *flags, model=model, **names)
    refused(code, capsys, words, tmp_path, ["in.nii", "taken.nii", "side.json", "empty", "empty.nii"])
    assert (tmp_path / "taken.nii").read_text() == (tmp_path / "side.json").read_text() == "mine"
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize("flags", [("--num-samples", 2), ("--spread", "u.nii")])
def test_a_model_with_one_answer_gives_no_spread(flags, tmp_path, capsys):
    write(tmp_path / "in.nii")
    code = run(tmp_path / "in.nii", tmp_path / "out.nii", *flags, model=default_model())
    refused(code, capsys, "objective '?regression'? has one answer", tmp_path, ["in.nii"])


def test_a_model_of_another_format_version_or_kind_is_refused(model, tmp_path, capsys):
    write(tmp_path / "in.nii")
    record = json.loads((model / "config.json").read_text())
    for change, words in (
        ({"format_version": 99}, "of format version 99, wanted 2"),
        ({"kind": "vqgan"}, "checkpoint of kind 'vqgan'"),
    ):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "weights.safetensors").write_bytes((model / "weights.safetensors").read_bytes())
        (tmp_path / "model" / "config.json").write_text(json.dumps(record | change))
        code = run(tmp_path / "in.nii", tmp_path / "out.nii", model=tmp_path / "model")
        refused(code, capsys, words, tmp_path, ["in.nii", "model"])


def test_weights_that_do_not_fit_are_refused(model, tmp_path, capsys):
    write(tmp_path / "in.nii")
    folder = save_untrained(tmp_path / "other", modalities=("t1", "t2"))
    (folder / "weights.safetensors").write_bytes((model / "weights.safetensors").read_bytes())
    code = run(tmp_path / "in.nii", tmp_path / "out.nii", model=folder)
    refused(code, capsys, r"weights\.safetensors does not belong to its config", tmp_path, ["in.nii", "other"])


@pytest.mark.parametrize("failing", ["open", "write_text"])
def test_a_full_disk_is_one_message_and_leaves_nothing(failing, model, tmp_path, capsys, monkeypatch):
    """The volume, or the sidecar after it, finds the disk full."""
    write(tmp_path / "in.nii", affine=np.diag([8.0, 8, 8, 1]))

    real = Path.open

    def full(self: Path, *words: Any, **more: Any) -> Any:
        if failing == "open" and words != ("wb",):
            return real(self, *words, **more)
        self.touch()  # the name is there, the content does not fit
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, failing, full)
    code = run(tmp_path / "in.nii", tmp_path / "out.nii", model=model)
    monkeypatch.undo()
    refused(code, capsys, "disk full", tmp_path, ["in.nii"])


def test_ctrl_c_leaves_nothing(model, tmp_path, monkeypatch):
    write(tmp_path / "in.nii", affine=np.diag([8.0, 8, 8, 1]))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("aldm.models.denoiser.Denoiser.denoise", interrupted)
    assert run(tmp_path / "in.nii", tmp_path / "out.nii", model=model) == 130
    assert run(tmp_path / "in.nii", tmp_path / "out", model=model, target="all") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["in.nii"]


@pytest.mark.slow
def test_a_whole_volume_goes_through_the_small_model_within_four_gigabytes(tmp_path):
    """192 x 192 x 144 voxels at 1 mm, untrained, in a process of its own whose memory is read at its end."""
    result = measure(tmp_path, whole_volume_config("haar", small().precision), 4.0, threads=2)
    assert result["code"] == 0
    assert result["peak_gb"] < 4
    assert nibabel.load(tmp_path / "out.nii").shape == (192, 192, 144)
