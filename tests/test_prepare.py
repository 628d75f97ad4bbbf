import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import psutil
import pytest
from jobs import content
from untrained import save_untrained

from aldm.config import PreprocessConfig
from aldm.data.prepare_plan import Request
from aldm.data.preparing import plan_store, prepare_store
from aldm.data.store import ShardReader, VolumeStore, shard_path
from aldm.errors import UserError
from aldm.presets import tiny
from pipelines.prepare import main

CONFIG = PreprocessConfig(spacing_mm=(8.0, 8.0, 8.0), spatial_shape=(16, 16, 12))
SHAPE = (20, 22, 16)
PATIENCE_S = 180
"""The longest wait for a process, on a machine that is busy with other things."""


def write_volume(path, seed, shift_mm=0.0, data=None):
    """A small skull-stripped LPS volume of 8 mm."""
    index = np.indices(SHAPE)
    radius = np.sqrt(sum(((i - n / 2 + 0.5) / (0.35 * n)) ** 2 for i, n in zip(index, SHAPE, strict=True)))
    brain = (300 + np.random.default_rng(seed).normal(0, 40, SHAPE)) * (radius < 1)
    affine = np.diag([-8.0, -8, 8, 1])
    affine[:3, 3] = 80 + shift_mm, 88, -64
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(brain.astype(np.int16) if data is None else data, affine), path)
    return path


def write_tree(root, num_subjects=3, modalities=("t1", "t2")):
    for i in range(num_subjects):
        for j, name in enumerate(modalities):
            write_volume(root / f"S{i:02d}" / f"S{i:02d}_{name}.nii.gz", seed=10 * i + j)
    return root


