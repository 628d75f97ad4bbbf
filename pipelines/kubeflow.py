"""python -m pipelines.kubeflow: the Kubeflow pipeline from a data set to a served model, compiled or run right here.

    python -m pipelines.kubeflow --compile aldm.yaml                  # the file to upload to Kubeflow Pipelines
    python -m pipelines.kubeflow --local --shared out --preset tiny   # all of it here, on simulated subjects
    python -m pipelines.kubeflow --dry-run --shared out               # the commands of every step

The flags are the pipeline's parameters; in the compiled file they are the defaults, which a run in Kubeflow may change.
A run whose step failed goes on where it stopped: start it again with the same parameters, here or in Kubeflow (another
run with the same run_name). What is kept says `pipelines/kubeflow_steps.py`; how a step is run, and run again,
`pipelines/kubeflow_run.py`; what is cached and retried, `pipelines/kubeflow_pipeline.py`; what the champion is,
`pipelines/champion.py`.
"""

import argparse
import contextlib
import logging
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from aldm.cli import EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_USER_ERROR, Terminated, with_flags
from aldm.errors import UserError
from aldm.files import atomic_path
from pipelines.arguments import JobParser, job_parser
from pipelines.kubeflow_run import END_WAIT_S
from pipelines.kubeflow_steps import STEP_NAMES, Parameters, check, check_parameters, commands, read_step

DESCRIPTION = """The pipeline simulate or prepare, train vqgan, encode, train ms-spade, train diffusion, export,
evaluate, and, where the new model's PSNR is higher than the champion's, register and roll the service to it: compiled
for Kubeflow Pipelines (--compile), or run on this machine (--local), each step the aldm command that is printed first.
Started again with the same parameters it goes on where it stopped. --dry-run prints the commands."""
EXECUTOR = "kfp.dsl.executor_main"
"""The module that runs a step."""
COMMON = {"preset": "preset", "settings": "set", "device": "device"}
"""Parameters that are flags of every job."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m pipelines.kubeflow ARGUMENTS`.

    Raises:
        UserError: everything that the user can fix.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.precision is not None:
        parser.error("--precision: give --set precision=... instead")
    if sum((args.compile is not None, args.local, args.dry_run)) != 1:
        parser.error("give one of --compile FILE, --local and --dry-run")
    p = parameters_of(args)
    if args.compile is not None:
        return _compile(args, p)
    p = replace(p, shared=str(Path(p.shared).absolute()))
    check(p)
    if args.dry_run:
        for step in STEP_NAMES:
            words = commands(p)[step]
            print(f"{step}: " + (f"aldm {' '.join(words)}" if words else "nothing to do"))
        return 0
    return _run_here(p)


def parameters_of(args: argparse.Namespace) -> Parameters:
    """Return the pipeline's parameters as the flags say."""
    values = {item.name: getattr(args, COMMON.get(item.name, item.name)) for item in fields(Parameters)}
    values["preset"] = values["preset"] or Parameters().preset
    return Parameters(**values)


def compile_to(file: Path, p: Parameters, image: str | None) -> None:
    """Write the pipeline's IR YAML.

    Args:
        file: ends in .yaml.
        p: the parameters' defaults.
        image: of every step; None for this version's.

    Raises:
        UserError: no kfp, or a file that cannot be written.
    """
    made = _pipeline()
    from kfp.compiler import Compiler

    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"--compile {file}: wanted a file that ends in .yaml")
    with atomic_path(file, overwrite=True) as temporary:
        Compiler().compile(made.pipeline, str(temporary), pipeline_parameters=asdict(p))
        if image is not None:
            text = temporary.read_text()
            temporary.write_text(text.replace(f"image: {made.IMAGE}\n", f"image: {image}\n"))


