import json
import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aldm.config import PreprocessConfig, to_dict
from aldm.data.store import (
    ShardReader,
    SubjectRecord,
    VolumeStore,
    shard_path,
    write_manifest,
    write_shard,
    write_store_file,
)
from aldm.errors import UserError

CONFIG = PreprocessConfig(spacing_mm=(2.0, 2.0, 2.0), spatial_shape=(8, 6, 10))
GRID = (9, 9, 9)


def arrays(seed=0):
    generator = np.random.default_rng(seed)
    return {
        "t1": generator.normal(size=GRID).astype(np.float16),
        "mask": generator.integers(0, 2, GRID).astype(np.uint8),
        "latent": generator.normal(size=(3, 2, 4, 5)).astype(np.float32),
        "number": np.array(7, np.int64),
        "nothing": np.zeros((0, 3), np.float32),
    }


def record(subject_id, split, modalities=("t1", "t2"), has_seg=False, start=(1, 2, -1), low=0.0):
    return SubjectRecord(
        subject_id=subject_id,
        split=split,
        modalities=modalities,
        has_seg=has_seg,
        region="brain",
        grid_affine=((2.0, 0.0, 0.0, -9.0), (0.0, 2.0, 0.0, -8.5), (0.0, 0.0, 2.0, 1 / 3), (0.0, 0.0, 0.0, 1.0)),
        grid_shape=GRID,
        crop_start=start,
        percentiles=dict.fromkeys(modalities, (low, 100.0 + low)),
        backgrounds=dict.fromkeys(modalities, low if start[0] > 0 else None),
        clipped=dict.fromkeys(modalities, (0.25, 0.5 if has_seg else None)),
        sources={
            name: {"path": f"{subject_id}/{name}.nii", "affine": ((1.0, 0, 0, 0),) * 4, "shape": (18, 18, 18)}
            for name in modalities
        },
    )


def whole(subject_id, modality):
    return np.random.default_rng([ord(c) for c in subject_id + modality]).uniform(-1, 1, GRID).astype(np.float16)


def make_store(path, records):
    (path / "shards").mkdir(parents=True)
    for item in records:
        content = [(name, whole(item.subject_id, name)) for name in item.modalities]
        content.append(("mask", (whole(item.subject_id, "mask") > 0).astype(np.uint8)))
        if item.has_seg:
            content.append(("seg", np.full(GRID, 4, np.uint8)))
        write_shard(shard_path(path, item.subject_id), content)
    header = {"layout": "brats", "preprocess": to_dict(CONFIG), "modalities": ["t1", "t2"], "fingerprint": "abc"}
    write_store_file(path, header)
    write_manifest(path, records, "abc")
    return path


