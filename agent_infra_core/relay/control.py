"""The control socket: frames from and to the controller."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from agent_infra_core.host import unix_address
from agent_infra_core.protocol import (
    FRAME_ANSWER,
    FRAME_EVENTS,
    FRAME_HELLO,
    FRAME_REQUEST,
    RELAY_PROTOCOL,
    EventBatch,
    FrameReader,
    SessionEnded,
    encode_frame,
)
from agent_infra_core.relay.reactor import Reactor

if TYPE_CHECKING:
    from agent_infra_core.relay.server import Relay

SHORTAGE_S = 60.0  # how often a lack of descriptors is logged
BATCHED_TURNS = 512  # finished turns in one frame
MAX_BUFFERED_EVENTS, MAX_BUFFERED_BYTES = 50_000, 64 << 20  # without a controller that takes them


class ControlChannel:
    """The Unix socket to the controller. The latest controller to connect is served; without one, events wait."""

    def __init__(self, relay: Relay, path: str, listener: Any) -> None:
        self._relay, self._listener = relay, listener
        self._finished: deque[bytes] = deque()  # encoded TurnFinished events
        self._finished_bytes = 0
        self._ended: deque[SessionEnded] = deque(maxlen=MAX_BUFFERED_EVENTS)
        self._unsent = b""  # a batch, encoded
        self._controller: Any = None
        self._write_lock = relay.reactor.new_lock()  # one frame at a time: several greenlets send
        self._flush_lock = relay.reactor.new_lock()  # owns _unsent: each batch goes out once
        self.events_dropped = 0
        self.questions = Questions(self, relay.reactor)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            with unix_address(path) as address:
                self._server.bind(address)
        finally:
            os.umask(before)
        self._server.listen(8)

    def run(self) -> None:
        """Accept controllers until the relay ends; a greenlet runs this."""
        started_at, told = time.time(), -math.inf
        while True:
            try:
                controller, _ = self._server.accept()
            except OSError as error:  # out of descriptors
                if time.monotonic() > told + SHORTAGE_S:
                    told = time.monotonic()
                    self._relay.log("error", f"no controller can be accepted for now: {error}")
                self._relay.reactor.sleep(1.0)
                continue
            if self._relay.is_stopping:  # no listening socket is left to hand over
                controller.close()
                continue
            former, self._controller = self._controller, None
            if former is not None:
                with contextlib.suppress(OSError):
                    former.shutdown(socket.SHUT_RDWR)
            hello = {
                "protocol": RELAY_PROTOCOL,
                "pid": os.getpid(),
                "port": self._listener.getsockname()[1],
                "started_at": started_at,
            }
            try:
                frame = encode_frame(FRAME_HELLO, json.dumps(hello).encode())
                socket.send_fds(controller, [frame], [self._listener.fileno()])
            except OSError:
                controller.close()
                continue
            self._relay.book.forget_reported()  # another controller knows nothing of the turns in flight
            self._controller = controller
            self._relay.reactor.spawn(self._read, controller)

    def _read(self, controller: Any) -> None:
        reader = FrameReader()
        try:
            while data := controller.recv(1 << 20):
                for kind, payload in reader.feed(data):
                    if kind == FRAME_ANSWER:
                        self.questions.deliver(payload)
                    else:
                        self._relay.handle_frame(kind, payload)
        except (OSError, ValueError) as error:
            self._relay.log("warning", f"the controller's connection broke: {error}")
        finally:
            if self._controller is controller:
                self._controller = None
                self._relay.log("info", "the controller is gone; the last table stays in force")
            controller.close()

    @property
    def is_connected(self) -> bool:
        """Whether a controller is connected."""
        return self._controller is not None

    @property
    def remedy(self) -> str:
        """The end of a message about a missing replica: what to do. Empty while a controller takes care of it."""
        gone = "; the proxy's controller is gone, and with it the tunnels that it held: `connect` takes over"
        return "" if self.is_connected else gone

    @property
    def has_news(self) -> bool:
        """Whether there may be something to report."""
        return bool(self._finished or self._relay.book.turns or self._ended or self._unsent)

    def add_finished(self, event: bytes) -> None:
        """Queue an encoded TurnFinished for the next batch."""
        self._finished.append(event)
        self._finished_bytes += len(event)
        while len(self._finished) > MAX_BUFFERED_EVENTS or self._finished_bytes > MAX_BUFFERED_BYTES:
            self._finished_bytes -= len(self._finished.popleft())
            self.events_dropped += 1

    def add_ended_session(self, event: SessionEnded) -> None:
        """Queue the end of a session for the next batch."""
        self._ended.append(event)

    def add_request(self, request: Mapping[str, str]) -> None:
        """Pass an operator's request to the controller. Without a controller it is lost."""
        payload = json.dumps(request).encode()
        self._relay.reactor.spawn(self.send, FRAME_REQUEST, payload)

    def flush(self) -> None:
        """Send what happened since the last batch. A batch that failed to go out is sent first."""
        with self._flush_lock:
            while self._controller is not None:
                if not self._unsent:
                    self._unsent = self._next_batch()
                if not self._unsent or not self.send(FRAME_EVENTS, self._unsent):
                    return
                self._unsent = b""

    def _next_batch(self) -> bytes:
        """What happened, encoded; empty if nothing did."""
        finished = [self._finished.popleft() for _ in range(min(BATCHED_TURNS, len(self._finished)))]
        self._finished_bytes -= sum(map(len, finished))
        # A turn that starts may continue one that is still to be reported as finished: that one goes first.
        # So do all turns of a session that ended.
        is_last = not self._finished
        batch = self._relay.book.news() if is_last else EventBatch()
        ended = [self._ended.popleft() for _ in range(len(self._ended) if is_last else 0)]
        if not (finished or ended or batch.started or batch.sent or batch.answering):
            return b""
        batch.finished, batch.session_ended = self._relay.codec.joined(finished), ended
        encoded: bytes = self._relay.codec.encode(batch)
        return encoded

    def send(self, kind: bytes, payload: bytes) -> bool:
        """Send one frame. Returns whether a controller took it. A slow controller blocks only this greenlet."""
        with self._write_lock:
            controller = self._controller
            if controller is None:
                return False
            try:
                controller.sendall(encode_frame(kind, payload))
            except OSError:
                return False
        return True


