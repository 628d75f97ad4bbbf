"""The evaluation around predictors whose scores are known, and what is said of the scores."""

import csv
import json
import math
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pandas
import pytest
from scipy import stats
from untrained import save_untrained

from aldm import metrics, score_table
from aldm.config import Config, DiffusionConfig, SamplingConfig
from aldm.errors import UserError
from aldm.evaluation import Candidate, check_candidates, count_translations, evaluate, pair_seed
from aldm.model_card import read_card_scores
from aldm.predictors import Predictor
from aldm.presets import tiny
from aldm.references import fit_references
from aldm.score_rows import REFERENCES, MethodKey, ScoreRow, frame, mean_scores, read_csv, write_csv
from aldm.translate import Translator
from pipelines.evaluate import main

COLUMNS = (
    "subject_id,method,source,target,sampler,num_inference_steps,region,psnr_db,nmse,ssim,mae,ms_ssim,nmi,sharpness,"
    "dice,hd95_mm,volume_ml,volume_error_ml,coverage,error_ratio,gain_psnr_db,gain_ssim"
)


class Echo(Predictor):
    """Takes the source for every target."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def encode(self, x):
        return x

    def decode(self, code):
        return code

    def predict(self, code, source, target, sampling, generator, on_step):
        return code.clone()


def echo(store, method="aldm", modalities=None, **changes) -> Candidate:
    config = replace(
        tiny(),
        modalities=store.modalities if modalities is None else modalities,
        preprocess=store.preprocess,
        diffusion=DiffusionConfig(objective="v"),
        sampling=SamplingConfig(sampler="ddim", num_inference_steps=2),
    )
    config = replace(config, **changes)
    model = Translator(Echo(config), config, kind="aldm", median_percentiles={}, model_hash="x")
    return Candidate(method, model, (model.sampling(), model.sampling("ddim", 3)))


@pytest.fixture(scope="module")
def measured(brats_store):
    subjects = brats_store.subjects("test") + brats_store.subjects("validation")
    return subjects, evaluate(brats_store, subjects, [echo(brats_store)])


def scores_of(rows, **wanted):
    return {
        (r.subject_id, r.source, r.target): (r.psnr_db, r.nmse, r.ssim)
        for r in rows
        if all(getattr(r, name) == value for name, value in wanted.items())
    }


def test_a_predictor_that_returns_the_source_scores_as_the_identity_row(measured):
    subjects, result = measured
    for region in ("volume", "brain"):
        for steps in (2, 3):
            model = scores_of(result.rows, method="aldm", region=region, num_inference_steps=steps)
            identity = scores_of(result.rows, method="identity", region=region)
            assert len(model) == 16 * len(subjects)
            assert len(identity) == 12 * len(subjects)
            assert all(place[1] != place[2] for place in identity)
            for place, values in identity.items():
                assert model[place] == pytest.approx(values)
            diagonal = [values for place, values in model.items() if place[1] == place[2]]
            assert diagonal == [(math.inf, 0.0, pytest.approx(1.0))] * 4 * len(subjects)


def test_the_lossless_codec_reconstructs_exactly_on_the_diagonal(measured):
    subjects, result = measured
    rows = scores_of(result.rows, method="reconstruction", region="volume")
    assert len(rows) == 4 * len(subjects)
    assert all(place[1] == place[2] for place in rows)
    assert all(nmse < 1e-10 for _, nmse, _ in rows.values())


def test_training_mean_is_the_mean_of_the_training_volumes_whatever_the_source(measured, brats_store):
    subjects, result = measured
    train = [record.subject_id for record in brats_store.subjects("train")]
    mean = np.mean([brats_store.volume(name, "t2").astype(np.float64) for name in train], axis=0)
    subject = subjects[0].subject_id
    truth = metrics.to_unit(brats_store.volume(subject, "t2"))
    expected = metrics.score(truth, metrics.to_unit(mean), {"brain": brats_store.mask(subject)})["brain"]
    rows = scores_of(result.rows, method="training-mean", region="brain", subject_id=subject, target="t2")
    assert {place[1] for place in rows} == set(brats_store.modalities)
    for values in rows.values():
        assert values == pytest.approx((expected.psnr_db, expected.nmse, expected.ssim), rel=1e-4)


def test_the_references_of_intensity_are_scored_once_for_every_pair(measured, brats_store):
    """As the store's own fit maps the source inside the mask, and as the identity outside."""
    subjects, result = measured
    pairs = [(s, t) for s in brats_store.modalities for t in brats_store.modalities if s != t]
    references = fit_references(brats_store, pairs)
    subject = subjects[0].subject_id
    mask, source, truth = brats_store.mask(subject), *(brats_store.volume(subject, name) for name in ("t1", "t2"))
    predictions = dict(references.predictions(source, mask, "t1", "t2"))
    assert set(predictions) == {"intensity-map", "histogram-matching"}
    for method, prediction in predictions.items():
        mine = [row for row in result.rows if row.method == method and row.region == "brain"]
        assert sorted((row.subject_id, row.source, row.target) for row in mine) == sorted(
            (record.subject_id, *pair) for record in subjects for pair in pairs
        )
        expected = metrics.score(metrics.to_unit(truth), metrics.to_unit(prediction), {"brain": mask})["brain"]
        values = scores_of(mine, subject_id=subject, source="t1", target="t2")[subject, "t1", "t2"]
        assert values == pytest.approx((expected.psnr_db, expected.nmse, expected.ssim), rel=1e-4)
    mean_db = {
        method: np.mean([db for db, _, _ in scores_of(result.rows, method=method, region="brain").values()])
        for method in ("intensity-map", "identity")
    }
    assert mean_db["intensity-map"] > mean_db["identity"] + 1  # the best map there is knows the target's contrast


