"""aldm tune: sweep noise schedules, objectives and samplers of stage 3 with Ray Tune."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from aldm.config import OBJECTIVES, SAMPLERS, Config
from aldm.errors import UserError
from aldm.stage_inputs import StageInputs
from aldm.words import counted
from pipelines.arguments import JobParser, job_parser, resolve_config

if TYPE_CHECKING:
    from tune.runs import SweepRuns
    from tune.search_space import Space
    from tune.sweep import Sweep

SEARCHERS, SCHEDULERS = ("random", "optuna"), ("asha", "none")
STEPS = (1, 2, 5, 10, 20)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm tune ARGUMENTS`."""
    args = _parser().parse_args(argv)
    out = args.out.resolve()
    if args.resume_or_start:
        args.resume = _begun(args, out)
    _check_folder(out, args.resume, args.overwrite)
    sweep, resolved = _sweep(args)
    if args.resume:
        sweep.check_same(out)
    if args.dry_run:
        print(_plan(sweep, resolved, out))
        return 0
    from pipelines.ray_session import ray_session
    from tune.running import own_folder, run_trials, share_cluster
    from tune.runs import SweepRuns, tracking_store
    from tune.sweep import Sweep

    with tracking_store(out), ray_session():
        share = share_cluster(sweep)
        with own_folder(out, sweep, args.resume):
            sweep = Sweep.load(out)
            with SweepRuns(out, sweep.group(out)) as runs:
                run_trials(sweep, out, share, runs)
                return _finish(sweep, out, runs)


def _parser() -> JobParser:
    parser = job_parser(
        "tune",
        "Sweep noise schedules, objectives and samplers of stage 3: a trial is a training of the diffusion stage, and "
        "every sampler is measured on its one best checkpoint. The measure is the volume's PSNR where the codec is "
        "isometric (haar). With another codec it is latent_rmse, the standardised latents' RMS error, in the trials "
        "and in the Pareto picture alike: a lower one need not be a better volume, so compare the models of the front "
        "with aldm evaluate.",
    )
    parser.add_argument("--latents", type=Path, required=True, help="store of latents, from aldm encode")
    parser.add_argument("--ms-spade", type=Path, required=True, metavar="RUN", help="run folder of stage 2")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweep; all nodes of a cluster reach it")
    parser.add_argument("--num-trials", type=int, default=16, metavar="N", help="points to train")
    parser.add_argument("--max-steps", type=int, help="optimizer steps of a trial (default: the configuration's)")
    parser.add_argument(
        "--max-minutes", type=float, help="fit the steps of a trial to this many minutes (default: the configuration's)"
    )
    parser.add_argument(
        "--objectives",
        nargs="+",
        metavar="NAME",
        help=f"draw from these of {', '.join(OBJECTIVES)} (default: all that the samplers can integrate)",
    )
    parser.add_argument(
        "--samplers", nargs="+", default=list(SAMPLERS), metavar="NAME", help="measure these (default: all)"
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        type=int,
        default=list(STEPS),
        metavar="N",
        help=f"numbers of network evaluations to measure (default: {' '.join(map(str, STEPS))})",
    )
    parser.add_argument(
        "--searcher", choices=SEARCHERS, default="random", help="how points are chosen; optuna learns from the scores"
    )
    parser.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        default="asha",
        help="asha stops the worse trials early, none lets all finish",
    )
    parser.add_argument(
        "--max-concurrent",
        type=int,
        metavar="K",
        help="trials at a time (default: as many as the cluster has CPUs, or GPUs)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the sweep in --out")
    parser.add_argument("--overwrite", action="store_true", help="delete the sweep in --out and start again")
    parser.add_argument(
        "--resume-or-start",
        action="store_true",
        help="go on with the sweep in --out if there is one, else start it: for what is run again as it stands",
    )
    return parser


def _begun(args: argparse.Namespace, out: Path) -> bool:
    """Whether the folder holds a sweep.

    Raises:
        UserError: --resume or --overwrite was given as well.
    """
    from tune.sweep import SWEEP_FILE

    if args.resume or args.overwrite:
        raise UserError("--resume-or-start decides by itself: leave --resume and --overwrite out")
    return (out / SWEEP_FILE).is_file()


def _check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    from aldm.files import check_folder
    from tune.sweep import SWEEP_FILE

    if resume and overwrite:
        raise UserError("--resume continues a sweep and --overwrite deletes it: give one of them")
    is_sweep = (out / SWEEP_FILE).is_file()
    if resume and not is_sweep:
        raise UserError(f"{out} holds no sweep to resume (no {SWEEP_FILE}): leave out --resume to start one")
    if is_sweep and not resume and not overwrite:
        raise UserError(
            f"{out} holds a sweep already: --resume continues it, --overwrite deletes it and starts from scratch"
        )
    if not resume:
        check_folder(out, overwrite=is_sweep, marker=SWEEP_FILE)


