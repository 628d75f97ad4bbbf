"""aldm benchmark --codecs: what it trains, what it measures, and that its table is what the scores say."""

import csv
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import run_here

from aldm.checkpoint import save_checkpoint
from aldm.cli import main
from aldm.data.store import VolumeStore
from aldm.metrics import psnr_db, ssim, to_unit
from aldm.models.codecs import build_codec
from aldm.pace import Pace
from aldm.pictures import RatePoint, save_rates
from aldm.presets import brats, small, tiny
from pipelines.benchmark_codecs import CODECS, CodecEntry, CodecTerms, plan_codec
from pipelines.benchmark_codecs_scores import BEFORE, score_all
from pipelines.benchmark_codecs_table import codecs_table, line_of
from pipelines.train import parse


def terms_of(store: Path, out: Path, *flags: str) -> CodecTerms:
    return CodecTerms(store=store, fingerprint="", out=out, minutes=10.0, flags=flags or ("--preset", "small"))


@pytest.mark.parametrize("name", CODECS)
def test_only_the_time_ends_a_training_and_the_adversary_starts_as_late(name: str, tmp_path: Path) -> None:
    entry = plan_codec(name, 3, terms_of(tmp_path / "store", tmp_path / "out"), small())
    args, config = parse(entry.training[1], entry.training[2:])
    codec, training = config.codec, config.train_vqgan
    assert (codec.kind, codec.quantizer) == (name.removesuffix("-fsq"), "fsq" if "fsq" in name else "codebook")
    assert (config.seed, args.run_dir) == (3, tmp_path / "out" / name / "seed-3" / "vqgan")
    assert training.max_minutes == 10
    pace = Pace.plan(training, 100, [0, training.adversarial_start_step])
    for step in range(1, 31):  # a step a second: 600 of them
        pace.step_done(step, 1.0)
        if pace.wants_validation_time:
            pace.validation_done(step, 0.0)
    preset = small().train_vqgan
    assert preset.max_steps is not None
    assert pace.num_steps == pytest.approx(600, abs=2)
    assert pace.starts[1] / pace.num_steps == pytest.approx(preset.adversarial_start_step / preset.max_steps, abs=0.01)


def test_a_length_in_epochs_is_left_alone(tmp_path: Path) -> None:
    entry = plan_codec("vqgan", 0, terms_of(tmp_path / "store", tmp_path / "out", "--preset", "brats"), brats())
    _, config = parse(entry.training[1], entry.training[2:])
    assert config.train_vqgan == replace(brats().train_vqgan, max_minutes=10.0)


@pytest.fixture
def trained(ixi_store: VolumeStore, tmp_path: Path) -> tuple[CodecTerms, list[CodecEntry]]:
    """A benchmark's folder with two seeds of a codec of random weights that quantises coarsely."""
    terms = terms_of(ixi_store.path, tmp_path / "out")
    codec = replace(tiny().codec, kind="haar-vqgan", quantizer="fsq", fsq_levels=(3, 3))
    config = replace(tiny(), codec=codec)
    entries = [plan_codec("haar-vqgan-fsq", seed, terms, config) for seed in (0, 1)]
    for entry in entries:
        torch.manual_seed(entry.seed)
        network = build_codec(codec)
        for parameter in network.parameters():  # no layer starts as nothing
            torch.nn.init.normal_(parameter, 0, 0.2)
        run = entry.folder / "vqgan"
        run.mkdir(parents=True)
        save_checkpoint(run / "best", kind="codec", config=config, weights=network.state_dict(), meta={})
        (run / "config.yaml").write_text(json.dumps({"train_vqgan": {"batch_size": 2}}))
        (run / "metrics.jsonl").write_text(json.dumps({"step": 7 + entry.seed, "elapsed_s": 60.0}) + "\n")
    return terms, entries


