"""One training in this process, from its inputs to a run folder, as `aldm train` does with `engine` plain."""

from pathlib import Path

import torch

from aldm.config import Config, training_of
from aldm.device import select_device
from aldm.engine import PlainEngine
from aldm.players import FitResult, Stage
from aldm.precision import usable_precision
from aldm.run_folder import RunFolder, check_run_folder
from aldm.stage_inputs import StageInputs
from aldm.training import OnLog, OnPanel, fit
from aldm.training_build import build_stage


def train(
    stage: str,
    config: Config,
    paths: StageInputs,
    run_dir: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
) -> FitResult:
    """Train one stage and keep its checkpoints in a run folder.

    Args:
        stage: vqgan, ms-spade, diffusion, unet, segmenter, uncertainty or a comparison method.
        config: the configuration of the whole model.
        paths: what the stage is built from.
        run_dir: folder of the run; made if it is missing.
        device: cpu, cuda or auto.
        resume: go on with the run in the folder.
        overwrite: delete the run in the folder.

    Raises:
        UserError: an input that is missing or does not go with the others, a run folder that cannot be used, or a loss
            that is not finite.
    """
    folder = Path(run_dir)
    check_run_folder(folder, resume, overwrite, stage)
    built, inputs = build_stage(stage, config, paths)
    built.samples("train")  # data that it cannot learn from are refused before anything is written
    opened = RunFolder.open(folder, stage=stage, config=built.config, inputs=inputs, resume=resume, overwrite=overwrite)
    with opened as run:
        return train_in(run, stage, built, select_device(device), resume=resume)


def train_in(
    run: RunFolder,
    stage: str,
    built: Stage,
    device: torch.device,
    *,
    resume: bool = False,
    on_log: OnLog | None = None,
    on_panel: OnPanel | None = None,
) -> FitResult:
    """Train a stage that is built, in a run folder that is open.

    Args:
        run: takes the checkpoints.
        stage: its name.
        built: what is trained.
        device: where to compute.
        resume: go on from the folder's last checkpoint.
        on_log: takes the lines of metrics; None writes them into the folder.
        on_panel: takes volumes to look at after a validation; see `fit`.
    """
    config = built.config
    return fit(
        built,
        PlainEngine(device, usable_precision(config.precision, device)),
        training_of(config, stage),
        seed=config.seed,
        on_log=on_log or run.log,
        on_checkpoint=lambda snapshot: run.save(snapshot.write, snapshot.is_best),
        on_panel=on_panel,
        resume_from=run.resume_from() if resume else None,
    )
