"""k8s/Dockerfile without a container engine: it is linted, its versions agree, and its install steps are replayed.

The replay is a real one: an empty virtual environment, the files that a build gets, pip with the constraints. What it
makes then runs as the image does: as user 10001, on a read-only file system, with a new /tmp.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from image import DOCKERFILE, ROOT, Replay, assignments, chain, context_files, environment, ignored, read_dockerfile
from service import free_port

import aldm
from aldm.cli import JOBS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
TEXT = DOCKERFILE.read_text()
NEEDED = ("sh", "bash", "env", "uname", "cat", "sleep")
"""Programs of the base image that the environment may call; no compiler is among them."""


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).parent / "hadolint")
    return subprocess.run([program, "--no-color", str(path)], capture_output=True, text=True, check=False)


def test_the_dockerfile_has_no_findings() -> None:
    done = hadolint(DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


@pytest.mark.parametrize(
    ("before", "after", "rule"),
    [
        ("ARG PYTHON_IMAGE=", "FROM debian\nARG PYTHON_IMAGE=", "DL3006"),
        ("--no-install-recommends ca", "ca", "DL3015"),
        ("tini=0.19.*", "tini", "DL3008"),
        (" --constraint constraints.txt setuptools", " setuptools", "DL3013"),
        ("USER 10001:10001", "USER root", "DL3002"),
        ('ENTRYPOINT ["tini", "--", "aldm"]', "ENTRYPOINT tini -- aldm", "DL3025"),
        ("-m venv /opt/aldm", '-m venv "/opt/aldm', "SC1072"),
    ],
)
def test_a_worse_dockerfile_is_found_out(tmp_path: Path, before: str, after: str, rule: str) -> None:
    assert before in TEXT
    worse = tmp_path / "Dockerfile"
    worse.write_text(TEXT.replace(before, after, 1))
    done = hadolint(worse)
    assert done.returncode != 0
    assert rule in done.stdout


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_base_images_are_named_by_full_version(variant: str) -> None:
    for last in ("build", "run"):
        image, stages = chain(last, {"VARIANT": variant})
        assert stages[-2].name == f"{last}-{variant}"
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[\w.-]+", image)


def test_both_variants_have_a_python_that_the_project_takes() -> None:
    least, most = (
        tuple(map(int, bound.lstrip("<>=").split("."))) for bound in PROJECT["project"]["requires-python"].split(",")
    )
    tag = read_dockerfile(TEXT)[0]["PYTHON_IMAGE"].partition(":")[2]
    pythons = [tag, *re.findall(r"python3(?:-\w+)?=(\d+\.\d+)", TEXT)]
    assert len(pythons) == 4
    assert all(least <= tuple(map(int, python.split(".")[:2])) < most for python in pythons)
    assert len({python.rpartition(".")[0] or python for python in pythons[1:]}) == 1, "build and run have one Python"


def test_every_install_of_packages_is_pinned() -> None:
    installs = re.findall(r"pip install [^&\n\\]+", TEXT)
    assert len(installs) == 6
    assert [one for one in installs if "--constraint constraints.txt" not in one and "--no-deps" not in one] == []
    named = {word for one in installs for word in re.findall(r" ([a-z][\w-]+)(?= |$)", one)} - {"install"}
    assert {"torch", "deepspeed", "setuptools"} <= named
    assert named <= set(PINS), "what pip is told to install has a version in constraints.txt"


def test_labels_and_tags_have_the_version_of_the_package() -> None:
    labels = {}
    for instruction in read_dockerfile(TEXT)[1]["run"].instructions:
        if instruction.word == "LABEL":
            labels |= assignments(instruction.text)
    assert labels["org.opencontainers.image.version"] == aldm.__version__
    assert set(re.findall(r"aldm:(\d[\d.]+\d)", TEXT)) == {aldm.__version__}
    assert labels["org.opencontainers.image.licenses"] == PROJECT["project"]["license"]


def test_the_extras_exist() -> None:
    extras = next(
        assignments(one.text)["EXTRAS"]
        for one in read_dockerfile(TEXT)[1]["build"].instructions
        if "EXTRAS" in one.text
    )
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_it_runs_as_the_user_of_the_manifests_and_writes_to_tmp(variant: str) -> None:
    instructions = chain("run", {"VARIANT": variant})[1][-1].instructions
    assert [one.text for one in instructions if one.word == "USER"] == ["10001:10001"]
    after = [one.word for one in instructions]
    assert "RUN" not in after[after.index("USER") :]
    env = environment("run", {"VARIANT": variant}, "/usr/bin")
    places = {name: value for name, value in env.items() if re.search(r"HOME|CACHE|CONFIG|DIR$", name)}
    assert len(places) >= 8
    assert {name for name, value in places.items() if not f"{value}/".startswith("/tmp/")} == set()
    assert env["PATH"] == "/opt/aldm/bin:/usr/bin"
    assert env.get("DS_ACCELERATOR") == {"cpu": "cpu", "cuda": None}[variant]


def test_a_build_gets_what_it_copies_and_little_else() -> None:
    copied = [one.text.split()[:-1] for one in read_dockerfile(TEXT)[1]["build"].instructions if one.word == "COPY"]
    names = {name for sources in copied for name in sources}
    packages = {name.rstrip("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= names
    assert {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]} <= names
    kept = {path.name for path in ROOT.iterdir() if any(context_files(path.name) if path.name in names else [])}
    assert kept >= {name for name in names if (ROOT / name).exists()} - {"k8s"}
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    for left in (".git/HEAD", ".venv/bin/python", "tests/test_image.py", "demo/model/weights.safetensors", "mlflow.db"):
        assert ignored(left, patterns), left
    for left in ("aldm/__pycache__/cli.cpython-311.pyc", "serve/.cache/x", "k8s/Dockerfile", "docs/images/page.png"):
        assert ignored(left, patterns), left


def test_package_data_of_the_project_reaches_the_build() -> None:
    for package, globs in PROJECT["tool"]["setuptools"]["package-data"].items():
        for pattern in globs:
            files = [str(path.relative_to(ROOT)) for path in (ROOT / package).glob(pattern) if path.is_file()]
            assert [name for name in files if name not in context_files(package)] in ([], ["k8s/Dockerfile"]), pattern


def test_patterns_of_dockerignore_are_read_as_docker_reads_them() -> None:
    assert ignored("a/b", ["*"])
    assert not ignored("a/b", ["*", "!a"])
    assert ignored("a/b", ["*", "!a", "a/b"])
    assert ignored("x/y/.z/w", ["**/.*"])
    assert not ignored("x/a", ["a"])


def torch_index() -> str:
    """Return the Dockerfile's index of CPU builds, or TORCH_INDEX; nothing, for pip's own, where it does not answer."""
    index = os.environ.get("TORCH_INDEX", read_dockerfile(TEXT)[1]["build-cpu"].instructions[0].text.partition("=")[2])
    with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(index, timeout=20):
        return index
    return ""


@pytest.fixture(scope="module")
def image() -> Iterator[Replay]:
    """The CPU variant's environment, made by the Dockerfile's own instructions; not in /tmp, new in every pod."""
    folder = Path(tempfile.mkdtemp(prefix="aldm-image-", dir="/var/tmp"))
    try:
        folder.chmod(0o755)
        replay = Replay(folder, {"TORCH_INDEX": torch_index()})
        replay.build("build")
        yield replay
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def pod(image: Replay) -> Callable[[str], str]:
    """Runs a bash command as in a pod: read-only root, new /tmp and /dev/shm, user 10001, no compiler on PATH."""
    if sys.platform != "linux" or not shutil.which("unshare") or not shutil.which("setpriv"):
        pytest.skip("needs Linux with util-linux: a read-only root is made with unshare")
    root = os.geteuid() == 0
    unshare = ["unshare", "--mount", *([] if root else ["--map-root-user"])]
    probe = subprocess.run([*unshare, "mount", "-t", "tmpfs", "t", "/tmp"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:  # a container without CAP_SYS_ADMIN, or a system that forbids user namespaces
        pytest.skip(f"this machine lets nobody make a read-only root: {probe.stderr.strip()}")
    tools = image.root / "bin"
    tools.mkdir(exist_ok=True)
    for name in NEEDED:
        (tools / name).symlink_to(str(shutil.which(name)))
    env = {name: image.inside(value) for name, value in environment("run", image.values, str(tools)).items()}
    mounts = "mount -o remount,bind,ro / && mount -t tmpfs t /tmp && mount -t tmpfs t /dev/shm && cd /tmp"
    # It may read as root does, since the Python of this machine may lie where only its owner looks; it writes as 10001.
    reads = "--inh-caps -all,+dac_read_search --ambient-caps +dac_read_search"
    user = f"setpriv --reuid 10001 --regid 10001 --clear-groups {reads}"
    inside = f"{mounts} && exec {user if root else ''} env -i {shlex.join(f'{k}={v}' for k, v in env.items())} bash -c"

    def run(command: str) -> str:
        done = subprocess.run(
            [*unshare, "sh", "-c", f"{inside} {shlex.quote(command)}"], capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    return run


@pytest.mark.slow
def test_the_replay_left_out_only_what_belongs_to_the_base_image(image: Replay) -> None:
    assert image.skipped == []
    assert not (image.root / "src" / "tests").exists()


@pytest.mark.slow
def test_the_environment_has_the_pinned_versions_and_no_others(image: Replay) -> None:
    python = image.root / "opt/aldm/bin/python"
    listed = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"^([\w.-]+)==([^\s+]+)", listed, re.MULTILINE))
    names = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found.items()}
    unpinned = {name: version for name, version in names.items() if PINS.get(name) != version}
    assert unpinned == {}
    assert names["ray"] == PINS["ray"]


@pytest.mark.slow
def test_a_pod_cannot_write_outside_tmp(pod: Callable[[str], str], image: Replay) -> None:
    """What the other tests of the pod rest on."""
    assert "writable" not in pod(
        f"for d in / /var/tmp {image.root} $HOME/../etc; do (echo >$d/x && echo writable) 2>&-; done; true"
    )
    assert pod("echo >/tmp/x; echo >/dev/shm/x; echo done") == "done\n"


@pytest.mark.slow
def test_the_commands_run_on_a_read_only_root(pod: Callable[[str], str]) -> None:
    assert pod("aldm --version") == f"aldm {aldm.__version__}\n"
    assert "parameters" in pod("aldm info --preset tiny")
    assert pod("ray --version").split()[-1] == PINS["ray"]
    if "k8s" in JOBS:
        assert "render" in pod("aldm k8s --help")


@pytest.mark.slow
def test_everything_is_importable_where_no_home_is_writable(pod: Callable[[str], str]) -> None:
    code = "import ray, deepspeed, mlflow, matplotlib.pyplot, serve.app, aldm; print(aldm.__file__)"
    assert "/opt/aldm/lib/" in pod(f"HOME=/nowhere python -c {shlex.quote(code)}")


@pytest.mark.slow
def test_ray_runs_a_task_there(pod: Callable[[str], str]) -> None:
    code = """
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
print(ray.get(ray.remote(lambda: 6 * 7).remote()))
"""
    assert pod(f"ulimit -n 4096; python -c {shlex.quote(code)}").split()[-1] == "42"


@pytest.mark.slow
def test_the_model_that_ships_translates_there(pod: Callable[[str], str]) -> None:
    code = "import nibabel, numpy; x = numpy.random.default_rng(0).random((32, 32, 24), 'float32')\n"
    code += "nibabel.save(nibabel.Nifti1Image(x, numpy.diag([4, 4, 4, 1])), '/tmp/t1.nii.gz')"
    command = f"python -c {shlex.quote(code)} && aldm translate t1.nii.gz t2.nii.gz --source t1 --target t2"
    assert "t2.nii.gz" in pod(f"{command} && echo *.nii.gz").split()[-1]


@pytest.mark.slow
def test_deepspeed_trains_there_without_a_compiler(pod: Callable[[str], str]) -> None:
    """As aldm's engine starts it: torch's optimizer, sharded states, no op of DeepSpeed's own."""
    code = """
import shutil, torch, torch.distributed as dist
from pipelines.distributed_engines import _start_deepspeed
assert not any(map(shutil.which, ("cc", "gcc", "g++", "nvcc")))
dist.init_process_group("gloo", init_method="file:///tmp/rendezvous", rank=0, world_size=1)
_start_deepspeed()
import deepspeed
net = torch.nn.Linear(4, 4)
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(net.parameters()), config=config)
before = [p.detach().clone() for p in net.parameters()]
engine.backward(engine(torch.ones(1, 4)).square().sum())
engine.step()
print("moved" if any(not torch.equal(a, b) for a, b in zip(before, net.parameters())) else "stood still")
"""
    ranks = f"RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()}"
    assert pod(f"{ranks} python -c {shlex.quote(code)}").split()[-1] == "moved"
