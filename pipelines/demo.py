"""aldm demo: every job of the method once, on simulated data, with a report."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aldm.config import Config, training_name, training_of
from pipelines.arguments import JobParser, job_parser, resolve_config
from pipelines.chain import REPORT, SPLITS_FILE, Chain, Step

DEMO_FILE = "demo.json"
LAYOUT, SOURCE, TARGET = "ixi", "t1", "t2"
NUM_VALIDATION, NUM_TEST = 2, 8
STEPS = {"vqgan": 200, "ms-spade": 100, "diffusion": 750, "unet": 750}
"""Steps of the trainings: two runs on one machine end with the same weights. The U-Net's take about as long as those of
stages 2 and 3 together."""
SECONDS_A_STEP = {"vqgan": 0.16, "ms-spade": 0.15, "diffusion": 0.33, "unet": 0.35}
"""What a step takes on two CPU cores, in the mean."""
START_MINUTES = 0.1
"""What a training takes before its first step and after its last."""
DESCRIPTION = f"""Simulate subjects in IXI's layout, prepare them, run the three trainings of the paper and a regression
U-Net for all pairs, score both on held-out subjects, translate one of those and the ICBM152 T1 average that nilearn
ships, and write {REPORT}, which opens offline. Its last line says whether {SOURCE} to {TARGET} is good enough and what
it took. The trainings have fixed numbers of steps: two runs on one machine end with the same weights. Each step is an
aldm command that is printed first and can be run by hand. Run again after an interruption, it goes on where it
stopped."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm demo ARGUMENTS`."""
    parser = _parser()
    args = parser.parse_args(argv)
    config = resolve_config(args)
    if args.num_subjects <= NUM_VALIDATION + NUM_TEST:
        parser.error(f"--num-subjects is {args.num_subjects}, wanted more than {NUM_VALIDATION + NUM_TEST}")
    settings = {
        "preset": args.preset or "small",
        "set": args.set,
        "precision": args.precision,
        "num_subjects": args.num_subjects,
        "seed": args.seed,
        "max_steps": {stage: _max_steps(config, stage) for stage in STEPS},
    }
    out: Path = args.out
    steps = plan_demo(out, settings, config, args.device)
    chain = Chain(out, DEMO_FILE, "demo", settings)
    if args.dry_run:
        chain.earlier_record(args.overwrite)
        print("\n".join(f"{step.budget_minutes:4.1f} min  {step.title}\n          $ {step.line}" for step in steps))
        print(
            f"memory: {_expected_gib(config):.2f} GiB for the largest training, beyond Python and torch (about 0.4 GB)"
        )
        return 0
    record = chain.open(args.overwrite, ("runs", "translated"))
    if not (out / SPLITS_FILE).is_file():
        _write_splits(out / SPLITS_FILE, args.num_subjects)
    print(f"{len(steps)} steps, about {sum(step.budget_minutes for step in steps):.0f} minutes on two CPU cores")
    chain.run(steps, record)
    from pipelines.demo_report import write_demo_report

    verdict = write_demo_report(out, record["steps"], source=SOURCE, target=TARGET)
    print(f"compare the trainings: mlflow ui --backend-store-uri {chain.tracking_uri}")
    print(f"report: {out / REPORT}")
    print(verdict)
    return 0