def _compile(args: argparse.Namespace, p: Parameters) -> int:
    elsewhere = Path(p.preset).suffix and not Path(p.preset).is_file()  # on the shared storage, not here
    check_parameters(replace(p, preset="small") if elsewhere else p, with_batches=not elsewhere)
    if args.image is not None and not re.fullmatch(r"[\w.:/@-]+", args.image, flags=re.ASCII):
        raise UserError(f"--image is {args.image!r}, wanted the name of an image")
    compile_to(args.compile, p, args.image)
    print(f"{args.compile}: upload it to Kubeflow Pipelines, or give it to kfp run create")
    return 0


def _run_here(p: Parameters) -> int:
    """Run the pipeline in processes of this machine.

    Raises:
        UserError: a step failed, with what it said last; the others are kept.
    """
    made = _pipeline()
    _without_retries(made.pipeline.pipeline_spec)
    from kfp import local

    try:
        p.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{p.folder} cannot be made: {error.strerror}") from error
    runner = local.SubprocessRunner(use_venv=False)
    local.init(runner=runner, pipeline_root=str(p.folder / "kubeflow"), raise_on_error=True)
    previous = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        made.pipeline(**asdict(p))
    except RuntimeError as error:
        raise UserError(_failure(p, error)) from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    print(f"everything: {p.folder}; MLflow: {p.server}")
    return 0


def _without_retries(spec: Any) -> None:
    """Take the retries out: they wait for nodes to come back, and here somebody is waiting for the message."""
    for dag in (spec.root.dag, *(component.dag for component in spec.components.values())):
        for task in dag.tasks.values():
            task.ClearField("retry_policy")


def _stop(number: int, _: object) -> None:
    """End the step that runs, which ends its command, wait until both have ended, and then end this process.

    Raises:
        KeyboardInterrupt: always.
    """
    started = psutil.Process().children(recursive=True)
    for child in started:
        with contextlib.suppress(psutil.Error):
            if EXECUTOR in child.cmdline():
                child.terminate()
    _, left = psutil.wait_procs(started, timeout=2 * END_WAIT_S)
    for child in left:
        with contextlib.suppress(psutil.Error):
            child.kill()
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _failure(p: Parameters, error: Exception) -> str:
    """Say which step failed and what it said last."""
    failed = [(step, read_step(step, p)) for step in STEP_NAMES]
    said = [
        f"the step {step} failed: {record['message']}" for step, record in failed if record.get("state") == "failed"
    ]
    return f"{said[0] if said else error}; fix that and run the same command again: what is finished is kept"


def _pipeline() -> ModuleType:
    """Return the module that needs kfp.

    Raises:
        UserError: kfp is not installed.
    """
    logging.getLogger("kfp").setLevel(logging.WARNING)
    try:
        from pipelines import kubeflow_pipeline
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "kfp":
            raise
        raise UserError("Kubeflow's package kfp is not installed: pip install 'aldm[kubeflow]'") from error
    return kubeflow_pipeline


def _parser() -> JobParser:
    parser = job_parser("kubeflow", DESCRIPTION)
    parser.prog = "python -m pipelines.kubeflow"
    parser.add_argument("--compile", type=Path, metavar="FILE.yaml", help="write the pipeline for Kubeflow Pipelines")
    parser.add_argument("--local", action="store_true", help="run the pipeline on this machine, without Kubeflow")
    parser.add_argument("--image", help="with --compile: the steps' image (default: aldm of this version, for CPUs)")
    group = parser.add_argument_group("parameters of the pipeline")
    for item in fields(Parameters):
        if item.name in COMMON:
            continue
        flag, default = "--" + item.name.replace("_", "-"), item.default
        assert default is not MISSING
        text = item.metadata["help"]
        if isinstance(default, bool):
            group.add_argument(flag, action="store_true", help=text)
            continue
        text += "" if default != "" or "empty" in text else " (default: none)"
        kind: Any = item.type
        group.add_argument(flag, type=kind, default=default, metavar=kind.__name__.upper(), help=text)
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"python -m pipelines.kubeflow: {with_flags(str(error))}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except Terminated:
        print("python -m pipelines.kubeflow: terminated", file=sys.stderr)
        sys.exit(EXIT_TERMINATED)
    except KeyboardInterrupt:
        print("python -m pipelines.kubeflow: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
