"""Questions about the history: each is answered, in a thread that no failure ends and nobody waits for."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from clock import Clock
from patience import PATIENCE_S
from program import wait_for

from agent_infra_core.control import reader
from agent_infra_core.control.link import RelayGoneError
from agent_infra_core.control.reader import HistoryReader, Question, history_question, session_question
from agent_infra_core.insight.history import HistoryFile
from agent_infra_core.insight.tracker import Tracker
from agent_infra_core.protocol import TurnFinished, TurnStarted


class Desk:
    """A reader, the answers that it gave, and what it logged."""

    def __init__(self, path: Path | None) -> None:
        self.answers: list[tuple[Mapping[str, Any], int, Any]] = []
        self.said: list[str] = []
        self.is_relay_gone = False
        self.reader = HistoryReader(path, self._take, lambda message, _: self.said.append(message))
        self.reader.start()

    def _take(self, request: Mapping[str, Any], status: int, body: str) -> None:
        if self.is_relay_gone:
            raise RelayGoneError("it is gone")
        self.answers.append((request, status, json.loads(body)))

    def ask(self, question: Question, op: str = "history") -> tuple[int, Any]:
        """The answer to one question."""
        count = len(self.answers)
        self.reader.ask({"op": op, "id": count}, question)
        wait_for(lambda: len(self.answers) > count, "an answer")
        return self.answers[-1][1:]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Callable[..., Desk]]:
    made: list[Desk] = []

    def make(name: str | None = "history.db") -> Desk:
        made.append(Desk(None if name is None else tmp_path / name))
        return made[-1]

    yield make
    for each in made:
        each.reader.stop()


def fine(_: HistoryFile | None) -> tuple[int, bytes]:
    return 200, b"{}"


def broken(_: HistoryFile | None) -> tuple[int, bytes]:
    raise ZeroDivisionError("a bug")


def test_a_question_that_fails_is_answered_and_told_and_the_next_one_is_served(desk: Callable[..., Desk]) -> None:
    made = desk()
    status, document = made.ask(broken)
    assert (status, "a bug" in document["error"]["message"]) == (500, True)
    assert "ZeroDivisionError" in made.said[0]
    made.is_relay_gone = True
    made.reader.ask({"op": "history", "id": 7}, fine)
    wait_for(made.reader._questions.empty, "its end")
    made.is_relay_gone = False
    assert made.ask(fine)[0] == 200


def test_of_a_history_that_cannot_be_read_sessions_are_what_the_controller_remembers(
    desk: Callable[..., Desk], tmp_path: Path
) -> None:
    (tmp_path / "history.db").write_bytes(b"!" * 5000)
    made, clock = desk(), Clock()
    tracker = Tracker(clock)
    tracker.observe(TurnStarted("t", clock.now, "m", "/v1/chat/completions", "s"))
    tracker.observe(TurnFinished("t", clock.now, "completed", 200))
    request = {"op": "session", "session": "s"}
    status, document = made.ask(session_question(request, tracker.session("s"), clock.now), "session")
    assert (status, [turn["turn"] for turn in document["turns"]]) == (200, ["t"])
    status, document = made.ask(history_question({}, clock.now))
    assert (status, "cannot be read" in document["error"]["message"]) == (503, True)


def test_neither_an_answer_that_fails_nor_a_second_failure_ends_the_thread(
    desk: Callable[..., Desk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "history.db").write_bytes(b"!" * 5000)
    made = desk()
    assert made.ask(broken, "session")[0] == 500  # also of what the controller remembers
    with monkeypatch.context() as patched:
        patched.setattr(made.reader, "_answer", broken)
        made.reader.ask({"op": "session"}, fine)
        wait_for(lambda: "an answer about the history failed" in made.said[-1], "its end")
    assert made.ask(fine, "session")[0] == 200


def test_a_question_ends_with_the_patience_of_its_client(
    desk: Callable[..., Desk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    HistoryFile(tmp_path / "history.db").close()
    made = desk()
    asked: list[int] = []

    def late(_: HistoryFile | None) -> tuple[int, bytes]:
        asked.append(1)
        return 200, b"{}"

    def endless(file: HistoryFile | None) -> tuple[int, bytes]:
        assert file is not None
        file.query("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n")
        return 200, b"{}"

    monkeypatch.setattr(reader, "HISTORY_QUESTION_S", 0.2)
    status, document = made.ask(endless, "sessions")
    assert (status, "no answer in 0.2 s" in document["error"]["message"]) == (503, True)
    monkeypatch.setattr(reader, "HISTORY_QUESTION_S", -1.0)
    made.reader.ask({"op": "history"}, late)  # nobody waits for it any more
    monkeypatch.setattr(reader, "HISTORY_QUESTION_S", PATIENCE_S)
    assert made.ask(fine)[0] == 200
    assert asked == []


@pytest.mark.parametrize("name", [None, "missing.db"])
def test_without_a_file_there_is_no_history(desk: Callable[..., Desk], name: str | None) -> None:
    assert desk(name).ask(history_question({}, 1e9))[0] == 404


def test_whoever_asks_too_much_at_once_is_refused_and_nobody_waits(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, free = desk(), threading.Event()

    def slow(_: HistoryFile | None) -> tuple[int, bytes]:
        free.wait(PATIENCE_S)
        return 200, b"{}"

    for number in range(reader.MAX_QUESTIONS + 5):
        made.reader.ask({"op": "history", "id": number}, slow)
    refused = [status for _, status, _ in made.answers]
    assert set(refused) == {503}
    assert 4 <= len(refused) <= 5
    free.set()
    wait_for(lambda: len(made.answers) == reader.MAX_QUESTIONS + 5, "all answers")