def test_the_lesion_is_a_region_where_the_segmentation_has_a_voxel(measured, brats_store):
    subjects, result = measured
    with_lesion = {r.subject_id for r in subjects if (brats_store.seg(r.subject_id) > 0).any()}
    assert {row.subject_id for row in result.rows if row.region == "lesion"} == with_lesion
    assert with_lesion
    assert {row.region for row in result.rows} == {"volume", "brain", "edges", "lesion"}


def test_every_translation_is_timed_and_counted(measured, brats_store):
    subjects, result = measured
    candidates = [echo(brats_store)]
    assert sum(len(times) for times in result.seconds.values()) == count_translations(brats_store, subjects, candidates)
    assert all(seconds > 0 for times in result.seconds.values() for seconds in times)


def test_examples_are_those_of_the_first_sampling(brats_store):
    seen, counted = [], []
    subjects = brats_store.subjects("test")[:1]
    evaluate(brats_store, subjects, [echo(brats_store)], on_example=seen.append, on_volume=lambda: counted.append(1))
    assert len(seen) == 16
    assert len(counted) == 32
    assert {example.key.num_inference_steps for example in seen} == {2}
    assert all(0 <= example.prediction.min() <= example.prediction.max() <= 1 for example in seen)


class Backwards:
    """Workers that finish the last task first and hand the function over as its pickle."""

    def map(self, function, items, *, description, unit, at_once=None):
        yield from map(pickle.loads(pickle.dumps(function)), reversed(items))


def loaded_by_workers(store):
    LOADS.append(store)
    return [echo(store)]


LOADS = []


def test_workers_load_the_candidates_once_and_their_order_leaves_no_trace(measured, brats_store):
    subjects, result = measured
    LOADS.clear()
    other = evaluate(
        brats_store,
        subjects,
        [echo(brats_store)],
        workers=Backwards(),
        load=partial(loaded_by_workers, brats_store),
    )
    assert len(subjects) > 1
    assert other.rows == result.rows
    assert {key: len(times) for key, times in other.seconds.items()} == {
        key: len(times) for key, times in result.seconds.items()
    }
    assert len(LOADS) == 1


def test_only_modalities_that_everyone_knows_are_measured(brats_store):
    candidates = [echo(brats_store), echo(brats_store, "other", modalities=("t1", "t2"))]
    assert check_candidates(brats_store, candidates) == ("t1", "t2")
    rows = evaluate(brats_store, brats_store.subjects("test")[:1], candidates).rows
    assert {row.source for row in rows} | {row.target for row in rows} == {"t1", "t2"}


