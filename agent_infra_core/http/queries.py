"""Query strings of the API: which parameters a path takes, and what they may be. Pure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from agent_infra_core.http.errors import RequestError

MAX_TEXT = 256  # characters of a parameter
LATEST_TIME = 1e11  # s since the epoch
SESSION_FIELDS = (
    *("id", "state", "model", "client", "task", "started_at", "last_at", "turns", "errors", "completed", "aborted"),
    *("rejected", "tokens_in", "tokens_out", "cached_tokens", "queued_s", "inference_s", "think_s", "replica"),
)


@dataclass(frozen=True)
class Parameter:
    """What a parameter may be: how its text is read (ValueError if it can't be), and the allowed values in words."""

    read: Callable[[str], Any]
    allowed: str


def _text() -> Parameter:
    def read(text: str) -> str:
        if len(text) > MAX_TEXT:
            raise ValueError
        return text

    return Parameter(read, f"text of at most {MAX_TEXT} characters")


def _number(low: float, high: float, kind: type[int] | type[float]) -> Parameter:
    def read(text: str) -> float:
        value = kind(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError
        return value

    words = "a whole number" if kind is int else "a number, s since the epoch,"
    return Parameter(read, f"{words} from {low:,.0f} to {high:,.0f}")


def _choice(*choices: str) -> Parameter:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError
        return text

    return Parameter(read, "one of " + ", ".join(choices))


_HISTORY = {
    "from": _number(0, LATEST_TIME, float),
    "to": _number(0, LATEST_TIME, float),
    "points": _number(1, 2000, int),
    "model": _text(),
}
_SESSIONS = {
    "query": _text(),
    "state": _choice("live", "ended", "all"),
    "model": _text(),
    "outcome": _choice("completed", "error", "aborted", "rejected"),
    "sort": _choice(*SESSION_FIELDS),
    "descending": _number(0, 1, int),
    "limit": _number(0, 1000, int),
    "offset": _number(0, 1_000_000, int),
}
_SESSION = {
    "limit": _number(1, 1000, int),
    "before": _number(1, 1_000_000_000, int),
}
PARAMETERS: Mapping[str, Mapping[str, Parameter]] = {"history": _HISTORY, "sessions": _SESSIONS, "session": _SESSION}


def read_query(arguments: Mapping[str, str], parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    """Read the parameters of a query; empty ones count as missing. Raises RequestError 400 with what is allowed."""
    values: dict[str, Any] = {}
    for name, text in arguments.items():
        parameter = parameters.get(name)
        if parameter is None:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(parameters)}"
            raise RequestError(400, f"{name[:40]}: unknown parameter; {hint}")
        if not text:
            continue
        try:
            values[name] = parameter.read(text)
        except (ValueError, OverflowError):
            raise RequestError(400, f"{name}: found {text[:40]!r}; allowed: {parameter.allowed}") from None
    return values
