"""`aldm info`: what it prints, and that a bad preset is one message."""

import re

import pytest

from aldm.errors import UserError
from pipelines.info import main, parameters_text, trainings


def test_tiny_is_described_whole(capsys):
    assert main(["--preset", "tiny", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("preset tiny: 16 x 24 x 16 voxels")
    for expected in ("encoder ", "decoder ", "ms-spade ", "unet ", "operations of one volume", "In bounded memory"):
        assert expected in text
    for row in ("translate", "train vqgan", "train ms-spade", "train diffusion", "train unet"):
        assert re.search(rf"^{row} +\d+ x \d+ x \d+ +\d+ +\d+\.\d\d ", text, re.MULTILINE), row


def test_dry_run_computes_nothing(capsys):
    assert main(["--preset", "tiny", "--device", "cpu", "--dry-run"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("would describe preset tiny")
    assert re.match(r"memory: about \d+\.\d\d GB", second)


def test_supplement_stands_beside_its_own_networks_only():
    from aldm.planner import with_modalities
    from aldm.presets import ixi, small

    paper = parameters_text(ixi())
    assert re.search(r"these three +236\.97 +237 \(Table A\)", paper)
    assert re.search(r"U-Net +166\.5\d +658 \(Table C\)", paper)
    assert "Table" not in parameters_text(with_modalities(small()))


def test_stage_1_is_planned_on_crops_and_on_whole_volumes():
    from aldm.presets import brats

    crops = [config.train_vqgan.crop for name, config in trainings(brats()) if name == "vqgan"]
    assert crops == [(96, 96, 96), None]


def test_lossless_codec_has_no_stage_1(capsys):
    main(["--preset", "tiny", "--set", "codec.kind=haar", "--device", "cpu", "--no-layers"])
    text = capsys.readouterr().out
    assert "train vqgan" not in text
    assert "train ms-spade" in text


def test_unknown_preset_is_one_message():
    with pytest.raises(UserError, match="no preset 'huge'"):
        main(["--preset", "huge"])
