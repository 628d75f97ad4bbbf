"""The job store by itself: order, leases, limits, expiry, and what a new start finds."""

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
from serve.jobs import FINISHED, LEASE_S, MAX_ATTEMPTS, QUEUED, RUNNING, Job, JobStore, new_id
from serve.problems import Problem
from serve.settings import Settings


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
    return Settings(model="unused", work_dir=str(folder), **{"max_upload_mb": 0.001, "max_queue": 3} | limits)


def add(store: JobStore, size: int = 10, **fields: Any) -> Job:
    """Queue a job whose volume has `size` bytes."""
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
    ticket = store.reserve()
    folder = store.folder / job.id
    folder.mkdir()
    (folder / "volume.nii").write_bytes(bytes(size))
    store.submit(ticket, job)
    return job


def restarted(store: JobStore) -> JobStore:
    """What a new process finds after the old one was killed: the kernel gives its lock back."""
    store._lock.close()
    return JobStore(store.settings)


def test_first_come_first_served_and_equal_jobs_in_one_batch(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path, max_queue=5))
    first, other, like_first = add(store), add(store, num_samples=2), add(store, targets=["pd"], seed=7)
    assert store.get(like_first.id, "me")["queue_position"] == 2
    assert store.claim("w", 4) == [first, like_first]
    assert store.claim("v", 4) == [other]
    assert store.claim("w", 4) == []
    assert {store.get(job.id, "me")["state"] for job in (first, other, like_first)} == {RUNNING}


