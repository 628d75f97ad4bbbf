"""The training loop against plain loops written out, and against itself with a stop in the middle."""

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aldm.baselines.regression_unet import RegressionStage
from aldm.config import Config, TrainingConfig
from aldm.data.dataset import batch_places
from aldm.data.store import VolumeStore
from aldm.errors import UserError
from aldm.latents import LatentStore, encode_store
from aldm.models.codecs import build_codec
from aldm.pace import MEASURED_STEPS, RECENT_STEPS, Pace, learning_rate
from aldm.players import Batch, Engine, Export, Player, Stage, StepInfo, Values, only_trainable
from aldm.presets import tiny
from aldm.randomness import derived_generator
from aldm.stages import DiffusionStage, MSSpadeStage, VQGANStage
from aldm.training import FitResult, PlainEngine, Snapshot, fit

BASE = TrainingConfig(
    batch_size=2,
    max_steps=6,
    learning_rate=0.05,
    decay="cosine",
    warmup_steps=0,
    validate_every=2,
    num_validation_samples=2,
    checkpoint_every=3,
    log_every=1,
)


class Points:
    """Points (x, y) on a noisy line; a subject each."""

    def __init__(self, length: int) -> None:
        self.x = torch.linspace(-1, 1, length)

    def __len__(self) -> int:
        return len(self.x)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        x = self.x[index : index + 1]
        return {"x": x, "y": 2 * x + 0.1 * torch.randn(1, generator=generator), "subject_id": f"s{index}"}


class LineStage:
    """One player fits a line; a second one, if wanted, is an adversary of the first."""

    name = "line"
    score = "error"
    higher_is_better = False

    def __init__(self, config: TrainingConfig, adversary_starts: int | None = None) -> None:
        torch.manual_seed(0)
        self.config = Config()
        self.model, self.adversary = nn.Linear(1, 1), nn.Linear(1, 1)
        self.players = [Player("line", self.model, config, self.loss)]
        if adversary_starts is not None:
            plain = replace(config, ema_decay=0.0)
            self.players.append(Player("adversary", self.adversary, plain, self.adversary_loss, adversary_starts))
        self.seen: list[list[str]] = []
        self.noise: list[float] = []
        self.lengths = {"train": 5, "validation": 3}

    def connect(self, engine: Engine) -> None:
        pass

    def samples(self, split: str) -> Points:
        return Points(self.lengths[split])

    def loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        self.seen.append(batch["subject_id"])
        self.noise += [float(torch.rand((), generator=generator)) for generator in info.generators]
        prediction = model(batch["x"])
        loss = F.mse_loss(prediction, batch["y"])
        if "adversary" in info.playing:
            info.shared["prediction"] = prediction.detach()
            loss = loss + 0.1 * self.adversary(prediction).mean()
        return loss, {"bias": self.model.bias.detach()[0].clone()}

    def adversary_loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        return (model(batch["y"]) - model(info.shared["prediction"])).mean(), {}

    def validate(self, modules: Mapping[str, nn.Module], batch: Batch, info: StepInfo) -> Values:
        return {"error": F.mse_loss(modules["line"](batch["x"]), batch["y"])}

    def export(self, weights: Mapping[str, Mapping[str, Tensor]]) -> Export:
        return Export("line", Config(), weights["line"], {})


