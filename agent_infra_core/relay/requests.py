"""Reads request and answer heads: what a request asks for, and whose turn it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent_infra_core.http.heads import (
    NOT_FORWARDED,
    NOT_RETURNED,
    AnswerHead,
    HeaderLines,
    HeadMemory,
    RequestHead,
    origin_form,
    parse_answer_head,
    parse_request_head,
    single_slashes,
    split_inference_path,
)
from agent_infra_core.protocol import MAX_FIGURE
from agent_infra_core.settings import HeadersConfig

MAX_NAME = 256  # characters of a session's, task's or client's name


@dataclass(slots=True)
class Labels:
    """What a request's headers say about its turn."""

    session: str | None
    task: str | None
    client: str | None
    pre_ms: float | None
    post_ms: float | None
    ends_session: bool
    is_retry: bool  # a client library sends the same body again
    run: str | None  # X-Run-Tasks


@dataclass(slots=True)
class RequestPlan:
    """What follows from a request's head alone: where it goes, and whose turn it is. Shared by equal heads."""

    request: RequestHead
    path: bytes  # without query; of an inference path, without /{model}
    query: bytes
    target: bytes  # path and query, for the replica
    is_inference: bool
    model: str | None  # named by the path
    labels: Labels
    is_form: bool  # the body isn't JSON

    @property
    def is_anthropic(self) -> bool:
        return b"/v1/messages" in self.path


class LabelReader:
    """Reads labels from the configured headers."""

    def __init__(self, names: HeadersConfig, session_headers: Iterable[str] = ()) -> None:
        """``session_headers`` also carry sessions' names; the first of them that a request has counts."""
        self._sessions = [name.lower().encode() for name in (names.session, *session_headers)]
        self._task, self._client = (name.lower().encode() for name in (names.task, names.client))
        self._pre, self._post = (name.lower().encode() for name in (names.timing_pre, names.timing_post))

    def read(self, fields: Mapping[bytes, bytes]) -> Labels:
        """Return a request's labels. An SDK's retry repeats the timings of its first try, which count once."""
        get = fields.get
        is_retry = get(b"x-stainless-retry-count", b"0") != b"0"
        return Labels(
            next(filter(None, map(label_text, map(get, self._sessions))), None),
            label_text(get(self._task)),
            label_text(get(self._client)),
            None if is_retry else _milliseconds(get(self._pre)),
            None if is_retry else _milliseconds(get(self._post)),
            get(b"x-session-end", b"").lower() == b"true",
            is_retry,
            label_text(get(b"x-run-tasks")),
        )


class HeadReader:
    """Reads heads. Those that repeat, as most do, are parsed once."""

    def __init__(self) -> None:
        self._request_lines, self._answer_lines = HeaderLines(NOT_FORWARDED), HeaderLines(NOT_RETURNED)
        self.known_requests, self.known_answers = HeadMemory(has_secrets=True), HeadMemory(has_secrets=False)

    def plan(
        self, data: bytes, end: int, valid: bytes | None, labels: LabelReader
    ) -> tuple[RequestPlan, int | None, bytes]:
        """Read the request head ``data[:end]``. Returns its plan, the length of its body in bytes (None: chunks) and
        its Authorization. Raises WireError.

        ``valid`` is an Authorization that was let pass: another one is checked for its syntax first.
        """
        known = self.known_requests.find(data, end)
        if known is not None and known[2] == valid:
            return known
        head = data[:end]
        request = parse_request_head(head, self._request_lines)
        path, _, query = origin_form(request.target).partition(b"?")
        route = split_inference_path(path) if request.method == b"POST" else None
        model, path = route or (None, single_slashes(path))
        found, is_form = labels.read(request.fields), b"multipart" in request.fields.get(b"content-type", b"")
        target = path + b"?" + query if query else path
        plan = RequestPlan(request, path, query, target, route is not None, model, found, is_form)
        fields = dict(request.fields)
        authorization = request.fields.pop(b"authorization", b"")  # a plan that is kept holds no secret
        is_plain = request.length and request.version and not fields.keys() & {b"expect", b"upgrade"}
        if route is not None and is_plain and found.pre_ms is None and found.post_ms is None:  # likely to repeat
            self.known_requests.keep(head, fields, plan)
        return plan, request.length, authorization

    def answer(self, data: bytes, end: int) -> tuple[AnswerHead, int | None]:
        """Read the answer head ``data[:end]``. Returns it and its body's length, as in AnswerHead. Raises WireError."""
        known = self.known_answers.find(data, end)
        if known is not None:
            return known[0], known[0].length if known[1] < 0 else known[1]
        head = parse_answer_head(data[:end], self._answer_lines)
        length = head.fields.get(b"content-length")
        # The length of a chunked answer means nothing; the next such head must not be believed its figure.
        is_length = length is None or (head.length is not None and length == b"%d" % head.length)
        if head.status >= 200 and head.status not in (204, 304) and is_length:
            self.known_answers.keep(data[:end], head.fields, head)
        return head, head.length


def label_text(value: bytes | None) -> str | None:
    """Return a header's value as text; None if it is missing or empty. A long one ends in a digest of the whole, so
    that two that differ stay two."""
    text = value.decode("utf-8", "replace").strip() if value else ""
    if len(text) > MAX_NAME:
        digest = hashlib.blake2b(value or b"", digest_size=8).hexdigest()
        return f"{text[: MAX_NAME - len(digest) - 1]}-{digest}"
    return text or None


def _milliseconds(value: bytes | None) -> float | None:
    """Return a duration that a client sent; None if it is missing or invalid."""
    try:
        number = float(value) if value else -1.0
    except ValueError:
        return None
    return number if 0.0 <= number <= MAX_FIGURE else None
