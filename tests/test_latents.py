"""The latent cache against the volumes that it was made from."""

import json
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aldm.config import CodecConfig
from aldm.data.dataset import LatentPairs
from aldm.data.store import VolumeStore
from aldm.errors import UserError
from aldm.latents import LATENTS_FILE, LatentStore, cache_bytes, codec_hash, encode_store, standardise, unstandardise
from aldm.models.codecs import build_codec
from aldm.presets import tiny
from pipelines.encode import main

HAAR = replace(tiny().codec, kind="haar")


@pytest.fixture(scope="module")
def latents(brats_store: VolumeStore, tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return encode_store(brats_store, build_codec(HAAR), HAAR, tmp_path_factory.mktemp("latents") / "haar", flips=True)


def raw(latents: LatentStore, subject_id: str, modality: str, flip: int = 0) -> torch.Tensor:
    z = torch.from_numpy(latents.latent(subject_id, modality, flip))[None]
    return unstandardise(z, torch.from_numpy(latents.mean), torch.from_numpy(latents.std))


def test_the_haar_cache_holds_the_volumes(latents: LatentStore, brats_store: VolumeStore) -> None:
    codec = build_codec(HAAR)
    for subject in latents.subjects()[:3]:
        for modality in subject.modalities:
            volume = torch.from_numpy(brats_store.volume(subject.subject_id, modality))
            assert torch.allclose(codec.decode(raw(latents, subject.subject_id, modality))[0, 0], volume, atol=2e-3)
            mirrored = codec.decode(raw(latents, subject.subject_id, modality, flip=1))[0, 0]
            assert torch.allclose(mirrored, volume.flip(0), atol=2e-3)


def test_the_training_split_is_standardised(latents: LatentStore) -> None:
    everything = np.stack(
        [
            latents.latent(subject.subject_id, modality)
            for subject in latents.subjects("train")
            for modality in subject.modalities
        ]
    ).astype(np.float64)
    assert np.allclose(everything.mean(axis=(0, 2, 3, 4)), 0, atol=1e-5)
    assert np.allclose(everything.std(axis=(0, 2, 3, 4)), 1, atol=1e-5)


def test_standardise_and_back() -> None:
    z, mean, std = torch.randn(2, 3, 4, 4, 4), torch.randn(3), torch.rand(3) + 0.5
    assert torch.allclose(unstandardise(standardise(z, mean, std), mean, std), z, atol=1e-5)


def test_splits_and_modalities_are_the_stores(latents: LatentStore, brats_store: VolumeStore) -> None:
    for split in ("train", "validation", "test"):
        wanted = [(record.subject_id, record.modalities) for record in brats_store.subjects(split)]
        assert [(subject.subject_id, subject.modalities) for subject in latents.subjects(split)] == wanted
    assert latents.data["fingerprint"] == brats_store.fingerprint
    assert latents.data["median_percentiles"]["t2"] == list(brats_store.median_percentiles("t2"))


def test_a_stale_cache_is_refused(latents: LatentStore) -> None:
    assert LatentStore.open(latents.path, codec_hash(HAAR, {})).codec_hash == latents.codec_hash
    other = codec_hash(replace(HAAR, haar_levels=2), {})
    with pytest.raises(UserError, match="is stale: it was encoded with codec haar-1, wanted haar-2"):
        LatentStore.open(latents.path, other)


def test_the_codecs_hash_follows_its_weights() -> None:
    config = CodecConfig(channels=(8, 8), num_res_blocks=1, codebook_size=4, norm_groups=4)
    weights = build_codec(config).state_dict()
    before = codec_hash(config, weights)
    assert codec_hash(config, weights) == before
    weights["quantizer.codebook"][0, 0] += 1
    assert codec_hash(config, weights) != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a store of latents"),
        ("{", "is damaged"),
        ('{"format_version": 0}', "format version 0"),
        ('{"format_version": 2}', "it lacks codec_hash; it lacks codec.kind; .*encode again with `overwrite`"),
    ],
)
def test_what_is_not_a_cache_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / LATENTS_FILE).write_text(text)
    with pytest.raises(UserError, match=message):
        LatentStore.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": [0.0]}, r"mean of the latents is \[0\.0\], wanted 8 numbers"),
        ({"std": [1.0] * 7 + ["a"]}, "std of the latents is .*, wanted 8 numbers"),
        ({"subjects": [{"subject_id": "A"}]}, r"it lacks subject\.split; it lacks subject\.modalities"),
        ({"data": {}}, r"it lacks data\.fingerprint"),
        ({"num_flips": True}, "num_flips is True, wanted a whole number"),
    ],
)
def test_a_damaged_header_is_refused(
    latents: LatentStore, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    header = json.loads((latents.path / LATENTS_FILE).read_text())
    (tmp_path / LATENTS_FILE).write_text(json.dumps(header | change))
    with pytest.raises(UserError, match=message):
        LatentStore.open(tmp_path)


class Backwards:
    """Workers that finish the last task first."""

    def map(
        self,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        *,
        description: str,
        unit: str,
        at_once: int | None = None,
    ) -> Iterator[Any]:
        yield from map(pickle.loads(pickle.dumps(function)), reversed(items))


def test_the_order_in_which_subjects_are_finished_leaves_no_trace(
    latents: LatentStore, brats_store: VolumeStore, tmp_path: Path
) -> None:
    codec = build_codec(HAAR)
    other = encode_store(brats_store, codec, HAAR, tmp_path / "latents", flips=True, workers=Backwards())
    files = sorted(path.relative_to(latents.path) for path in latents.path.rglob("*") if path.is_file())
    assert len(files) == 1 + len(latents.subjects())
    for file in files:
        assert (other.path / file).read_bytes() == (latents.path / file).read_bytes()


def test_an_interrupted_encoding_leaves_nothing(brats_store: VolumeStore, tmp_path: Path) -> None:
    calls = 0

    def encode(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return build_codec(HAAR).encode(x)

    with pytest.raises(KeyboardInterrupt):
        encode_store(brats_store, build_codec(HAAR), HAAR, tmp_path / "latents", encode=encode)
    assert list(tmp_path.iterdir()) == []


def test_a_latent_that_is_not_finite_is_refused_by_name(brats_store: VolumeStore, tmp_path: Path) -> None:
    first = brats_store.subjects()[0].subject_id
    with pytest.raises(UserError, match=f"the latent of {first}, t1 is not finite"):
        encode_store(
            brats_store,
            build_codec(HAAR),
            HAAR,
            tmp_path / "latents",
            encode=lambda x: build_codec(HAAR).encode(x) * 1e6,
        )
    assert list(tmp_path.iterdir()) == []


def test_another_store_needs_overwrite(latents: LatentStore, brats_store: VolumeStore) -> None:
    before = (latents.path / LATENTS_FILE).read_bytes()
    with pytest.raises(UserError, match="`overwrite`"):
        encode_store(brats_store, build_codec(HAAR), HAAR, latents.path)
    assert (latents.path / LATENTS_FILE).read_bytes() == before


def test_a_store_without_training_subjects_is_refused(
    brats_store: VolumeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = brats_store.subjects("test")
    monkeypatch.setattr(brats_store, "subjects", lambda split=None: held_out)
    with pytest.raises(UserError, match="no training subject"):
        encode_store(brats_store, build_codec(HAAR), HAAR, tmp_path / "latents")


def test_the_size_is_known_before(latents: LatentStore, brats_store: VolumeStore) -> None:
    shards = sum(file.stat().st_size for file in (latents.path / "shards").iterdir())
    expected = cache_bytes(brats_store, build_codec(HAAR), flips=True)
    assert expected <= shards < 1.25 * expected + 2000 * len(latents.subjects()) * len(latents.modalities)


def test_pairs_of_latents_use_one_flip_for_both_ends(latents: LatentStore) -> None:
    pairs = LatentPairs(latents, "train", latents.modalities)
    flips = set()
    for seed in range(12):
        sample = pairs.sample(2, torch.Generator().manual_seed(seed))
        for end in ("source", "target"):
            stored = latents.latent(sample["subject_id"], latents.modalities[sample[end]], sample["flip"])
            assert torch.equal(sample[f"z_{end}"], torch.from_numpy(stored))
        flips.add(sample["flip"])
    assert flips == {0, 1}
    assert {
        LatentPairs(latents, "validation", latents.modalities).sample(0, torch.Generator().manual_seed(seed))["flip"]
        for seed in range(12)
    } == {0}


def test_a_cache_pickles_as_its_path(latents: LatentStore) -> None:
    subject = latents.subjects()[0].subject_id
    copy = pickle.loads(pickle.dumps(latents))
    assert np.array_equal(copy.latent(subject, "t1"), latents.latent(subject, "t1"))
    assert json.loads((latents.path / LATENTS_FILE).read_text())["codec_hash"] == copy.codec_hash


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], r"memory: about \d+\.\d\d GB a process\n"),
        (["--max-memory-gb", "2.5"], r"memory: at most 2\.5 GB a process"),
    ],
)
def test_a_dry_run_of_the_job_says_how_much_memory_it_takes(
    flags: list[str], words: str, brats_store: VolumeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--store", str(brats_store.path), "--codec", "haar", "--out", str(tmp_path / "out"), "--dry-run"]
    assert main([*arguments, "--preset", "tiny", "--device", "cpu", *flags]) == 0
    assert re.search(words, capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


def test_held_out_latents_are_of_different_modalities_and_not_flipped(latents: LatentStore) -> None:
    pairs = LatentPairs(latents, "validation", latents.modalities, same_modality_fraction=1.0)
    for seed in range(20):
        sample = pairs.sample(0, torch.Generator().manual_seed(seed))
        assert sample["source"] != sample["target"]
        assert sample["flip"] == 0