class Run:
    """What a training told its callbacks."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.records: list[dict[str, Any]] = []
        self.snapshots: list[Snapshot] = []

    def log(self, record: dict[str, Any]) -> None:
        self.records.append({key: value for key, value in record.items() if key != "elapsed_s"})

    def checkpoint(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)
        if self.folder is not None:
            place = self.folder / f"{snapshot.step}"
            place.mkdir(parents=True, exist_ok=True)
            snapshot.write(place)


def train(
    stage: Stage, config: TrainingConfig, run: Run | None = None, engine: Engine | None = None, **arguments: Any
) -> FitResult:
    run = run or Run()
    return fit(
        stage,
        engine or PlainEngine(),
        config,
        seed=1,
        on_log=run.log,
        on_checkpoint=run.checkpoint,
        **arguments,
    )


def reference(config: TrainingConfig, adversary_starts: int | None = None) -> list[Tensor]:
    """The same training in plain torch; parameters at its end."""
    stage, points = LineStage(config, adversary_starts), Points(5)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    optimizers = [
        kind(module.parameters(), betas=config.betas, weight_decay=config.weight_decay)
        for module in (stage.model, stage.adversary)
    ]
    for step in range(config.max_steps or 0):
        rows = [
            points.sample(place, derived_generator(1, "step", step, i))
            for i, place in enumerate(batch_places(5, config.batch_size, step, 1))
        ]
        x, y = (torch.stack([row[key] for row in rows]) for key in "xy")
        plays = adversary_starts is not None and step >= adversary_starts
        prediction = stage.model(x)
        loss = F.mse_loss(prediction, y) + (0.1 * stage.adversary(prediction).mean() if plays else 0)
        losses = [loss]
        if plays:
            losses.append((stage.adversary(y) - stage.adversary(prediction.detach())).mean())
        modules = (stage.model, stage.adversary)
        gradients = [
            torch.autograd.grad(one, list(module.parameters())) for one, module in zip(losses, modules, strict=False)
        ]
        for module, optimizer, gradient in zip(modules, optimizers, gradients, strict=False):
            norm = torch.stack([g.norm() for g in gradient]).norm()
            for parameter, g in zip(module.parameters(), gradient, strict=True):
                parameter.grad = g * min(1.0, config.gradient_clip / (float(norm) + 1e-6))
            half_cosine = 0.5 * (1 + math.cos(math.pi * step / (config.max_steps or 1)))
            optimizer.param_groups[0]["lr"] = config.learning_rate * half_cosine
            optimizer.step()
    return [*stage.model.parameters(), *stage.adversary.parameters()]


DECAYED = replace(BASE, optimizer="adamw", weight_decay=0.1, betas=(0.5, 0.9))


@pytest.mark.parametrize(
    ("config", "adversary_starts"), [(BASE, None), (BASE, 0), (BASE, 3), (DECAYED, None), (DECAYED, 3)]
)
def test_fit_is_the_plain_loop(config: TrainingConfig, adversary_starts: int | None) -> None:
    stage = LineStage(config, adversary_starts)
    train(stage, config)
    for got, wanted in zip(
        [*stage.model.parameters(), *stage.adversary.parameters()], reference(config, adversary_starts), strict=True
    ):
        assert torch.allclose(got, wanted, atol=1e-6)


def test_players_before_their_start_do_not_play() -> None:
    stage, run = LineStage(BASE, adversary_starts=4), Run()
    train(stage, replace(BASE, max_steps=4), run)
    untouched = LineStage(BASE, adversary_starts=4)
    assert torch.equal(stage.adversary.weight, untouched.adversary.weight)
    assert not any("adversary/loss" in record for record in run.records)


def test_other_players_are_frozen_and_nothing_else_changes() -> None:
    stage = LineStage(BASE, adversary_starts=0)
    stage.adversary.bias.requires_grad_(False)
    with only_trainable(stage.players[0], stage.players):
        assert [p.requires_grad for p in stage.model.parameters()] == [True, True]
        stage.adversary(stage.model(torch.ones(1, 1))).sum().backward()
    assert stage.adversary.weight.grad is None
    assert stage.model.weight.grad is not None
    assert [p.requires_grad for p in stage.adversary.parameters()] == [True, False]


class OneOfTwo(PlainEngine):
    """One rank of two; what it reduces stays its own."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, 2


def test_ranks_share_the_batch_of_one_process() -> None:
    config = replace(BASE, batch_size=4)
    alone, first, second = (LineStage(config) for _ in range(3))
    train(alone, config)
    train(first, config, engine=OneOfTwo(0))
    train(second, config, engine=OneOfTwo(1))
    for whole, even, odd in zip(alone.seen, first.seen, second.seen, strict=True):
        assert whole[0::2] == even
        assert whole[1::2] == odd
    assert alone.noise[0::2] == first.noise
    assert alone.noise[1::2] == second.noise


class Thread(PlainEngine):
    """One rank of several, a thread each: gradients and values are averaged through a shared list."""

    def __init__(self, rank: int, barrier: threading.Barrier, shared: list[Tensor]) -> None:
        super().__init__()
        self.rank, self.world_size, self.barrier, self.shared = rank, len(shared), barrier, shared

    def reduce(self, value: Tensor) -> Tensor:
        self.shared[self.rank] = value
        self.barrier.wait()
        mean = torch.stack(list(self.shared)).mean(dim=0)
        self.barrier.wait()
        return mean

    def step(self, player: Player, learning_rate: float) -> Tensor:
        for parameter in player.module.parameters():
            parameter.grad = self.reduce(parameter.grad)
        return super().step(player, learning_rate)


