"""Trainings that run one after the other in a group of processes, as engines find it; for the tests of the engines."""

import multiprocessing
import os
import tempfile
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any


def run_on(num_workers: int, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the tasks on so many ranks and return what rank 0 found; test_ray_training.py has the groups of Ray Train.

    The ranks are forked from a process that has imported what takes seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "aldm.training", "pipelines.train"])
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        group = [pool.submit(curves, rank, num_workers, f"{folder}/group", tasks) for rank in range(num_workers)]
        done, _ = wait(group, return_when=FIRST_EXCEPTION)
        for rank in done:  # what failed first: the others only miss it
            rank.result()
        return group[0].result()


def losses(run: dict[str, Any], after: int = 0) -> dict[str, list[float]]:
    """Return every logged value by name, one a step."""
    values: dict[str, list[float]] = {}
    for record in run["log"]:
        if record["step"] > after:
            for name, value in record.items():
                if "/" in name:
                    values.setdefault(name, []).append(value)
    return values


def assert_same(got: dict[str, list[float]], wanted: dict[str, list[float]], relative: float) -> None:
    """Compare the curves of two runs."""
    import numpy as np

    assert got.keys() == wanted.keys()
    assert any(name.endswith("/loss") for name in got)
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], rtol=relative, atol=1e-7, err_msg=name)


def curves(rank: int, num_workers: int, meeting: str, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return {log: records, weights: exported arrays} of every task, as this rank of a group has them.

    Args:
        rank: of this process.
        num_workers: ranks of the group.
        meeting: a file by which they find each other; it is not there yet.
        tasks: arguments of `curve`.
    """
    import torch
    import torch.distributed as dist

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_workers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in names.items()})  # DeepSpeed looks there too
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=num_workers)
    try:
        return [curve(**task) for task in tasks]
    finally:
        dist.destroy_process_group()  # so that nobody waits for a rank that failed


def curve(
    stage: str,
    engine: str,
    inputs: dict[str, str],
    training: dict[str, Any],
    folder: str,
    resume: str | None = None,
    poisoned_rank: int | None = None,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Train a stage with an engine; its checkpoints go to folder/step.

    Args:
        stage: vqgan, diffusion, or a comparison method.
        engine: plain, ddp or zero-0 to zero-3.
        inputs: paths by flag name.
        training: changes of the tiny preset's section.
        folder: for the checkpoints, shared by all ranks.
        resume: checkpoint to go on from.
        poisoned_rank: the rank whose loss of the third step is not a number.
        precision: fp32 or bf16.

    Returns:
        log and exported weights of rank 0; codebooks, parameters: a digest of every rank's; refused: every rank's
        message; poisoned: the subjects of the loss that was not a number, of every rank.
    """
    from safetensors.numpy import load_file

    from aldm.errors import NotFiniteError
    from aldm.training import fit

    built, section = make_stage(stage, inputs, training)
    resume_from = None if resume is None else Path(resume)
    made = make_engine(engine, section.batch_size, resume_from, precision)
    logged: list[dict[str, Any]] = []

    def save(snapshot: Any) -> None:
        path = Path(folder) / str(snapshot.step)
        path.mkdir(exist_ok=True, parents=True)
        snapshot.write(path)

    poisoned = poison(built, step=2) if poisoned_rank == made.rank else []
    message = None
    try:
        fit(built, made, section, seed=0, on_log=logged.append, on_checkpoint=save, resume_from=resume_from)
    except NotFiniteError as error:
        message = str(error)
    last = max((int(path.name) for path in Path(folder).iterdir()), default=0)
    weights = load_file(Path(folder) / str(last) / "weights.safetensors") if made.rank == 0 else {}
    return {
        "log": logged,
        "weights": weights,
        "codebooks": of_all_ranks(made, codebook_digest(built)),
        "parameters": of_all_ranks(made, parameters_digest(built)),
        "refused": of_all_ranks(made, message),
        "poisoned": of_all_ranks(made, poisoned),
    }


def poison(stage: Any, step: int) -> list[str]:
    """Make the first player's loss of a step not a number; its subjects are put into the list that is returned."""
    player = stage.players[0]
    whole = player.loss
    subjects: list[str] = []

    def loss(model: Any, batch: Any, info: Any) -> Any:
        value, values = whole(model, batch, info)
        if info.step != step:
            return value, values
        subjects.extend(batch["subject_id"])
        return value * float("nan"), values

    player.loss = loss
    return subjects


def codebook_digest(stage: Any) -> str | None:
    """Return a digest of the codebook and its statistics; None where there is none."""
    import hashlib

    quantizer = getattr(getattr(stage, "codec", None), "quantizer", None)
    if quantizer is None:
        return None
    state = sorted(quantizer.state_dict().items())
    return hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for _, tensor in state)).hexdigest()


def parameters_digest(stage: Any) -> str:
    """Return a digest of what is trained; buffers, such as a batch norm's averages, are each rank's own."""
    import hashlib

    digest = hashlib.sha256()
    for player in stage.players:
        for parameter in player.module.parameters():
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def of_all_ranks(engine: Any, value: Any) -> list[Any]:
    """Return what every rank has."""
    import torch.distributed as dist

    if engine.world_size == 1:
        return [value]
    found: list[Any] = [None] * engine.world_size
    dist.all_gather_object(found, value)
    return found


def make_stage(stage: str, inputs: dict[str, str], training: dict[str, Any]) -> tuple[Any, Any]:
    """Return the stage of the changed tiny preset and its section of the configuration."""
    from aldm.config import training_of, with_training
    from aldm.config_baselines import METHODS
    from aldm.presets import tiny
    from aldm.stage_inputs import StageInputs
    from aldm.training_build import build_stage

    config = replace(tiny(), pair=("t1", "t2")) if stage in METHODS else tiny()
    paths = StageInputs(**{name: Path(path) for name, path in inputs.items()})
    built, _ = build_stage(stage, with_training(config, stage, **training), paths)
    return built, training_of(built.config, stage)


def make_engine(name: str, batch_size: int, resume_from: Path | None, precision: str) -> Any:
    """Return plain, ddp or zero-N."""
    from aldm.engine import PlainEngine
    from pipelines.distributed_engines import DDPEngine, DeepSpeedEngine

    if name == "plain":
        return PlainEngine(precision=precision)
    if name == "ddp":
        return DDPEngine(precision=precision)
    return DeepSpeedEngine(
        precision=precision, zero_stage=int(name[-1]), batch_size=batch_size, resume_from=resume_from
    )