def plan_demo(out: Path, settings: dict[str, Any], config: Config, device: str) -> list[Step]:
    """Return the commands of the demo, in order."""
    from aldm.data.phantom import subject_name, volume_path
    from aldm.data.phantom_anatomy import icbm152_file

    flags = ["--preset", settings["preset"], "--device", device]
    flags += [word for assignment in settings["set"] for word in ("--set", assignment)]
    flags += ["--precision", settings["precision"]] if settings["precision"] else []
    seed, runs = str(settings["seed"]), out / "runs"
    held_out = volume_path(LAYOUT, subject_name(LAYOUT, settings["num_subjects"] - 1), SOURCE)

    def job(*words: object) -> list[str]:
        names = 2 if words[0] == "train" else 1
        return [*map(str, words[:names]), *flags, *map(str, words[names:])]

    def train(stage: str, title: str, *words: object) -> Step:
        number = settings["max_steps"][stage]
        command = job("train", stage, *words, "--run-dir", runs / stage, "--max-steps", number, "--seed", seed)
        command += _adversary(config, stage, number)
        command += ["--engine", "plain", "--group", out.name]  # without Ray: starting it four times costs a minute
        minutes = START_MINUTES + number * SECONDS_A_STEP[stage] / 60
        return Step(title, command, runs / stage / "config.yaml", minutes, "--resume")

    def translate(title: str, volume: Path, name: str) -> Step:
        output = out / "translated" / f"{name}_{TARGET}.nii.gz"
        command = ["translate", str(volume), str(output), "--model", str(out / "model"), "--device", device]
        return Step(title, [*command, "--source", SOURCE, "--target", TARGET], output, 0.1)

    data, store, latents, model, unet = (out / name for name in ("data", "store", "latents", "model", "unet"))
    phantom = ("phantom", data, "--layout", LAYOUT, "--num-subjects", settings["num_subjects"], "--seed", seed)
    stages = ("--ms-spade", runs / "ms-spade", "--diffusion", runs / "diffusion")
    scores = ("evaluate", "--model", model, "--store", store, "--split", "test", "--out", out / "scores")
    return [
        Step("simulate subjects", job(*phantom, "--spacing-mm", config.preprocess.spacing_mm[0]), data, 0.5),
        Step(
            "check and prepare the data",
            job("prepare", data, store, "--layout", LAYOUT, "--splits", out / SPLITS_FILE, "--num-processes", 2),
            store / "store.json",
            0.3,
            None,
        ),
        train("vqgan", "stage 1: VQGAN between Haar transforms", "--store", store, "--set", "codec.kind=haar-vqgan"),
        Step(
            "encode with the lossless Haar codec",
            job("encode", "--store", store, "--codec", "haar", "--out", latents),
            latents,
            0.1,
        ),
        train("ms-spade", "stage 2: MS-SPADE", "--latents", latents),
        train("diffusion", "stage 3: diffusion", "--latents", latents, "--ms-spade", runs / "ms-spade"),
        Step(
            "export the translator", ["export", "--codec", "haar", *map(str, stages), "--out", str(model)], model, 0.05
        ),
        train("unet", "yardstick: regression U-Net for all pairs", "--store", store),
        Step("export the U-Net", ["export", "--baseline", str(runs / "unet"), "--out", str(unet)], unet, 0.05),
        Step(
            "score both on the held-out subjects",
            [*map(str, scores), "--baseline", f"unet={unet}", "--device", device, "--group", out.name],
            out / "scores",
            1.0,
        ),
        translate("translate a held-out subject", data / held_out, "held_out"),
        translate("translate the ICBM152 T1 average", icbm152_file("t1"), "icbm152"),
    ]


def _max_steps(config: Config, stage: str) -> int:
    """Return a training's steps: the demo's, but no more than the configuration's."""
    return min(STEPS[stage], training_of(config, stage).max_steps or STEPS[stage])


def _adversary(config: Config, stage: str, steps: int) -> list[str]:
    """Return the flag that lets a discriminator join at the same share of the steps as in the configuration."""
    training = training_of(config, stage)
    if training.adversarial_weight == 0 or not training.max_steps:
        return []
    start = training.adversarial_start_step * steps // training.max_steps
    return ["--set", f"{training_name(stage)}.adversarial_start_step={start}"]


def _expected_gib(config: Config) -> float:
    """Return the expected peak memory of the largest training, GiB."""
    from aldm.planner import GIB, PLANNED_TRAININGS, plan_memory

    kinds = {stage: "haar-vqgan" if stage == "vqgan" else "haar" for stage in PLANNED_TRAININGS}
    config = replace(config, modalities=("t1", "t2", "pd"))
    plans = [
        plan_memory(replace(config, codec=replace(config.codec, kind=kind)), stage) for stage, kind in kinds.items()
    ]
    return max(each.peak_bytes for each in plans) / GIB


def _write_splits(path: Path, num_subjects: int) -> None:
    """The last subjects are the test split, those before them the validation split."""
    from aldm.data.phantom import subject_name

    first_test = num_subjects - NUM_TEST
    lines = ["subject_id,split"]
    for index in range(num_subjects):
        split = "test" if index >= first_test else "validation" if index >= first_test - NUM_VALIDATION else "train"
        lines.append(f"{subject_name(LAYOUT, index)},{split}")
    path.write_text("\n".join(lines) + "\n")


def _parser() -> JobParser:
    parser = job_parser("demo", DESCRIPTION)
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that the demo makes")
    parser.add_argument("--num-subjects", type=int, default=34, metavar="N", help="simulated subjects")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the data and of the trainings")
    parser.add_argument("--overwrite", action="store_true", help="delete the demo in --out and start again")
    return parser
