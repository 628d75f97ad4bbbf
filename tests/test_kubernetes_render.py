"""aldm k8s render: what it fills in, what it refuses, and that an installed package is enough."""

import functools
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_objects import ROOT, overlay

from aldm import planner
from aldm.cli import main
from aldm.config import override
from aldm.errors import UserError
from aldm.presets import PRESETS
from pipelines import kubernetes_render
from pipelines.kubernetes_checks import containers_of, manifest_errors
from pipelines.kubernetes_commands import cluster_spec, has_gpu, parsed, words_of
from pipelines.kubernetes_fill import GPU_LABEL, Setup, demand_of, filled
from pipelines.kubernetes_fit import GPUS_GIB, Fit, check_fits, fits_of, smallest_gpu, told
from pipelines.kubernetes_quantities import quantity, said
from pipelines.kubernetes_schemas import Manifest, pod_templates
from pipelines.serve_config import with_model

IMAGE = "registry.example:5000/team/aldm:0.1.0-cuda"
GPU_WORDS = ("k8s", "render", "--overlay", "gpu", "--image", IMAGE)


@pytest.fixture(scope="module", autouse=True)
def _planned_once() -> Iterator[None]:
    """What the planner says of a configuration is asked once: it says the same again, after seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "plan_memory", functools.cache(planner.plan_memory))
        yield


def setup_of(preset: str = "brats", num_workers: int = 16, **changes: Any) -> Setup:
    values: dict[str, Any] = {"image": IMAGE, "preset": preset, "config": PRESETS[preset](), "layout": "brats"}
    return Setup(**values | {"num_workers": num_workers, "gpu": "h100-80gb"} | changes)


def jobs_of(manifests: list[Manifest]) -> dict[str, Manifest]:
    return {item["metadata"]["name"]: item for item in manifests if item["kind"] == "RayJob"}


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlays made once, and nothing traced: what fits is tested by itself."""
    monkeypatch.setattr(kubernetes_render, "kustomized", lambda folder: list(overlay(folder.name)))
    monkeypatch.setattr(kubernetes_render, "fits_of", lambda manifests, setup: [])


@pytest.mark.parametrize("preset", ["brats", "ixi", "released", "brats-haar", "small", "tiny"])
def test_what_is_filled_in_is_in_order_and_everywhere(preset: str) -> None:
    before = list(overlay("gpu"))
    setup = setup_of(preset, layout="ixi" if preset == "ixi" else "brats")
    made = filled(before, setup)
    assert manifest_errors(made, image=IMAGE) == []
    images = {
        box["image"] for item in made for _, template in pod_templates(item) for box in containers_of(template["spec"])
    }
    assert {image for image in images if "aldm" in image} == {IMAGE}
    jobs = jobs_of(made)
    assert ("aldm-train-vqgan" in jobs) == (setup.config.codec.kind != "haar")
    for name, job in jobs.items():
        args, config = parsed(words_of(job))
        if "--preset" in words_of(job):
            assert config.preset == preset, name
        for group in cluster_spec(job).get("workerGroupSpecs", []):
            assert group["replicas"] == 16
            selector = {GPU_LABEL: "h100-80gb"} if has_gpu(group) else None
            assert group["template"]["spec"].get("nodeSelector") == selector, name
        if setup.config.codec.kind == "haar" and hasattr(args, "codec"):
            assert args.codec == "haar"
    assert before == list(overlay("gpu"))


def test_a_batch_is_the_presets_made_divisible_unless_one_is_asked_for() -> None:
    def batch(setup: Setup) -> int:
        words = words_of(jobs_of(filled(overlay("gpu"), setup))["aldm-train-diffusion"])
        assert sum("batch_size" in word for word in words) == 1
        return parsed(words)[1].train_diffusion.batch_size

    assert batch(setup_of(num_workers=16)) == 16
    assert batch(setup_of("released", num_workers=3)) == 6
    assert batch(setup_of("released", num_workers=1)) == 4
    config = override(PRESETS["brats"](), ["train_diffusion.batch_size=32"])
    asked = setup_of(config=config, settings=["train_diffusion.batch_size=32"])
    assert asked.batch_size("diffusion") == 32
    words = words_of(jobs_of(filled(overlay("gpu"), asked))["aldm-train-diffusion"])
    assert parsed(words)[1].train_diffusion.batch_size == 32


def test_the_queue_has_room_for_the_largest_job() -> None:
    made = filled(overlay("gpu"), setup_of(num_workers=64))
    (queue,) = [item for item in made if item["kind"] == "ClusterQueue"]
    quota = {
        resource["name"]: quantity(resource["nominalQuota"])
        for group in queue["spec"]["resourceGroups"]
        for flavor in group["flavors"]
        for resource in flavor["resources"]
    }
    assert quota["nvidia.com/gpu"] == 64
    for job in jobs_of(made).values():
        assert all(quota[name] >= amount for name, amount in demand_of(job).items())