RECORDS = [
    record("B", "test", ("t2",)),
    record("A", "train", has_seg=True),
    record("C", "train", low=10),
    record("E", "train", ("t1",), low=100),
    record("D", "validation"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return VolumeStore.open(make_store(tmp_path_factory.mktemp("stores") / "store", RECORDS))


# ------------------------------------------------------------------------------------------------------------- shards


def test_a_shard_gives_back_every_array(tmp_path):
    write_shard(tmp_path / "a.arrow", arrays().items(), {"key": "k", "about": "é"})
    reader = ShardReader(tmp_path / "a.arrow")
    assert list(reader) == list(arrays())
    assert reader.metadata == {"key": "k", "about": "é"}
    for key, array in arrays().items():
        assert reader[key].dtype == array.dtype
        np.testing.assert_array_equal(reader[key], array, strict=True)


def test_the_same_records_give_the_same_bytes(tmp_path):
    write_shard(tmp_path / "a.arrow", arrays().items(), {"b": "1", "a": "2"})
    write_shard(tmp_path / "b.arrow", iter(arrays().items()), {"a": "2", "b": "1"})
    assert (tmp_path / "a.arrow").read_bytes() == (tmp_path / "b.arrow").read_bytes()


def test_records_are_views_of_the_mapped_file(tmp_path):
    write_shard(tmp_path / "a.arrow", [("x", np.arange(1000, dtype=np.int32))])
    reader = ShardReader(tmp_path / "a.arrow")
    view = reader["x"]
    assert not view.flags.owndata
    assert not view.flags.writeable
    assert np.shares_memory(view, reader["x"])
    del reader
    np.testing.assert_array_equal(view, np.arange(1000))  # the view keeps the map alive


def test_arrays_that_are_not_contiguous_are_stored_as_they_look(tmp_path):
    array = np.arange(60).reshape(3, 4, 5).transpose(2, 0, 1)[::-1]
    write_shard(tmp_path / "a.arrow", [("x", array)])
    np.testing.assert_array_equal(ShardReader(tmp_path / "a.arrow")["x"], array)


def test_a_shard_appears_whole_or_not_at_all(tmp_path):
    def records():
        yield "x", np.zeros(10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.arrow", records())
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_shard_is_refused(tmp_path):
    write_shard(tmp_path / "a.arrow", arrays().items())
    content = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.arrow").touch()
    for name in ("cut.arrow", "empty.arrow", "missing.arrow"):
        with pytest.raises(UserError, match=name):
            ShardReader(tmp_path / name)


# -------------------------------------------------------------------------------------------------------------- store


def test_the_manifest_keeps_every_field(store):
    assert store.subjects() == sorted(RECORDS, key=lambda item: item.subject_id)
    assert store.modalities == ("t1", "t2")
    assert store.preprocess == CONFIG
    assert (store.layout, store.fingerprint) == ("brats", "abc")


def test_subjects_by_split(store):
    names = {split: [item.subject_id for item in store.subjects(split)] for split in ("train", "validation", "test")}
    assert names == {"train": ["A", "C", "E"], "validation": ["D"], "test": ["B"]}
    with pytest.raises(UserError, match="dev"):
        store.subjects("dev")


def test_the_box_is_the_whole_grid_cropped_and_padded(store):
    expected = np.full((8, 6, 10), -1, np.float32)
    expected[0:8, 0:6, 1:10] = whole("A", "t1")[1:9, 2:8, 0:9]
    np.testing.assert_array_equal(store.volume("A", "t1"), expected, strict=True)
    np.testing.assert_array_equal(store.whole("A", "t1"), whole("A", "t1").astype(np.float32), strict=True)
    mask = np.zeros((8, 6, 10), bool)
    mask[0:8, 0:6, 1:10] = (whole("A", "mask") > 0)[1:9, 2:8, 0:9]
    np.testing.assert_array_equal(store.mask("A"), mask, strict=True)
    np.testing.assert_array_equal(store.whole_mask("A"), whole("A", "mask") > 0, strict=True)
    seg = store.seg("A")
    assert seg.dtype == np.uint8
    assert (seg[:, :, 1:] == 4).all()
    assert (seg[:, :, 0] == 0).all()
    assert store.seg("C") is None
    assert store.region("A") == "brain"


def test_what_a_subject_lacks_is_named(store):
    with pytest.raises(UserError, match="no subject 'Z'"):
        store.volume("Z", "t1")
    with pytest.raises(UserError, match="subject B has no t1"):
        store.volume("B", "t1")


def test_statistics_come_from_the_training_subjects(store):
    assert store.median_percentiles("t1") == (10, 110)
    assert store.median_percentiles("t2") == (5, 105)
    mean = store.training_mean("t2")
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, (store.volume("A", "t2") + store.volume("C", "t2")) / 2, atol=1e-6)
    with pytest.raises(UserError, match="no training subject with pd"):
        store.training_mean("pd")


def test_more_subjects_than_open_shards(store, monkeypatch):
    monkeypatch.setattr("aldm.data.store._OPEN_SHARDS", 2)
    for _ in range(2):
        for item in store.subjects():
            name = item.modalities[0]
            np.testing.assert_array_equal(store.whole(item.subject_id, name), whole(item.subject_id, name))


def test_a_store_pickles_as_its_path(store):
    copy = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 1000
    np.testing.assert_array_equal(copy.volume("A", "t1"), store.volume("A", "t1"))


def test_what_is_not_a_finished_store_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a store"):
        VolumeStore.open(tmp_path)
    path = make_store(tmp_path / "store", [replace(RECORDS[0])])
    manifest = (path / "manifest.parquet").read_bytes()
    (path / "manifest.parquet").unlink()
    with pytest.raises(UserError, match="not finished"):
        VolumeStore.open(path)
    (path / "manifest.parquet").write_bytes(manifest[:50])
    with pytest.raises(UserError, match="damaged"):
        VolumeStore.open(path)
    pq.write_table(pa.table({"subject_id": ["A"]}), path / "manifest.parquet")
    with pytest.raises(UserError, match=r"damaged .*'split'"):
        VolumeStore.open(path)
    (path / "manifest.parquet").write_bytes(manifest)
    header = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps({**header, "format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        VolumeStore.open(path)
    (path / "store.json").write_text(json.dumps({**header, "preprocess": None, "layout": 3}))
    with pytest.raises(UserError, match="layout is 3, wanted text; preprocess is None, wanted a mapping; prepare"):
        VolumeStore.open(path)
    (path / "store.json").write_text('{"format_version": 2}')
    with pytest.raises(UserError, match="it lacks layout; it lacks preprocess; it lacks modalities; it lacks finger"):
        VolumeStore.open(path)
    (path / "store.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        VolumeStore.open(path)
