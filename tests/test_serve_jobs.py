"""The job store by itself: order, leases, limits, expiry, and what a new start finds."""

import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import serve.jobs
from aldm.errors import UserError
from serve.jobs import CHECK_S, LEASE_S, MAX_ATTEMPTS, JobStore
from serve.problems import Problem
from serve.records import FINISHED, QUEUED, RUNNING, Job, new_id
from serve.settings import Settings
from serve.work_folder import SWEEP_S


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = time.time()

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The job store's clock."""
    clock = Clock()
    monkeypatch.setattr(serve.jobs, "time", clock)
    return clock


def settings_of(folder: Path, **limits: Any) -> Settings:
    usual = {"max_upload_mb": 0.001, "max_queue": 3, "max_voxels": 1000}
    return Settings(model="unused", work_dir=str(folder), **usual | limits)


def claim(store: JobStore, worker: str, count: int, name: str | None = None, model: str = "h") -> list[Job]:
    """A worker's request for jobs, under a new name unless it is asked again."""
    return store.claim(worker, count, name or new_id(), model)


def reserve(store: JobStore, ticket: str | None = None, size: int = 1000) -> str:
    """Reserve a place under a new name unless it is asked again; return the name."""
    ticket = ticket or new_id()
    store.reserve(ticket, size)
    return ticket


def arrived(store: JobStore, size: int = 10, **fields: Any) -> Job:
    """A job whose volume of `size` bytes lies in its folder, not yet queued."""
    values: dict[str, Any] = {
        "id": new_id(),
        "owner": "me",
        "source": "t1",
        "source_from": "request",
        "targets": ["t2"],
        "sampler": "ddim",
        "num_inference_steps": 4,
        "num_samples": 1,
        "eta": 0.0,
        "seed": 0,
        "format": "nii.gz",
        "model": {"name": "m", "hash": "h"},
        "created": serve.jobs.time.time(),
    }
    job = Job(**values | fields)
    folder = store.folder / job.id
    folder.mkdir()
    (folder / "volume.nii.gz").write_bytes(bytes(size))
    return job


def add(store: JobStore, size: int = 10, **fields: Any) -> Job:
    """Queue a job whose volume has `size` bytes."""
    ticket = reserve(store)
    job = arrived(store, size, **fields)
    store.submit(ticket, job)
    return job


def restarted(store: JobStore) -> JobStore:
    """What a new process finds after the old one was killed: the kernel gives its lock back."""
    store.lock.close()
    return JobStore(store.settings)


def test_first_come_first_served_and_equal_jobs_in_one_batch(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path, max_queue=5))
    first, other, like_first = add(store), add(store, num_samples=2), add(store, targets=["pd"], seed=7)
    assert store.get(like_first.id, "me")["queue_position"] == 2
    assert claim(store, "w", 4) == [first, like_first]
    assert claim(store, "v", 4) == [other]
    assert claim(store, "w", 4) == []
    assert {store.get(job.id, "me")["state"] for job in (first, other, like_first)} == {RUNNING}


def test_a_full_queue_is_busy_and_uploads_count(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    add(store)
    tickets = [reserve(store), reserve(store)]
    with pytest.raises(Problem, match="queue is full") as caught:
        reserve(store)
    assert caught.value.status == 503
    assert int(caught.value.headers["Retry-After"]) >= 1
    store.release(tickets[0])
    store.release(reserve(store))
    reserve(store)
    with pytest.raises(Problem):
        reserve(store)
    clock.now += 300 + CHECK_S + 1  # uploads that never came
    assert reserve(store)


def test_an_upload_that_lost_its_place_is_taken_where_there_is_another(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path, max_queue=1))
    ticket, first, second = reserve(store), arrived(store), arrived(store)
    clock.now += 300 + CHECK_S + 1
    assert store.counts()["uploading"] == 0
    store.submit(ticket, first)
    with pytest.raises(Problem, match="lost its place"):
        store.submit(ticket, second)
    assert [job.id for job in claim(store, "w", 9)] == [first.id]


