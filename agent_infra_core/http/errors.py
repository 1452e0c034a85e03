"""Errors in the formats of OpenAI and Anthropic: JSON bodies, stream events, whole answers. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping

from agent_infra_core.errors import AgentInfraError


class RequestError(AgentInfraError):
    """An error that the relay itself returns for a request: HTTP status, message, and when the client may retry."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, retry_after_s: int = 0, closes: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after_s, self.closes = status, code, retry_after_s, closes


class WireError(RequestError):
    """Bytes that violate HTTP/1.1 or a limit of ours. What follows can't be trusted, so the connection closes."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(status, message, closes=True)


_ERROR_TYPES: Mapping[int, tuple[str, str]] = {  # status → OpenAI's error type, Anthropic's error type
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("not_found_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("invalid_request_error", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "invalid_request_error"),
    429: ("rate_limit_error", "rate_limit_error"),
    503: ("service_unavailable_error", "overloaded_error"),
    504: ("timeout_error", "timeout_error"),
}


def error_document(status: int, message: str, code: str | None, is_anthropic: bool) -> bytes:
    """Return the JSON body of an error, in the format from which the API's client library makes its exceptions."""
    openai_type, anthropic_type = _ERROR_TYPES.get(status, ("api_error", "api_error"))
    if is_anthropic:
        return json.dumps({"type": "error", "error": {"type": anthropic_type, "message": message}}).encode()
    return json.dumps({"error": {"message": message, "type": openai_type, "param": None, "code": code}}).encode()


def error_event(message: str, is_anthropic: bool) -> bytes:
    """Return the SSE event that reports a broken stream to a client library."""
    return (b"event: error\n" if is_anthropic else b"") + (
        b"data: %b\n\n" % error_document(502, message, "replica_lost", is_anthropic)
    )


def encode_answer(
    status: int, body: bytes, *, extra: bytes = b"", closes: bool = False, content_type: bytes = b"application/json"
) -> bytes:
    """Return a complete HTTP answer; ``extra`` is complete header lines."""
    phrase = http_phrase(status).encode()
    return b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b%b\r\n%b" % (
        status, phrase, content_type, len(body), extra, b"connection: close\r\n" if closes else b"", body
    )  # fmt: skip


def http_phrase(status: int) -> str:
    """Return a status's reason phrase."""
    from http import HTTPStatus

    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"
