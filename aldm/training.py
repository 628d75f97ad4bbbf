"""The only training loop.

A step runs the stage's players in their order. `fit` sees a Stage (what is optimised), an Engine (how gradients become
steps, on one process or many) and two callbacks, `on_log` and `on_checkpoint`. Every random choice of a step is a
function of the seed, the step and the sample's place in the batch (aldm/randomness.py), and the batch of a step is
defined for all ranks together and split by rank: a resumed training computes what it would have computed without the
stop.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from aldm.checkpoint import load_weights, read_weights, write_checkpoint
from aldm.config import TrainingConfig
from aldm.data.dataset import Samples, batch_places, collate
from aldm.engine import EMA, PlainEngine
from aldm.errors import NotFiniteError, UserError
from aldm.interrupts import DeferredInterrupts
from aldm.pace import MEASURED_STEPS, Pace, learning_rate
from aldm.players import Batch, Engine, FitResult, Panel, Player, Snapshot, Stage, StepInfo, Values, only_trainable
from aldm.progress import Progress, progress
from aldm.randomness import derived_generator, derived_seed
from aldm.records import Kinds, read_record
from aldm.run_folder import LOOP_STATE

__all__ = ["FitResult", "PlainEngine", "Snapshot", "fit", "validate"]

_LOOP_STATE: Kinds = {
    "step": int,
    "best": (float, int, type(None)),
    "validated": dict,
    "pace.length": list,
    "pace.num_steps": int,
    "pace.starts": list,
    "pace.elapsed_s": (float, int),
    "pace.fitted": bool,
    "pace.validation_s": (float, int, type(None)),
    "pace.checkpoint_s": (float, int),
    "window": dict,
}
"""What a snapshot's training.json holds."""

OnLog = Callable[[dict[str, Any]], None]
OnCheckpoint = Callable[[Snapshot], None]
OnPanel = Callable[[int, Panel], None]


def fit(
    stage: Stage,
    engine: Engine,
    config: TrainingConfig,
    *,
    seed: int,
    on_log: OnLog,
    on_checkpoint: OnCheckpoint,
    on_panel: OnPanel | None = None,
    resume_from: Path | None = None,
) -> FitResult:
    """Train a stage.

    Args:
        stage: its players, samples, validation and export.
        engine: steps the players.
        config: length, batch size, and when to log, validate and write a checkpoint.
        seed: of every random choice.
        on_log: called on rank 0 with {step, ...} of training or {step, validation/...}; step counts finished steps.
        on_checkpoint: called on every rank with a snapshot to write.
        on_panel: called on rank 0 after a validation with the step and volumes of its first sample to look at.
        resume_from: folder that a snapshot was written to.

    Raises:
        UserError: no training sample, a batch that the ranks cannot share evenly, or a loss or gradient that is not
            finite (the weights are as before the step).
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the step at hand and a checkpoint.
    """
    loop = _Loop(stage, engine, config, seed, on_log, on_checkpoint, on_panel)
    if resume_from is not None:
        loop.load(resume_from)
    with torch.random.fork_rng(devices=[]), DeferredInterrupts() as interrupts:
        loop.run(interrupts)
    return FitResult(loop.step, loop.validated, loop.best)


@torch.no_grad()
def validate(
    stage: Stage,
    modules: Mapping[str, nn.Module],
    samples: Samples,
    engine: Engine,
    *,
    num_samples: int,
    seed: int,
    step: int = 0,
) -> tuple[dict[str, float], Panel | None]:
    """Return the means of what a stage measures over samples spread over a split, and the first sample's panel.

    Samples and noise depend on the seed alone: equal weights have equal scores, whenever they are measured. The modules
    are left in evaluation mode, torch's random state is not kept.

    Args:
        stage: measures.
        modules: of the stage's players, by name.
        samples: of the split, at least one.
        engine: whose ranks share the samples.
        num_samples: validate on so many of them; more than there are take some several times.
        seed: of every random choice.
        step: of the training, for the stage.
    """
    for module in modules.values():
        module.eval()
    window, panel = _Window(), None
    for index, number, weight in _spread(len(samples), num_samples, engine):
        generator = derived_generator(seed, "validation", number)
        batch = _on_device(collate([samples.sample(index, generator)]), engine.device)
        torch.manual_seed(derived_seed(seed, "validation layers", number))
        info = StepInfo(step, [generator], frozenset(modules))
        with engine.autocast():
            window.add("validation", stage.validate(modules, batch, info), weight)
        panel = panel or info.shared.get("panel")
    return {name.removeprefix("validation/"): value for name, value in window.means(engine).items()}, panel


