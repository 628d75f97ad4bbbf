"""The comparison methods as trainings: each learns, goes on where it stopped, and becomes a translator of its pair."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from baseline_stages import PAIR, batch_of, config_of, gradient, info_of, play
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from aldm.baselines.cyclegan import Cycle, CycleGANStage
from aldm.baselines.eagan import EaGANStage
from aldm.baselines.methods import method_network, method_stage
from aldm.baselines.nicegan import NiceGANStage
from aldm.baselines.pairs import on_volume, slice_shape
from aldm.baselines.pix2pix import Pix2PixStage
from aldm.checkpoint import save_checkpoint
from aldm.cli import main
from aldm.config import Config, training_of, with_training
from aldm.config_baselines import BOTH_WAYS, METHODS, VOLUME_METHODS
from aldm.data.dataset import SlicePairs, VolumePairs
from aldm.data.store import VolumeStore, write_manifest
from aldm.errors import UserError
from aldm.planner import plan_memory
from aldm.presets import brats, ixi, tiny
from aldm.training import PlainEngine, fit
from serve.models import find_model
from serve.problems import Problem
from serve.settings import Settings
from serve.submissions import Service
from serve.worker import load


@pytest.fixture
def store(ixi_store: VolumeStore) -> VolumeStore:
    return ixi_store


@pytest.mark.parametrize("method", METHODS)
def test_a_player_s_turn_moves_that_player_alone(method: str, store: VolumeStore) -> None:
    stage = method_stage(config_of(method), store, method)
    batch, info = batch_of(stage), info_of(stage)
    for player in stage.players:
        for other in stage.players:
            other.module.zero_grad(set_to_none=True)
        play(stage, player, batch, info)
        assert gradient(player.module) > 0
        for other in stage.players:
            if other is not player:
                assert all(parameter.grad is None for parameter in other.module.parameters())
                assert all(parameter.requires_grad for parameter in other.module.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_training_is_the_uninterrupted_one(method: str, store: VolumeStore, tmp_path: Path) -> None:
    def train(steps: int, resume_from: Path | None, out: Path) -> dict[str, Tensor]:
        torch.manual_seed(0)
        config = config_of(method, max_steps=4, checkpoint_every=2, decay="constant", validate_every=100)
        config = with_training(config, method, max_steps=steps)
        stage = method_stage(config, store, method)
        folders: dict[int, Path] = {}

        def keep(snapshot: Any) -> None:
            folder = out / str(snapshot.step)
            folder.mkdir(parents=True, exist_ok=True)
            snapshot.write(folder)
            folders[snapshot.step] = folder

        fit(
            stage,
            PlainEngine(),
            training_of(config, method),
            seed=0,
            on_log=lambda record: None,
            on_checkpoint=keep,
            resume_from=resume_from,
        )
        return {
            f"{player.name}.{name}": value.clone()
            for player in stage.players
            for name, value in player.module.state_dict().items()
        }

    whole = train(4, None, tmp_path / "whole")
    train(2, None, tmp_path / "first")
    resumed = train(4, tmp_path / "first" / "2", tmp_path / "second")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_cyclegan_is_unpaired_to_the_last_bit(store: VolumeStore) -> None:
    """Its generator's loss is a sum of what concerns A and what concerns B."""
    stage = method_stage(config_of("cyclegan"), store, "cyclegan")
    assert isinstance(stage, CycleGANStage)
    for player in stage.players:
        player.module.double()
    generator = torch.Generator().manual_seed(0)
    a1, a2, b1, b2 = (torch.rand(1, 1, 16, 32, generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(4))

    def loss(a: Tensor, b: Tensor) -> float:
        batch = {"source_volume": a, "target_volume": b}
        original = Tensor.float
        try:
            Tensor.float = lambda self: self  # type: ignore[method-assign,assignment,misc]
            return float(stage.players[0].loss(stage.generators, batch, info_of(stage, 1))[0])
        finally:
            Tensor.float = original  # type: ignore[method-assign]

    assert loss(a1, b1) + loss(a2, b2) == pytest.approx(loss(a1, b2) + loss(a2, b1), abs=1e-10)


def test_the_generators_of_cyclegan_play_before_its_discriminators(store: VolumeStore) -> None:
    stage = method_stage(config_of("cyclegan"), store, "cyclegan")
    assert [player.name for player in stage.players] == ["generator", "discriminator"]
    assert isinstance(stage.generators(*[torch.zeros(1, 1, 16, 32)] * 2, True), Cycle)  # type: ignore[attr-defined]


def test_pix2pix_judges_an_image_by_its_source(store: VolumeStore) -> None:
    stage = method_stage(config_of("pix2pix"), store, "pix2pix")
    assert isinstance(stage, Pix2PixStage)
    image = torch.randn(1, 1, 16, 32)
    first, second = (stage.discriminator(stage.judged(torch.randn(1, 1, 16, 32), image)) for _ in range(2))
    assert not torch.equal(first, second)


def test_both_players_of_pix2pix_meet_the_same_image(store: VolumeStore) -> None:
    """Dropout draws the same in the turns of one step."""
    config = config_of("pix2pix")
    config = replace(
        config, baselines=replace(config.baselines, pix2pix=replace(config.baselines.pix2pix, num_levels=6))
    )
    stage = method_stage(config, store, "pix2pix")
    seen: list[Tensor] = []
    stage.generator.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))  # type: ignore[attr-defined]
    torch.manual_seed(3)
    batch, info = batch_of(stage), info_of(stage)
    for player in stage.players:
        play(stage, player, batch, info)
    assert torch.equal(*seen)


