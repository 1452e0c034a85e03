"""Answers questions about the history in a thread of its own, so that no query keeps the controller."""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent_infra_core.control.discovery import STOP_S
from agent_infra_core.control.link import RelayGoneError
from agent_infra_core.errors import RefusedError
from agent_infra_core.http.errors import error_document
from agent_infra_core.insight.export import read_history
from agent_infra_core.insight.history import HistoryFile
from agent_infra_core.insight.series import (
    SeriesQuery,
    SessionsQuery,
    SessionTurns,
    find_sessions,
    read_series,
)
from agent_infra_core.insight.tracker import SCHEMA_VERSION, encode_stats, session_row
from agent_infra_core.insight.turns import TurnRecord
from agent_infra_core.protocol import HISTORY_QUESTION_S

MAX_QUESTIONS = 16  # that wait; of more, clients are asked to come back

Question = Callable[[HistoryFile | None], tuple[int, bytes]]  # returns a status and a JSON document


class HistoryReader:
    """Owns the thread that reads the history. Each question gets a connection of its own, so the file may be replaced.

    A question is dropped, or its query interrupted, HISTORY_QUESTION_S after it came: nobody waits for it any longer.

    ``path`` None: no history is kept, and questions get no file. Nor do those about sessions while it can't be read:
    the controller remembers the latest.
    """

    def __init__(
        self,
        path: Path | None,
        answer: Callable[[Mapping[str, Any], int, str], None],
        log: Callable[[str, str], None],
    ) -> None:
        """``answer`` takes a request, a status and a JSON document; it is called in the thread. ``log``: a message and
        its level."""
        self._path, self._answer, self._log = path, answer, log
        self._questions: queue.Queue[tuple[float, Mapping[str, Any], Question] | None] = queue.Queue(MAX_QUESTIONS)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="history reader", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ask(self, request: Mapping[str, Any], question: Question) -> None:
        """Answer ``request`` by ``question``, soon. It is refused at once while too many wait."""
        try:
            self._questions.put_nowait((time.monotonic() + HISTORY_QUESTION_S, request, question))
        except queue.Full:
            status, document = _refusal(503, f"{MAX_QUESTIONS} questions about the history wait already; try again")
            self._answer(request, status, document.decode())

    def stop(self) -> None:
        """End the thread. If a query is still running after STOP_S, abandon it."""
        self._stop.set()
        with contextlib.suppress(queue.Full):
            self._questions.put_nowait(None)
        if self._thread.is_alive():
            self._thread.join(timeout=STOP_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            if (item := self._questions.get()) is None:
                continue
            try:
                self._serve(*item)
            except RelayGoneError:  # and with it the client
                pass
            except Exception:  # noqa: BLE001  an answer that fails must not end the next
                self._log(f"an answer about the history failed: {traceback.format_exc().strip()}", "error")

    def _serve(self, deadline: float, request: Mapping[str, Any], question: Question) -> None:
        if time.monotonic() > deadline:
            return
        try:
            status, document = self._reply(deadline, request, question)
        except Exception as error:  # noqa: BLE001  a question that fails must not end the next
            self._log(f"a question about the history failed: {traceback.format_exc().strip()}", "error")
            status, document = _refusal(500, f"the question failed: {error}; the proxy's log says more")
        self._answer(request, status, document.decode())

    def _reply(self, deadline: float, request: Mapping[str, Any], question: Question) -> tuple[int, bytes]:
        try:
            if self._path is None or not self._path.exists():
                return question(None)
            with read_history(self._path) as file:
                if file is not None:
                    file.interrupt_at(deadline)
                return question(file)
        except RefusedError as error:  # it can't be read
            if time.monotonic() > deadline:
                return _refusal(503, f"the history gave no answer in {HISTORY_QUESTION_S:g} s; ask for less")
            return _refusal(503, str(error)) if request["op"] == "history" else question(None)


def _refusal(status: int, message: str) -> tuple[int, bytes]:
    return status, error_document(status, message, None, False)


LISTED_TURNS = 200  # of one session, if the client asks for no other number
DEFAULT_RANGE_S = 3600.0


def history_question(request: Mapping[str, Any], now: float) -> Question:
    """GET /history; ``request`` has the parameters that the client gave."""
    until = request.get("to", now)
    query = SeriesQuery(
        request.get("from", until - DEFAULT_RANGE_S), until, request.get("points", 300), request.get("model")
    )
    return functools.partial(_answer_history, query=query, now=now)


def _answer_history(file: HistoryFile | None, query: SeriesQuery, now: float) -> tuple[int, bytes]:
    if file is None:
        return _refusal(404, 'no history is kept yet, or proxy.history is "off"')
    return 200, encode_stats(read_series(file, query, now))


def sessions_question(request: Mapping[str, Any], known: Sequence[Sequence[Any]]) -> Question:
    """GET /sessions; ``known`` are Tracker.session_rows()."""
    given = {name: value for name, value in request.items() if name not in ("op", "id")}
    return functools.partial(_answer_sessions, known=known, query=SessionsQuery(**given))


def _answer_sessions(
    file: HistoryFile | None, known: Sequence[Sequence[Any]], query: SessionsQuery
) -> tuple[int, bytes]:
    if file is not None:
        return 200, encode_stats(find_sessions(file, known, query))
    with contextlib.closing(HistoryFile(None)) as empty:
        return 200, encode_stats(find_sessions(empty, known, query))


def session_question(
    request: Mapping[str, Any], known: tuple[dict[str, Any] | None, Sequence[TurnRecord]], now: float
) -> Question:
    """GET /stats/sessions/{id}; ``known`` is Tracker.session() of it."""
    return functools.partial(_answer_session, request=request, known=known, now=now)


def _answer_session(
    file: HistoryFile | None,
    request: Mapping[str, Any],
    known: tuple[dict[str, Any] | None, Sequence[TurnRecord]],
    now: float,
) -> tuple[int, bytes]:
    row, latest = known
    turns = SessionTurns(request.get("limit", LISTED_TURNS), request.get("before"))
    if file is not None:
        turns.add(file.turns(request["session"]))
    elif row is not None:
        turns.count = max(0, row["turns"] - len(latest))
    turns.add(latest)
    if turns.session is not None and (row is None or turns.session.turns > row["turns"]):  # as find_sessions() does
        row = session_row(turns.session, row["state"] if row is not None else "ended")
    if row is None:
        return _refusal(404, "this session is unknown or was forgotten; GET /sessions lists the known ones")
    document = {
        "schema_version": SCHEMA_VERSION,
        "now": now,
        "session": row,
        "turns_total": turns.count,
        "turns": turns.latest_first(),
    }
    return 200, encode_stats(document)