def test_the_service_is_given_the_model_and_keeps_all_else() -> None:
    def config(manifests: Sequence[Manifest]) -> Any:
        (service,) = [item for item in manifests if item["kind"] == "RayService"]
        return yaml.safe_load(service["spec"]["serveConfigV2"])

    wanted = config(overlay("gpu"))
    assert config(filled(overlay("gpu"), setup_of())) == wanted
    wanted["applications"][0]["args"]["model"] = "models:/translator/7"
    made = filled(overlay("gpu"), setup_of(model="models:/translator/7"))
    assert config(made) == wanted
    assert manifest_errors(made, image=IMAGE) == []
    (text,) = [item["spec"]["serveConfigV2"] for item in made if item["kind"] == "RayService"]
    assert with_model(text, "models:/translator/7", "aldm") == text  # what a roll writes: kubectl sees no conflict


@pytest.mark.parametrize("unit", ["", "m", "k", *"MGTPE", *(f"{unit}i" for unit in "KMGTPE")])
def test_quantities_are_what_kubernetes_takes_them_for(unit: str) -> None:
    parse = pytest.importorskip("kubernetes.utils.quantity").parse_quantity
    for number in ("0", "1", "2", "250", "1.5", "0.125", "1000000"):
        assert quantity(number + unit) == pytest.approx(float(parse(number + unit)))
        assert quantity(said(quantity(number + unit), like=f"8{unit}")) == pytest.approx(
            math.ceil(float(number)) * quantity(f"1{unit}")
        )


@pytest.mark.parametrize("text", ["1K", "64GiB", "1e", "mi", "-1", "1 Gi", "1.2.3", "1ki", "."])
def test_what_is_no_quantity_is_none(text: str) -> None:
    with pytest.raises(AssertionError):
        quantity(text)