def test_an_encoder_of_nicegan_learns_from_its_own_discriminator_alone(store: VolumeStore) -> None:
    stage = method_stage(config_of("nicegan"), store, "nicegan")
    assert isinstance(stage, NiceGANStage)
    batch, info = batch_of(stage), info_of(stage)
    before = {name: value.clone() for name, value in stage.discriminators.named_parameters()}
    play(stage, stage.players[1], batch, info)
    assert gradient(stage.generators) > 0
    assert all(torch.equal(value, before[name]) for name, value in stage.discriminators.named_parameters())
    only_b = {"source_volume": torch.full((1, 1, 16, 32), -1.0), "target_volume": batch["target_volume"][:1]}
    stage.discriminators.zero_grad(set_to_none=True)
    play(stage, stage.players[0], only_b, info_of(stage, 1))
    assert gradient(stage.discriminators.of_b.encoder) > 0


@pytest.mark.parametrize("method", ["dea-gan", "gea-gan"])
def test_the_generator_of_ea_gan_hears_its_discriminator(method: str, store: VolumeStore) -> None:
    """The released code's pool cuts this gradient."""
    config = config_of(method)
    own = {"dea-gan": "dea_gan", "gea-gan": "gea_gan"}[method]
    section = replace(getattr(config.baselines, own), l1_weight=0.0, edge_weight=0.0)
    config = replace(config, baselines=replace(config.baselines, **{own: section}))
    stage = method_stage(config, store, method)
    assert isinstance(stage, EaGANStage)
    batch, info = batch_of(stage, 1), info_of(stage, 1)
    play(stage, stage.players[1], batch, info)
    assert gradient(stage.generator) > 0
    seen = stage.judged(batch["source_volume"], batch["target_volume"]).shape[1]
    assert seen == (3 if method == "dea-gan" else 2)


def test_the_edge_term_of_ea_gan_rises_epoch_by_epoch(store: VolumeStore) -> None:
    stage = method_stage(config_of("dea-gan", batch_size=1), store, "dea-gan")
    assert isinstance(stage, EaGANStage)
    stage.epoch_length = 10
    weights = [stage.edge_weight(10 * epoch) for epoch in range(22)]
    np.testing.assert_allclose(weights, [100 * min(epoch, 20) / 20 for epoch in range(22)])


# ------------------------------------------------------------------------------------------------- slices and volumes


def test_a_volume_goes_through_slices_and_comes_back() -> None:
    x = torch.randn(2, 1, 5, 6, 40)
    shapes = []

    def network(part: Tensor) -> Tensor:
        shapes.append(tuple(part.shape[1:]))
        return part + 1

    torch.testing.assert_close(on_volume(network, x, 2, (8, 9)), x + 1)
    assert set(shapes) == {(1, 8, 9)}
    torch.testing.assert_close(on_volume(lambda part: part, x, 3, (8, 9)), x)