def train_in_threads(stages: list[LineStage], config: TrainingConfig) -> list[Run]:
    barrier, shared = threading.Barrier(len(stages), timeout=180), [torch.zeros(()) for _ in stages]
    runs = [Run() for _ in stages]
    with ThreadPoolExecutor(len(stages)) as pool:
        jobs = [
            pool.submit(train, stage, config, run, Thread(rank, barrier, shared))
            for rank, (stage, run) in enumerate(zip(stages, runs, strict=True))
        ]
        for job in jobs:
            job.result()
    return runs


@pytest.mark.parametrize("num_validation_samples", [2, 3])
def test_two_ranks_compute_what_one_computes(num_validation_samples: int) -> None:
    """Three samples do not come out even on two ranks: what fills the last round must not count."""
    config = replace(BASE, batch_size=4, ema_decay=0.9, num_validation_samples=num_validation_samples)
    alone, run = LineStage(config, 2), Run()
    train(alone, config, run)
    ranks = [LineStage(config, 2) for _ in range(2)]
    runs = train_in_threads(ranks, config)
    for stage in ranks:
        for got, wanted in zip(stage.model.parameters(), alone.model.parameters(), strict=True):
            assert torch.allclose(got, wanted, atol=1e-6)
    assert runs[1].records == []
    for got, wanted in zip(runs[0].records, run.records, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_ranks_of_unequal_speed_agree_on_the_steps_of_a_time_budget() -> None:
    config = replace(BASE, batch_size=2, max_steps=400, max_minutes=0.5 / 60, validate_every=50)
    ranks = [LineStage(config) for _ in range(2)]

    def slow(loss: Tensor) -> Tensor:
        time.sleep(0.004)
        return loss

    break_at(ranks[1], None, slow)
    runs = train_in_threads(ranks, config)
    steps = [run.snapshots[-1].step for run in runs]
    assert steps[0] == steps[1] < 400


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size 3 cannot be shared evenly by 2 workers"):
        train(LineStage(BASE), replace(BASE, batch_size=3), engine=OneOfTwo(0))


def test_an_empty_training_split_is_refused() -> None:
    stage = LineStage(BASE)
    stage.lengths["train"] = 0
    with pytest.raises(UserError, match="training split is empty"):
        train(stage, BASE)


def test_without_validation_subjects_the_last_is_all_there_is() -> None:
    stage, run = LineStage(BASE), Run()
    stage.lengths["validation"] = 0
    assert train(stage, BASE, run).best is None
    assert [(snapshot.step, snapshot.is_best) for snapshot in run.snapshots] == [(3, False), (6, False)]


def test_the_best_score_is_kept_in_its_direction() -> None:
    for higher in (False, True):
        stage, run = LineStage(replace(BASE, ema_decay=0.0)), Run()
        stage.higher_is_better = higher
        result = train(stage, replace(BASE, checkpoint_every=1), run)
        scores = [record["validation/error"] for record in run.records if "validation/error" in record]
        assert result.best == (max(scores) if higher else min(scores))
        best_steps = [snapshot.step for snapshot in run.snapshots if snapshot.is_best]
        assert scores[best_steps[-1] // 2 - 1] == result.best


@pytest.mark.parametrize(("best", "is_best"), [(-1.0, False), (1000.0, True)])
def test_a_resumed_training_knows_the_best_score(best: float, is_best: bool, tmp_path: Path) -> None:
    """A score so far that is never reached again, and one that any score is better than."""
    run, rest = Run(tmp_path), Run()
    train(LineStage(BASE), BASE, run)
    state = json.loads((tmp_path / "3" / "training.json").read_text())
    (tmp_path / "3" / "training.json").write_text(json.dumps({**state, "best": best}))
    result = train(LineStage(BASE), BASE, rest, resume_from=tmp_path / "3")
    assert any(snapshot.is_best for snapshot in rest.snapshots) == is_best
    assert (result.best != best) == is_best


def test_validation_does_not_change_the_training() -> None:
    with_, without = LineStage(BASE), LineStage(BASE)
    train(with_, BASE)
    train(without, replace(BASE, validate_every=1000))
    assert torch.equal(with_.model.weight, without.model.weight)


def test_the_average_is_what_is_validated_and_exported(tmp_path: Path) -> None:
    config = replace(BASE, ema_decay=0.9)
    stage, run = LineStage(config), Run(tmp_path)
    train(stage, config, run)
    biases = [record["line/bias"] for record in run.records if "line/bias" in record][1:]
    biases.append(float(stage.model.bias.detach()))  # after each of the 6 updates
    average = float(LineStage(config).model.bias.detach())
    for count, bias in enumerate(biases):
        average += (1 - min(0.9, (1 + count) / (10 + count))) * (bias - average)
    from aldm.checkpoint import load_checkpoint

    exported = load_checkpoint(tmp_path / "6").weights
    assert float(exported["bias"]) == pytest.approx(average, rel=1e-5)
    assert float(exported["bias"]) != pytest.approx(biases[-1], rel=1e-3)
    points = Points(3)
    rows = [points.sample([0, 1][i], derived_generator(1, "validation", i)) for i in range(2)]
    errors = [float((F.linear(row["x"], exported["weight"], exported["bias"]) - row["y"]) ** 2) for row in rows]
    assert run.records[-1]["validation/error"] == pytest.approx(sum(errors) / 2, rel=1e-5)


def test_metrics_are_means_over_the_steps_since_the_last_line() -> None:
    fine, coarse = Run(), Run()
    train(LineStage(BASE), BASE, fine)
    train(LineStage(BASE), replace(BASE, log_every=3), coarse)
    every = [record["line/loss"] for record in fine.records if "line/loss" in record]
    means = [record["line/loss"] for record in coarse.records if "line/loss" in record]
    assert means == pytest.approx([sum(every[:3]) / 3, sum(every[3:]) / 3])


def test_the_steps_after_the_last_full_window_are_logged_too() -> None:
    run = Run()
    train(LineStage(BASE), replace(BASE, log_every=4), run)
    assert [record["step"] for record in run.records if "line/loss" in record] == [4, 6]


def break_at(stage: LineStage, step: int | None, damage: Callable[[Tensor], Tensor]) -> None:
    loss = stage.loss

    def broken(model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        value, values = loss(model, batch, info)
        return (damage(value) if step in (None, info.step) else value), values

    stage.players[0].loss = broken


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda loss: loss * math.nan, "the loss of line is nan"),
        (lambda loss: loss + math.inf, "the loss of line is inf"),
        (lambda loss: loss + (loss - loss).sqrt(), "the gradient of line has norm (nan|inf)"),
    ],
)
def test_a_value_that_is_not_finite_stops_before_the_step(damage: Callable[[Tensor], Tensor], message: str) -> None:
    config = replace(BASE, decay="constant")
    wanted = LineStage(config)
    train(wanted, replace(config, max_steps=2))
    stage = LineStage(config)
    break_at(stage, 2, damage)
    with pytest.raises(UserError, match=rf"{message} at step 3 of line, on subject (s\d), (s\d)") as caught:
        train(stage, config)
    assert ", ".join(stage.seen[-1]) in str(caught.value)
    assert torch.equal(stage.model.weight, wanted.model.weight)