def test_candidates_that_cannot_be_compared_are_refused(brats_store):
    other_grid = replace(brats_store.preprocess, spacing_mm=(7.0, 8.0, 8.0))
    for candidates, words in (
        ([echo(brats_store), echo(brats_store)], "one name"),
        ([echo(brats_store, preprocess=other_grid)], "preprocessing"),
        ([echo(brats_store, modalities=("pd",))], "no modality"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate(brats_store, brats_store.subjects("test"), candidates)
    with pytest.raises(UserError, match="no subject"):
        evaluate(brats_store, [], [echo(brats_store)])


def test_seeds_differ_between_pairs_and_subjects_and_stay():
    seeds = {pair_seed(0, subject, s, t) for subject in ("a", "b") for s in ("t1", "t2") for t in ("t1", "t2")}
    assert len(seeds) == 8
    assert pair_seed(3, "a", "t1", "t2") == pair_seed(0, "a", "t1", "t2") + 3
    assert pair_seed(0, "a", "t1", "t2") == 2986810024  # crc32 of "a/t1/t2": the same on every machine


# ------------------------------------------------------------------------------------------------- what is said of it


def row(subject, method, psnr_db, source="t1", target="t2", region="brain", sampler="", steps=0):
    return ScoreRow(subject, method, source, target, sampler, steps, region, psnr_db, 1 / psnr_db, psnr_db / 100)


def test_means_are_over_translations_and_leave_out_what_is_not_defined():
    rows = [row("1", "b", 20.0), row("2", "b", 23.0), row("1", "b", 99.0, target="t1"), row("1", "b", 7.0, region="x")]
    rows = [replace(r, nmi=nmi) for r, nmi in zip(rows, (1.5, math.nan, 2.0, math.nan), strict=True)]
    rows += [row("1", "reconstruction", 40.0, source="t2"), row("1", "a", 30.0, sampler="ddim", steps=4)]
    means = mean_scores(rows)
    assert list(means.index) == [("b", "", 0, "brain"), ("b", "", 0, "x"), ("a", "ddim", 4, "brain")]
    brain = means.loc["b", "", 0, "brain"]
    assert (brain.psnr_db, brain.ssim, brain.nmi, brain.volumes) == pytest.approx((21.5, 0.215, 1.5, 2))
    assert math.isnan(means.loc["b", "", 0, "x"].nmi)
    with_codec = mean_scores(rows, with_codec=True)
    assert with_codec.loc["reconstruction", "", 0, "brain"].psnr_db == 40
    assert with_codec.drop("reconstruction").equals(means)
    lines = score_table.card(rows, "brain").splitlines()
    assert lines[2:] == [
        "| b | 21.50 | 0.047 | 0.215 | - | - | 1.500 | - | 2 |",
        "| a (ddim 4) | 30.00 | 0.033 | 0.300 | - | - | - | - | 1 |",
    ]


def test_the_scores_of_earlier_versions_are_read_without_those_that_they_lack(tmp_path):
    names = COLUMNS.split(",")[:10]
    (tmp_path / "old.csv").write_text(f"{','.join(names)}\n1,b,t1,t2,,0,brain,20.0,0.05,0.2\n")
    (old,) = read_csv(tmp_path / "old.csv")
    assert (old.psnr_db, old.ssim) == (20.0, 0.2)
    assert math.isnan(old.mae)
    assert math.isnan(old.sharpness)


def key(method):
    return MethodKey(method, "", 0)


def test_summary_is_mean_and_sample_standard_deviation():
    values = [20.0, 23.0, 28.5]
    summary = score_table.summarize([row(str(i), "a", value) for i, value in enumerate(values)])
    assert summary.count == 3
    assert summary.mean[0] == pytest.approx(np.mean(values))
    assert summary.std[0] == pytest.approx(stats.tstd(values))
    assert summary.text().startswith("23.83 ± 4.31 / ")
    assert score_table.summarize([row("a", "a", 20.0)]).text() == "20.00 / 0.050 / 0.200"
    assert score_table.summarize([row("a", "a", math.inf)]).text().startswith("exact / ")


def test_comparison_is_the_paired_t_interval_over_subjects():
    rng = np.random.default_rng(0)
    first, second = rng.normal(25, 2, (8, 2)), rng.normal(24, 2, (8, 2))
    rows = [
        row(str(i), method, float(values[i, j]), target=target)
        for method, values in (("a", first), ("b", second))
        for i in range(8)
        for j, target in enumerate(("t2", "pd"))
    ]
    rows.append(row("9", "a", 99.0))  # a subject that only one method has does not count
    rows.append(row("0", "b", 99.0, source="t2", target="t2"))  # nor does the diagonal
    found = score_table.compare(rows, key("a"), key("b"), "brain")
    oracle = stats.ttest_rel(first.mean(axis=1), second.mean(axis=1))
    low, high = oracle.confidence_interval(0.95)
    sign = 1 if oracle.statistic > 0 else -1
    assert (found.better.method, found.than.method) == (("a", "b") if sign > 0 else ("b", "a"))
    assert found.num_subjects == 8
    assert (found.low_db, found.high_db) == pytest.approx((low, high) if sign > 0 else (-high, -low))
    assert found.certain == (oracle.pvalue < 0.05)


def test_one_subject_or_nothing_in_common_gives_no_certainty():
    rows = [row("1", "a", 25.0), row("1", "b", 24.0), row("2", "c", 30.0)]
    assert not score_table.compare(rows, key("a"), key("b"), "brain").certain
    assert score_table.compare(rows, key("a"), key("c"), "brain") is None
    assert score_table.compare(rows, key("a"), key("b"), "lesion") is None
    assert "one subject: none" in score_table.comparisons(rows, "brain")


def test_the_best_method_is_tested_against_each_other_one_and_corrected_for_their_number():
    rng = np.random.default_rng(1)
    values = {"a": rng.normal(25, 1, 9), "b": rng.normal(24.5, 1, 9), "c": rng.normal(23, 1, 9)}
    rows = [row(str(i), method, float(v)) for method, own in values.items() for i, v in enumerate(own)]
    rows += [row(str(i), "reconstruction", 40.0, source="t2") for i in range(9)]  # translates nothing
    p_of = {other: stats.wilcoxon(values["a"] - values[other]).pvalue for other in "bc"}
    assert p_of["c"] < p_of["b"]
    lines = score_table.comparisons(rows, "brain").splitlines()
    assert lines[0].endswith("| p (Holm, 2 comparisons) |")
    cells = {tuple(line.split(" | ")[:2]): line.split(" | ")[-1].strip(" |") for line in lines[2:]}
    assert cells == {
        ("| a", "c"): f"{2 * p_of['c']:.3f}",
        ("| a", "b"): f"{max(2 * p_of['c'], p_of['b']):.3f}",
        ("| b", "c"): "",
    }
    few = [each for each in rows if int(each.subject_id) < 5]
    lines = score_table.comparisons(few, "brain").splitlines()
    assert lines[0].endswith("| subjects | | p |"), "nothing was tested, so nothing is corrected"
    assert "cannot be significant" in lines[2]


def test_methods_with_equal_scores_have_no_winner():
    rows = [row(str(i), method, 20.0 + i) for i in range(8) for method in "ab"]
    assert score_table.compare(rows, key("a"), key("b"), "brain").p_value == 1.0
    assert score_table.comparisons(rows, "brain").endswith("| not certain | 1.000 |")


def test_table_has_a_row_per_source_and_a_column_per_target_in_the_vocabulary_s_order():
    rows = [
        row("1", "a", 20.0 + i, source=s, target=t)
        for i, (s, t) in enumerate((("pd", "t1"), ("t1", "t2"), ("t2", "pd")))
    ]
    lines = score_table.pairs_table(rows, key("a"), "brain").splitlines()
    assert lines[0] == "| PSNR (dB) / NMSE / SSIM | -> t1 | -> t2 | -> pd |"
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["t1 ->", "t2 ->", "pd ->"]
    assert lines[2].split("|")[3].strip() == "21.00 / 0.048 / 0.210"
    assert lines[2].split("|")[2].strip() == ""


def test_the_paper_s_table_stands_next_to_ixi_only():
    rows = [row("1", "a", 25.0), row("2", "a", 26.0)]
    document = {name: score_table.document(rows, title="x", layout=name, seconds={}) for name in ("ixi", "brats")}
    assert "| pd -> | 27.968 ± 0.521 / 0.070 ± 0.028 / 0.931 ± 0.028 |" in document["ixi"]
    assert "Table D" not in document["brats"]


def test_a_model_s_card_holds_the_means_of_all_scores_and_null_where_there_is_none(tmp_path):
    rows = [replace(row("1", "aldm", psnr, sampler="ddim", steps=4), sharpness=0.5) for psnr in (20.0, 23.0)]
    write_csv(tmp_path / "scores.csv", [*rows, row("1", "aldm", 99.0, target="t1", sampler="ddim", steps=4)])
    (tmp_path / "times.csv").write_text(
        "method,sampler,num_inference_steps,seconds\naldm,ddim,4,0.25\naldm,ddim,4,0.5\n"
    )
    (tmp_path / "evaluation.json").write_text(json.dumps({"models": [{"hash": "x"}]}))
    (card,) = read_card_scores(tmp_path, "x")
    assert {name: card[name] for name in ("method", "sampler", "num_inference_steps", "region")} == {
        "method": "aldm",
        "sampler": "ddim",
        "num_inference_steps": 4,
        "region": "brain",
    }
    assert (card["psnr_db"], card["ssim"], card["sharpness"], card["seconds"]) == (21.5, 0.215, 0.5, 0.375)
    assert card["nmi"] is None
    assert json.loads(json.dumps([card], allow_nan=False)) == [card]


# ---------------------------------------------------------------------------------------------------------- the job


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_untrained(folder / "model")
    save_untrained(folder / "plain", kind="unet")
    return folder


def test_the_job_writes_scores_tables_times_card_and_pictures(models, ixi_store, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--store", str(ixi_store.path), "--out", str(out), "--num-samples", "2", "--samplers", "ddim:1"]
    assert main(["--model", str(models / "model"), "--baseline", str(models / "plain"), *arguments]) == 0
    lines = (out / "scores.csv").read_text().splitlines()
    assert lines[0] == COLUMNS
    rows = list(csv.DictReader(lines))
    pandas.testing.assert_frame_equal(pandas.read_parquet(out / "scores.parquet"), frame(read_csv(out / "scores.csv")))
    subjects = {record.subject_id for record in ixi_store.subjects("test")}
    assert {r["subject_id"] for r in rows} == subjects
    keys = {(r["method"], r["sampler"], r["num_inference_steps"]) for r in rows}
    assert keys == {
        ("aldm", "dpm-solver++", "3"),
        ("aldm", "ddim", "1"),
        *((name, "", "0") for name in ("unet", *REFERENCES, "reconstruction")),
    }
    assert {r["region"] for r in rows} == {"volume", ixi_store.region(min(subjects)), "edges"}
    assert "Table D" in (out / "scores.md").read_text()
    assert len(list((out / "pictures").glob("*.png"))) == 2 * 6  # of one subject, by both models
    assert (out / "quality.png").stat().st_size > 1000
    assert len((out / "times.csv").read_text().splitlines()) == 1 + 3 * 9 * len(subjects)
    record = json.loads((out / "evaluation.json").read_text())
    assert [model["method"] for model in record["models"]] == ["aldm", "unet"]
    assert "scores.md" in capsys.readouterr().out


def test_a_baseline_may_be_named_and_dry_run_writes_nothing(models, ixi_store, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--model", str(models / "model"), "--baseline", f"plain={models / 'plain'}", "--dry-run"]
    assert main([*arguments, "--store", str(ixi_store.path), "--out", str(out), "--samplers", "all"]) == 0
    said = capsys.readouterr().out
    assert "plain: plain" in said
    assert all(words in said for words in ("dpm-solver++ 10", "ddpm 50", "ddim 4", "GB of memory"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--model": "nowhere"}, "nowhere"),
        ({"--store": "nowhere"}, "not a store"),
        ({"--samplers": "ddim:many"}, "SAMPLER:STEPS"),
        ({"--samplers": "one-step"}, "dpm-solver"),
        ({"--max-subjects": "0"}, "max_subjects"),
        ({"--pictures": "-1"}, "`pictures` is -1, wanted at least 0"),
        ({"--seed": str(2**63)}, "--seed is 9223372036854775808, wanted 0 to"),
        ({"--out": "taken"}, "exists"),
        ({"--set": "unet.channels=[4]"}, "unet.*carries"),
        ({"--preset": "small"}, "carries"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_nothing_is_written(
    models, ixi_store, tmp_path, monkeypatch, change, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    arguments = {"--model": str(models / "model"), "--store": str(ixi_store.path), "--out": "out"} | change
    with pytest.raises(UserError, match=words):
        main([word for pair in arguments.items() for word in pair])
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["file"]