def test_slices_are_those_of_the_volume(store: VolumeStore) -> None:
    """What 2D methods are trained on is what they are given to translate: the model's box, with background around."""
    record = store.subjects("train")[0]
    volume = store.volume(record.subject_id, "t1")
    plane = (volume.shape[0], volume.shape[1] + 4)
    assert volume.shape != record.grid_shape
    seen: list[Tensor] = []
    on_volume(lambda part: seen.append(part) or part, torch.from_numpy(volume)[None, None], 2, plane)  # type: ignore[func-returns-value]
    translated = torch.cat(seen)[:, 0].numpy()
    for z in range(volume.shape[2]):
        np.testing.assert_array_equal(store.axial_slice(record.subject_id, "t1", z, plane), translated[z])


def test_an_epoch_of_slices_sees_every_slice_once(store: VolumeStore) -> None:
    slices = SlicePairs(store, PAIR, (16, 24))
    records = [record for record in store.subjects("train") if set(PAIR) <= set(record.modalities)]
    assert len(slices) == len(records) * store.preprocess.spatial_shape[2]
    places = [slices._sources[index] for index in range(len(slices))]
    assert len(set(places)) == len(slices)
    assert {subject for subject, _ in places} == {record.subject_id for record in records}


def test_only_the_pair_is_seen(store: VolumeStore) -> None:
    samples = VolumePairs(store, "train", store.modalities, pair=("pd", "t1"))
    for index in range(len(samples)):
        sample = samples.sample(index, torch.Generator().manual_seed(index))
        np.testing.assert_array_equal(sample["source_volume"][0], store.volume(sample["subject_id"], "pd"))
        np.testing.assert_array_equal(sample["target_volume"][0], store.volume(sample["subject_id"], "t1"))


# --------------------------------------------------------------------------------------------------- the paper's sizes


@pytest.mark.parametrize("preset", [brats, ixi])
@pytest.mark.parametrize("method", METHODS)
def test_the_paper_s_sizes_go_through(method: str, preset: Callable[[], Config]) -> None:
    config = replace(preset(), pair=PAIR)
    with torch.device("meta"):
        network = method_network(config, method)
        shape = config.preprocess.spatial_shape
        if not method.endswith("-3d") and method not in ("dea-gan", "gea-gan"):
            shape = (2, 1, *slice_shape(config))
        else:
            shape = (1, 1, *shape)
        x = torch.empty(shape)
        run = network if not hasattr(network, "translate") else lambda part: network.translate(part, False)
        assert run(x).shape == x.shape


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "method"), [*((brats, method) for method in METHODS), (ixi, "pix2pix"), (ixi, "pix2pix-3d")]
)
def test_a_training_step_at_the_paper_s_sizes(method: str, preset: Callable[[], Config]) -> None:
    """Losses and gradients of every player, on tensors without values; the loader gives what the batch asks for."""
    config = preset()
    step = plan_memory(config, method)
    whole, training = config.preprocess.spatial_shape, training_of(config, method)
    assert step.shape == (whole if method in VOLUME_METHODS else slice_shape(config))
    assert (step.batch_size, training.crop) == (1 if method in VOLUME_METHODS else 32, None)
    assert slice_shape(config) == {"brats": (240, 240), "ixi": (160, 256)}[config.preset]
    assert step.flops_of.keys() == {"generator", "discriminator"}
    network = network_flops(config, method) * step.batch_size
    assert step.flops_of["generator"] > 3 * network  # forward, and backward to input and weights
    assert step.flops_of["discriminator"] > 0