class Questions:
    """Questions from clients that only the controller can answer."""

    def __init__(self, channel: ControlChannel, reactor: Reactor) -> None:
        self._channel, self._reactor = channel, reactor
        self._waiting: dict[int, Any] = {}
        self._unsent: dict[int, bytes] = {}  # of these, questions that still have to go out
        self._is_sending = False
        # A late answer to a question of an earlier relay must reach nobody. JSON's numbers are exact up to 2**53.
        self._count = secrets.randbits(48)

    def ask(self, op: str, patience_s: float, **details: Any) -> dict[str, Any] | None:
        """Return a FRAME_ANSWER; None if no controller answers within ``patience_s``. Blocks this greenlet."""
        self._count += 1
        number, result = self._count, self._reactor.new_result()
        self._waiting[number] = result
        try:
            self._unsent[number] = json.dumps({**details, "op": op, "id": number}).encode()
            # Sent by another greenlet: a controller that reads nothing must not hold this one beyond its time.
            if not self._is_sending:
                self._is_sending = True
                self._reactor.spawn(self._send)
            answer: dict[str, Any] | None = result.wait(patience_s) if self._channel.is_connected else None
            return answer
        finally:
            del self._waiting[number]
            self._unsent.pop(number, None)  # nobody waits for its answer any more

    def _send(self) -> None:
        try:
            while self._unsent:
                self._channel.flush()  # the answers are to include every turn that is over
                if self._unsent:
                    self._channel.send(FRAME_REQUEST, self._unsent.pop(next(iter(self._unsent))))
        finally:
            self._is_sending = False

    def deliver(self, payload: bytes) -> None:
        """Deliver a FRAME_ANSWER, unless nobody waits for it any more."""
        answer = json.loads(payload)
        if (result := self._waiting.get(answer["id"])) is not None:
            result.set(answer)
