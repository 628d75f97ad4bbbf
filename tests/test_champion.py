"""Who is better: the rule by hand, and as it is read from the scores of an evaluation."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from aldm.errors import UserError
from aldm.evaluation_settings import EVALUATION_FILE, SCORES_FILE
from aldm.score_rows import ScoreRow, write_csv
from pipelines.champion import (
    METHOD,
    NO_CHAMPION_DB,
    Champion,
    ChampionComparison,
    find_hash,
    is_current,
    measured_champion,
    read_comparison,
    set_champion,
    split_name,
    swap_back,
)
from pipelines.registry_download import HASH_TAG, Registered, find_alias
from pipelines.tracking_server import connect

CHAMPION = Registered("translator", 3, "c" * 64)
COMPARISON = ChampionComparison(25.0, 24.0, "brain", 6, "m" * 64, CHAMPION)


@pytest.mark.parametrize(
    ("psnr_db", "champion_db", "min_gain_db", "wins"),
    [
        (25.0, 24.0, 0.0, True),
        (24.0, 25.0, 0.0, False),
        (25.0, 25.0, 0.0, False),  # a tie keeps the champion
        (25.5, 25.0, 0.5, False),  # and so does exactly the wanted gain
        (25.75, 25.0, 0.5, True),
        (25.25, 25.0, 0.5, False),
        (24.75, 25.0, -0.5, True),
        (0.0, None, 0.0, True),
        (0.0, None, 5.0, True),  # there is nobody to be better than
    ],
)
def test_the_higher_psnr_wins_by_more_than_the_wanted_gain(
    psnr_db: float, champion_db: float | None, min_gain_db: float, wins: bool
) -> None:
    named = None if champion_db is None else CHAMPION
    comparison = replace(COMPARISON, psnr_db=psnr_db, champion_psnr_db=champion_db, champion=named)
    assert comparison.wins(min_gain_db) is wins
    assert comparison.to_beat_db(min_gain_db) == (NO_CHAMPION_DB if champion_db is None else champion_db + min_gain_db)
    assert ("NOT better" in comparison.verdict(min_gain_db)) is (named is not None and not wins)


def test_the_verdict_says_what_was_measured_and_against_whom() -> None:
    assert COMPARISON.verdict() == (
        "mean PSNR 25.000 dB inside the brain, 6 translations: better than the champion models:/translator/3 with "
        "24.000 dB"
    )
    whole = replace(COMPARISON, region="volume", champion_psnr_db=None, champion=None)
    assert whole.verdict() == "mean PSNR 25.000 dB over the whole volume, 6 translations; there is no champion yet"
    assert "NOT better by more than 2 dB than" in COMPARISON.verdict(2.0)


Scores = Mapping[tuple[str, str, str], float]
OWN_SAMPLING = {"sampler": "ddim", "num_inference_steps": 4}


def model(method: str, kind: str = "aldm") -> dict[str, Any]:
    """A model in an evaluation's record; the second of its samplings is not its own."""
    other = {"sampler": "ddim", "num_inference_steps": 50}
    return {"method": method, "kind": kind, "hash": method[0] * 64, "samplings": [OWN_SAMPLING, other]}


def row(method: str, place: tuple[str, str, str], psnr_db: float, **changes: Any) -> ScoreRow:
    subject_id, source, target = place
    usual: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": 4, "region": "brain", "nmse": 0.1, "ssim": 0.9}
    return ScoreRow(subject_id, method, source, target, psnr_db=psnr_db, **usual | changes)


def evaluation(folder: Path, rows: list[ScoreRow], champion: bool = True, kind: str = "aldm") -> Path:
    models = [model("new", kind), model("baseline"), model(METHOD)][: 3 if champion else 1]
    named = {"name": CHAMPION.name, "version": CHAMPION.version, "hash": CHAMPION.hash} if champion else None
    write_csv(folder / SCORES_FILE, rows)
    (folder / EVALUATION_FILE).write_text(json.dumps({"models": models, "champion": named}))
    return folder


PLACES = [("s1", "t1", "t2"), ("s1", "t2", "t1"), ("s2", "t1", "t2")]


def test_both_are_measured_on_the_pairs_that_both_have(tmp_path: Path) -> None:
    """One translates a pair that the other does not know; by its own pairs the new model would win."""
    rows = [row("new", place, 20.0) for place in PLACES] + [row(METHOD, place, 21.0) for place in PLACES]
    rows += [row("new", ("s1", "t1", "pd"), 90.0), row(METHOD, ("s1", "flair", "t1"), 1.0)]
    comparison = read_comparison(evaluation(tmp_path, rows))
    assert (comparison.psnr_db, comparison.champion_psnr_db, comparison.volumes) == (20.0, 21.0, 3)
    assert (comparison.model_hash, comparison.champion) == ("n" * 64, CHAMPION)
    assert not comparison.wins()


def test_only_translations_between_two_modalities_count_with_the_models_own_sampling(tmp_path: Path) -> None:
    psnrs = (10.0, 20.0, 36.0)
    rows = [row("new", place, psnr) for place, psnr in zip(PLACES, psnrs, strict=True)]
    rows += [row("new", PLACES[0], 99.0, num_inference_steps=50), row("new", PLACES[0], 98.0, sampler="dpm-solver++")]
    rows += [row("new", ("s1", "t1", "t1"), 97.0), row("baseline", PLACES[0], 96.0)]
    comparison = read_comparison(evaluation(tmp_path, rows, champion=False))
    assert comparison.psnr_db == pytest.approx(22.0)
    assert (comparison.volumes, comparison.champion_psnr_db, comparison.champion) == (3, None, None)
    assert comparison.wins()


