"""The fixed segmenter: what it learns from, what it finds in real, copied and empty volumes, and what is said of it."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from untrained import save_untrained

from aldm import usefulness
from aldm.data.dataset import collate
from aldm.data.labels import LESION, TISSUES, LabelledSubjects, label_map, structures_of
from aldm.data.store import VolumeStore
from aldm.errors import UserError
from aldm.models.segmenter import Segmenter
from aldm.planner import plan_memory
from aldm.players import StepInfo
from aldm.presets import tiny
from aldm.randomness import derived_generator
from aldm.score_rows import OVERLAPS, REFERENCES, SEGMENTED, ScoreRow, frame, mean_scores, of_images, read_csv
from aldm.segmentation import TrueStructure
from aldm.segmenter_stage import SegmenterStage, load_segmenter, segmentation_loss
from pipelines import evaluate, train

STRUCTURES = (*TISSUES, LESION)
STRUCTURE = SEGMENTED + LESION


@pytest.fixture(scope="module")
def run(brats_store: VolumeStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter trained for seconds on the simulated subjects at 8 mm."""
    folder = tmp_path_factory.mktemp("segmenter") / "run"
    words = ["segmenter", "--store", str(brats_store.path), "--run-dir", str(folder), "--preset", "tiny"]
    words += ["--max-steps", "90", "--engine", "plain", "--device", "cpu", "--log-level", "warning", "--no-tracking"]
    for text in ("validate_every=1000", "checkpoint_every=1000", "learning_rate=1e-2", "ema_decay=0"):
        words += ["--set", f"train_segmenter.{text}"]
    assert train.main([*words, "--set", "segmenter.channels=[16,16]"]) == 0
    return folder