def test_a_number_is_said_rounded_up() -> None:
    assert said(64.25 * 2**30, like="8Gi") == "65Gi"
    assert said(8.1, like="8") == "9"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--overlay", "prod"), "--overlay is 'prod', wanted one of dev, gpu"),
        (("--image", "registry.example/aldm"), "names no version"),
        (("--image", "registry.example/aldm:latest"), "names no version"),
        (("--image", "Registry/ALDM:1"), "in lower case"),
        (("--image", "aldm:1 --privileged"), "wanted REGISTRY/NAME:TAG"),
        (("--image", "registry.example/other:1"), "an image named aldm"),
        (("--image", "aldm:0.1.0-cpu"), "its tag says cpu, overlay gpu takes cuda: wanted aldm:0.1.0-cuda"),
        (
            ("--image", "r.io/aldm:0.2.0-cuda"),
            "its tag says aldm 0.2.0, these manifests are of 0.1.0: wanted r.io/aldm:",
        ),
        (("--image", "aldm:0.2.0@sha256:" + 64 * "0"), "its tag says aldm 0.2.0"),
        (("--overlay", "dev", "--image", "aldm:0.1.0-cuda"), "overlay dev takes cpu: wanted aldm:0.1.0-cpu"),
        (("--preset", "brat"), "no preset 'brat'"),
        (("--num-workers", "0"), "--num-workers is 0, wanted at least 1"),
        (("--model", "models:/translator@champion"), "wanted models:/NAME/VERSION, which never changes"),
        (("--gpu", "h100"), "--gpu is 'h100', wanted one of l4-24gb"),
        (
            ("--overlay", "dev", "--image", "aldm:0.1.0-cpu", "--gpu", "h100-80gb"),
            "workers of overlay dev have no GPU: say --overlay gpu",
        ),
        (("--device", "cuda"), "the overlay says where jobs compute"),
        (("--set", "train_diffusion.batchsize=3"), "batchsize"),
        (("--num-workers", "16", "--set", "train_vqgan.batch_size=24"), "say --set train_vqgan.batch_size=32"),
        (("--only", "aldm-prepaer"), "--only aldm-prepaer"),
    ],
)
def test_a_setup_that_cannot_work_is_refused(
    unplanned: None, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert main([*GPU_WORDS, *words]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_a_file_as_preset_is_refused(unplanned: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("preset: brats\n")
    assert main([*GPU_WORDS, "--preset", str(tmp_path / "my.yaml")]) == 2
    assert "a file is not in the image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "said"), [(":0.1.0-cuda", False), (":0.1.0", True), (":nightly", True), ("@sha256:" + 64 * "a", True)]
)
def test_an_image_whose_name_says_nothing_is_taken_with_a_word(
    unplanned: None, capsys: pytest.CaptureFixture[str], version: str, said: bool
) -> None:
    assert main([*GPU_WORDS[:4], "--image", f"r.io/aldm{version}", "--dry-run"]) == 0
    assert ("see to it that it is aldm 0.1.0, cuda" in capsys.readouterr().err) == said


def test_files_and_output_hold_the_same(unplanned: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [*GPU_WORDS, "--num-workers", "16"]
    assert main(words) == 0
    printed = list(yaml.safe_load_all(capsys.readouterr().out))
    out = tmp_path / "out"
    assert main([*words, "--out", str(out)]) == 0
    written = [item for file in sorted(out.rglob("*.yaml")) for item in yaml.safe_load_all(file.read_text())]
    key = str
    assert sorted(map(key, written)) == sorted(map(key, printed))
    assert {file.stem for file in (out / "jobs").iterdir()} == set(jobs_of(written))
    assert main([*words, "--out", str(out)]) == 2
    assert main([*words, "--out", str(out), "--overwrite"]) == 0
    capsys.readouterr()
    assert main([*words, "--only", "aldm-prepare", "service"]) == 0
    chosen = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [item["kind"] for item in chosen] == ["RayJob", "RayService"]


def test_a_dry_run_writes_nothing(unplanned: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*GPU_WORDS, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "would write RayJob aldm-train-diffusion" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused_with_a_way_out() -> None:
    fits = [Fit("train diffusion", 60.0, 40.0), Fit("translate", 3.0, 40.0)]
    with pytest.raises(
        UserError, match=r"preset brats does not fit a GPU a100-40gb: train diffusion.*DOES NOT FIT"
    ) as refused:
        check_fits(fits, setup_of(gpu="a100-40gb"), "gpu")
    assert "--gpu h100-80gb" in str(refused.value)
    assert "translate" not in str(refused.value)
    assert "activation_checkpointing" in str(refused.value)
    with pytest.raises(UserError) as refused:
        check_fits([fits[0], Fit("translate", 60.0, 40.0)], setup_of(gpu="a100-40gb"), "gpu")
    assert "activation_checkpointing" not in str(refused.value)
    with pytest.raises(UserError, match=r"does not fit a worker of overlay dev: .* or say --overlay gpu"):
        check_fits(fits, setup_of(gpu=None), "dev")
    check_fits([Fit("tune", 60.0, 40.0, beside=True)], setup_of(gpu="a100-40gb"), "gpu")


def test_where_no_gpu_is_named_the_least_that_is_enough_is_told() -> None:
    """A part fits the GPU that is told and none with less memory; what fits none is refused."""
    for needed in (1.0, 19.0, 21.0, 36.0, 70.0, 140.0):
        gpu = smallest_gpu(needed)
        assert gpu is not None
        rooms = {name: (gib - 1) * 0.9 for name, gib in GPUS_GIB.items()}
        assert rooms[gpu] == min(room for room in rooms.values() if room >= needed)
    fits = [Fit("train diffusion", 60.0, None), Fit("translate", 3.0, None), Fit("tune", 150.0, None, beside=True)]
    check_fits(fits, setup_of(gpu=None), "gpu")
    assert told(fits)[0] == "train diffusion: 60.0 GiB: fits h100-80gb"
    assert "no --gpu: h100-80gb or a larger one takes the chain and the service" in "\n".join(told(fits))
    huge = [Fit("train diffusion", 200.0, None)]
    with pytest.raises(UserError, match=r"does not fit any GPU that is known: train diffusion: .* FITS NO GPU"):
        check_fits(huge, setup_of(gpu=None), "gpu")


def test_the_planner_is_asked_about_the_chain_the_sweep_and_the_service() -> None:
    """Where a worker has little memory nothing fits; a worker's share of the batch counts, not the batch."""
    setup = setup_of("tiny", num_workers=2, gpu=None)
    fits = fits_of(overlay("dev"), setup)
    trainings = [f"train {stage}" for stage in ("diffusion", "ms-spade", "vqgan")]
    assert [fit.what.split(",")[0] for fit in fits] == ["encode", "evaluate", *trainings, "tune", "the service"]
    assert [fit.what for fit in fits if fit.beside] == ["tune, a trial with a batch of 1"]
    assert all(fit.fits and fit.room_gib == 3.0 for fit in fits)
    on_gpu = fits_of([item for item in overlay("gpu") if item["kind"] == "RayService"], setup_of("tiny", gpu="l4-24gb"))
    assert [fit.room_gib for fit in on_gpu] == [pytest.approx((GPUS_GIB["l4-24gb"] - 1) * 0.9)]


def test_every_manifest_is_package_data() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["k8s"]
    packed = {path for pattern in patterns for path in (ROOT / "k8s").glob(pattern)}
    there = {
        path
        for path in (ROOT / "k8s").rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert there - packed == set()


@pytest.mark.slow
def test_an_installed_package_renders(tmp_path: Path) -> None:
    """With nothing of the repository around but what a wheel holds."""
    for package in ("aldm", "pipelines", "serve", "tune", "k8s"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    words = ["k8s", "render", "--overlay", "dev", "--image", "aldm:0.1.0-cpu", "--num-workers", "2", "--only", "jobs"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "aldm.cli", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("^kind: RayJob", done.stdout, re.MULTILINE)) == 10
    assert "the service, one volume:" in done.stderr