@contextlib.contextmanager
def handler(number: int, action: Any) -> Iterator[None]:
    previous = signal.signal(number, action)
    try:
        yield
    finally:
        signal.signal(number, previous)


class Stop(KeyboardInterrupt):
    pass


def raise_stop(number: int, frame: Any) -> None:
    raise Stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_at_hand_and_leaves_a_checkpoint(number: int, tmp_path: Path) -> None:
    stage, run = LineStage(BASE), Run(tmp_path)

    def interrupt(loss: Tensor) -> Tensor:
        signal.raise_signal(number)
        return loss

    break_at(stage, 3, interrupt)
    with handler(number, raise_stop):
        with pytest.raises(Stop):
            train(stage, BASE, run)
        assert signal.getsignal(number) is raise_stop
    assert run.snapshots[-1].step == 4
    resumed, whole = LineStage(BASE), LineStage(BASE)
    train(resumed, BASE, resume_from=tmp_path / "4")
    train(whole, BASE)
    assert torch.equal(resumed.model.weight, whole.model.weight)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    stage, run = LineStage(BASE), Run(tmp_path)

    def interrupt_twice(loss: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return loss

    break_at(stage, 3, interrupt_twice)
    with handler(signal.SIGINT, raise_stop), pytest.raises(Stop):
        train(stage, BASE, run)
    assert [snapshot.step for snapshot in run.snapshots if not snapshot.is_best] == [3]


def test_the_callers_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    stage = LineStage(BASE)
    torch.set_rng_state(before)
    train(stage, BASE)
    assert torch.equal(torch.get_rng_state(), before)


# The real stages, stopped and resumed.


@pytest.fixture(scope="module")
def latents(brats_store: VolumeStore, tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    config = replace(tiny().codec, kind="haar")
    return encode_store(brats_store, build_codec(config), config, tmp_path_factory.mktemp("latents") / "haar")


def real_stage(name: str, store: VolumeStore, latents: LatentStore) -> tuple[Any, TrainingConfig]:
    torch.manual_seed(0)
    config = tiny()
    gan = {"adversarial_start_step": 1, "adversarial_weight": 0.5, "max_steps": 6, "checkpoint_every": 3}
    config = replace(
        config,
        train_vqgan=replace(config.train_vqgan, **gan),
        train_ms_spade=replace(config.train_ms_spade, **gan, batch_size=2),
        train_diffusion=replace(config.train_diffusion, max_steps=6, checkpoint_every=3),
        train_unet=replace(config.train_unet, max_steps=6, checkpoint_every=3, flip_probability=0.5),
    )
    if name == "vqgan":
        return VQGANStage(config, store), config.train_vqgan
    if name == "ms-spade":
        return MSSpadeStage(config, latents), config.train_ms_spade
    if name == "unet":
        return RegressionStage(config, store), config.train_unet
    ms_spade = MSSpadeStage(config, latents).ms_spade
    return DiffusionStage(config, latents, ms_spade, "0" * 64), config.train_diffusion


@pytest.mark.parametrize("name", ["vqgan", "ms-spade", "diffusion", "unet"])
def test_resuming_computes_what_never_stopping_computes(
    name: str, brats_store: VolumeStore, latents: LatentStore, tmp_path: Path
) -> None:
    stage, config = real_stage(name, brats_store, latents)
    assert config.ema_decay > 0
    whole = Run(tmp_path / "whole")
    train(stage, config, whole)
    assert len(stage.players) == (2 if name in ("vqgan", "ms-spade") else 1)

    again, config = real_stage(name, brats_store, latents)
    rest = Run(tmp_path / "rest")
    train(again, config, rest, resume_from=tmp_path / "whole" / "3")
    assert rest.records == [record for record in whole.records if record["step"] > 3]
    for player, other in zip(stage.players, again.players, strict=True):
        assert all(
            torch.equal(tensor, other.module.state_dict()[key]) for key, tensor in player.module.state_dict().items()
        )
    states = [json.loads((tmp_path / which / "6/training.json").read_text()) for which in ("whole", "rest")]
    assert {**states[0], "pace": 0} == {**states[1], "pace": 0}
    weights = [(tmp_path / which / "6/weights.safetensors").read_bytes() for which in ("whole", "rest")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("content", [None, b"", b"nonsense", "half", {"line": {}}, [1]])
def test_resuming_from_a_damaged_engine_is_explained(content: Any, tmp_path: Path) -> None:
    run = Run(tmp_path)
    train(LineStage(BASE), BASE, run)
    folder = max(tmp_path.iterdir())
    file = folder / "engine.pt"
    if content is None:
        file.unlink()
    elif isinstance(content, dict | list):
        torch.save(content, file)
    else:
        file.write_bytes(file.read_bytes()[:300] if content == "half" else content)
    with pytest.raises(
        UserError, match=r"engine\.pt (cannot be read|is damaged).*resume from another checkpoint"
    ) as refused:
        train(LineStage(BASE), BASE, resume_from=folder)
    assert "weights_only" not in str(refused.value)
    state = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps({**state, "pace": {}, "step": None}))
    with pytest.raises(
        UserError, match=r"training\.json is damaged: step is None, wanted a whole number; it lacks pace"
    ):
        train(LineStage(BASE), BASE, resume_from=folder)


def test_resuming_without_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no state of a training"):
        train(LineStage(BASE), BASE, resume_from=tmp_path)


# The pace.


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    config = TrainingConfig(learning_rate=2.0, warmup_steps=4, decay="cosine")
    rates = [learning_rate(config, step, 104) for step in range(105)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4] == pytest.approx(2.0)
    assert rates[54] == pytest.approx(1.0)
    assert rates[104] == pytest.approx(0.0)
    assert learning_rate(replace(config, decay="constant"), 103, 104) == 2.0
    assert learning_rate(config, 0, 20) == pytest.approx(1.0)  # a warm-up of at most a tenth
    assert learning_rate(config, 130, 104) == pytest.approx(0.0)  # and not up again
    assert learning_rate(config, 1, 1) == pytest.approx(0.0)


@pytest.mark.parametrize(("start", "rates"), [(0.5, [2, 2, 2, 2, 2, 2, 1.6, 1.2, 0.8, 0.4, 0]), (0.0, [])])
def test_a_linear_decay_falls_to_zero_from_its_start_on(start: float, rates: list[float]) -> None:
    config = TrainingConfig(learning_rate=2.0, decay="linear", decay_start=start)
    wanted = rates or [2 - 0.2 * step for step in range(11)]
    assert [learning_rate(config, step, 10) for step in range(11)] == pytest.approx(wanted)
    warm = replace(config, warmup_steps=10)
    assert learning_rate(warm, 9, 110) == 2.0
    assert learning_rate(warm, 85, 110) == pytest.approx(2 * 0.25 / (1 - start))  # three quarters of what follows it
    assert learning_rate(warm, 110, 110) == pytest.approx(0.0)


def simulate(config: TrainingConfig, seconds: Callable[[int], float], starts: list[int]) -> Pace:
    """Run a pace on a clock of its own: a step takes seconds(step), a validation 3 s, a checkpoint 1 s."""
    pace, step = Pace.plan(config, 100, starts), 0
    while step < pace.num_steps:
        step += 1
        pace.step_done(step, seconds(step))
        if step % config.validate_every == 0 or (step == MEASURED_STEPS and pace.wants_validation_time):
            pace.validation_done(step, 3.0)
        if step % config.checkpoint_every == 0:
            pace.checkpoint_done(1.0)
    pace.validation_done(step, 3.0)
    pace.checkpoint_done(1.0)
    return pace


def test_steps_are_fitted_to_the_mean_of_the_last_ones_and_what_comes_between() -> None:
    """By hand: what is left of the time over a step's mean and its share of a validation and of a checkpoint."""
    config = TrainingConfig(max_steps=100_000, max_minutes=10, validate_every=20, checkpoint_every=50)
    pace = Pace.plan(config, 100, [0])
    pace.validation_done(0, 4.0)
    pace.checkpoint_done(5.0)
    seconds = [30.0] + [1.0 + step / 8 for step in range(1, 80)]
    for step, one in enumerate(seconds, start=1):
        before = pace.num_steps
        pace.step_done(step, one)
        if step % MEASURED_STEPS:
            assert pace.num_steps == before
            continue
        last = seconds[max(1, step - RECENT_STEPS) : step]
        left = 600 - 4 - 5 - sum(seconds[:step]) - 4 - 5
        assert pace.num_steps == step + int(left / (sum(last) / len(last) + 4 / 20 + 5 / 50))


def test_steps_are_not_fitted_before_a_validation_is_timed() -> None:
    config = TrainingConfig(max_steps=10_000, max_minutes=10, validate_every=100)
    pace = Pace.plan(config, 100, [0])
    for step in range(1, MEASURED_STEPS + 1):
        pace.step_done(step, 1.0)
        assert pace.wants_validation_time
        assert pace.num_steps == 10_000
    pace.validation_done(MEASURED_STEPS, 0.0)
    assert not pace.wants_validation_time
    assert pace.num_steps == MEASURED_STEPS + 590
    early = Pace.plan(config, 100, [0])
    for step in range(1, MEASURED_STEPS):
        early.step_done(step, 1.0)
    early.validation_done(MEASURED_STEPS - 1, 0.0)  # too few steps are known
    assert early.num_steps == 10_000
    assert not Pace.plan(replace(config, max_minutes=None), 100, [0]).wants_validation_time


@pytest.mark.parametrize("slow", [1.0, 1.7])
def test_a_time_budget_is_used_and_kept(slow: float) -> None:
    config = TrainingConfig(max_steps=10_000, max_minutes=10, validate_every=50, checkpoint_every=50)
    pace = simulate(config, lambda step: slow if step > 150 else 1.0, [0, 0])
    assert 0.97 * 600 < pace.elapsed_s <= 600 + slow


def test_a_machine_that_slows_down_late_does_not_break_the_budget() -> None:
    config = TrainingConfig(max_steps=10_000, max_minutes=10, validate_every=1000, checkpoint_every=1000)
    pace = simulate(config, lambda step: 2.0 if step > 400 else 1.0, [0])
    assert 0.95 * 600 < pace.elapsed_s <= 605


def test_a_slow_first_step_does_not_count() -> None:
    config = TrainingConfig(max_steps=10_000, max_minutes=10, validate_every=1000)
    pace = Pace.plan(config, 100, [0, 5000])
    pace.validation_done(0, 0.0)
    for step in range(1, MEASURED_STEPS + 1):
        pace.step_done(step, 60.0 if step == 1 else 1.0)
    assert pace.num_steps == pytest.approx(MEASURED_STEPS + 600 - 69, abs=2)
    assert pace.starts[1] == pytest.approx(pace.num_steps / 2, abs=2)


def test_a_player_that_starts_late_still_starts_and_is_paid_for() -> None:
    config = TrainingConfig(max_steps=10_000, max_minutes=10, validate_every=1000, checkpoint_every=1000)
    pace = simulate(config, lambda step: 1.0, [0, 7500])
    assert pace.starts[1] == pytest.approx(0.75 * pace.num_steps, rel=0.05)
    start = pace.starts[1]
    pace = simulate(config, lambda step: 2.0 if step >= start else 1.0, [0, 7500])
    assert pace.starts[1] == start
    assert 0.95 * 600 < pace.elapsed_s <= 602


def test_a_time_budget_never_exceeds_the_planned_steps() -> None:
    config = TrainingConfig(max_steps=40, max_minutes=10, validate_every=20)
    assert simulate(config, lambda step: 0.1, [0, 30]).num_steps == 40
    assert simulate(config, lambda step: 0.1, [0, 30]).starts == [0, 30]


def test_without_a_budget_epochs_or_steps_decide() -> None:
    assert Pace.plan(TrainingConfig(epochs=3, batch_size=4), 10, [0]).num_steps == 8
    assert Pace.plan(TrainingConfig(epochs=3, max_steps=5), 10, [0]).num_steps == 5


def test_a_resumed_budget_goes_on_and_a_changed_one_is_taken() -> None:
    config = TrainingConfig(max_steps=10_000, max_minutes=10, validate_every=50)
    pace = Pace.plan(config, 100, [0])
    for step in range(1, MEASURED_STEPS + 1):
        pace.step_done(step, 1.0)
    pace.validation_done(MEASURED_STEPS, 3.0)
    assert pace.num_steps < 1000
    resumed = Pace.plan(config, 100, [0])
    resumed.load_state(json.loads(json.dumps(pace.state())))
    assert (resumed.num_steps, resumed.elapsed_s) == (pace.num_steps, 13.0)
    longer = Pace.plan(replace(config, max_minutes=20), 100, [0])
    longer.load_state(pace.state())
    for step in range(MEASURED_STEPS + 1, 2 * MEASURED_STEPS + 1):
        longer.step_done(step, 1.0)
    assert 1.9 * pace.num_steps < longer.num_steps < 2.1 * pace.num_steps


def test_fit_fits_its_steps_to_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def tick() -> float:
        return clock

    monkeypatch.setattr("aldm.training.time.monotonic", tick)
    config = replace(BASE, max_steps=1000, max_minutes=1.0, validate_every=20, checkpoint_every=1000)
    stage, run = LineStage(config), Run()
    loss = stage.loss

    def slow(model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        nonlocal clock
        clock += 1.0
        return loss(model, batch, info)

    stage.players[0].loss = slow
    result = train(stage, config, run)
    assert 57 <= result.step <= 60
    assert run.records[-2]["learning_rate"] < 0.002 * config.learning_rate  # the cosine ended with it