def test_a_full_queue_is_busy_and_uploads_count(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    add(store)
    tickets = [store.reserve(), store.reserve()]
    with pytest.raises(Problem, match="queue is full") as caught:
        store.reserve()
    assert caught.value.status == 503
    assert int(caught.value.headers["Retry-After"]) >= 1
    store.release(tickets[0])
    store.release(store.reserve())
    store.reserve()
    with pytest.raises(Problem):
        store.reserve()
    clock.now += serve.jobs.TICKET_S + 1  # uploads that never came
    assert store.reserve()


def test_a_silent_worker_s_jobs_go_to_another_before_all_others(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    first, second = add(store), add(store)
    assert store.claim("w", 1) == [first]
    for _ in range(5):
        clock.now += LEASE_S - 1
        assert store.beat("w", {first.id: 0.5}) == []
    clock.now += LEASE_S + 1
    assert store.claim("v", 1) == [first]
    assert store.get(first.id, "me")["attempt"] == 2
    assert store.beat("w", {first.id: 0.9}) == [first.id]  # the old one comes back and is told to stop
    store.finish("w", first.id)
    assert store.get(first.id, "me")["state"] == RUNNING
    store.finish("v", first.id)
    assert store.get(first.id, "me")["state"] == "done"
    assert store.counts()["totals"]["retried"] == 1
    assert store.claim("v", 1) == [second]


def test_a_job_that_kills_its_workers_is_given_up(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    job = add(store)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert [one.attempt for one in store.claim("w", 1)] == [attempt]
        clock.now += LEASE_S + 1
    view = store.get(job.id, "me")
    assert (view["state"], view["error"]["status"]) == ("failed", 500)
    assert "died 3 times" in view["error"]["detail"]
    assert store.claim("w", 1) == []


def test_cancelling(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    running, waiting = add(store), add(store)
    store.claim("w", 1)
    for job in (running, waiting):
        store.cancel(job.id, "me")
        assert store.get(job.id, "me")["state"] == "cancelled"
        assert not (store.folder / job.id / "volume.nii").exists()
    assert store.beat("w", {running.id: 0.4}) == [running.id]
    (store.folder / running.id / "result_t2.nii.gz").write_bytes(b"late")
    store.finish("w", running.id)
    assert [file.name for file in (store.folder / running.id).iterdir()] == ["job.json"]
    assert store.get(running.id, "me")["state"] == "cancelled"
    store.cancel(running.id, "me")  # a second time: forget it
    with pytest.raises(Problem, match="no such translation"):
        store.get(running.id, "me")


def test_only_the_owner_sees_a_job(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    job = add(store)
    for call in (store.get, store.cancel):
        with pytest.raises(Problem) as caught:
            call(job.id, "another")
        assert caught.value.status == 404
    assert store.get(job.id, "me")["state"] == QUEUED


def test_results_expire(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path, keep_hours=2))
    job, waiting = add(store), add(store)
    store.claim("w", 1)
    store.finish("w", job.id)
    clock.now += 2 * 3600 - 1
    assert store.get(job.id, "me")["state"] == "done"
    clock.now += 2
    with pytest.raises(Problem, match="expired"):
        store.get(job.id, "me")
    assert not (store.folder / job.id).exists()
    assert store.get(waiting.id, "me")["state"] == QUEUED  # what is not done does not expire


def test_the_folder_stays_below_its_size(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path, max_folder_gb=20e-6, max_queue=10))  # 20 kB, 3 kB for an upload
    old, new = add(store, size=6000), add(store, size=6000)
    for job in (old, new):
        store.claim("w", 1)
        store.finish("w", job.id)
        clock.now += 1
    waiting = add(store, size=6000)
    assert store.get(old.id, "me")["state"] == "done"  # all three fit
    add(store, size=6000)  # and this one does not: the oldest finished one goes
    with pytest.raises(Problem, match="no such"):
        store.get(old.id, "me")
    add(store, size=6000)
    with pytest.raises(Problem, match="no such"):
        store.get(new.id, "me")
    with pytest.raises(Problem, match="is full of unfinished jobs"):
        store.reserve()
    assert store.get(waiting.id, "me")["state"] == QUEUED


def test_a_new_start_finds_every_job(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path, max_queue=5))
    done, running, silent, second = add(store), add(store), add(store), add(store)
    for _ in range(3):
        clock.now += 0.1
        store.claim("w", 1)
    store.finish("w", done.id)
    again = restarted(store)
    assert again.get(done.id, "me")["state"] == "done"
    assert again.claim("v", 1)[0].id == second.id
    again.finish("v", second.id)
    assert again.beat("w", {running.id: 0.7}) == []  # its worker is alive and goes on
    clock.now += LEASE_S - 1
    again.beat("w", {running.id: 0.8})
    clock.now += 2
    assert [job.id for job in again.claim("v", 1)] == [silent.id]
    again.finish("w", running.id)
    assert again.get(running.id, "me")["state"] == "done"
    assert again.get(running.id, "me")["attempt"] == 1


def test_what_is_half_written_is_not_a_job(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    job = add(store)
    (store.folder / "halfway").mkdir()
    (store.folder / "damaged").mkdir()
    (store.folder / "damaged" / "job.json").write_text('{"id": ')
    again = restarted(store)
    assert [one.id for one in again.claim("w", 9)] == [job.id]
    clock.now += serve.jobs.TICKET_S + 1
    last = restarted(again)
    assert [folder.name for folder in last.folder.iterdir()] == [job.id]


def test_draining_starts_nothing_and_keeps_what_waits(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(settings_of(tmp_path))
    running, waiting = add(store), add(store)
    store.claim("w", 1)
    assert store.drain() == 1
    assert store.claim("w", 1) == []
    with pytest.raises(Problem, match="about to stop"):
        store.reserve()
    store.finish("w", running.id)
    assert store.drain() == 0
    assert [job.id for job in restarted(store).claim("w", 1)] == [waiting.id]


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
                self.store.reserve()
            return
        self.number += 1
        self.known.add(add(self.store, id=f"{self.number:03d}", num_samples=samples).id)

    @rule(worker=st.sampled_from(["v", "w"]), count=st.integers(1, 3))
    def claim(self, worker: str, count: int) -> None:
        self.held[worker] |= {job.id for job in self.store.claim(worker, count)}

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
            assert (self.store.folder / job_id / "volume.nii").exists() == (
                view["state"] not in ("failed", "cancelled")
            )
        positions = sorted(view["queue_position"] for view in views.values() if view["state"] == QUEUED)
        assert positions == list(range(len(positions)))

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store._lock.close()
            serve.jobs.time = self.real
            self.place.cleanup()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = hypothesis_settings(max_examples=40, stateful_step_count=30, deadline=None)