def network_flops(config: Config, method: str) -> int:
    """Operations with which the network that translates maps one slice or volume."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = method_network(replace(config, pair=PAIR), method)
        sides = config.preprocess.spatial_shape if method in VOLUME_METHODS else slice_shape(config)
        x = torch.empty(1, 1, *sides)
        network.translate(x, False) if hasattr(network, "translate") else network(x)
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------------ the commands


@pytest.mark.parametrize("method", ["pix2pix", "nicegan"])
def test_from_training_to_a_translation(method: str, store: VolumeStore, tmp_path: Path, capsys: Any) -> None:
    words = ["train", method, "--store", store.path, "--run-dir", tmp_path / "run", "--preset", "tiny"]
    words += ["--source", "t1", "--target", "t2", "--engine", "plain", "--no-tracking"]
    assert main([str(word) for word in words]) == 0
    assert main(["export", "--baseline", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 0
    way = "t1 to t2 and back" if method in BOTH_WAYS else "t1 to t2"
    assert f"{method} model for {way}, hash" in capsys.readouterr().out
    record = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (record["kind"], record["config"]["pair"]) == (method, list(PAIR))
    words = ["evaluate", "--model", tmp_path / "model", "--store", store.path, "--out", tmp_path / "scores"]
    assert main([str(word) for word in words]) == 0
    lines = (tmp_path / "scores" / "scores.csv").read_text().splitlines()[1:]
    pairs = {tuple(line.split(",")[2:4]) for line in lines if line.split(",")[1] == method}
    assert pairs == ({PAIR, PAIR[::-1]} if method in BOTH_WAYS else {PAIR})
    capsys.readouterr()
    words = ["evaluate", "--model", tmp_path / "model", "--store", store.path, "--out", tmp_path / "other"]
    assert main([str(word) for word in (*words, "--source", "pd", "--target", "t1")]) == 2
    assert f"this {method} model translates t1 to t2" in capsys.readouterr().err
    assert main([str(word) for word in (*words, "--source", "t9", "--target", "t1")]) == 2
    assert "aldm evaluate: --source is 't9', wanted one of: t1, t2, pd" in capsys.readouterr().err


def test_a_method_can_be_served(store: VolumeStore, tmp_path: Path) -> None:
    """It is loaded and warmed up for its own pair, and another pair is refused before anything is queued."""
    method = "pix2pix"
    stage = method_stage(config_of(method), store, method)
    weights = {player.name: player.module.state_dict() for player in stage.players}
    export = stage.export(weights)
    save_checkpoint(
        tmp_path / "run",
        kind=export.kind,
        config=export.config,
        weights=export.weights,
        meta={**export.meta, "training": {"stage": method, "step": 0, "validation": {}}},
    )
    assert main(["export", "--baseline", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 0
    settings = Settings(work_dir=str(tmp_path / "work"))
    assert load(tmp_path / "model", settings).translates(*PAIR)
    service = Service(settings, find_model(str(tmp_path / "model"), tmp_path / "work"), None)  # type: ignore[arg-type]
    service.check_sources(["t1"], ["t2"])
    with pytest.raises(Problem, match="translates t1 to t2, not t1 to pd"):
        service.check_sources(["t1"], ["t2", "pd"])


def test_unpaired_data_do_for_the_methods_that_need_no_pairs(store: VolumeStore) -> None:
    """A store in which no training subject has both ends."""
    records = store.subjects()
    alone = [replace(record, modalities=(PAIR[index % 2],)) for index, record in enumerate(records)]
    header = {"layout": store.layout, "fingerprint": "", "preprocess": asdict(store.preprocess)}
    unpaired = VolumeStore(store.path, {**header, "modalities": store.modalities}, alone)
    for method in METHODS:
        stage = method_stage(config_of(method), unpaired, method)
        if method in BOTH_WAYS:
            assert batch_of(stage)["target_volume"].shape[0] == 2
        else:
            with pytest.raises(UserError, match=r"no training subject has t1 and t2.*cyclegan or nicegan"):
                stage.samples("train")


@pytest.mark.parametrize("method", ["pix2pix", "unet"])
def test_unpaired_data_are_refused_before_anything_is_written(
    method: str, store: VolumeStore, tmp_path: Path, capsys: Any
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store.path, copy)
    write_manifest(copy, [replace(one, modalities=(PAIR[0],)) for one in store.subjects()], store.fingerprint)
    words = ["train", method, "--store", copy, "--run-dir", tmp_path / "run", "--preset", "tiny"]
    assert main([str(word) for word in (*words, "--source", PAIR[0], "--target", PAIR[1])]) == 2
    assert "no training subject has t1 and t2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_trained_is_refused(store: VolumeStore, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(UserError, match="trained for one pair of modalities: give `source` and `target`"):
        method_stage(tiny(), store, "pix2pix")
    words = ["train", "pix2pix", "--store", str(store.path), "--run-dir", str(tmp_path / "run"), "--preset", "tiny"]
    assert main([*words, "--source", "t1", "--target", "flair"]) == 2
    assert "cannot be learnt from data without flair" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["train", "pix3pix"]) == 2
    said = capsys.readouterr().err
    assert "there is no stage 'pix3pix'" in said
    assert all(method in said for method in METHODS)
