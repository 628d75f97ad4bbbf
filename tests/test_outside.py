"""What `aldm prepare` says of a head that is larger than the model's box."""

import logging
from dataclasses import replace

import nibabel
import numpy as np
import pytest
from test_clipping import record
from test_translate import head_and_neck, placed

from aldm.data.outside import outside_report
from aldm.data.store import VolumeStore
from pipelines.prepare import main


def test_what_lies_outside_is_told_and_more_than_half_a_percent_is_warned():
    def subject(name, share):
        return replace(record(name, {"t1": (0.0, None)}), share_outside=share)

    line, warnings = outside_report([subject("A", 0.0), subject("B", 0.004), subject("C", 0.02)])
    assert line == "outside the box: 0.80% (at most 2.00%)"
    assert len(warnings) == 1
    assert "in 1 of 3 subjects (C 2.0%)" in warnings[0]
    assert outside_report([subject("A", 0.005)])[1] == []
    assert outside_report([subject("A", None)]) == ("outside the box: not measured", [])


def test_a_store_keeps_the_vertex_of_a_head_with_its_neck(tmp_path, capsys, caplog):
    volume = head_and_neck(placed())
    nibabel.save(nibabel.Nifti1Image(volume.data, volume.affine), tmp_path / "t1.nii")
    (tmp_path / "table.csv").write_text("subject_id,modality,path\nA,t1,t1.nii\n")
    words = ["--layout", "table", "--preset", "tiny", "--spatial-shape", "24", "24", "16", "--num-processes", "1"]
    with caplog.at_level(logging.WARNING):
        main([str(tmp_path / "table.csv"), str(tmp_path / "store"), *words])
    store = VolumeStore.open(tmp_path / "store")
    (subject,) = store.subjects()
    whole, box = store.whole_mask("A"), store.mask("A")
    assert not whole[:, :, subject.crop_start[2] + 16 :].any(), "nothing of the head lies above the box"
    assert box[:, :, -1].any(), "the box ends at the vertex"
    assert subject.share_outside == pytest.approx(1 - box.sum() / whole.sum())
    assert 0.02 < subject.share_outside < 0.5
    assert np.flatnonzero(whole.any(axis=(0, 1)))[0] < subject.crop_start[2], "the neck goes on"
    assert f"(at most {subject.share_outside:.2%})" in capsys.readouterr().out
    assert "outside the model's box" in caplog.text
