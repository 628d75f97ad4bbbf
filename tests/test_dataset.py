"""Training samples: epochs, pairs, crops and flips, all from the generator that is handed in."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise, permutations

import pytest
import torch

from aldm.data.dataset import VolumePairs, VolumeSamples, batch_places, collate, crop_and_flip, draw_pair
from aldm.data.store import VolumeStore
from aldm.errors import UserError
from aldm.randomness import derived_generator, derived_seed


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("length", "batch_size"), [(7, 1), (7, 3), (2, 5), (1, 4)])
def test_every_sample_is_seen_once_an_epoch(length: int, batch_size: int) -> None:
    row = [place for step in range(4 * length) for place in batch_places(length, batch_size, step, seed=3)]
    epochs = [row[start : start + length] for start in range(0, 4 * length, length)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(batch_places(20, 20, step, seed)) for seed in (0, 1) for step in (0, 1)]
    assert len(set(orders)) == 4


def test_derived_seeds_differ_by_every_key_and_its_place() -> None:
    seeds = [derived_seed(0, "a", 1), derived_seed(1, "a", 1), derived_seed(0, "b", 1), derived_seed(0, 1, "a")]
    assert len({*seeds, derived_seed(0, "a", 2), derived_seed(-1, "a", 1)}) == 6
    assert derived_seed(0, "a", 1) == seeds[0]


def draws(modalities: tuple[str, ...], fraction: float | None) -> Counter[tuple[str, str]]:
    return Counter(draw_pair(modalities, fraction, derived_generator(0, step)) for step in range(3000))


def test_pairs_are_drawn_evenly() -> None:
    counts = draws(("t1", "t2", "pd"), None)
    assert len(counts) == 9
    assert min(counts.values()) > 0.8 * 3000 / 9


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_the_share_of_the_diagonal_is_what_was_asked_for(fraction: float) -> None:
    counts = draws(("t1", "t2", "pd"), fraction)
    diagonal = sum(count for (source, target), count in counts.items() if source == target) / 3000
    assert diagonal == pytest.approx(fraction, abs=0.02)
    off = [count for (source, target), count in counts.items() if source != target]
    assert len(off) == (0 if fraction == 1 else 6)
    assert all(count > 0.8 * (1 - fraction) * 3000 / 6 for count in off)


def test_a_subject_with_one_modality_gives_its_diagonal() -> None:
    assert set(draws(("t2",), 0.0)) == {("t2", "t2")}


def test_crops_lie_inside_and_reach_every_corner() -> None:
    volume = torch.arange(4 * 5 * 6.0).view(1, 4, 5, 6)
    starts = set()
    for seed in range(300):
        (box,) = crop_and_flip([volume], (2, 5, 4), 0.0, generator(seed))
        assert box.shape == (1, 2, 5, 4)
        first = int(box[0, 0, 0, 0])
        x, z = first // 30, first % 6
        assert torch.equal(box, volume[:, x : x + 2, :, z : z + 4])
        starts.add((x, z))
    assert starts == {(x, z) for x in range(3) for z in range(3)}


def test_both_volumes_of_a_pair_are_cropped_and_flipped_alike() -> None:
    volume = torch.rand(1, 6, 6, 6)
    flipped = 0
    for seed in range(20):
        a, b = crop_and_flip([volume, volume + 1], (4, 4, 4), 0.5, generator(seed))
        assert torch.equal(a + 1, b)
        flipped += not torch.equal(a, crop_and_flip([volume], (4, 4, 4), 0.0, generator(seed))[0])
    assert 10 < flipped < 20  # 7 of 8 on average


def test_volumes_of_the_store_come_back_by_subject_and_modality(brats_store: VolumeStore) -> None:
    samples = VolumeSamples(brats_store, "train", ("t1", "flair"))
    assert len(samples) == 2 * len(brats_store.subjects("train"))
    seen = [samples.sample(index, generator()) for index in range(len(samples))]
    assert all(before["subject_id"] <= after["subject_id"] for before, after in pairwise(seen))
    for sample in seen[:3]:
        stored = torch.from_numpy(brats_store.volume(sample["subject_id"], sample["modality"]))
        assert torch.equal(sample["volume"][0], stored)


def test_a_sample_is_a_function_of_its_generator(brats_store: VolumeStore) -> None:
    pairs = VolumePairs(brats_store, "train", brats_store.modalities, (8, 8, 8), 0.5)
    first, again, other = (pairs.sample(1, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first["source_volume"], again["source_volume"])
    assert (first["source"], first["target"]) == (again["source"], again["target"])
    assert not torch.equal(first["source_volume"], other["source_volume"])


def test_pairs_are_of_one_subject_and_ids_count_through_the_models_modalities(brats_store: VolumeStore) -> None:
    modalities = ("t2", "flair")
    pairs = VolumePairs(brats_store, "train", modalities)
    for seed in range(4):
        sample = pairs.sample(0, generator(seed))
        for end in ("source", "target"):
            stored = brats_store.volume(sample["subject_id"], modalities[sample[end]])
            assert torch.equal(sample[f"{end}_volume"][0], torch.from_numpy(stored))


def test_held_out_pairs_are_of_different_modalities_and_not_flipped(brats_store: VolumeStore) -> None:
    pairs = VolumePairs(brats_store, "validation", brats_store.modalities, None, 1.0)
    for seed in range(20):
        sample = pairs.sample(0, generator(seed))
        assert sample["source"] != sample["target"]
        stored = brats_store.volume(sample["subject_id"], brats_store.modalities[sample["target"]])
        assert torch.equal(sample["target_volume"][0], torch.from_numpy(stored))


def test_every_ordered_pair_of_different_modalities_is_drawn_as_often(brats_store: VolumeStore) -> None:
    pairs = VolumePairs(brats_store, "train", ("t1", "t2", "flair"))
    samples = [pairs.sample(0, derived_generator(0, step)) for step in range(900)]
    counts = Counter((sample["source"], sample["target"]) for sample in samples)
    assert set(counts) == set(permutations(range(3), 2))
    assert max(abs(count - 150) for count in counts.values()) < 4 * 150**0.5


def test_subjects_without_any_of_the_modalities_are_left_out(
    brats_store: VolumeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = brats_store.subjects("train")
    fewer = [replace(records[0], modalities=("t1",)), replace(records[1], modalities=("t2", "flair"))]
    monkeypatch.setattr(brats_store, "subjects", lambda split: fewer)
    pairs = VolumePairs(brats_store, "train", ("t2", "flair"))
    assert len(pairs) == 1
    assert {pairs.sample(0, generator(seed))["subject_id"] for seed in range(5)} == {records[1].subject_id}


def test_a_crop_larger_than_the_volume_is_refused(brats_store: VolumeStore) -> None:
    with pytest.raises(UserError, match="the crop of 8 x 99 x 8 voxels does not fit"):
        VolumeSamples(brats_store, "train", ("t1",), (8, 99, 8))


def test_collate_stacks() -> None:
    samples = [{"x": torch.full((1, 2), float(i)), "target": i, "subject_id": f"s{i}"} for i in range(3)]
    batch = collate(samples)
    assert batch["x"].shape == (3, 1, 2)
    assert batch["target"].tolist() == [0, 1, 2]
    assert batch["target"].dtype == torch.int64
    assert batch["subject_id"] == ["s0", "s1", "s2"]
