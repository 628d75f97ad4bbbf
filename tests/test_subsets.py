"""Scores over every subset of sources: which there are, what the tables say, and that evaluate files them apart."""

import csv
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from test_any_sources import ANY
from untrained import save_untrained

from aldm import subsets
from aldm.cli import main
from aldm.data.store import VolumeStore
from aldm.metrics import score, to_unit
from aldm.presets import small
from aldm.score_rows import MethodKey, ScoreRow
from aldm.translate import Translator
from aldm.translation import Request

KEY = MethodKey("aldm", "one-step", 1)


def row(subject: str, source: str, target: str, psnr_db: float, region: str = "brain") -> ScoreRow:
    return ScoreRow(subject, *KEY[:1], source, target, *KEY[1:], region, psnr_db, 0.1, 0.9)


def rows_of(values: dict[tuple[str, str], tuple[float, ...]]) -> list[ScoreRow]:
    return [row(f"s{i}", *place, value) for place, group in values.items() for i, value in enumerate(group)]


def test_all_subsets_of_four_are_fifteen_and_none_holds_its_target() -> None:
    names = ("t1", "t1ce", "t2", "flair")
    assert len(subsets.subsets_of(names)) == 15
    wanted = {
        (chosen, target)
        for bits in itertools.product((0, 1), repeat=4)
        for target in names
        if sum(bits) >= 2
        and target not in (chosen := tuple(name for name, bit in zip(names, bits, strict=True) if bit))
    }
    assert set(subsets.several(names)) == wanted
    assert len(subsets.several(names)) == len(wanted) == 16


def test_what_an_added_source_brings_is_the_mean_difference_over_subjects() -> None:
    rows = rows_of(
        {
            ("t1", "pd"): (20.0, 21.0, 25.0),
            ("t2", "pd"): (22.0, 20.0, 23.0),
            ("t1+t2", "pd"): (22.5, 22.0, 25.5),
            ("t1", "t2"): (10.0, 10.0, 10.0),
        }
    )
    rows += [row("s0", "t1", "pd", 99.0, region="lesion"), row("s0", "t1", "t1", 150.0)]
    cells = subsets.psnr_of(rows, KEY, "brain")
    added = subsets.added_source(cells)
    assert set(added) == {("t1", "t2", "pd"), ("t2", "t1", "pd")}
    gains = np.array([2.5, 1.0, 0.5])
    found = added["t1", "t2", "pd"]
    assert found.mean_db == pytest.approx(gains.mean())
    low, high = stats.t.interval(0.95, 2, loc=gains.mean(), scale=stats.sem(gains))
    assert found.half_db == pytest.approx((high - low) / 2)
    best = subsets.two_against_one(cells)  # t1 is the best single one: 22 dB against 21.67
    assert best is not None
    assert (best.mean_db, best.num_subjects) == (pytest.approx(gains.mean()), 3)
    text = subsets.document(rows, KEY, ["brain", "edges"])
    assert f"the best single one: {found.text()} dB (3 subjects, mean over targets)" in text
    assert "The least that an added source brings: +1.33" in text
    assert "| t1 + t2 |  | 23.33 ± " in text
    assert "edges" not in text


def test_few_sources_come_first_then_the_vocabulary_s_order() -> None:
    places = [
        ("t1+t2", "flair"),
        ("flair", "t1"),
        ("t1", "t2"),
        ("t1", "flair"),
        ("t1+t1ce+t2", "flair"),
        ("t1ce", "t2"),
    ]
    cells = subsets.psnr_of(rows_of(dict.fromkeys(places, (20.0,))), KEY, "brain")
    assert list(cells) == [places[2], places[3], places[5], places[1], places[0], places[4]]


def test_nothing_with_two_sources_has_no_gain() -> None:
    assert subsets.two_against_one(subsets.psnr_of(rows_of({("t1", "t2"): (1.0,)}), KEY, "brain")) is None


def test_evaluate_scores_every_subset_and_keeps_pairs_apart(brats_store: VolumeStore, tmp_path: Path) -> None:
    config = replace(ANY, codec=small().codec, preprocess=brats_store.preprocess)
    model = save_untrained(tmp_path / "model", config=config, modalities=brats_store.modalities)
    out = tmp_path / "scores"
    command = ["evaluate", "--model", model, "--store", brats_store.path, "--out", out, "--max-subjects", 1]
    assert main([*map(str, command), "--split", "train"]) == 0
    pairs = list(csv.DictReader((out / "scores.csv").open()))
    assert not any("+" in line["source"] for line in pairs)
    lines = list(csv.DictReader((out / "subsets.csv").open()))
    found = {(tuple(line["source"].split("+")), line["target"]) for line in lines}
    assert found == set(subsets.several(brats_store.modalities))
    assert "## Any sources: aldm (one-step 1)" in (out / "scores.md").read_text()
    assert min(Image.open(out / "subsets.png").size) > 100
    translator, subject = Translator.load(model), brats_store.subjects("train")[0].subject_id
    volumes = {name: brats_store.volume(subject, name) for name in ("t1", "flair")}
    request = Request({name: translator.encode(volume) for name, volume in volumes.items()}, "t2", 0)
    (made,) = translator.translate_batch([request])
    mean = made.mean
    wanted = score(to_unit(brats_store.volume(subject, "t2")), to_unit(mean), {"volume": None})["volume"]
    (line,) = [
        line for line in lines if (line["source"], line["target"], line["region"]) == ("t1+flair", "t2", "volume")
    ]
    assert float(line["psnr_db"]) == pytest.approx(wanted.psnr_db, rel=1e-5)