class _Loop:
    """The state of one call of `fit`."""

    def __init__(
        self,
        stage: Stage,
        engine: Engine,
        config: TrainingConfig,
        seed: int,
        on_log: OnLog,
        on_checkpoint: OnCheckpoint,
        on_panel: OnPanel | None,
    ) -> None:
        self.stage, self.engine, self.config, self.seed = stage, engine, config, seed
        self.on_log, self.on_checkpoint, self.on_panel = on_log, on_checkpoint, on_panel
        self.train, self.validation = stage.samples("train"), stage.samples("validation")
        _check(self.train, config, engine)
        self.averages = {  # taken first: an engine may shard the weights that it prepares
            player.name: EMA(player.module, player.config.ema_decay, engine.device)
            for player in stage.players
            if player.config.ema_decay > 0
        }
        self.models = {player.name: engine.prepare(player) for player in stage.players}
        stage.connect(engine)
        self.pace = Pace.plan(config, len(self.train), [player.start_step for player in stage.players])
        self.step = 0
        self.best: float | None = None
        self.validated: dict[str, float] = {}
        self.window = _Window()

    def run(self, interrupts: DeferredInterrupts) -> None:
        """Train to the end, or to the interrupt."""
        saved, validated = self.step, self.step
        bar: Progress[None]
        with progress(total=self.pace.num_steps - self.step, description=self.stage.name, unit="step") as bar:
            while self.step < self.pace.num_steps and not self._stops(interrupts):
                self._timed_step()
                bar.update()
                if self.step % self.config.log_every == 0:
                    bar.note(self._log())
                is_best = False
                if self._validation_is_due():
                    is_best, validated = self._validate(), self.step
                if is_best or self.step % self.config.checkpoint_every == 0:
                    self._save(is_best)
                    saved = self.step
                bar.set_remaining(self.pace.num_steps - self.step)
        finished = self.step >= self.pace.num_steps
        if finished and self.step % self.config.log_every:
            self._log()
        if finished and validated < self.step:
            is_best = self._validate()
            self._save(is_best)
        elif saved < self.step:
            self._save(is_best=False)
        interrupts.deliver()

    def _stops(self, interrupts: DeferredInterrupts) -> bool:
        """Whether a signal has come, to any rank: all have to stop after the same step."""
        requested = interrupts.requested is not None
        if self.engine.world_size == 1:
            return requested
        return float(self.engine.reduce(torch.tensor(float(requested), device=self.engine.device))) > 0

    def _seconds_since(self, begin: float) -> float:
        """Return the time since `begin`; with a time budget the mean over the ranks, which have to agree on it."""
        seconds = time.monotonic() - begin
        if self.engine.world_size == 1 or self.config.max_minutes is None:
            return seconds
        return float(self.engine.reduce(torch.tensor(seconds, dtype=torch.float64, device=self.engine.device)))

    def _timed_step(self) -> None:
        begin = time.monotonic()
        self._train_step()
        self.step += 1
        self.pace.step_done(self.step, self._seconds_since(begin))

    def _train_step(self) -> None:
        """Run the players of one step."""
        places = batch_places(len(self.train), self.config.batch_size, self.step, self.seed)
        own = range(self.engine.rank, self.config.batch_size, self.engine.world_size)
        generators = [derived_generator(self.seed, "step", self.step, place) for place in own]
        samples = [self.train.sample(places[i], generator) for i, generator in zip(own, generators, strict=True)]
        batch = _on_device(collate(samples), self.engine.device)
        torch.manual_seed(derived_seed(self.seed, "layers", self.step, self.engine.rank))  # dropout and the like
        turns = [
            (player, start)
            for player, start in zip(self.stage.players, self.pace.starts, strict=True)
            if self.step >= start
        ]
        info = StepInfo(self.step, generators, frozenset(player.name for player, _ in turns))
        for player, start in turns:
            rate = learning_rate(player.config, self.step, self.pace.num_steps)
            with only_trainable(player, self.stage.players):
                with self.engine.autocast():
                    loss, values = player.loss(self.models[player.name], batch, info)
                self._check_finite(player, loss.detach())
                self.engine.backward(player, loss)
                try:
                    norm = self.engine.step(player, rate)
                except FloatingPointError as error:
                    raise self._not_finite(str(error)) from error
            if player.name in self.averages:
                self.averages[player.name].update(self.engine.weights(player), self.step - start)
            self.window.add(player.name, {"loss": loss.detach(), "gradient_norm": norm, **values})

    def _check_finite(self, player: Player, loss: Tensor) -> None:
        """Raise on all ranks where the loss of any is not finite."""
        value = float(self.engine.reduce(loss))
        if not math.isfinite(value):
            own = torch.zeros(self.engine.world_size, device=self.engine.device)
            own[self.engine.rank] = float(not torch.isfinite(loss))
            ranks = self.engine.reduce(own).nonzero().flatten().tolist()
            raise self._not_finite(f"the loss of {player.name} is {value}", ranks)

    def _not_finite(self, what: str, ranks: Sequence[int] = ()) -> NotFiniteError:
        """Return the error that names the subjects of these ranks, or of the whole batch; the same on every rank."""
        places = batch_places(len(self.train), self.config.batch_size, self.step, self.seed)
        subjects = [
            self.train.sample(place, derived_generator(self.seed, "step", self.step, i))["subject_id"]
            for i, place in enumerate(places)
            if not ranks or i % self.engine.world_size in ranks
        ]
        return NotFiniteError(
            f"{what} at step {self.step + 1} of {self.stage.name}, on subject {', '.join(subjects)}; the step was not "
            "taken. Look at that subject's volumes, lower the learning_rate, or use `precision` fp32"
        )

    def _log(self) -> str:
        """Hand the means since the last log to on_log; return a short text for the progress display."""
        values = self.window.means(self.engine)
        self.window = _Window()
        rate = learning_rate(self.config, self.step - 1, self.pace.num_steps)
        epoch = self.step * self.config.batch_size / len(self.train)
        record = {"step": self.step, "num_steps": self.pace.num_steps, "epoch": round(epoch, 4), "learning_rate": rate}
        if self.engine.rank == 0:
            self.on_log(record | values | {"elapsed_s": round(self.pace.elapsed_s, 2)})
        first = self.stage.players[0].name
        return f"loss {values[f'{first}/loss']:.4g}"

    def _validation_is_due(self) -> bool:
        early = self.step == MEASURED_STEPS and self.pace.wants_validation_time
        return early or self.step % self.config.validate_every == 0

    def _validate(self) -> bool:
        """Validate, log, and return whether this is the best score so far."""
        begin = time.monotonic()
        if not len(self.validation):
            self.pace.validation_done(self.step, 0.0)
            return False
        modules = {
            player.name: self.averages[player.name].module if player.name in self.averages else player.module
            for player in self.stage.players
        }
        number = self.config.num_validation_samples
        self.validated, panel = validate(
            self.stage, modules, self.validation, self.engine, num_samples=number, seed=self.seed, step=self.step
        )
        for player in self.stage.players:
            player.module.train()
        self.pace.validation_done(self.step, self._seconds_since(begin))
        if self.engine.rank == 0:
            self.on_log({"step": self.step, **{f"validation/{name}": value for name, value in self.validated.items()}})
            if self.on_panel is not None and panel is not None:
                self.on_panel(self.step, panel)
        score = self.validated[self.stage.score]
        if self.best is None or (score > self.best if self.stage.higher_is_better else score < self.best):
            self.best = score
            return True
        return False

    def _save(self, is_best: bool) -> None:
        begin = time.monotonic()
        self.on_checkpoint(Snapshot(self.step, is_best, self.validated, self._write))
        self.pace.checkpoint_done(self._seconds_since(begin))

    def _write(self, folder: Path) -> None:
        """Write this rank's share of a snapshot."""
        window = self.window.state(self.engine)
        weights = {
            player.name: self.averages[player.name].module.state_dict()
            if player.name in self.averages
            else self.engine.weights(player)
            for player in self.stage.players
        }
        self.engine.save(folder)
        if self.engine.rank != 0:
            return
        export = self.stage.export(weights)
        training = {
            "stage": self.stage.name,
            "step": self.step,
            "num_steps": self.pace.num_steps,
            "score": self.stage.score,
            "validation": self.validated,
        }
        meta = {**export.meta, "training": training}
        write_checkpoint(folder, kind=export.kind, config=export.config, weights=export.weights, meta=meta)
        for name, average in self.averages.items():
            save_file(_separate(average.module.state_dict()), _average_file(folder, name))
        state = {
            "step": self.step,
            "best": self.best,
            "validated": self.validated,
            "pace": self.pace.state(),
            "window": window,
        }
        (folder / LOOP_STATE).write_text(json.dumps(state, indent=1) + "\n")

    def load(self, folder: Path) -> None:
        """Go on from a snapshot."""
        if not (folder / LOOP_STATE).is_file():
            raise UserError(f"{folder} holds no state of a training (no {LOOP_STATE}): it cannot be resumed")
        state = read_record(folder / LOOP_STATE, _LOOP_STATE, "resume from another checkpoint, or train again")
        self.engine.load(folder)
        for name, average in self.averages.items():
            load_weights(average.module, read_weights(_average_file(folder, name)), _average_file(folder, name))
        self.step, self.best, self.validated = state["step"], state["best"], state["validated"]
        self.pace.load_state(state["pace"])
        self.window = _Window(state["window"])