def _sweep(args: argparse.Namespace) -> tuple["Sweep", Config]:
    """Return what the flags ask for, checked against the inputs, and a trial's configuration completed with the data's.

    Raises:
        UserError: a number out of range, a name that is not known, inputs that are missing or do not fit.
    """
    from aldm.pace import planned_steps
    from aldm.training_build import build_stage
    from tune.search_space import random_points, with_point, with_way
    from tune.sweep import HALTS, STAGE, Sweep

    for name in ("num_trials", "max_concurrent"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, wanted at least 1")
    preset = resolve_config(args)
    space = _space(args, preset)
    distinct = len(random_points(space, args.num_trials, preset.seed))
    if distinct < args.num_trials:
        raise UserError(
            f"--num-trials {args.num_trials}: objective {' and '.join(space.objectives)} has no more than {distinct} "
            "points to train; take as many trials, or more --objectives"
        )
    changes = {name: value for name in ("max_steps", "max_minutes") if (value := getattr(args, name)) is not None}
    training = replace(preset.train_diffusion, **changes)
    objective = space.objectives[0]
    probe = with_way(with_point(preset, {"objective": objective}), space.scored_way(objective))
    stage, inputs = build_stage(STAGE, probe, StageInputs(latents=args.latents, ms_spade=args.ms_spade))
    for split in ("train", "validation"):
        if not len(stage.samples(split)):
            raise UserError(f"{args.latents} has no {split} subjects, a sweep needs them: prepare with other --splits")
    num_steps = planned_steps(training, len(stage.samples("train")))
    if args.scheduler == "asha" and training.max_minutes is None:
        first_halt = math.ceil(HALTS[0] * num_steps)
        training = replace(training, validate_every=min(training.validate_every, first_halt))
    training = replace(training, checkpoint_every=training.validate_every)
    return Sweep(
        config=replace(preset, train_diffusion=training),
        preset_training=preset.train_diffusion,
        latents=str(args.latents.resolve()),
        ms_spade=str(args.ms_spade.resolve()),
        codec_hash=inputs["codec_hash"],
        ms_spade_hash=inputs["ms_spade_hash"],
        space=space,
        num_steps=num_steps,
        num_trials=args.num_trials,
        searcher=args.searcher,
        scheduler=args.scheduler,
        max_concurrent=args.max_concurrent,
        device=args.device,
        score=stage.score,
        higher_is_better=stage.higher_is_better,
    ), stage.config


def _space(args: argparse.Namespace, preset: Config) -> "Space":
    """Return the space; without --objectives, of all that the samplers can integrate."""
    from aldm.sampling import allowed_samplers
    from tune.search_space import Space

    able = [name for name in OBJECTIVES if set(allowed_samplers(name)) & set(args.samplers)]
    return Space(
        objectives=tuple(args.objectives or able or OBJECTIVES),
        samplers=tuple(args.samplers),
        evaluations=tuple(sorted(set(args.steps))),
        num_train_timesteps=preset.diffusion.num_train_timesteps,
    )


def _plan(sweep: "Sweep", resolved: Config, out: Path) -> str:
    """Say what the sweep would do."""
    from aldm.planner import plan_memory
    from tune.sweep import STAGE

    training = sweep.config.train_diffusion
    length = f"{training.max_minutes:g} min, at most " if training.max_minutes else ""
    stops = (
        "ASHA stops the worse half after a quarter of it, and again after a half"
        if sweep.scheduler == "asha"
        else "none is stopped early"
    )
    return "\n".join(
        [
            f"would sweep {counted(sweep.num_trials, 'trial')} in {out}, points drawn by {sweep.searcher} from",
            *(f"  {line}" for line in sweep.space.describe()),
            f"  a trial: {length}{counted(sweep.num_steps, 'step')} of batch {training.batch_size}; {stops}",
            f"  a validation: {counted(training.num_validation_samples, 'pair')}, every "
            f"{counted(training.validate_every, 'step')}, judged by {sweep.score}",
            f"memory of one trial, {sweep.max_concurrent or 'as many as there are CPUs or GPUs'} at a time:",
            plan_memory(resolved, STAGE).describe(),
        ]
    )


def _finish(sweep: "Sweep", out: Path, runs: "SweepRuns") -> int:
    """Write the results and say what came of it."""
    from tune.results import read_trials, write_sweep
    from tune.sweep import FAILED, MEASURED, PICTURE, PRESET, RESULTS, STOPPED, TABLE

    trials, measurements = read_trials(sweep, out)
    best = write_sweep(sweep, out, trials, measurements)
    runs.finish({trial.name: trial.state for trial in trials}, RESULTS, {f"best/{sweep.score}": best.value})
    counts = [(state, sum(trial.state == state for trial in trials)) for state in (MEASURED, STOPPED, FAILED)]
    print(
        f"tune: {counted(len(trials), 'trial')} ({', '.join(f'{count} {state}' for state, count in counts if count)}); "
        f"best {sweep.score} {best.value:.4g}: {best.label()}, network evaluations {best.way.network_evaluations}\n"
        f"see {out / TABLE} and {out / PICTURE}; go on with aldm train diffusion --preset {out / PRESET}"
    )
    return 0