def test_a_model_without_a_sampler_is_filed_without_one(tmp_path: Path) -> None:
    rows = [row("new", PLACES[0], 15.0, sampler="", num_inference_steps=0), row("new", PLACES[0], 99.0)]
    assert read_comparison(evaluation(tmp_path, rows, champion=False, kind="unet")).psnr_db == 15.0


@pytest.mark.parametrize(
    ("regions", "wanted"),
    [
        (("volume", "brain", "lesion"), "brain"),
        (("volume", "foreground", "lesion"), "foreground"),
        (("lesion", "volume"), "volume"),
    ],
)
def test_scores_are_those_inside_the_mask(regions: tuple[str, ...], wanted: str, tmp_path: Path) -> None:
    rows = [row("new", PLACES[0], float(10 + number), region=name) for number, name in enumerate(regions)]
    comparison = read_comparison(evaluation(tmp_path, rows, champion=False))
    assert (comparison.region, comparison.psnr_db) == (wanted, 10.0 + regions.index(wanted))


def test_what_says_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no evaluation: make one with aldm evaluate --out"):
        read_comparison(tmp_path)
    for name, rows, message in (
        ("apart", [row("new", PLACES[0], 20.0), row(METHOD, PLACES[1], 20.0)], "nothing to compare"),
        ("same", [row(who, ("s1", "t1", "t1"), 20.0) for who in ("new", METHOD)], "nothing to compare"),
        ("nan", [row("new", PLACES[0], math.nan), row(METHOD, PLACES[0], 20.0)], "the mean PSNR is nan"),
        ("inf", [row("new", PLACES[0], math.inf), row(METHOD, PLACES[0], 20.0)], "the mean PSNR is inf"),
    ):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=message):
            read_comparison(evaluation(tmp_path / name, rows))


@pytest.mark.parametrize(
    ("text", "wanted"), [("translator", ("translator", "champion")), ("translator@best", ("translator", "best"))]
)
def test_a_name_has_the_champions_alias_unless_it_says_another(text: str, wanted: tuple[str, str]) -> None:
    assert split_name(text) == wanted


def test_a_name_that_mlflow_does_not_take_is_refused() -> None:
    for text in ("a/b", "translator@a/b"):
        with pytest.raises(UserError, match="a/b"):
            split_name(text)


def test_the_record_names_the_champion() -> None:
    assert asdict(CHAMPION) == {"name": "translator", "version": 3, "hash": "c" * 64}


def test_an_evaluation_measures_the_champion_beside_its_baselines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one is asked for, and there is one; it lies in a folder that goes with the block."""
    folder = tmp_path / "champion"
    held = {("translator", "champion"): CHAMPION}

    @contextlib.contextmanager
    def fetched(model: Registered, near: Path, _: str) -> Iterator[Path]:
        assert (model, near) == (CHAMPION, tmp_path / "scores")
        folder.mkdir()
        yield folder
        folder.rmdir()

    monkeypatch.setattr("pipelines.champion.find_alias", lambda name, alias, _: held.get((name, alias)))
    monkeypatch.setattr("pipelines.champion.fetched", fetched)
    for asked, found in ((None, None), ("translator@best", None), ("translator", Champion(CHAMPION, folder))):
        with measured_champion(asked, tmp_path / "scores") as champion:
            assert champion == found
            assert folder.is_dir() is (found is not None)
        assert not folder.exists()


def test_the_alias_goes_to_the_winner_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a registry of four versions; the third has the weights of the second."""
    server = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    client = connect(server)
    client.create_registered_model("translator")
    for digest in ("a", "b", "b", "c"):
        client.create_model_version("translator", "file:///nowhere", tags={HASH_TAG: digest * 64})
    first, _, third, last = (Registered("translator", n, d * 64) for n, d in ((1, "a"), (2, "b"), (3, "b"), (4, "c")))
    assert find_hash("translator", "b" * 64, server) == third
    assert find_hash("translator", "d" * 64, server) is None

    def holders() -> list[Registered | None]:
        return [find_alias("translator", alias, server) for alias in ("champion", "previous")]

    with pytest.raises(UserError, match="no version with the alias champion, so there is nothing to go back to"):
        swap_back("translator", "champion", server)
    set_champion(first, "champion", None, server)
    assert holders() == [first, None]
    with pytest.raises(UserError, match="no version with the alias previous, so there is nothing to go back to"):
        swap_back("translator", "champion", server)
    set_champion(third, "champion", first, server)
    assert holders() == [third, first]
    assert swap_back("translator", "champion", server) == (first, third)
    assert holders() == [first, third]

    scores = evaluation(tmp_path, [row(who, PLACES[0], 20.0) for who in ("new", METHOD)])
    record = json.loads((scores / EVALUATION_FILE).read_text())
    for measured, winner, current in ((first, "n", True), (third, "n", False), (third, "a", True), (last, "c", False)):
        record["champion"] = {"name": measured.name, "version": measured.version, "hash": measured.hash}
        record["models"][0]["hash"] = winner * 64
        (scores / EVALUATION_FILE).write_text(json.dumps(record))
        assert is_current(scores, "translator", "champion") is current
