"""Progress: log lines off a terminal, a bar on one."""

import io
import logging

import pytest

from aldm import progress as progress_module
from aldm.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass for the progress display; tests set clock[0]."""
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_it_yields_what_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([1, 2, 3], description="reading", unit="file")) == [1, 2, 3]
    assert list(progress(iter("ab"), total=2)) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_off_a_terminal_it_logs_now_and_then(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aldm")
    with progress(total=100, description="training", unit="step") as bar:
        for _ in range(50):
            clock[0] += 1
            bar.note("loss 0.5")
            bar.update()
        clock[0] += 1
        bar.update(50)
    assert caplog.messages[0] == "training: 15/100 step, 00:15 elapsed, 01:25 remaining (loss 0.5)"
    assert [message.split()[1] for message in caplog.messages] == ["15/100", "30/100", "45/100", "100/100"]


def test_short_work_logs_nothing(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aldm")
    for _ in progress(range(100), description="reading", unit="file"):
        clock[0] += 0.1
    assert caplog.messages == []


def test_an_unknown_total_has_no_remaining_time(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aldm")
    with progress(description="reading", unit="file") as bar:
        clock[0] += 20
        bar.update(7)
        assert caplog.messages == ["reading: 7 file, 00:20 elapsed"]


def test_on_a_terminal_it_draws_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    list(progress(range(4), description="reading", unit="file"))
    assert "reading: 100%" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()


def test_an_exception_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)

    def fail() -> None:
        for item in progress(range(4), description="reading"):
            if item == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert terminal.getvalue().endswith("\n")


def test_counting_by_hand_needs_no_iterable() -> None:
    with pytest.raises(TypeError, match="call update"):
        list(progress(total=3))
