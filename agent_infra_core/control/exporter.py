"""Sends finished turns as spans in a thread of its own. Nobody waits for the receiver; what it misses is counted."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from agent_infra_core.insight.spans import Span, turn_span
from agent_infra_core.insight.turns import TurnRecord

EXPORT_INTERVAL_S = 1.0
EXPORTED_TURNS = 512  # at once
WAITING_TURNS = 10_000  # that the receiver hasn't taken; above this, the oldest is dropped
EXPORT_CLOSE_S = 5.0  # to send the rest on close


class SpanSender(Protocol):
    """The connection to the receiver."""

    def send(self, spans: Sequence[Span]) -> bool:
        """Send spans; may block for seconds. Returns whether the receiver took them."""

    def close(self) -> None:
        """End, and make a ``send`` that still blocks return soon."""


class TurnExporter:
    """Owns the thread that sends spans. A batch that the receiver refuses is dropped; the log says so once."""

    def __init__(self, sender: SpanSender, make: Callable[[TurnRecord], Span], log: Callable[[str, str], None]) -> None:
        """``log`` takes a message and its level."""
        self._sender, self._make, self._log = sender, make, log
        self._lock = threading.Lock()  # guards _waiting and lost
        self._waiting: deque[TurnRecord] = deque()
        self.lost = 0  # turns that were dropped
        self._is_failing = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, turns: Iterable[TurnRecord]) -> None:
        """Queue finished turns."""
        with self._lock:
            self._waiting += turns
            while len(self._waiting) > WAITING_TURNS:
                self._waiting.popleft()
                self.lost += 1

    def close(self) -> None:
        """Send the rest, for at most EXPORT_CLOSE_S."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=EXPORT_CLOSE_S)
        self._sender.close()
        if lost := self.lost + len(self._waiting):
            self._log(f"{lost} turns were not exported as spans", "warning")

    def _run(self) -> None:
        while not self._stop.wait(EXPORT_INTERVAL_S):
            self._flush()
        close_by = time.monotonic() + EXPORT_CLOSE_S
        while self._flush() and time.monotonic() < close_by:
            pass

    def _flush(self) -> bool:
        """Send one batch. Returns whether more waits and the receiver takes it."""
        with self._lock:
            batch = [self._waiting.popleft() for _ in range(min(EXPORTED_TURNS, len(self._waiting)))]
        if not batch:
            return False
        try:
            problem = None if self._sender.send([self._make(record) for record in batch]) else "refused them"
        except Exception as error:  # noqa: BLE001  whatever it is: the next batch may be taken
            problem = f"failed: {error!r}"
        if problem is not None:
            with self._lock:
                self.lost += len(batch)
        if (problem is not None) != self._is_failing:
            self._is_failing = problem is not None
            if problem is not None:
                message = f"turns were dropped: the receiver of otel.endpoint {problem}"
            else:
                message = f"the receiver of otel.endpoint takes turns again; {self.lost} were dropped"
            self._log(message, "warning")
        return problem is None and bool(self._waiting)


def span_maker(deployment: str, providers: Mapping[str, str], has_text: bool) -> Callable[[TurnRecord], Span]:
    """A function that makes the span of a turn. ``providers``: model → engine."""

    def make(record: TurnRecord) -> Span:
        engine = providers.get(record.model or "", "command")
        return turn_span(record, deployment, "openai_compatible" if engine == "command" else engine, has_text)

    return make