def prepare(source, store, layout="brats", config=CONFIG, **options):
    return prepare_store(
        source, store, layout=layout, config=config, num_processes=options.pop("num_processes", 1), **options
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three subjects of two modalities. Read it only."""
    return write_tree(tmp_path_factory.mktemp("data") / "brats")


# ------------------------------------------------------------------------------------------------- what the store holds


def test_the_store_holds_the_rescaled_voxels_of_an_aligned_tree(brats_tree, brats_store):
    assert brats_store.modalities == ("t1", "t1ce", "t2", "flair")
    assert {record.region for record in brats_store.subjects()} == {"brain"}
    splits = [brats_store.subjects(split) for split in ("train", "validation", "test")]
    assert all(splits)
    assert sorted(record.subject_id for split in splits for record in split) == sorted(
        path.name for path in brats_tree.iterdir() if path.is_dir()
    ), "every subject is in exactly one split"
    for record in brats_store.subjects()[:2]:
        for name in record.modalities:
            image = nibabel.load(brats_tree / record.sources[name]["path"])
            data = nibabel.as_closest_canonical(image).get_fdata()
            low, top = np.percentile(data[data != 0], (0.1, 95))
            high = low + 2 * (top - low)
            np.testing.assert_allclose(record.percentiles[name], (low, high), rtol=1e-6)
            assert record.backgrounds[name] == 0
            expected = np.clip((data - low) / (high - low) * 2 - 1, -1, 1)
            np.testing.assert_allclose(brats_store.whole(record.subject_id, name), expected, atol=1e-3)
            np.testing.assert_array_equal(record.sources[name]["affine"], image.affine)
            assert record.sources[name]["shape"] == image.shape
        for role in ("seg", "tissue"):
            file = brats_tree / record.subject_id / f"{record.subject_id}_{role}.nii.gz"
            stored = ShardReader(shard_path(brats_store.path, record.subject_id))[role]
            np.testing.assert_array_equal(stored, nibabel.as_closest_canonical(nibabel.load(file)).get_fdata())
            assert stored.dtype == np.uint8
        assert record.has_seg
        assert record.has_tissue


def test_volumes_with_two_grids_share_one(ixi_store):
    assert ixi_store.modalities == ("t1", "t2", "pd")
    assert {record.region for record in ixi_store.subjects()} == {"foreground"}
    for record in ixi_store.subjects():
        mask = ixi_store.mask(record.subject_id)
        assert mask.any()
        volumes = [ixi_store.volume(record.subject_id, name) for name in record.modalities]
        for volume in volumes:
            assert volume.shape == mask.shape
            assert volume[mask].mean() > volume[~mask].mean() + 0.5
        assert not record.has_seg
        assert not record.has_tissue
        assert ixi_store.tissue(record.subject_id) is None
    shapes = {record.sources[name]["shape"] for record in ixi_store.subjects() for name in ("t1", "t2")}
    assert len(shapes) == 2


def test_subjects_without_a_modality_are_kept(tmp_path):
    tree = write_tree(tmp_path / "data")
    (tree / "S01" / "S01_t1.nii.gz").unlink()
    store = prepare(tree, tmp_path / "store")
    assert [record.modalities for record in store.subjects()] == [("t1", "t2"), ("t2",), ("t1", "t2")]


def test_a_table_with_mask_and_seg_and_a_split_file(tmp_path):
    for name in ("t1", "pd"):
        write_volume(tmp_path / "in" / f"{name}.nii.gz", seed=1)
    labels = np.zeros(SHAPE, np.uint8)
    labels[8:12, 9:13, 6:9] = 1
    write_volume(tmp_path / "in" / "mask.nii.gz", 0, data=labels)
    write_volume(tmp_path / "in" / "seg.nii.gz", 0, data=labels * 3)
    (tmp_path / "in" / "table.csv").write_text(
        "subject_id,modality,path,mask,seg\nA,t1,t1.nii.gz,mask.nii.gz,seg.nii.gz\nA,pd,pd.nii.gz,,\n"
    )
    (tmp_path / "splits.csv").write_text("subject_id,split\nA,validation\n")
    store = prepare(tmp_path / "in" / "table.csv", tmp_path / "store", "table", splits=tmp_path / "splits.csv")
    (record,) = store.subjects("validation")
    assert record.region == "brain"
    turned = labels[::-1, ::-1]
    np.testing.assert_array_equal(store.whole_mask("A"), turned == 1)
    np.testing.assert_array_equal(ShardReader(shard_path(store.path, "A"))["seg"], turned * 3)
    assert record.sources["t1"]["path"] == "t1.nii.gz"


# ------------------------------------------------------------------------------------------------------------ going on


def test_a_store_that_lost_files_is_completed_to_the_same_bytes(source, tmp_path):
    store = prepare(source, tmp_path / "store").path
    whole = content(store)
    assert set(whole) == {"store.json", "manifest.parquet"} | {f"shards/S{i:02d}.arrow" for i in range(3)}
    untouched = shard_path(store, "S02").stat().st_mtime_ns
    shard_path(store, "S00").unlink()
    shard_path(store, "S01").write_bytes(whole["shards/S01.arrow"][:1000])
    (store / "shards" / ".tmp-1-2-S01.arrow").write_bytes(b"left behind by a killed run")
    (store / "manifest.parquet").unlink()
    prepare(source, store)
    assert content(store) == whole
    assert shard_path(store, "S02").stat().st_mtime_ns == untouched


def test_a_damaged_manifest_is_written_anew(source, tmp_path):
    store = prepare(source, tmp_path / "store").path
    whole = content(store)
    (store / "manifest.parquet").write_bytes(whole["manifest.parquet"][:100])
    with pytest.raises(UserError, match=r"is damaged .*: run the same aldm prepare again"):
        VolumeStore.open(store)
    prepare(source, store)
    assert content(store) == whole


def test_two_processes_write_the_same_bytes_as_one(source, tmp_path):
    one = prepare(source, tmp_path / "one", num_processes=1)
    two = prepare(source, tmp_path / "two", num_processes=2)
    assert content(one.path) == content(two.path)
    assert one.fingerprint == two.fingerprint


STOPPED_EARLY = """
import sys, time
from pathlib import Path
from aldm.data import preparing
from pipelines.prepare import main

write_shard = preparing.write_shard

def write_when_allowed(path, *arguments):
    while any(path.parent.glob("S*.arrow")) and not Path("may-go-on").exists():
        time.sleep(0.01)
    write_shard(path, *arguments)

preparing.write_shard = write_when_allowed
if __name__ == "__main__":
    main(sys.argv[1:])
"""
"""`aldm prepare`, whose processes wait after the first shard until there is a file named may-go-on."""


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(tmp_path, signal_number):
    tree, store = write_tree(tmp_path / "data", num_subjects=8, modalities=("t1",)), tmp_path / "store"
    flags = ["--layout", "brats", "--spacing-mm", "8", "--spatial-shape", "16", "16", "12", "--log-level", "error"]
    (tmp_path / "run.py").write_text(STOPPED_EARLY)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "run.py", str(tree), str(store), *flags, "--num-processes", "2"],
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd=tmp_path,
    )
    try:
        until = time.monotonic() + PATIENCE_S
        while not list(store.glob("shards/S*.arrow")):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal_number)
        (tmp_path / "may-go-on").touch()
        assert process.wait(PATIENCE_S) != 0
    finally:
        process.kill()
        process.wait()
    assert not psutil.wait_procs(workers, timeout=PATIENCE_S)[1], "they end with the run"
    done = {path.name: path.stat().st_mtime_ns for path in store.glob("shards/S*.arrow")}
    assert 0 < len(done) < 8
    assert not (store / "manifest.parquet").exists()
    if signal_number == signal.SIGINT:
        assert not list(store.rglob(".tmp-*"))
    with pytest.raises(UserError, match="not finished"):
        VolumeStore.open(store)

    prepare(tree, store)
    for name, written in done.items():
        assert (store / "shards" / name).stat().st_mtime_ns == written, "finished shards are kept"
    assert content(store) == content(prepare(tree, tmp_path / "uninterrupted").path)


def test_a_store_may_grow(tmp_path):
    tree = write_tree(tmp_path / "data", 2)
    store = prepare(tree, tmp_path / "store")
    first = content(store.path)
    write_tree(tree, 4)
    grown = prepare(tree, tmp_path / "store")
    assert grown.fingerprint != store.fingerprint
    assert len(grown.subjects()) == 4
    later = content(grown.path)
    assert all(later[name] == first[name] for name in first if name.startswith("shards"))
    assert later == content(prepare(tree, tmp_path / "fresh").path)


def test_the_fingerprint_depends_on_what_it_should(source, tmp_path):
    elsewhere = shutil.copytree(source, tmp_path / "copy")
    base = prepare(source, tmp_path / "a").fingerprint
    assert prepare(elsewhere, tmp_path / "b").fingerprint == base
    assert prepare(source, tmp_path / "c", config=replace(CONFIG, intensity="paper")).fingerprint != base
    (tmp_path / "splits.csv").write_text("subject_id,split\nS00,test\nS01,test\nS02,test\n")
    assert prepare(source, tmp_path / "d", splits=tmp_path / "splits.csv").fingerprint != base
    write_volume(elsewhere / "S00" / "S00_t1.nii.gz", seed=99)
    assert prepare(elsewhere, tmp_path / "e").fingerprint != base


# ----------------------------------------------------------------------------------------------------------- refusals


def test_every_problem_is_reported_once_and_nothing_is_written(tmp_path):
    tree = write_tree(tmp_path / "data", 5)
    (tree / "S00" / "S00_t1.nii.gz").write_bytes(b"")
    whole = (tree / "S01" / "S01_t2.nii.gz").read_bytes()
    (tree / "S01" / "S01_t2.nii.gz").write_bytes(whole[: len(whole) // 2])
    write_volume(tree / "S02" / "S02_t1.nii.gz", 0, data=np.zeros(SHAPE, np.int16))
    write_volume(tree / "S02" / "S02_t2.nii.gz", 0, data=np.full(SHAPE, np.nan, np.float32))
    write_volume(tree / "S03" / "S03_t2.nii.gz", seed=1, shift_mm=5000)
    write_volume(tree / "S04" / "S04_seg.nii.gz", 0, data=np.full(SHAPE, 0.5, np.float32))
    write_volume(tree / "S04" / "S04_t1.nii", seed=1)
    before = content(tree)
    with pytest.raises(UserError) as caught:
        prepare(tree, tmp_path / "store", num_processes=2)
    report = str(caught.value).splitlines()
    assert report[0].startswith(f"7 problems in {tree}")
    for line, (name, reason) in zip(
        report[1:],
        [
            ("S00_t1.nii.gz", "empty"),
            ("S01_t2.nii.gz", "truncated"),
            ("S02_t1.nii.gz", "zero"),
            ("S02_t2.nii.gz", "NaN"),
            ("S03_t2.nii.gz", "outside that of t1"),
            ("S04_seg.nii.gz", "wanted labels"),
            ("S04_t1.nii.gz", "a second t1"),
        ],
        strict=True,
    ):
        assert name in line
        assert reason in line
    assert not (tmp_path / "store").exists()
    assert content(tree) == before


def test_problems_found_while_preparing_are_reported_together(tmp_path):
    tree = write_tree(tmp_path / "data", 3)
    speck = np.zeros(SHAPE, np.int16)
    speck[10, 10, 8] = 1
    for i in (0, 2):
        write_volume(tree / f"S{i:02d}" / f"S{i:02d}_t2.nii.gz", 0, data=speck)
    with pytest.raises(UserError, match="2 problems") as caught:
        prepare(tree, tmp_path / "store")
    assert "subject S00: t2:" in str(caught.value)
    assert "no contrast" in str(caught.value)
    with pytest.raises(UserError, match="not finished"):
        VolumeStore.open(tmp_path / "store")
    write_tree(tree, 3)
    prepare(tree, tmp_path / "store")
    assert content(tmp_path / "store") == content(prepare(tree, tmp_path / "fresh").path)


def test_another_configuration_needs_overwrite(source, tmp_path):
    store = prepare(source, tmp_path / "store").path
    before = content(store)
    other = replace(CONFIG, spacing_mm=(10.0, 10.0, 10.0))
    with pytest.raises(UserError, match=r"spacing_mm \[8.0, 8.0, 8.0\] -> \[10.0, 10.0, 10.0\].*`overwrite`"):
        prepare(source, store, config=other)
    assert content(store) == before
    replaced = prepare(source, store, config=other, overwrite=True)
    assert replaced.preprocess == other
    assert content(store) == content(prepare(source, tmp_path / "fresh", config=other).path)


@pytest.mark.parametrize("change", ["gone", "changed", "split"])
def test_other_subjects_need_overwrite(tmp_path, change):
    tree = write_tree(tmp_path / "data")
    store = prepare(tree, tmp_path / "store").path
    before, splits, reason = content(store), None, "S01"
    if change == "gone":
        shutil.rmtree(tree / "S01")
    elif change == "changed":
        write_volume(tree / "S01" / "S01_t1.nii.gz", seed=99)
    else:
        splits, reason = tmp_path / "splits.csv", "S01 goes from"
        old = {record.subject_id: record.split for record in VolumeStore.open(store).subjects()}
        old["S01"] = "test" if old["S01"] == "train" else "train"
        splits.write_text("subject_id,split\n" + "".join(f"{name},{split}\n" for name, split in old.items()))
    with pytest.raises(UserError, match=reason):
        prepare(tree, store, splits=splits)
    assert content(store) == before
    prepare(tree, store, splits=splits, overwrite=True)
    assert content(store) == content(prepare(tree, tmp_path / "fresh", splits=splits).path)


def test_a_folder_that_is_not_a_store_is_never_touched(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="mine"):
            prepare(source, tmp_path / "mine", overwrite=overwrite)
    with pytest.raises(UserError, match="make it first"):
        prepare(source, tmp_path / "missing" / "store")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        prepare(source, tmp_path / "mine" / "thesis.txt")
    assert content(tmp_path) == {"mine/thesis.txt": b"all of it"}


@pytest.mark.parametrize("name", ["store", "shards"])
def test_a_folder_that_cannot_be_made_is_named(source, tmp_path, monkeypatch, name):
    mkdir = Path.mkdir

    def refuse(path, *arguments, **options):
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=rf"cannot make the folder .*{name}: Permission denied"):
        prepare(source, tmp_path / "store")


def test_two_runs_on_one_store_at_once_are_refused(source, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    descriptor = os.open(store, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another aldm prepare"):
        prepare(source, store)
    os.close(descriptor)
    prepare(source, store)


# ------------------------------------------------------------------------------------------------------- command line


def test_the_job_prepares_and_says_so(source, tmp_path, capsys):
    flags = [str(source), str(tmp_path / "store"), "--layout", "brats", "--num-processes", "1"]
    main([*flags, "--preset", "tiny", "--spacing-mm", "8", "8", "9", "--spatial-shape", "16", "16", "12"])
    assert "3 subjects with t1, t2; masks: brain" in capsys.readouterr().out
    store = VolumeStore.open(tmp_path / "store")
    assert store.preprocess == replace(CONFIG, spacing_mm=(8.0, 8.0, 9.0))


def test_a_model_says_how_its_data_are_prepared(source, tmp_path):
    model = save_untrained(tmp_path / "model")
    words = [str(source), str(tmp_path / "store"), "--layout", "brats", "--num-processes", "1", "--like", str(model)]
    main([*words, "--register", "rigid"])
    wanted = replace(tiny().preprocess, register="rigid")
    assert VolumeStore.open(tmp_path / "store").preprocess == wanted
    for more in (["--spacing-mm", "4"], ["--preset", "tiny"], ["--set", "preprocess.intensity=paper"]):
        with pytest.raises(UserError, match=f"and {more[0]}: a model wants its own"):
            main([*words, *more])


def test_a_dry_run_checks_everything_and_writes_nothing(source, tmp_path, capsys):
    flags = ["--layout", "brats", "--preset", "tiny", "--dry-run", "--num-processes", "1"]
    main([str(source), str(tmp_path / "store"), *flags])
    printed = capsys.readouterr().out
    assert "3 subjects:" in printed
    assert "3 t1, 3 t2" in printed
    assert "would be written with spacing_mm=(8.0, 8.0, 8.0), spatial_shape=(16, 24, 16), intensity=tissue" in printed
    assert "GiB a process" in printed
    assert list(tmp_path.iterdir()) == []
    bad = write_tree(tmp_path / "bad")
    (bad / "S00" / "S00_t1.nii.gz").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="1 problem in"):
        main([str(bad), str(tmp_path / "store"), *flags])


def test_the_expected_memory_grows_with_the_target_grid(source, tmp_path):
    def expected_gib(spacing_mm):
        config = replace(CONFIG, spacing_mm=(spacing_mm,) * 3)
        request = Request(source=source, store=tmp_path / "store", layout="brats", config=config)
        return plan_store(request, num_processes=1).memory_per_process_gib

    assert expected_gib(8.0) > 0.4  # what the program holds resident before it has read a volume
    voxels = np.prod(SHAPE)  # two volumes of 8 mm a subject
    assert expected_gib(2.0) - expected_gib(8.0) == pytest.approx(8 * 2 * (4**3 - 1) * voxels / 2**30)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--spacing-mm", "1", "2"], "one or three"),
        (["--spacing-mm", "-1"], "above 0"),
        (["--spacing-mm", "nan"], r"spacing_mm is \(nan, nan, nan\), wanted a finite value above 0"),
        (["--spacing-mm", "8", "8", "inf"], "wanted a finite value above 0"),
        (["--spacing-mm", "0.01"], r"S00_t1.*a grid of 16000 x 17600 x 12800 = .*, wanted at most 134,217,728: take"),
        (["--spatial-shape", "16", "16", "0"], "above 0"),
        (["--num-processes", "0"], "at least 1"),
        (["--max-voxels", "100"], "limit is"),
        (["--splits", "nowhere.csv"], "nowhere"),
    ],
)
def test_bad_flags_are_refused(source, tmp_path, flags, reason):
    defaults = [] if "--num-processes" in flags else ["--num-processes", "1"]
    with pytest.raises(UserError, match=reason):
        main([str(source), str(tmp_path / "store"), "--layout", "brats", "--preset", "tiny", *defaults, *flags])
    assert list(tmp_path.iterdir()) == []


def test_a_map_of_tissues_with_other_labels_is_refused(tmp_path):
    write_volume(tmp_path / "S" / "S_t1.nii.gz", seed=1)
    write_volume(tmp_path / "S" / "S_tissue.nii.gz", 0, data=np.full(SHAPE, 4, np.uint8))
    with pytest.raises(UserError, match="labels above 3, wanted 1 CSF"):
        prepare(tmp_path, tmp_path / "store")
