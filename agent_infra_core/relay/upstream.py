"""Pooled connections to the replicas."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agent_infra_core.http.heads import (
    NOT_FORWARDED,
    NOT_RETURNED,
    AnswerHead,
    HeaderLines,
    HeadMemory,
    RepeatedHead,
    origin_form,
    parse_answer_head,
    parse_request_head,
    split_inference_path,
)
from agent_infra_core.relay.turn import Labels, Reactor, RequestPlan

if TYPE_CHECKING:
    from agent_infra_core.relay.exchange import Exchange
    from agent_infra_core.relay.replicas import LiveReplica

JOINED_BODY_BYTES = 16 << 10


class HeadReader:
    """Reads heads; those that come again and again are read in full once."""

    def __init__(self) -> None:
        self._request_lines, self._answer_lines = HeaderLines(NOT_FORWARDED), HeaderLines(NOT_RETURNED)
        self.known_requests, self.known_answers = HeadMemory(has_secrets=True), HeadMemory(has_secrets=False)

    def plan(
        self, head: bytes, let_pass: bytes | None, labels_of: Callable[[Mapping[bytes, bytes]], Labels]
    ) -> tuple[RequestPlan, int | None, bytes]:
        """What a request head asks for, the length of its body, its Authorization; ``let_pass`` is one known to be
        sound. Raises WireError."""
        known = self.known_requests.find(head, len(head))
        if known is not None and known[2] == let_pass:
            return known
        request = parse_request_head(head, self._request_lines)
        path, _, query = origin_form(request.target).partition(b"?")
        route = split_inference_path(path) if request.method == b"POST" else None
        model, path = route or (None, path)
        labels = labels_of(request.fields)
        is_form = b"multipart" in request.fields.get(b"content-type", b"")
        plan = RequestPlan(request, path, query, route is not None, model, labels, is_form)
        fields = dict(request.fields)
        authorization = request.fields.pop(b"authorization", b"")  # no plan that is kept holds a secret
        # Kept is what an express may carry, and what is likely to come again.
        is_plain = request.length and request.version and not fields.keys() & {b"expect", b"upgrade"}
        if route is not None and is_plain and labels.pre_ms is None and labels.post_ms is None:
            self.known_requests.keep(head, fields, plan)
        return plan, request.length, authorization

    def answer(self, data: bytes, end: int) -> tuple[AnswerHead, int | None]:
        """The answer head ``data[:end]`` and the length of its body, as in AnswerHead; WireError."""
        known = self.known_answers.find(data, end)
        if known is not None:
            return known[0], known[0].length if known[1] < 0 else known[1]
        head = parse_answer_head(data[:end], self._answer_lines)
        told = head.fields.get(b"content-length")
        # One in chunks has no length, whatever else it says: the next such head would be believed its figure.
        means_it = told is None or (head.length is not None and told == b"%d" % head.length)
        has_body = head.status >= 200 and head.status not in (204, 304)
        if has_body and means_it:
            self.known_answers.keep(data[:end], head.fields, head)
        return head, head.length


class Upstream:
    """A connection to a replica, watched for as long as it lives; idle, it goes when the replica closes it."""

    __slots__ = ("head", "replica", "sock", "watcher")

    def __init__(self, replica: LiveReplica, sock: Any, head: RepeatedHead, reactor: Reactor) -> None:
        self.replica, self.sock, self.head = replica, sock, head
        self.watcher = reactor.watch_reads(sock, self._on_idle)

    def rest(self) -> None:
        """Wait among the replica's idle connections for the next exchange."""
        if self.replica.is_gone:
            return self.close()
        self.watcher.callback = self._on_idle
        self.replica.idle[self] = None
        return None

    def send(self, head: bytes, body: bytes | bytearray) -> int:
        """Send a request, as much of it as the socket takes at once; the number of bytes."""
        try:
            # Below some size a copy is cheaper than what it takes to send two buffers at once.
            if len(body) < JOINED_BODY_BYTES:
                return int(self.sock.send(head + body))
            return int(self.sock.sendmsg((head, body)))
        except OSError:
            return 0  # said again, and understood, when the rest is sent

    def _on_idle(self) -> None:
        self.replica.forget(self)  # closed by the replica, or it sends what nobody asked for

    def send_rest(self, message: Sequence[bytes | bytearray], sent: int, exchange: Exchange) -> bool:
        """Send what is left of a request; False when it does not go: what the replica said, or that it hung up, is
        then read. For the client's own greenlet."""
        client = exchange.client
        rest = memoryview(b"".join(message))[sent:]
        try:
            while rest and exchange.result is None:
                client.wait_writable(self.sock)
                if client.gone or exchange.is_late():
                    return False
                with contextlib.suppress(BlockingIOError):
                    rest = rest[self.sock.send(rest) :]
                    client.deadline = time.monotonic() + client.relay.settings.proxy.request_timeout
        except OSError:
            return False
        return not rest

    def close(self) -> None:
        self.watcher.stop()
        self.watcher.close()
        self.sock.close()