class _Window:
    """Sums of the values since the last log; nothing is read from the device before it is asked for."""

    def __init__(self, state: Mapping[str, Sequence[float]] | None = None) -> None:
        self._sums = {
            name: (torch.tensor(total, dtype=torch.float64), count) for name, (total, count) in (state or {}).items()
        }

    def add(self, prefix: str, values: Values, weight: int = 1) -> None:
        """Add the values of one step, or with weight 0 nothing but their names."""
        for name, value in values.items():
            key = f"{prefix}/{name}"
            total, count = self._sums.get(key, (0.0, 0))
            added = torch.as_tensor(value, dtype=torch.float64) if weight else 0.0
            self._sums[key] = (torch.as_tensor(total, dtype=torch.float64) + added, count + weight)

    def state(self, engine: Engine) -> dict[str, tuple[float, float]]:
        """Return {name: (sum, count)}, both averaged over the ranks."""
        if not self._sums:
            return {}
        sums = [(torch.as_tensor(total).to(engine.device), count) for total, count in self._sums.values()]
        totals = torch.stack([torch.stack((total, total.new_tensor(count))) for total, count in sums])
        return dict(zip(self._sums, map(tuple, engine.reduce(totals).tolist()), strict=True))

    def means(self, engine: Engine) -> dict[str, float]:
        """Return {name: mean} over steps and ranks."""
        return {name: total / count for name, (total, count) in self.state(engine).items()}


def _check(train: Samples, config: TrainingConfig, engine: Engine) -> None:
    if not len(train):
        raise UserError("the training split is empty: prepare more subjects, or give other `splits`")
    if config.batch_size % engine.world_size:
        raise UserError(
            f"batch_size {config.batch_size} cannot be shared evenly by {engine.world_size} workers: take a multiple"
        )


def _spread(length: int, number: int, engine: Engine) -> list[tuple[int, int, int]]:
    """Return this rank's (index, number, weight) of validation samples spread over a split.

    Every rank gets as many, as engines that shard parameters need; where they do not come out even, the last round is
    filled with samples of weight 0.
    """
    places = [i * length // number if number <= length else i % length for i in range(number)]
    even = -(-number // engine.world_size) * engine.world_size
    numbered = [(places[i % number], i % number, int(i < number)) for i in range(even)]
    return numbered[engine.rank :: engine.world_size]


def _on_device(batch: Batch, device: torch.device) -> Batch:
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy whose tensors share no memory, which safetensors asks for."""
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def _average_file(folder: Path, player: str) -> Path:
    return folder / f"average-{player}.safetensors"