@pytest.fixture(scope="module")
def measured(run: Path, brats_store: VolumeStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of an untrained model with that segmenter, on the subjects that it was trained on."""
    folder = tmp_path_factory.mktemp("usefulness")
    save_untrained(folder / "model", modalities=brats_store.modalities, preprocess=brats_store.preprocess)
    words = ["--model", folder / "model", "--store", brats_store.path, "--segmenter", run, "--out", folder / "scores"]
    assert evaluate.main([*map(str, words), "--split", "train", "--max-subjects", "3", "--pictures", "0"]) == 0
    return folder / "scores"


def test_real_volumes_are_segmented_best_and_empty_ones_worst(measured: Path) -> None:
    rows = [row for row in read_csv(measured / "scores.csv") if row.region.startswith(SEGMENTED)]
    means = mean_scores(rows, with_codec=True).groupby("method").mean()  # over structures
    assert set(means.index) == {"real", "empty", "aldm", "reconstruction", *REFERENCES}
    others = means.drop(["real", "empty"])
    assert means["dice"]["real"] > max(0.5, others["dice"].max())
    assert means["hd95_mm"]["real"] < others["hd95_mm"].min()
    made = others.drop(["aldm", "reconstruction"])  # an untrained model gives less than nothing
    assert means["dice"]["empty"] < made["dice"].min()
    assert means["hd95_mm"]["empty"] > made["hd95_mm"].max()
    assert means["volumes"]["real"] * 3 == means["volumes"]["identity"]  # each target once, and from three sources


def test_the_rows_are_those_of_the_segmenter_on_the_target_s_own_modality(
    measured: Path, run: Path, brats_store: VolumeStore
) -> None:
    rows = read_csv(measured / "scores.csv")
    segmenter, digest = load_segmenter(run, brats_store)
    subject = rows[0].subject_id
    assert segmenter.structures == structures_of(brats_store) == STRUCTURES
    true = TrueStructure(brats_store.seg(subject) > 0, brats_store.preprocess.spacing_mm)
    for method, source in (("real", "t2"), ("identity", "flair")):
        wanted = true.score(segmenter.segment(brats_store.volume(subject, source), "t2") == 4)
        places = [(subject, method, source, "t2", STRUCTURE)]
        (row,) = [r for r in rows if (r.subject_id, r.method, r.source, r.target, r.region) in places]
        assert [getattr(row, name) for name in OVERLAPS] == pytest.approx(list(asdict(wanted).values()), rel=1e-6)
        assert math.isnan(row.psnr_db)
    assert all(math.isnan(row.dice) for row in of_images(rows))
    pandas.testing.assert_frame_equal(pandas.read_parquet(measured / "scores.parquet"), frame(rows))
    assert json.loads((measured / "evaluation.json").read_text())["segmenter"] == {"folder": str(run), "hash": digest}


def test_the_report_begins_with_the_segmenter_s_own_dice_and_keeps_its_rows_apart(measured: Path) -> None:
    text = (measured / "scores.md").read_text()
    real = usefulness.real_dice(read_csv(measured / "scores.csv"))
    words = ", ".join(f"{name} {real[name]:.3f}" for name in STRUCTURES)
    assert text.index(f"The segmenter's Dice on real volumes: {words}.") < text.index("## Region: volume")
    assert SEGMENTED not in text
    lines = text[text.index("## Usefulness") :].splitlines()
    methods = [
        line.split(" | ")[0].strip("| ")
        for line in lines[lines.index("| | csf | grey | white | lesion | volumes |") + 2 :]
    ]
    assert (methods[0], methods[methods.index("") - 1]) == ("real", "empty")


@pytest.mark.parametrize(("dice", "poor"), [(0.5, False), (0.49, True), (math.nan, True)])
def test_a_poor_segmenter_is_said_to_be_poor(dice: float, poor: bool) -> None:
    row = ScoreRow("1", "real", "t1", "t1", "", 0, STRUCTURE, dice=dice, hd95_mm=3, volume_ml=1, volume_error_ml=2)
    assert ("too poor" in usefulness.verdict([row])) == poor
    cell = "-" if math.isnan(dice) else f"{dice:.3f}"
    assert usefulness.usefulness_table([row]).splitlines()[-1] == f"| real | {cell} / 3.0 / 2.0 | 1 |"
    assert usefulness.usefulness_table([replace(row, region="brain")]) == ""


def test_each_modality_has_a_network_that_sees_no_other() -> None:
    torch.manual_seed(0)
    segmenter = Segmenter(("t1", "t2"), ("lesion",), (8, 8), 4)
    for network in segmenter.networks:
        torch.nn.init.normal_(network.out.conv.weight)
    volumes = torch.rand(1, 2, 7, 10, 8) * 2 - 1
    before = segmenter(volumes)
    assert before.shape == (1, 2, 2, 7, 10, 8)
    volumes[:, 0] = -1
    after = segmenter(volumes)
    assert torch.equal(before[:, 1], after[:, 1])
    assert not torch.equal(before[:, 0], after[:, 0])
    same = volumes[0, 1].numpy()
    assert not np.array_equal(
        segmenter.logits(volumes[:, 1:], 0).detach(), segmenter.logits(volumes[:, 1:], 1).detach()
    )
    assert np.array_equal(segmenter.segment(same, "t2"), after[0, 1].argmax(dim=0).numpy())


def test_the_loss_is_cross_entropy_and_dice_over_the_volumes_that_there_are(brats_store: VolumeStore) -> None:
    logits, labels = torch.randn(2, 3, 3, 4, 2), torch.randint(3, (2, 3, 4, 2))
    wanted = []
    for one, label in zip(logits.softmax(dim=1), labels, strict=True):
        places = list(np.ndindex(*label.shape))
        entropy = -sum(math.log(one[(label[p], *p)]) for p in places) / len(places)
        dice = []
        for k in (1, 2):
            both = sum(float(one[(k, *p)]) * (label[p] == k).item() for p in places)
            dice.append((2 * both + 1) / (float(one[k].sum()) + float((label == k).sum()) + 1))
        wanted.append(entropy + 1 - sum(dice) / 2)
    assert segmentation_loss(logits, labels).tolist() == pytest.approx(wanted, rel=1e-5)
    stage = SegmenterStage(tiny(), brats_store, (LESION,))
    batch = collate([stage.samples("train").sample(0, derived_generator(0, 0))])
    info = StepInfo(0, [], frozenset())
    each = []
    for place in range(4):
        batch["has"] = torch.eye(4)[None, place]
        each.append(float(stage._loss(stage.segmenter, batch, info)[0].detach()))
    batch["has"] = torch.tensor([[1.0, 0, 0, 1]])
    assert float(stage._loss(stage.segmenter, batch, info)[0].detach()) == pytest.approx((each[0] + each[3]) / 2)


def test_a_sample_is_a_subject_s_volumes_and_where_its_lesion_is(brats_store: VolumeStore) -> None:
    names = brats_store.modalities
    subjects = LabelledSubjects(brats_store, "train", names, STRUCTURES, None, 1.0)  # flipped along every axis
    records = brats_store.subjects("train")
    assert len(subjects) == len(records)
    sample = subjects.sample(1, derived_generator(0, 0))
    subject = records[1].subject_id
    assert sample["has"].tolist() == [1.0] * 4
    for place, name in enumerate(names):
        assert torch.equal(sample["volumes"][place].flip(0, 1, 2), torch.tensor(brats_store.volume(subject, name)))
    lesion, tissue = brats_store.seg(subject) > 0, brats_store.tissue(subject)
    assert lesion.any()
    wanted = np.where(lesion, 4, tissue)
    assert set(np.unique(wanted)) == {0, 1, 2, 3, 4}
    assert np.array_equal(sample["labels"].flip(0, 1, 2).numpy(), wanted)
    assert np.array_equal(label_map(brats_store, subject, STRUCTURES), wanted)
    assert np.array_equal(label_map(brats_store, subject, ("white", LESION)), 2 * lesion + ((tissue == 3) & ~lesion))
    lacking = LabelledSubjects(brats_store, "train", ("t1", "pd"), (LESION,)).sample(1, derived_generator(0, 0))
    assert lacking["has"].tolist() == [1.0, 0.0]
    assert (lacking["volumes"][1] == -1).all()


def test_a_store_without_labels_is_refused(ixi_store: VolumeStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a segmentation: there is nothing to learn"):
        train.main(
            ["segmenter", "--store", str(ixi_store.path), "--run-dir", str(tmp_path / "run"), "--preset", "tiny"]
        )
    assert list(tmp_path.iterdir()) == []


def test_a_segmenter_of_other_data_is_refused(run: Path, brats_store: VolumeStore, ixi_store: VolumeStore) -> None:
    with pytest.raises(UserError, match=r"the store .* has pd too"):
        load_segmenter(run, ixi_store)
    other = VolumeStore.open(brats_store.path)
    other.preprocess = replace(other.preprocess, intensity="paper")
    with pytest.raises(UserError, match="train it on a store like this one"):
        load_segmenter(run, other)
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_segmenter(run.parent, brats_store)


def test_its_training_is_planned() -> None:
    one, two = (plan_memory(replace(tiny(), modalities=("t1", "t2", "pd")[:number]), "segmenter") for number in (1, 2))
    assert two.flops == pytest.approx(2 * one.flops, rel=0.01)
    assert two.weights_bytes == 2 * one.weights_bytes > 0


def test_a_structure_that_one_method_lacks_leaves_its_own_cell_empty() -> None:
    def row(method: str, structure: str, dice: float) -> ScoreRow:
        region = SEGMENTED + structure
        return ScoreRow("1", method, "t1", "t2", "", 0, region, dice=dice, hd95_mm=1.0, volume_error_ml=2.0)

    rows = [row("real", "grey", 0.9), row("real", "lesion", 0.8), row("a", "lesion", 0.5)]
    assert "| a |  | 0.500 / 1.0 / 2.0 | 1 |" in usefulness.usefulness_table(rows)
