"""What `aldm prepare` says of clipped intensities."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from aldm.config import PreprocessConfig
from aldm.data.clipping import clipping_report
from aldm.data.store import SubjectRecord, VolumeStore
from pipelines.prepare import main

CONFIG = PreprocessConfig(spacing_mm=(8.0, 8.0, 8.0), spatial_shape=(16, 24, 16))


def record(subject_id: str, clipped: dict[str, tuple[float, float | None]]) -> SubjectRecord:
    modalities = tuple(clipped)
    return SubjectRecord(
        subject_id=subject_id,
        split="train",
        modalities=modalities,
        has_seg=any(seg is not None for _, seg in clipped.values()),
        region="brain",
        grid_affine=tuple(map(tuple, np.eye(4).tolist())),
        grid_shape=(4, 4, 4),
        crop_start=(0, 0, 0),
        percentiles=dict.fromkeys(modalities, (0.0, 1.0)),
        backgrounds=dict.fromkeys(modalities),
        clipped=clipped,
        sources={},
    )


def test_shares_are_told_and_more_than_a_hundredth_is_warned():
    lines, warnings = clipping_report(
        [
            record("A", {"t1": (0.002, 0.0), "flair": (0.004, 0.6)}),
            record("B", {"t1": (0.004, None), "flair": (0.004, 0.01)}),
            record("C", {"t1": (0.003, None)}),
        ]
    )
    assert lines == [
        "clipped of t1: brain 0.30% (at most 0.40%), segmentation 0.00% (at most 0.00%)",
        "clipped of flair: brain 0.40% (at most 0.40%), segmentation 30.50% (at most 60.00%)",
    ]
    assert warnings == [
        "flair: more than 1% of the segmentation is clipped, so its contrast is lost, in 1 of 2 subjects (A 60.0%)"
    ]
    assert clipping_report([record("A", {"t2": (0.011, None)})])[1] == [
        "t2: more than 1% of the brain is clipped, so its contrast is lost, in 1 of 1 subjects (A 1.1%)"
    ]


@pytest.mark.parametrize(("rule", "warned"), [("tissue", False), ("foreground", False), ("paper", True)])
def test_prepare_measures_it_warns_and_keeps_it(brats_tree, tmp_path, capsys, caplog, rule, warned):
    words = ["--spacing-mm", "8", "--spatial-shape", "16", "24", "16", "--layout", "brats", "--num-processes", "1"]
    with caplog.at_level(logging.WARNING):
        main([str(brats_tree), str(tmp_path / "store"), *words, "--set", f"preprocess.intensity={rule}"])
    assert "clipped of t1ce: brain" in capsys.readouterr().out
    assert ("flair: more than 1% of the segmentation is clipped" in caplog.text) is warned
    store = VolumeStore.open(tmp_path / "store")
    assert store.preprocess == replace(CONFIG, intensity=rule)
    for kept in store.subjects():
        for name in kept.modalities:
            of_mask, of_seg = kept.clipped[name]
            data = store.whole(kept.subject_id, name)
            inside = store.whole_mask(kept.subject_id)
            assert of_seg is not None
            if not warned and name in ("t1ce", "flair"):
                assert of_seg < 0.05
            assert of_mask == pytest.approx(np.mean(np.abs(data[inside]) == 1), abs=5e-3), "float16 rounds to 1"