def test_what_is_measured_is_what_the_codec_does(ixi_store: VolumeStore, trained) -> None:
    terms, entries = trained
    found = {(each.codec, each.seed): each for each in score_all(terms, entries, ixi_store, torch.device("cpu"))}
    weights = entries[0].folder / "vqgan" / "best" / "weights.safetensors"
    network = build_codec(replace(tiny().codec, kind="haar-vqgan", quantizer="fsq", fsq_levels=(3, 3))).eval()
    from safetensors.torch import load_file

    network.load_state_dict(load_file(weights))
    measured, codes = found["haar-vqgan-fsq", 0], []
    for record in ixi_store.subjects("test"):
        for name in record.modalities:
            x = ixi_store.volume(record.subject_id, name)
            with torch.no_grad():
                z = network.encode(torch.from_numpy(x)[None, None])
                outputs = {"": network.decode(z), BEFORE: network.decode_codes(z)}
                codes += network.quantize(z).indices.flatten().tolist()
            for region, mask in (("volume", None), (record.region, ixi_store.mask(record.subject_id))):
                for ending, y in outputs.items():
                    truth, image = to_unit(x), to_unit(y[0, 0].numpy())
                    (row,) = (
                        row
                        for row in measured.rows
                        if (row.subject_id, row.source, row.region) == (record.subject_id, name, region)
                        and row.method == "haar-vqgan-fsq" + ending
                    )
                    assert row.psnr_db == pytest.approx(psnr_db(truth, image, mask), abs=1e-3)
                    assert row.ssim == pytest.approx(ssim(truth, image, mask), abs=1e-4)
    shares = np.bincount(codes)[np.bincount(codes) > 0] / len(codes)
    facts = measured.facts
    assert facts.scalars_per_voxel == 2 / 64
    assert facts.bits_per_voxel == pytest.approx(np.log2(9) / 64)
    assert (facts.codes, facts.codes_used) == (9, len(shares) / 9)
    assert facts.perplexity == pytest.approx(np.prod(shares**-shares))
    assert facts.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert found["haar", 0].facts.scalars_per_voxel == 1
    assert min(row.psnr_db for row in found["haar", 0].rows) > 100
    weights.unlink()  # nothing is measured twice
    assert repr(score_all(terms, entries, ixi_store, torch.device("cpu"))) == repr(list(found.values()))  # NaN is NaN


def test_the_row_of_a_codec_is_the_mean_over_subjects_of_their_means(ixi_store: VolumeStore, trained) -> None:
    terms, entries = trained
    measured = [
        each for each in score_all(terms, entries, ixi_store, torch.device("cpu")) if each.seed or "fsq" in each.codec
    ]
    line = line_of("haar-vqgan-fsq", measured, entries)
    values, seeds = defaultdict(list), []
    for each in measured:
        own = [row for row in each.rows if row.method == each.codec and row.region != "volume"]
        seeds.append(np.mean([row.psnr_db for row in own]))
        for row in own:
            values[row.subject_id].append(row.psnr_db)
    region = own[0].region
    assert line.psnr_db[region][0] == pytest.approx(np.mean([np.mean(v) for v in values.values()]))
    assert line.spread_db == pytest.approx(np.std(seeds, ddof=1))
    assert (line.samples, line.minutes) == (15, 1.0)  # 7 and 8 steps of two samples
    text = codecs_table([line], ["volume", region])
    assert f"| haar-vqgan-fsq | 32 | {np.log2(9) / 64:.3f} | {line.psnr_db['volume'][0]:.2f}" in text
    assert text.endswith(f"| {line.spread_db:.2f} |")


def test_the_picture_shows_every_codec(tmp_path: Path) -> None:
    points = [
        RatePoint("linear 16:1", "linear", 16, None, 27.0, None),
        RatePoint("linear 64:1", "linear", 64, None, 21.0, None),
        RatePoint("vqgan", "vqgan", 16, 0.125, 25.0, 26.0),
    ]
    save_rates(tmp_path / "all.png", points)
    save_rates(tmp_path / "one.png", points[1:])
    assert (tmp_path / "all.png").read_bytes() != (tmp_path / "one.png").read_bytes()


@pytest.mark.slow
def test_it_goes_on_and_its_table_is_what_the_scores_say(
    ixi_store: VolumeStore, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first codec is trained in a process of its own, the second one here."""
    out = tmp_path / "out"
    words = ["benchmark", "--codecs", "haar-vqgan", "--store", str(ixi_store.path), "--out", str(out)]
    words += ["--preset", "tiny", "--budget", "0.03"]
    assert main([*words, "--dry-run"]) == 0
    assert "aldm train vqgan --preset tiny" in capsys.readouterr().out
    assert not out.exists()
    assert main(words) == 0
    record = out / "haar-vqgan" / "seed-0" / "record.json"
    before = record.read_bytes()
    words[2] = "haar-vqgan-fsq"
    monkeypatch.setattr("pipelines.benchmark_run.run_bound", run_here)
    assert main(words) == 0
    assert record.read_bytes() == before  # nothing of it ran again
    with (out / "codecs.csv").open() as stream:
        lines = {line["codec"]: line for line in csv.DictReader(stream)}
    assert {"haar", "linear 16:1", "haar-vqgan", "haar-vqgan-fsq"} <= set(lines)
    with (out / "scores.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if (row["codec"], row["region"]) == ("haar-vqgan", "volume")]
    assert float(lines["haar-vqgan"]["volume_psnr_db"]) == pytest.approx(
        np.mean([float(row["psnr_db"]) for row in rows])
    )
    assert float(lines["haar-vqgan"]["bits_per_voxel"]) == 4 / 64
    page = (out / "codecs.md").read_text()
    assert f"| haar-vqgan | 16 | 0.062 | {float(lines['haar-vqgan']['volume_psnr_db']):.2f}" in page
    assert "| haar | 1 | - | lossless |" in page
    assert (out / "codecs.png").stat().st_size > 10_000
    assert main([*words, "--budget", "1"]) == 2
    assert "holds a benchmark with other settings" in capsys.readouterr().err
