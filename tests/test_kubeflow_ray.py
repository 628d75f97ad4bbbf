"""The pipeline's steps on a real cluster: an idle one, and one that outlives the step that submitted to it."""

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from ray_head import RayHead, Submission, wait_until

from aldm.data.store import VolumeStore
from aldm.errors import UserError
from pipelines.kubeflow_run import run_step
from pipelines.kubeflow_steps import STEPS, Parameters, commands, line_of, read_step

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
STEP = "import json, sys; from pipelines.kubeflow_run import step; step(sys.argv[1], json.loads(sys.argv[2]))"


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    """A head without CPUs and no workers, as the cluster `aldm` is when nobody uses it."""
    with RayHead(num_cpus=0) as head:
        yield head


@pytest.fixture
def prepares(head: RayHead, brats_tree: Path, tmp_path: Path) -> Parameters:
    """A run whose first step needs one worker, and whose trainings may have three."""
    return Parameters(
        data=str(brats_tree),
        preset="tiny",
        settings=[f"train_{stage}.batch_size=3" for stage in ("vqgan", "ms_spade", "diffusion")],
        shared=str(tmp_path),
        num_workers=1,
        ray_address=head.address,
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
    )


def start(step: str, p: Parameters, head: RayHead) -> Submission:
    """Run a step as its pod does."""
    return Submission([sys.executable, "-c", STEP, step, json.dumps(asdict(p))], head.environment)


def jobs(head: RayHead, step: str) -> dict[str, str]:
    """Submission id -> status of the jobs of a step."""
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.load(answer)
    return {job["submission_id"]: job["status"] for job in found if job["submission_id"].startswith(step)}


def test_workers_on_gpus_are_asked_of_a_cluster_that_has_none(
    head: RayHead, brats_store: VolumeStore, tmp_path: Path
) -> None:
    p = Parameters(data="/data", preset="tiny", settings=["codec.kind=haar"], shared=str(tmp_path), num_workers=2)
    p = replace(p, use_gpu=True, ray_address=head.address)
    p.folder.mkdir(parents=True)
    (p.folder / "store").symlink_to(brats_store.path)
    submission = head.submit("dry", ROOT, "aldm", *(commands(p)["encode"] or ()), "--dry-run")
    assert submission.wait() == 0, submission.output
    assert "2 tasks at a time on Ray, each on a GPU" in submission.output


def test_a_step_that_is_ended_ends_its_job(head: RayHead, prepares: Parameters) -> None:
    p = replace(prepares, run_name="ended")
    running = start("prepare", p, head)
    wait_until(lambda: "RUNNING" in jobs(head, "prepare").values(), running)
    running.send_signal(signal.SIGTERM)
    assert running.wait() == 143, running.output
    (state,) = jobs(head, "prepare").values()
    assert state == "STOPPED"
    assert read_step("prepare", p)["state"] == "running"  # so the next start continues it


def test_the_job_of_a_step_that_was_killed_is_followed(head: RayHead, prepares: Parameters) -> None:
    """A second start submits nothing while the first one's job waits for a worker, and is done when that is."""
    before = set(jobs(head, "prepare"))
    killed = start("prepare", prepares, head)
    wait_until(lambda: set(jobs(head, "prepare")) - before, killed)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    again = start("prepare", prepares, head)
    wait_until(lambda: "of an earlier start runs still: following it" in again.output, again)
    (job,) = set(jobs(head, "prepare")) - before
    assert job in again.output
    address = f"127.0.0.1:{head.ports['port']}"
    words = ["ray", "start", f"--address={address}", "--num-cpus=1", "--block", "--disable-usage-stats"]
    node = subprocess.Popen(words, env=head.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert again.wait() == 0, again.output
    finally:
        node.terminate()
        node.wait()
    assert "9 subjects" in again.output
    record = read_step("prepare", prepares)
    assert (record["state"], record["command"]) == ("done", line_of("prepare", prepares))

    stopped = record | {"state": "running", "job": {"address": head.address, "id": job}}
    (prepares.folder / STEPS / "prepare.json").write_text(json.dumps(stopped))
    later = start("prepare", replace(prepares, num_workers=3), head)
    assert later.wait() == 0, later.output
    assert f"the job {job} of an earlier start has succeeded meanwhile" in later.output
    assert read_step("prepare", prepares)["state"] == "done"
    assert set(jobs(head, "prepare")) - before == {job}


def test_without_an_answer_nothing_is_submitted_beside_a_job_that_may_run(brats_tree: Path, tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    p = Parameters(data=str(brats_tree), preset="tiny", shared=str(tmp_path), num_workers=1, ray_address=nowhere)
    (p.folder / STEPS).mkdir(parents=True)
    record = {"command": line_of("prepare", p), "state": "running", "begun": 0.0}
    record |= {"job": {"address": nowhere, "id": "prepare-0"}}
    file = p.folder / STEPS / "prepare.json"
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"the job prepare-0, which may still run: .* remove .*prepare\.json first"):
        run_step("prepare", p)
    assert json.loads(file.read_text()) == record