def test_progress_grows_to_1(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    job = add(store)
    claim(store, "w", 1)
    seen = []
    for done in (0.0, 0.5, 0.3, 1.2):
        assert store.beat("w", {job.id: done}) == []
        seen.append(store.get(job.id, "me")["progress"])
    assert seen == [0.0, 0.5, 0.5, 1.0]


def test_a_silent_worker_s_jobs_go_to_another_before_all_others(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    first, second = add(store), add(store)
    assert claim(store, "w", 1) == [first]
    for _ in range(5):
        clock.now += LEASE_S - 1
        assert store.beat("w", {first.id: 0.5}) == []
    clock.now += LEASE_S + 1
    assert claim(store, "v", 1) == [first]
    assert store.get(first.id, "me")["attempt"] == 2
    assert store.beat("w", {first.id: 0.9}) == [first.id]  # the old one comes back and is told to stop
    store.finish("w", first.id)
    assert store.get(first.id, "me")["state"] == RUNNING
    store.finish("v", first.id)
    assert store.get(first.id, "me")["state"] == "done"
    assert store.counts()["totals"]["retried"] == 1
    assert claim(store, "v", 1) == [second]


def test_a_job_that_kills_its_workers_is_given_up(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    job = add(store)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert [one.attempt for one in claim(store, "w", 1)] == [attempt]
        clock.now += LEASE_S + 1
    view = store.get(job.id, "me")
    assert (view["state"], view["error"]["status"]) == ("failed", 500)
    assert "died 3 times" in view["error"]["detail"]
    assert claim(store, "w", 1) == []


def test_cancelling(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    running, waiting = add(store), add(store)
    claim(store, "w", 1)
    for job in (running, waiting):
        store.cancel(job.id, "me")
        assert store.get(job.id, "me")["state"] == "cancelled"
        assert not (store.folder / job.id / "volume.nii.gz").exists()
    assert store.beat("w", {running.id: 0.4}) == [running.id]
    (store.folder / running.id / "result_t2.nii.gz").write_bytes(b"late")
    store.finish("w", running.id)
    assert [file.name for file in (store.folder / running.id).iterdir()] == ["job.json"]
    assert store.get(running.id, "me")["state"] == "cancelled"
    store.cancel(running.id, "me")  # a second time: nothing more
    assert store.get(running.id, "me")["state"] == "cancelled"
    store.forget(running.id, "me")
    store.forget(running.id, "me")
    with pytest.raises(Problem, match="no such translation"):
        store.get(running.id, "me")


def test_what_a_silent_worker_writes_for_a_cancelled_job_goes(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    job = add(store)
    claim(store, "w", 1)
    store.cancel(job.id, "me")
    clock.now += LEASE_S + 1
    assert store.get(job.id, "me")["state"] == "cancelled"
    (store.folder / job.id / "result_t2.nii.gz").write_bytes(b"late")
    store.finish("w", job.id)
    assert [file.name for file in (store.folder / job.id).iterdir()] == ["job.json"]


def test_what_became_of_jobs_is_counted(tmp_path: Path, clock: Clock) -> None:
    """Only a result's seconds count; what leaves no result leaves no volume either."""
    store = JobStore(settings_of(tmp_path, max_upload_mb=1))
    made, failing, unwanted = add(store), add(store, size=10**5), add(store, size=10**5)
    claim(store, "w", 1)
    counts = store.counts()
    assert (counts["queued"], counts["running"]) == (2, 1)
    clock.now += 3
    store.finish("w", made.id)
    claim(store, "w", 1)
    clock.now += 7
    store.finish("w", failing.id, Problem(422, "bad").as_dict())
    store.cancel(unwanted.id, "me")
    counts = store.counts()
    assert (counts["queued"], counts["running"]) == (0, 0)
    assert counts["totals"] == {"accepted": 3, "done": 1, "failed": 1, "cancelled": 1}
    assert counts["seconds"] == pytest.approx(3)
    assert [edge for edge, count in counts["histogram"] if count] == [5]
    assert counts["folder_bytes"] < 10**5


def test_only_the_owner_sees_a_job(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    job = add(store)
    for call in (store.get, store.cancel, store.forget):
        with pytest.raises(Problem) as caught:
            call(job.id, "another")
        assert caught.value.status == 404
    assert store.get(job.id, "me")["state"] == QUEUED


def test_results_expire(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path, keep_hours=2))
    job, waiting = add(store), add(store)
    claim(store, "w", 1)
    store.finish("w", job.id)
    clock.now += 2 * 3600 - 1
    assert store.get(job.id, "me")["state"] == "done"
    clock.now += 2
    with pytest.raises(Problem, match="expired"):
        store.get(job.id, "me")
    assert not (store.folder / job.id).exists()
    assert store.get(waiting.id, "me")["state"] == QUEUED  # what is not done does not expire


def test_the_folder_stays_below_its_size(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path, max_folder_gb=0.04, max_queue=10))  # 40 MB, 1 MB for an upload
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "weights").write_bytes(bytes(4_000_000))
    old, new = add(store, size=10_000_000), add(store, size=10_000_000)  # and 2.1 MB for the results of each
    for job in (old, new):
        claim(store, "w", 1)
        store.finish("w", job.id)
        clock.now += SWEEP_S
    waiting, _ = add(store, size=8_000_000), add(store, size=8_000_000)
    assert store.get(old.id, "me")["state"] == "done"
    add(store, size=8_000_000)  # 44 MB are there: the oldest finished one goes
    with pytest.raises(Problem, match="no such"):
        store.get(old.id, "me")
    add(store, size=8_000_000)
    with pytest.raises(Problem, match="no such"):
        store.get(new.id, "me")
    with pytest.raises(Problem, match="is full of unfinished jobs"):
        reserve(store)
    assert store.get(waiting.id, "me")["state"] == QUEUED
    assert store.counts()["folder_bytes"] > 36_000_000


def taken(store: JobStore) -> int:
    """How many uploads at once the folder has room for."""
    for number in range(100):
        try:
            reserve(store, f"{number}")
        except Problem:
            break
    return store.counts()["uploading"]


def test_what_arrives_and_what_will_be_written_count(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path, max_folder_gb=0.04, max_queue=100))  # 40 MB, 1.015 MB for an upload
    job = add(store, voxels=1_000_000, targets=["t2", "pd", "t1"], num_samples=2)  # 3 x (2 x 4.2 + 2.1) MB
    assert taken(store) == 8
    store.cancel(job.id, "me")
    assert taken(store) == 39


def test_a_cap_below_one_upload_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="raise the first or lower the others"):
        settings_of(tmp_path, max_folder_gb=0.001)


def test_a_full_disk_takes_no_uploads(tmp_path: Path, clock: Clock, monkeypatch) -> None:
    store = JobStore(settings_of(tmp_path))
    full = shutil.disk_usage(tmp_path)._replace(free=10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(Problem, match="the disk of the service's folder is full"):
        reserve(store)


def test_every_call_can_be_made_twice(tmp_path: Path, clock: Clock) -> None:
    """Callers do that when an answer is late; the first call may have come through."""
    store = JobStore(settings_of(tmp_path, max_queue=3))
    jobs = [add(store), add(store)]
    ticket = reserve(store)
    assert reserve(store, ticket) == ticket  # a full queue by now, and still the same place
    assert store.counts()["uploading"] == 1
    store.release(ticket)
    store.release(ticket)
    assert store.counts()["uploading"] == 0
    assert claim(store, "w", 1, "first") == claim(store, "w", 1, "first") == [jobs[0]]
    assert store.get(jobs[0].id, "me")["attempt"] == 1
    assert store.counts()["queued"] == 1
    again = restarted(store)  # between the two
    assert [job.id for job in claim(again, "w", 1, "first")] == [jobs[0].id]
    assert claim(again, "w", 1, "second")[0].id == jobs[1].id
    for job, error in zip(jobs, (None, Problem(422, "bad").as_dict()), strict=True):
        again.finish("w", job.id, error)
        again.finish("w", job.id, error)
    assert again.counts()["totals"] == {"done": 1, "failed": 1}
    for _ in range(2):
        again.cancel(jobs[0].id, "me")
        assert again.get(jobs[0].id, "me")["state"] == "done"
    for _ in range(2):
        again.forget(jobs[0].id, "me")
    assert not (store.folder / jobs[0].id).exists()


def test_a_job_is_made_by_the_model_that_it_was_meant_for(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    old, new = {"name": "old", "hash": "h"}, {"name": "new", "hash": "g"}
    store.configure(store.settings.model_dump(), old)
    running, waiting = add(store, model=old), add(store, model=old)
    claim(store, "w", 1)
    assert claim(store, "v", 1, model="g") == []  # a copy of the new model that is ready early
    assert store.get(waiting.id, "me")["state"] == QUEUED
    again = restarted(store)
    again.configure(store.settings.model_dump(), new)
    view = again.get(waiting.id, "me")
    assert (view["state"], view["error"]["status"]) == ("failed", 409)
    assert "another model (new, it was old)" in view["error"]["detail"]
    assert again.beat("w", {running.id: 0.5}) == []  # an old copy that still runs may finish
    clock.now += LEASE_S + 1
    assert again.get(running.id, "me")["state"] == "failed"  # and nobody makes it when that copy dies
    with pytest.raises(Problem, match="being started again with another model"):
        add(again, model=old)
    (left,) = (job for job in (add(again, model=new),) if claim(again, "v", 1, model="g"))
    assert again.get(left.id, "me")["state"] == RUNNING


def test_another_model_may_serve_once_a_copy_of_it_asks_for_work(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    assert store.may_serve("h")  # the first
    store.configure(store.settings.model_dump(), {"name": "old", "hash": "h"})
    assert store.may_serve("h")
    assert not store.may_serve("g")
    claim(store, "v", 1, model="g")
    assert store.may_serve("g")
    clock.now += LEASE_S + 1
    assert store.may_serve("h")
    assert not store.may_serve("g")  # that copy has died


def test_a_restarted_store_knows_the_last_limits(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    store.configure(settings_of(tmp_path, max_queue=7).model_dump(), {"name": "m", "hash": "h"})
    store.lock.close()
    first = settings_of(tmp_path)  # what Ray starts it again with
    assert JobStore(first, as_configured=True).settings.max_queue == 7


def test_a_new_start_finds_every_job(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path, max_queue=5))
    done, running, silent, second = add(store), add(store), add(store), add(store)
    for _ in range(3):
        clock.now += 0.1
        claim(store, "w", 1)
    store.finish("w", done.id)
    again = restarted(store)
    assert again.get(done.id, "me")["state"] == "done"
    assert claim(again, "v", 1)[0].id == second.id
    again.finish("v", second.id)
    assert again.beat("w", {running.id: 0.7}) == []  # its worker is alive and goes on
    clock.now += LEASE_S - 1
    again.beat("w", {running.id: 0.8})
    clock.now += 2
    assert [job.id for job in claim(again, "v", 1)] == [silent.id]
    again.finish("w", running.id)
    assert again.get(running.id, "me")["state"] == "done"
    assert again.get(running.id, "me")["attempt"] == 1


def test_uploads_of_an_ingress_that_died_are_removed_and_nothing_else(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    job = add(store)
    half, damaged, users = store.folder / new_id(), store.folder / new_id(), store.folder / "my-results"
    for folder in (half, damaged, users):
        folder.mkdir()
    (half / "upload.nii").write_bytes(b"Doe^Jane")
    (damaged / "job.json").write_text('{"id": ')
    again = restarted(store)
    assert [one.id for one in claim(again, "w", 9)] == [job.id]
    assert half.exists()  # its ingress may be alive
    clock.now += 300 + CHECK_S + 60
    again.beat("w", {job.id: 0.5})
    again.counts()
    assert {folder.name for folder in again.folder.iterdir()} == {job.id, "my-results"}


def test_another_s_folder_is_left_alone(tmp_path: Path) -> None:
    project = tmp_path / "project"
    kept = project / "jobs" / "my-results" / "table.csv"
    kept.parent.mkdir(parents=True)
    kept.write_text("1")
    os.utime(kept.parent, (0, 0))
    project.chmod(0o755)
    with pytest.raises(UserError, match="holds jobs that no translation service made"):
        JobStore(settings_of(project))
    assert kept.read_text() == "1"
    kept.parent.parent.rename(project / "results")
    store = JobStore(settings_of(project))
    assert stat.S_IMODE(project.stat().st_mode) == 0o755
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    store.lock.close()
    JobStore(settings_of(tmp_path / "new"))
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_a_service_that_is_started_again_and_again_does_not_use_up_a_job_s_attempts(
    tmp_path: Path, clock: Clock
) -> None:
    store = JobStore(settings_of(tmp_path))
    job = add(store)
    for attempt in range(1, MAX_ATTEMPTS + 3):
        assert [one.attempt for one in claim(store, f"w{attempt}", 1)] == [attempt]
        store = restarted(store)
        clock.now += LEASE_S + 1
    assert store.get(job.id, "me")["state"] == QUEUED
    assert store.get(job.id, "me")["deaths"] == 0


def test_draining_starts_nothing_and_keeps_what_waits(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    running, waiting = add(store), add(store)
    claim(store, "w", 1)
    assert store.drain() == 1
    assert claim(store, "w", 1) == []
    with pytest.raises(Problem, match="about to stop"):
        reserve(store)
    store.finish("w", running.id)
    assert store.drain() == 0
    assert [job.id for job in claim(restarted(store), "w", 1)] == [waiting.id]


def test_halting_stops_what_is_running_for_the_next_start(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    job = add(store)
    claim(store, "w", 1)
    store.halt()
    assert store.beat("w", {job.id: 0.5}) == [job.id]
    store.finish("w", job.id)  # what the worker says when it has stopped
    again = restarted(store)
    assert again.get(job.id, "me")["state"] == RUNNING
    clock.now += LEASE_S + 1
    assert [one.id for one in claim(again, "v", 1)] == [job.id]


def test_two_services_cannot_share_a_folder(tmp_path: Path) -> None:
    store = JobStore(settings_of(tmp_path))
    with pytest.raises(UserError, match="in use by another service"):
        JobStore(store.settings)
    with pytest.raises(UserError, match="cannot be used"):
        JobStore(settings_of(Path("/proc/none")))


class AnyOrder(RuleBasedStateMachine):
    """Whatever clients, workers and restarts do, in any order: no job is lost, and none is in two places."""

    @initialize()
    def start(self) -> None:
        self.number = 0
        self.place = tempfile.TemporaryDirectory()
        self.clock = Clock()
        self.real, serve.jobs.time = serve.jobs.time, self.clock  # type: ignore[assignment]
        self.store = JobStore(settings_of(Path(self.place.name) / "w", max_queue=4))
        self.held: dict[str, set[str]] = {"v": set(), "w": set()}
        self.known: set[str] = set()

    @rule(samples=st.integers(1, 2))
    def submit(self, samples: int) -> None:
        if self.store.counts()["queued"] >= 4:
            with pytest.raises(Problem, match="queue is full"):
                reserve(self.store)
            return
        self.number += 1
        self.known.add(add(self.store, id=f"{self.number:03d}", num_samples=samples).id)

    @rule(worker=st.sampled_from(["v", "w"]), count=st.integers(1, 3))
    def claim(self, worker: str, count: int) -> None:
        self.held[worker] |= {job.id for job in claim(self.store, worker, count)}

    @rule(worker=st.sampled_from(["v", "w"]), done=st.floats(0, 1))
    def beat(self, worker: str, done: float) -> None:
        self.held[worker] -= set(self.store.beat(worker, dict.fromkeys(self.held[worker], done)))

    @precondition(lambda self: any(self.held.values()))
    @rule(worker=st.sampled_from(["v", "w"]), fails=st.booleans())
    def finish(self, worker: str, fails: bool) -> None:
        for job_id in sorted(self.held[worker])[:1]:
            self.store.finish(worker, job_id, Problem(422, "bad").as_dict() if fails else None)
            self.held[worker].remove(job_id)

    @precondition(lambda self: self.known)
    @rule(index=st.integers(0, 9))
    def cancel(self, index: int) -> None:
        job_id = sorted(self.known)[index % len(self.known)]
        if self.store.get(job_id, "me")["state"] in FINISHED:
            self.known.remove(job_id)
            self.store.forget(job_id, "me")
        else:
            self.store.cancel(job_id, "me")

    @rule(seconds=st.floats(0.1, 1.5 * LEASE_S))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def die(self) -> None:
        self.store = restarted(self.store)

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "store"):
            return
        views = {job_id: self.store.get(job_id, "me") for job_id in self.known}
        for job_id, view in views.items():
            assert (view["queue_position"] is not None) == (view["state"] == QUEUED)
            assert 0 <= view["progress"] <= 1
            assert (self.store.folder / job_id / "volume.nii.gz").exists() == (
                view["state"] not in ("failed", "cancelled")
            )
        positions = sorted(view["queue_position"] for view in views.values() if view["state"] == QUEUED)
        assert positions == list(range(len(positions)))

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.lock.close()
            serve.jobs.time = self.real
            self.place.cleanup()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = hypothesis_settings(max_examples=40, stateful_step_count=30, deadline=None)
