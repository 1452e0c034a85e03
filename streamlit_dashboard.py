"""The page of Agent Infra: replicas, queue, sessions, and what limits the run.

    python agent_infra.py dashboard
    streamlit run streamlit_dashboard.py -- --proxy http://127.0.0.1:5800 [--token-file FILE]

It is a separate program: it reads GET /stats and GET /stats/sessions/{id} and keeps no history.
The sections, each of which refers only to those above it: formats · client · shaping (dict → DataFrame) · charts
(DataFrame → alt.Chart) · nodes and panels (DataFrame → plain data that the browser part makes elements of) · views
(the only ones that speak to Streamlit) · main.

Text from agents (prompts, answers, ids) reaches the browser as text nodes and attribute values, never as
markup or Markdown: no view hands such a string to a Streamlit element, and the browser part knows no innerHTML.
"""

from __future__ import annotations

import argparse
import gc
import hmac
import json
import math
import os
import re
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard
from urllib.parse import quote, urlsplit

import altair as alt
import pandas as pd
import streamlit as st

DEFAULT_PROXY = "http://127.0.0.1:5800"
SCHEMA_VERSION = 2  # of /stats, as this page reads it
INTERVALS_S = (1, 2, 5, 10)
EXPLAIN_EVERY_S = 5.0  # charts and analysis: the proxy doesn't compute them more often
MAX_POINTS = 500  # of a chart's line
LISTED_BACKENDS, LISTED_CLIENTS, LISTED_SESSIONS, LISTED_TURNS, LISTED_WAITING = 16, 8, 6, 12, 5  # before "show all"
OPEN_SESSIONS = 8  # whose turns are requested at a time

# =====================================================================================================================
# Formats: figures with their units. Unknown values are a dash, never a guess and never NaN.
# =====================================================================================================================

UNKNOWN = "–"
SPACE = "\u00a0"  # between a figure and its unit


def is_known(value: Any) -> TypeGuard[float]:
    """Whether this is a finite number; pandas turns unknown values into NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def listed(document: Any, name: str) -> list[Mapping[str, Any]]:
    """The rows under ``name``; empty if there is no such list."""
    rows = document.get(name) if isinstance(document, Mapping) else None
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def part(document: Any, *names: str) -> Mapping[str, Any]:
    """The object at the path ``names``; empty if there is none."""
    for name in names:
        document = document.get(name) if isinstance(document, Mapping) else None
    return document if isinstance(document, Mapping) else {}


def duration(ms: Any) -> str:
    """A duration of ``ms`` with about three digits: 0.4 ms, 340 ms, 3.21 s, 2 min 05 s, 3 h 12 min, 4 d 3 h."""
    if not is_known(ms):
        return UNKNOWN
    if ms < 9.95:
        return f"{ms:.1f}{SPACE}ms" if ms else f"0{SPACE}ms"
    if ms < 999.5:
        return f"{ms:.0f}{SPACE}ms"
    seconds = ms / 1000
    if seconds < 59.95:
        return f"{seconds:.{2 if seconds < 9.995 else 1}f}{SPACE}s"
    whole = round(seconds)
    for size, unit, part, part_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return (
                f"{whole // size}{SPACE}{unit} {whole % size // part:0{1 if size == 86400 else 2}d}{SPACE}{part_unit}"
            )
    return f"{whole}{SPACE}s"


def seconds(value: Any) -> str:
    """A duration of ``value`` seconds in whole seconds, for figures that tick while they are shown."""
    if not is_known(value):
        return UNKNOWN
    return f"{max(0, round(value))}{SPACE}s" if value < 59.5 else duration(max(0.0, value) * 1000)


def count(value: Any) -> str:
    """A count: 7, 12,345, 1.25 M."""
    if not is_known(value):
        return UNKNOWN
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.2f}{SPACE}{unit}"
    return f"{round(value):,}"


def things(value: Any, word: str) -> str:
    """A count with its unit: 1 session, 3 sessions."""
    return f"{count(value)} {word}" + ("" if value == 1 else "s")


def figure(value: Any) -> str:
    """A figure with three significant digits: 0.324, 4.86, 43.2, 1,840."""
    if not is_known(value):
        return UNKNOWN
    if abs(value) >= 99.95 or value == 0:
        return count(value)
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value)) + 1e-9))}f}".replace("-", "−")


def percent(fraction: Any, signed: bool = False) -> str:
    """A share: 4 %, 0.4 %, and with ``signed`` +4 %, −12 %."""
    if not is_known(fraction):
        return UNKNOWN
    value = fraction * 100
    digits = 1 if 0 < abs(value) < 0.95 else 0
    return f"{value:{'+' if signed else ''}.{digits}f}{SPACE}%".replace("-", "−")


def gibibytes(value: Any) -> str:
    return f"{value / 2**30:.1f}{SPACE}GiB" if is_known(value) else UNKNOWN


# =====================================================================================================================
# Client: asks the proxy. The only part that does I/O; its one thread ends by itself when nobody reads.
# =====================================================================================================================


@dataclass(frozen=True)
class Problem:
    """Why there are no current figures: what happened, and what to do."""

    what: str
    fix: str


@dataclass(frozen=True)
class Reading:
    """The last reading. ``document`` stays the last good one while there is a problem."""

    document: Mapping[str, Any] | None = None
    read_at: float = 0.0  # monotonic seconds: when the document came
    problem: Problem | None = None
    sessions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # id → body of GET /stats/sessions/{id}


class ProxyError(Exception):
    """The proxy returned no document that this page can show."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.problem = Problem(what, fix)


def checked_url(url: str) -> str:
    """The proxy's base URL without a slash at its end; ValueError if it isn't one."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError(f"--proxy {url}: a URL such as {DEFAULT_PROXY} is needed")
    return parts.geturl().rstrip("/")


class ProxyClient:
    """GET requests to one proxy, over one kept connection; owned by one thread at a time."""

    def __init__(self, url: str, token: str | None) -> None:
        import requests

        self.url = url
        self._requests = requests
        self._session = requests.Session()
        self._session.trust_env = False  # ignores http_proxy and ~/.netrc
        if token:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def get(self, path: str) -> Any:
        """The JSON document at ``path``; ProxyError, with what to do, if there is none."""
        try:
            answer = self._session.get(self.url + path, timeout=(2.0, 5.0), allow_redirects=False)
        except self._requests.Timeout:
            raise ProxyError(
                f"The proxy at {self.url} does not answer in time.",
                "It may be overloaded, or the network is down; this page keeps trying.",
            ) from None
        except self._requests.RequestException:
            raise ProxyError(
                f"There is no proxy at {self.url}.",
                "Start one with “python agent_infra.py up” or “connect”, or say where it is with --proxy; "
                "this page keeps trying.",
            ) from None
        return _document_of(self.url, answer.status_code, answer.content)

    def stats(self) -> Mapping[str, Any]:
        """The body of GET /stats, of the version that this page reads."""
        document = self.get("/stats")
        version = document.get("schema_version") if isinstance(document, dict) else None
        if not isinstance(version, int):
            raise ProxyError(
                f"What answers at {self.url} is not Agent Infra's proxy.", "Say where the proxy is with --proxy."
            )
        if version != SCHEMA_VERSION:
            older, newer = ("proxy", "page") if version < SCHEMA_VERSION else ("page", "proxy")
            raise ProxyError(
                f"The proxy at {self.url} speaks version {version} of /stats, this page reads {SCHEMA_VERSION}.",
                f"The {older} is older than the {newer}: run both from the same release of Agent Infra.",
            )
        return dict(document)

    def session(self, name: str) -> Mapping[str, Any]:
        """The body of GET /stats/sessions/{id}."""
        document = self.get(f"/stats/sessions/{quote(name, safe='')}")
        return document if isinstance(document, dict) else {}


def _document_of(url: str, status: int, body: bytes) -> Any:
    """The document of an answer; ProxyError if it isn't valid."""
    if status in (401, 403):
        raise ProxyError(
            f"The proxy at {url} asks for its key.",
            "Name the file that has it with --token-file, or set the key in the environment variable "
            "AGENT_INFRA_TOKEN; on the proxy's machine it is “api_key” in the deployment's state directory.",
        )
    if status == 503:
        raise ProxyError(f"The proxy at {url} has no figures yet.", "It has just started; this page keeps trying.")
    try:
        document = json.loads(body) if status == 200 else None
    except ValueError:
        document = None
    if document is None:
        raise ProxyError(
            f"What answers at {url} is not Agent Infra's proxy (status {status}).", "Say where it is with --proxy."
        )
    return document


class Poller:
    """The last reading of one proxy, shared by all viewers, so the proxy is asked once per interval.

    Reads on demand in its own thread, so an unresponsive proxy delays nobody: a caller waits for
    ``patience_s`` and then gets the last reading. The thread ends after ``idle_s`` without a caller.
    """

    def __init__(self, client: ProxyClient, clock: Callable[[], float] = time.monotonic, idle_s: float = 30.0) -> None:
        self._client = client
        self.clock = clock
        self._idle_s = idle_s
        self._changed = threading.Condition()  # guards all below
        self._reading = Reading()
        self._wanted: dict[str, float] = {}  # session → when it was last requested
        self._asked = self._done = 0
        self._done_at = -math.inf
        self._thread: threading.Thread | None = None

    def read(self, max_age_s: float, sessions: Iterable[str] = (), patience_s: float = 0.5) -> Reading:
        """The last reading; refreshed if it is older than ``max_age_s`` or lacks one of ``sessions``."""
        with self._changed:
            now = self.clock()
            self._wanted.update((name, now) for name in sessions)
            lacks = any(name not in self._reading.sessions for name in sessions)
            if now - self._done_at > max_age_s or lacks:
                self._asked = max(self._asked, self._done + 1)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="agent-infra-poller", daemon=True)
                    self._thread.start()
                self._changed.notify_all()
                asked = self._asked
                self._changed.wait_for(lambda: self._done >= asked, patience_s)
            return self._reading

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._asked > self._done, self._idle_s):
                    self._thread = None
                    return
                latest = sorted(self._wanted.items(), key=lambda item: item[1])[-2 * OPEN_SESSIONS :]
                self._wanted = {name: at for name, at in latest if at > self.clock() - self._idle_s}
                wanted, former = tuple(self._wanted), self._reading
            try:
                reading = self._fetch(former, wanted)
            except Exception as error:  # noqa: BLE001 - whatever it is, the viewers are told and the next read tries again
                reading = replace(former, problem=Problem(f"This page failed: {error!r}.", "It keeps trying."))
            with self._changed:
                self._reading = reading
                self._done += 1
                self._done_at = self.clock()
                self._changed.notify_all()

    def _fetch(self, former: Reading, wanted: Iterable[str]) -> Reading:
        try:
            document = self._client.stats()
        except ProxyError as error:
            return replace(former, problem=error.problem)
        read_at = self.clock()
        rows, rows_before = session_rows(document), session_rows(former.document or {})
        details: dict[str, Mapping[str, Any]] = {}
        for name in wanted:
            known = former.sessions.get(name)
            if known is not None and "problem" not in known and rows.get(name) == rows_before.get(name):
                details[name] = known  # nothing has happened in it since
                continue
            try:
                details[name] = self._client.session(name)
            except ProxyError as error:
                details[name] = {"problem": error.problem.what}
        return Reading(document, read_at, None, details)


def session_rows(document: Mapping[str, Any]) -> dict[str, Any]:
    """Session → its row in /stats."""
    return {
        row["id"]: row
        for client in listed(document, "clients")
        for row in listed(client, "sessions")
        if isinstance(row.get("id"), str)
    }


# =====================================================================================================================
# Shaping: documents → DataFrames. Pure; every figure may be missing. All times are by the proxy's clock.
# =====================================================================================================================

# Judgements: a word always stands beside the colour, and a shape before it.
GOOD, BUSY, BAD, NEUTRAL = "good", "busy", "bad", "neutral"
SHAPES = {GOOD: "●", BUSY: "▲", BAD: "✕", NEUTRAL: "○"}
JUDGEMENT_OF_STATE = {
    "ready": GOOD,
    "pending": NEUTRAL,
    "starting": BUSY,
    "loading": BUSY,
    "draining": BUSY,
    "stopped": NEUTRAL,
    "failed": BAD,
    "lost": BAD,
    "unhealthy": BAD,
}
JUDGEMENT_OF_OUTCOME = {"completed": GOOD, "error": BAD, "cut": BAD, "rejected": BAD, "aborted": NEUTRAL}
JUDGEMENT_OF_VERDICT = {
    "BALANCED": GOOD,
    "GPU-BOUND": BUSY,
    "AGENT-BOUND": BUSY,
    "LATENCY-BOUND": BUSY,
    "KV-BOUND": BUSY,
    "IMBALANCED": BUSY,
    "UNHEALTHY": BAD,
}
# Of a turn, in their order. Without streaming, prefill is unknown: all of it is "inference".
PHASES = ("pre", "queue", "prefill", "decode", "inference", "post", "unaccounted")
BACKEND_COLUMNS = (
    *("id", "model", "node", "partition", "state", "judgement", "reason", "restarts", "gpus", "gpu_name"),
    *("gpu_utilization", "memory_used", "memory_total", "kv_usage", "in_flight", "slots", "in_flight_history"),
    *("ttft_ms", "p50_ms", "p95_ms", "is_slowest", "tunnel", "tunnel_judgement", "left_s", "requests", "errors"),
)
SESSION_COLUMNS = (
    *("client", "command", "id", "task", "model", "backend", "state", "turns", "errors", "silent_s"),
    *("pre", "queue", "inference", "post", "unaccounted", "context_tokens", "prompt_tokens"),
    *("cached_tokens", "cache_misses", "last_miss", "alerts", "moves"),
)
TURN_COLUMNS = (
    *("turn", "session", "task", "model", "backend", "ago_s", "outcome", "judgement", *PHASES, "ttft_ms", "total_ms"),
    *("prompt_tokens", "completion_tokens", "cached_tokens", "is_estimated", "cache_miss", "retries"),
    *("prompt", "answer", "error"),
)
# The panels of the timeline: their lines, by the names that the proxy's history has and as they are shown.
TIMELINE: Mapping[str, Mapping[str, str]] = {
    "throughput": {"turns_per_minute": "turns"},
    "latency": {"p50": "median", "p95": "95th percentile"},
    "agents": {"active_sessions": "active agents", "in_flight": "turns in flight", "pending": "turns waiting"},
}
CAPACITY = {"curve": "predicted, with its interval", "here": "you are here, as measured"}
SLOW_FACTOR = 1.2  # a replica whose median latency exceeds the median of all by this factor is marked
FULL_KV = 0.95  # of the KV cache: from here on sequences are preempted
SOON_S = 900.0  # a job that ends this soon is marked


def backend_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """One row per replica, the most urgent first: BACKEND_COLUMNS; durations in ms (``left_s``: s), memory in bytes."""
    now = document.get("now")
    rows = [_backend_row(row, now) for row in listed(document, "backends")]
    ready = [row["p50_ms"] for row in rows if row["state"] == "ready" and is_known(row["p50_ms"])]
    if len(ready) > 1:
        slow = max(ready)
        for row in rows:
            row["is_slowest"] = row["p50_ms"] == slow > SLOW_FACTOR * statistics.median(ready)
    order = {BAD: 0, BUSY: 1, NEUTRAL: 2, GOOD: 3}
    rows.sort(key=lambda row: (order[row["judgement"]], not _needs_a_look(row), natural(row["id"])))
    return pd.DataFrame(rows, columns=list(BACKEND_COLUMNS))


def _needs_a_look(row: Mapping[str, Any]) -> bool:
    """Whether any figure of a replica is highlighted, whatever its state."""
    is_full = is_known(row["kv_usage"]) and row["kv_usage"] >= FULL_KV
    is_over_soon = is_known(row["left_s"]) and row["left_s"] < SOON_S
    return row["is_slowest"] or is_full or is_over_soon or row["tunnel_judgement"] in (BUSY, BAD)


def natural(name: Any) -> tuple[Any, ...]:
    """A sort key that puts model-2 before model-10."""
    words = re.split(r"(\d{1,12})", str(name))
    return tuple((1, int(word), "") if word.isdecimal() else (0, 0, word) for word in words)


def _backend_row(row: Mapping[str, Any], now: Any) -> dict[str, Any]:
    state = row.get("state") if isinstance(row.get("state"), str) else "unknown"
    if state == "ready" and row.get("healthy") is False:
        state = "unhealthy"
    gpu, tunnel = part(row, "gpu"), part(row, "tunnel")
    ends_at = row.get("ends_at")
    history = row.get("inflight_history")
    tunnel_judgement = {"up": NEUTRAL, "down": BAD}.get(str(tunnel.get("state")), BUSY)
    return {
        "id": row.get("id"),
        "model": row.get("model"),
        "node": row.get("node"),
        "partition": row.get("partition"),
        "state": state,
        "judgement": JUDGEMENT_OF_STATE.get(str(state), NEUTRAL),
        "reason": None if state == "ready" else row.get("reason"),
        "restarts": row.get("restarts"),
        "gpus": gpu.get("count"),
        "gpu_name": gpu.get("name"),
        "gpu_utilization": gpu["utilization"] / 100 if is_known(gpu.get("utilization")) else None,
        "memory_used": gpu.get("memory_used"),
        "memory_total": gpu.get("memory_total"),
        "kv_usage": part(row, "engine").get("kv_usage"),
        "in_flight": row.get("inflight"),
        "slots": row.get("slots"),
        "in_flight_history": [each for each in history if is_known(each)] if isinstance(history, list) else [],
        "ttft_ms": part(row, "ttft_ms").get("p50"),
        "p50_ms": part(row, "latency_ms").get("p50"),
        "p95_ms": part(row, "latency_ms").get("p95"),
        "is_slowest": False,
        "tunnel": tunnel.get("state"),
        "tunnel_judgement": tunnel_judgement if tunnel else None,
        "left_s": max(0.0, ends_at - now) if is_known(ends_at) and is_known(now) and ends_at > 0 else None,
        "requests": row.get("requests"),
        "errors": row.get("errors"),
    }


def session_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """One row per listed session, in the proxy's order: SESSION_COLUMNS; phases are sums over its turns in ms."""
    now = document.get("now")
    rows = [
        {
            "client": client.get("id"),
            "command": client.get("command"),
            **{name: row.get(name) for name in ("id", "task", "model", "backend", "state", "turns", "errors")},
            "silent_s": _ago(now, row.get("last_seen")),
            "pre": row.get("pre_ms"),
            "queue": row.get("wait_ms"),
            "inference": row.get("inference_ms"),
            "post": row.get("post_ms"),
            "unaccounted": row.get("unaccounted_ms"),
            **{name: row.get(name) for name in ("context_tokens", "prompt_tokens", "cached_tokens")},
            **{name: row.get(name) for name in ("cache_misses", "last_miss")},
            "alerts": [str(alert) for alert in row.get("alerts") or ()],
            "moves": row.get("moves"),
        }
        for client in listed(document, "clients")
        for row in listed(client, "sessions")
    ]
    return pd.DataFrame(rows, columns=list(SESSION_COLUMNS))


def _ago(now: Any, at: Any) -> float | None:
    """Seconds since ``at`` by the proxy's clock, at least 0."""
    return max(0.0, now - at) if is_known(now) and is_known(at) else None


def turn_frame(rows: Iterable[Mapping[str, Any]], now: Any) -> pd.DataFrame:
    """One row per finished turn, in the given order: TURN_COLUMNS; phases and durations in ms, ``ago_s`` in s."""
    return pd.DataFrame([_turn_row(row, now) for row in rows], columns=list(TURN_COLUMNS))


def _turn_row(row: Mapping[str, Any], now: Any) -> dict[str, Any]:
    inference, ttft = row.get("inference_ms"), row.get("ttft_ms")
    phases = {name: row.get(f"{name}_ms") for name in PHASES}  # the proxy reports neither prefill nor decode
    if row.get("stream") and is_known(inference) and is_known(ttft):
        prefill = min(ttft, inference)
        phases.update(prefill=prefill, decode=inference - prefill, inference=None)
    known = [value for value in phases.values() if is_known(value)]
    return {
        **{name: row.get(name) for name in ("turn", "session", "task", "model", "backend", "outcome")},
        "ago_s": _ago(now, row.get("finished_at")),
        "judgement": JUDGEMENT_OF_OUTCOME.get(str(row.get("outcome")), NEUTRAL),
        **phases,
        "ttft_ms": ttft,
        "total_ms": sum(known) if known else None,
        **{name: row.get(name) for name in ("prompt_tokens", "completion_tokens", "cached_tokens", "cache_miss")},
        "is_estimated": bool(row.get("tokens_estimated")),
        **{name: row.get(name) for name in ("retries", "error")},
        **{name: row.get(name) or "" for name in ("prompt", "answer")},
    }


def timeline_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """The proxy's last minutes, at most MAX_POINTS rows: at (UTC), and one column per line of TIMELINE.

    Latencies are in s; unknown values are NaN.
    """
    points = [row for row in listed(part(document, "throughput"), "history") if is_known(row.get("at"))]
    points = points[:: max(1, math.ceil(len(points) / MAX_POINTS))]
    rows = []
    for point in points:
        latency = part(point, "latency_ms")
        row = {"at": point["at"]}
        for panel_name, names in TIMELINE.items():
            for key, name in names.items():
                value = latency.get(key) if panel_name == "latency" else point.get(key)
                if is_known(value):
                    row[name] = value / 1000 if panel_name == "latency" else value
        rows.append(row)
    lines = [name for names in TIMELINE.values() for name in names.values()]
    frame = pd.DataFrame(rows, columns=["at", *lines]).astype(float)
    frame["at"] = pd.to_datetime(frame["at"], unit="s", utc=True)
    return frame


def pipeline_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """Where recent turns spent their time: part, share (0 to 1), mean_ms, p50_ms, p95_ms. Empty without traffic."""
    pipeline = part(document, "pipeline")
    rows = [
        {"part": name, **{key: part(pipeline, name).get(key) for key in ("share", "mean_ms", "p50_ms", "p95_ms")}}
        for name in ("pre", "queue", "inference", "post", "unaccounted")
    ]
    known = [row for row in rows if is_known(row["share"])]
    return pd.DataFrame(known, columns=["part", "share", "mean_ms", "p50_ms", "p95_ms"])


_LIMITS = (("knee", "knee_agents"), ("KV cache full", "kv_agents"), ("70 % utilisation", "utilisation_agents"))


def capacity_frame(entry: Mapping[str, Any]) -> pd.DataFrame:
    """The predicted curve, the current position and the limits on the number of agents: one row per point.

    kind (of CAPACITY, or "limit"), agents, turns_per_hour, low, high, text and side (of limits: their label, and to
    which side of the line it stands). A limit's turns_per_hour is the height of its label, above the curve.
    Limits beyond the curve are left out. Empty if there is no curve.
    """
    columns = ["kind", "agents", "turns_per_hour", "low", "high", "text", "side"]
    curve = [{**row, "kind": CAPACITY["curve"]} for row in listed(entry, "curve")]
    curve = [row for row in curve if all(is_known(row.get(name)) for name in columns[1:5])][:MAX_POINTS]
    if len(curve) < 2:
        return pd.DataFrame([], columns=columns)
    agents, rate = part(entry, "operating", "agents"), part(entry, "operating", "turns_per_hour")
    here = {"kind": CAPACITY["here"], "agents": agents.get("value"), "turns_per_hour": rate.get("value")}
    here.update(low=rate.get("low"), high=rate.get("high"))
    rows = curve + [here] * (is_known(here["agents"]) and is_known(here["turns_per_hour"]))
    right = max(row["agents"] for row in rows)
    found = [(part(entry, "limits", name).get("value"), label) for label, name in _LIMITS]
    limits = sorted((value, label) for value, label in found if is_known(value) and value <= right)
    top = max(max(row[name] for name in ("turns_per_hour", "high") if is_known(row.get(name))) for row in rows)
    # All labels are on the same side of their lines; the line that other labels cross is drawn lowest.
    side = "left" if not limits or limits[-1][0] < right * 0.72 else "right"
    for level, (value, label) in enumerate(limits if side == "right" else reversed(limits)):
        height = top * (1.14 + 0.14 * level)
        text = f"{label} {count(value)}"
        rows.append({"kind": "limit", "agents": value, "turns_per_hour": height, "text": text, "side": side})
    frame = pd.DataFrame(rows, columns=columns)
    return frame.astype(dict.fromkeys(columns[1:5], float))


def what_if_frame(entry: Mapping[str, Any]) -> pd.DataFrame:
    """What would change the throughput: name, turns_per_hour, change, low, high (fractions), reason where unknown."""
    rows = [
        {
            "name": row.get("name"),
            "turns_per_hour": part(row, "turns_per_hour").get("value"),
            **{key: part(row, "change").get(key) for key in ("low", "high", "reason")},
            "change": part(row, "change").get("value"),
        }
        for row in listed(entry, "what_ifs")
    ]
    return pd.DataFrame(rows, columns=["name", "turns_per_hour", "change", "low", "high", "reason"])


def share_frame(entry: Mapping[str, Any]) -> pd.DataFrame:
    """What limits throughput: name, share, low, high; empty if unknown."""
    named = (
        ("think time of the agents", "agent"),
        ("latency of a lone turn", "base_latency"),
        ("contention for the GPUs", "contention"),
    )
    shares = part(entry, "verdict", "shares")
    rows = [
        {"name": text, "share": share["value"], "low": share.get("low"), "high": share.get("high")}
        for text, key in named
        for share in [part(shares, key)]
        if is_known(share.get("value"))
    ]
    return pd.DataFrame(rows, columns=["name", "share", "low", "high"])


HOUR_STATES = ("ready_busy", "ready_idle", "loading", "pending")


def hours_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """Hours by model and state, with their sum last if there are several models: model, unit, HOUR_STATES.

    The unit is GPU-hours, or replica-hours if no replica has a GPU. Empty if they aren't recorded.
    """
    accounting = part(document, "accounting")
    kept = [(row.get("model"), row) for row in listed(accounting, "by_model")]
    if len(kept) > 1:
        kept.append((None, accounting))
    has_gpus = any(part(accounting, "gpu_hours").values())
    key, unit = ("gpu_hours", "GPU-hours") if has_gpus else ("replica_hours", "replica-hours")
    rows = [{"model": model, "unit": unit, **{s: part(row, key).get(s) for s in HOUR_STATES}} for model, row in kept]
    return pd.DataFrame(rows, columns=["model", "unit", *HOUR_STATES])


def watchdog_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """Sessions that may need attention: kind, session, client, model, ago_s, sentence."""
    now = document.get("now")
    rows = [
        {**{name: row.get(name) for name in ("kind", "session", "client", "model", "sentence")}, "ago_s": ago}
        for row in listed(document, "watchdog")
        for ago in [_ago(now, row.get("since"))]
    ]
    return pd.DataFrame(rows, columns=["kind", "session", "client", "model", "ago_s", "sentence"])


# =====================================================================================================================
# Charts: DataFrames → alt.Chart. Pure. Colours come from the theme (range "category"), so light and dark both fit.
# =====================================================================================================================

CHART_ALT = {
    "timeline": "Lines over the last minutes: turns per minute; latency of turns, median and 95th percentile; active "
    "agents, turns in flight and waiting. Current figures are under Queue Status.",
    "capacity": "Predicted turns per hour by number of agents, with the current position and the limits. "
    "The tables beside it have the same figures.",
}


AXIS_PX = 38  # of the time axes' labels: "1,000" and some room
_GREY = "#8a94a0"  # reads on light and on dark
Data: TypeAlias = (
    "pd.DataFrame | alt.NamedData"  # named: the chart without its data, built once and filled again and again
)


def _lines(data: Data, panel_name: str, title: str, unit: str, crosshair: alt.Parameter, height: int) -> alt.LayerChart:
    """One panel of the timeline, with the shared crosshair and its figures.

    Streamlit gives each of several charts the whole width, without room for an axis beside it: so the lines begin
    AXIS_PX inside, and the labels stand before them, aligned over the panels.
    """
    names = list(TIMELINE[panel_name].values())
    own = alt.Chart(data)
    is_last = panel_name == list(TIMELINE)[-1]  # the axis is common, so one has the labels
    times = alt.Axis(title=None, format="%H:%M", tickCount=6, labelOverlap=True, labelFlush=True, grid=False)
    times.labels = is_last
    figures = alt.Axis(title=None, tickCount=3, ticks=False, domain=False, offset=-AXIS_PX, labelPadding=6)
    if panel_name == "agents":
        figures.tickMinStep = 1  # agents are whole numbers
    after_labels = alt.Scale(range=[AXIS_PX, alt.ExprRef("width")])
    x = alt.X("at:T", axis=times, scale=after_labels)
    legend = alt.Legend(orient="top", direction="horizontal", symbolType="stroke", title=None, offset=2)
    colour = alt.Color("name:N", scale=alt.Scale(domain=names), legend=legend if len(names) > 1 else None)
    y = alt.Y("value:Q", scale=alt.Scale(zero=True, nice=True), axis=figures)
    lines = (
        own.transform_fold(names, as_=["name", "value"])
        .mark_line(strokeWidth=1.75, interpolate="monotone", clip=True)
        .encode(x=x, y=y, color=colour)
    )
    tooltip = [alt.Tooltip("at:T", title="time", format="%H:%M:%S")]
    tooltip += [alt.Tooltip(f"{name}:Q", title=f"{name}, {unit}", format=",.3~r") for name in names]
    rule = (
        own.mark_rule(strokeWidth=1, color=_GREY)
        .encode(x=x, tooltip=tooltip, opacity=alt.condition(crosshair, alt.value(1), alt.value(0), empty=False))
        .add_params(crosshair)
    )
    heading = alt.Title(title, anchor="start", fontSize=12, fontWeight="normal", color=_GREY, offset=6)
    return alt.layer(lines, rule).properties(height=height, title=heading)


def timeline_chart(data: Data, height: int = 204) -> alt.VConcatChart:
    """Throughput, latency and agents of timeline_frame, stacked on one time axis with a shared crosshair."""
    crosshair = alt.selection_point(
        name="moment", fields=["at"], nearest=True, on="pointerover", clear="pointerout", empty=False
    )
    charts = [
        _lines(data, "throughput", "turns per minute", "per min", crosshair, height),
        _lines(data, "latency", "latency of a turn, s", "s", crosshair, height),
        _lines(data, "agents", "agents and turns, count", "count", crosshair, height),
    ]
    joined = alt.vconcat(*charts, spacing=18).resolve_scale(x="shared", color="independent")
    return joined.configure(background="transparent").configure_view(strokeWidth=0)


def capacity_chart(data: Data, height: int = 280) -> alt.LayerChart:
    """Throughput by agents, of capacity_frame: the fitted curve, its limits, and "you are here", with intervals."""
    everything = alt.Chart(data).encode(
        x=alt.X("agents:Q", title="agents in parallel", scale=alt.Scale(zero=True, nice=False)),
        y=alt.Y("turns_per_hour:Q", title="turns per hour", scale=alt.Scale(zero=True, nice=False)),
    )
    names = list(CAPACITY.values())
    legend = alt.Legend(orient="top", direction="horizontal", title=None, offset=4, labelLimit=300, symbolOpacity=1)
    colour = alt.Color("kind:N", scale=alt.Scale(domain=names, range=["#4f83c4", "#9a7fd1"]), legend=legend)
    tooltip = [alt.Tooltip("agents:Q", title="agents", format=",.0f")]
    for name, text in (("turns_per_hour", "turns per hour"), ("low", "at least"), ("high", "at most")):
        tooltip.append(alt.Tooltip(f"{name}:Q", title=text, format=",.0f"))
    span = {"y": alt.Y("low:Q", title="turns per hour"), "y2": alt.Y2("high:Q"), "color": colour}
    predicted, measured = (everything.transform_filter(alt.datum.kind == name) for name in names)
    limits = everything.transform_filter(alt.datum.kind == "limit")
    left, right = (limits.transform_filter(alt.datum.side == side) for side in ("left", "right"))
    layers = [
        predicted.mark_area(opacity=0.18).encode(**span),
        predicted.mark_line(strokeWidth=2).encode(color=colour, tooltip=tooltip),
        limits.mark_rule(strokeDash=[4, 4], strokeWidth=1, color=_GREY).encode(y2=alt.datum(0)),
        left.mark_text(align="left", dx=5, fontSize=12, color=_GREY).encode(text="text:N"),
        right.mark_text(align="right", dx=-5, fontSize=12, color=_GREY).encode(text="text:N"),
        measured.mark_rule(strokeWidth=2).encode(**span),
        measured.mark_point(size=150, filled=True, shape="diamond", opacity=1).encode(color=colour, tooltip=tooltip),
    ]
    return (
        alt.layer(*layers).properties(height=height).configure(background="transparent").configure_view(strokeWidth=0)
    )


def chart_template(chart: Callable[[Data], alt.TopLevelMixin]) -> dict[str, Any]:
    """A chart's Vega-Lite specification without its data, which is looked for under the name "rows".

    Altair takes a few hundred milliseconds to build one; filling this one takes almost none.
    """
    with warnings.catch_warnings():  # Altair warns that several charts share a crosshair, which is intended
        warnings.simplefilter("ignore", UserWarning)
        specification: dict[str, Any] = chart(alt.NamedData("rows")).to_dict()
    specification["usermeta"] = {
        "embedOptions": {"logLevel": 1, "renderer": "canvas"}
    }  # Vega warns about layers without rows
    return specification


def lowered(template: Mapping[str, Any], height: int = 88) -> dict[str, Any]:
    """The timeline to show beside an analysis without a curve, which is as low."""
    return {**template, "vconcat": [{**chart, "height": height} for chart in template["vconcat"]]}


# =====================================================================================================================
# Nodes: [tag, attributes, child, …], a child being text or a node. Plain data; the browser part makes elements of it.
# "key" in the attributes is not shown: by it an element stays the same one when its place changes.
# =====================================================================================================================

Node = list[Any]
Child = Any  # str | Node | None


def el(tag: str, attributes: Mapping[str, Any] | None = None, *children: Child) -> Node:
    """An element; omits children that are None."""
    return [tag, dict(attributes or {}), *(child for child in children if child is not None)]


def foreign(text: Any, kind: str = "ai-id") -> Node:
    """Text from outside (an id, a prompt): isolated in direction, truncated by the style, complete in the title."""
    shown = str(text)
    return el("bdi", {"class": kind, "title": shown}, shown)


def badge(judgement: str, word: str, title: str | None = None) -> Node:
    """A judgement: shape, word and colour."""
    shape = el("span", {"aria-hidden": "true"}, SHAPES[judgement])
    return el("span", {"class": f"ai-badge ai-{judgement}", **({"title": title} if title else {})}, shape, " " + word)


def panel(name: str, title: str, *children: Child, aside: Child = None) -> Node:
    """A panel with its heading; keys move from one to the next."""
    head = el("div", {"class": "ai-head"}, el("h2", {"id": f"ai-{name}"}, title), aside)
    attributes = {"class": "ai-panel", "data-panel": name, "tabindex": "-1", "aria-labelledby": f"ai-{name}"}
    return el("section", attributes, head, *children)


def table(caption: str, columns: Sequence[tuple[str, str]], rows: Sequence[Node], kind: str = "") -> Node:
    """A table. ``columns`` are (title, class); a title may be empty only where the cells are buttons."""
    heads = [el("th", {"scope": "col", "class": style}, title) for title, style in columns]
    return el(
        "div",
        {"class": "ai-scroll", "tabindex": "0", "role": "region", "aria-label": caption},
        el(
            "table",
            {"class": f"ai-table {kind}"},
            el("caption", {"class": "ai-hidden"}, caption),
            el("thead", {}, el("tr", {}, *heads)),
            el("tbody", {}, *rows),
        ),
    )


def cell(*children: Child, kind: str = "", **attributes: Any) -> Node:
    return el("td", {"class": kind, **attributes} if kind else attributes, *children)


def toggle(name: str, is_open: bool, label: Child, what: str) -> Node:
    """A button that opens or closes ``name``."""
    arrow = el("span", {"class": "ai-arrow", "aria-hidden": "true"}, "▾" if is_open else "▸")
    attributes = {"class": "ai-toggle", "data-toggle": name, "aria-expanded": str(is_open).lower(), "title": what}
    return el("button", attributes, arrow, label)


def show_all(name: str, total: int, shown: int, what: str, is_open: bool) -> Node | None:
    """The button that shows all rows, or only the first few again; None if nothing is hidden."""
    if total <= shown:
        return None
    text = f"show the first {shown}" if is_open else f"show all {count(total)} {what}"
    return el("button", {"class": "ai-more", "data-toggle": name, "aria-expanded": str(is_open).lower()}, text)


def meter(fraction: Any, label: str, text: str, judgement: str = NEUTRAL) -> Node:
    """A share as text over a bar."""
    if not is_known(fraction):
        return el("span", {"class": "ai-muted"}, UNKNOWN)
    width = f"{100 * min(1.0, max(0.0, fraction)):.1f}%"
    bar = el(
        "span", {"class": "ai-meter"}, el("span", {"class": f"ai-fill ai-fill-{judgement}", "style": f"width:{width}"})
    )
    word = el("span", {"class": f"ai-{judgement}"}, text)
    return el("span", {"class": "ai-metered", "role": "img", "aria-label": f"{label} {text}"}, word, bar)


def phase_bar(phases: Mapping[str, Any], scale_ms: float) -> Node:
    """A stacked bar of PHASES (ms) over ``scale_ms``; unaccounted time is hatched."""
    known = [(name, float(phases[name])) for name in PHASES if is_known(phases.get(name)) and phases[name] > 0]
    text = ", ".join(f"{name} {duration(ms)}" for name, ms in known) or "no time known"
    parts = [
        el("span", {"class": f"ai-phase ai-{name}", "style": f"width:{100 * ms / scale_ms:.2f}%"}) for name, ms in known
    ]
    return el("span", {"class": "ai-bar", "role": "img", "aria-label": text, "title": text}, *parts)


def phase_legend(names: Sequence[str] = PHASES) -> Node:
    items = [el("li", {}, el("span", {"class": f"ai-swatch ai-{name}", "aria-hidden": "true"}), name) for name in names]
    return el("ul", {"class": "ai-legend", "aria-label": "phases of a turn"}, *items)


def sparkline(values: Sequence[float]) -> Node | None:
    """A sparkline of figures, scaled from 0 to the highest; None below two."""
    if len(values) < 2:
        return None
    highest = max(1.0, *values)
    step = 100 / (len(values) - 1)
    points = " ".join(f"{index * step:.1f},{19 - 18 * value / highest:.1f}" for index, value in enumerate(values))
    line = el("polyline", {"points": points, "fill": "none", "vector-effect": "non-scaling-stroke"})
    return el(
        "svg",
        {"class": "ai-spark", "viewBox": "0 0 100 20", "preserveAspectRatio": "none", "aria-hidden": "true"},
        line,
    )


def change_bar(change: Any, low: Any, high: Any, reach: float) -> Node:
    """A change as a bar to the left or right of a middle line, with its interval; ``reach`` is half the bar."""
    if not is_known(change):
        return el("span", {"class": "ai-change"})
    left, right = sorted((0.0, change))

    def place(value: float) -> float:
        return 50 + 50 * max(-1.0, min(1.0, value / reach))

    parts = [
        el(
            "span",
            {"class": "ai-change-fill", "style": f"left:{place(left):.1f}%;width:{place(right) - place(left):.1f}%"},
        )
    ]
    if is_known(low) and is_known(high):
        width = place(high) - place(low)
        parts.append(el("span", {"class": "ai-change-range", "style": f"left:{place(low):.1f}%;width:{width:.1f}%"}))
    return el("span", {"class": "ai-change", "aria-hidden": "true"}, *parts)


def estimate(value: Mapping[str, Any], show: Callable[[Any], str] = figure, unit: str | None = None) -> str:
    """An Estimate as text: "147 agents (135 to 159)", a range alone, or a dash."""
    low, high = value.get("low"), value.get("high")
    unit = str(value.get("unit") or "") if unit is None else unit
    tail = f"{SPACE}{unit}" if unit else ""
    span = f"{show(low)} to {show(high)}" if is_known(low) and is_known(high) else None
    if is_known(value.get("value")):
        return f"{show(value['value'])}{tail}" + (f" ({span})" if span else "")
    return f"{span}{tail}" if span else UNKNOWN


# =====================================================================================================================
# Panels: documents and DataFrames → nodes. Pure.
# =====================================================================================================================


def header_panel(
    document: Mapping[str, Any], url: str, age_s: float | None, problem: Problem | None, is_paused: bool
) -> Node:
    """The source and age of the figures."""
    if problem is not None:
        state = badge(BAD, "not connected")
    elif is_paused:
        state = badge(NEUTRAL, "paused")
    else:
        state = badge(GOOD, "live")
    models = [str(row.get("name")) for row in listed(document, "models")]
    facts = [("proxy", url), ("models", ", ".join(models)), ("strategy", document.get("strategy"))]
    if is_known(document.get("uptime_seconds")):
        facts.append(("up", seconds(document["uptime_seconds"])))
    shown = [
        el("span", {"class": "ai-fact"}, el("span", {"class": "ai-muted"}, name + " "), foreign(value))
        for name, value in facts
        if value
    ]
    if age_s is not None:
        age = el("span", {"data-age": f"{age_s:.1f}"})
        shown.append(el("span", {"class": "ai-fact"}, el("span", {"class": "ai-muted"}, "refreshed "), age, " ago"))
    title = el("div", {"class": "ai-title"}, el("h1", {}, "Agent Infra"), state)
    return el("div", {"class": "ai-header"}, title, el("div", {"class": "ai-facts"}, *shown))


def problem_panel(problem: Problem | None, has_document: bool) -> Node | None:
    """A problem that affects all figures, and what to do."""
    if problem is None:
        return None
    tail = " The last known figures are shown below in grey." if has_document else ""
    return el(
        "div",
        {"class": "ai-problem", "role": "alert"},
        badge(BAD, problem.what),
        el("span", {}, " " + problem.fix + tail),
    )


def stale_problem(age_s: float) -> Problem | None:
    """The problem if the proxy answers with figures that are ``age_s`` seconds old."""
    if age_s < 10.0:
        return None
    return Problem(
        f"The proxy's figures are {seconds(age_s)} old: its controller is gone.",
        "Turns are still served; “python agent_infra.py connect” takes over.",
    )


KEYS = (
    ("Tab", "next panel (Shift-Tab: previous)"),
    ("↓ j", "next row"),
    ("↑ k", "previous row"),
    ("Enter", "expand, collapse"),
    ("q Esc", "pause, go on"),
)


def keys_panel() -> Node:
    """The legend of the keys."""
    items = [el("li", {}, el("kbd", {}, key), " " + what) for key, what in KEYS]
    return el("ul", {"class": "ai-keys", "aria-label": "keys"}, *items)


def verdict_panel(document: Mapping[str, Any]) -> Node:
    """What limits the run, how sure that is, and how many agents to run: one line per model and GPU type."""
    entries = listed(document, "analysis")
    lines = [_verdict_line(entry, len(entries) > 1) for entry in entries]
    if not lines:
        has_served = bool(part(document, "totals").get("requests"))
        text = "No recent traffic, so there is no verdict." if has_served else "No traffic yet."
        lines = [el("div", {"class": "ai-verdict"}, el("div", {}, badge(NEUTRAL, "NO DATA")), el("p", {}, text))]
    return panel("verdict", "Verdict", *lines)


def _verdict_line(entry: Mapping[str, Any], is_named: bool) -> Node:
    verdict, suggestion = part(entry, "verdict"), part(entry, "suggestion")
    name = str(verdict.get("name") or "NO DATA")
    confidence = verdict.get("confidence")
    sure = None if not is_known(confidence) else f"{percent(min(confidence, 0.99))} sure"
    if is_known(confidence) and confidence > 0.99:
        sure = f"over 99{SPACE}% sure"
    sentence = str(verdict.get("sentence") or verdict.get("reason") or "")
    if sentence.lower().startswith(name.lower()) and ": " in sentence:  # the name and how sure it is stand beside it
        sentence = sentence.partition(": ")[2]
        sentence = sentence[:1].upper() + sentence[1:]
    sentence = sentence.replace(" %", f"{SPACE}%")
    advice = str(suggestion.get("sentence") or "")
    flags = [
        el(
            "p",
            {"key": f"flag-{flag.get('name')}"},
            badge(JUDGEMENT_OF_VERDICT.get(str(flag.get("name")), BUSY), str(flag.get("name"))),
            " ",
            str(flag.get("sentence") or ""),
        )
        for flag in listed(entry, "flags")
    ]
    return el(
        "div",
        {"class": "ai-verdict", "key": entry_label(entry)},
        el(
            "div",
            {"class": "ai-verdict-name"},
            el("div", {"class": "ai-muted"}, entry_label(entry)) if is_named else None,
            badge(JUDGEMENT_OF_VERDICT.get(name, NEUTRAL), name),
            el("div", {"class": "ai-muted"}, sure) if sure else None,
        ),
        _suggestion(part(suggestion, "agents"), part(entry, "operating", "agents")),
        el(
            "div",
            {"class": "ai-verdict-text"},
            el("p", {}, sentence),
            el("p", {}, el("strong", {}, advice)) if advice else None,
            *flags,
        ),
    )


def entry_label(entry: Mapping[str, Any]) -> str:
    """The label that distinguishes an entry of the analysis from the others."""
    return " on ".join(str(entry[name]) for name in ("model", "gpu") if entry.get(name)) or "all"


def _suggestion(agents: Mapping[str, Any], now: Mapping[str, Any]) -> Node | None:
    if not is_known(agents.get("value")):
        return None
    low, high = agents.get("low"), agents.get("high")
    span = f"{count(low)} to {count(high)}" if is_known(low) and is_known(high) else None
    running = f"now {count(now['value'])}" if is_known(now.get("value")) else None
    return el(
        "div",
        {"class": "ai-suggestion"},
        el("div", {"class": "ai-muted"}, "suggested"),
        el("div", {"class": "ai-large"}, count(agents["value"]), el("span", {"class": "ai-unit"}, " agents")),
        el("div", {"class": "ai-muted"}, " · ".join(text for text in (span, running) if text)),
    )


def queue_panel(document: Mapping[str, Any]) -> Node:
    """Turns waiting and in flight, and the throughput."""
    queue, totals, rates = part(document, "queue"), part(document, "totals"), part(document, "throughput")
    slots = [row.get("slots") for row in listed(document, "models")]
    of_slots = f"of {count(sum(filter(is_known, slots)))} slots" if any(map(is_known, slots)) else "at the replicas"
    requests, errors = totals.get("requests"), totals.get("errors")
    pending, oldest = queue.get("pending"), queue.get("oldest_ms")
    turns, tokens = rates.get("turns_per_minute"), rates.get("tokens_per_second")
    quiet = "no traffic" if not requests else "not known yet"
    tiles = [
        ("Waiting", count(pending), "turns in the queue"),
        ("In flight", count(queue.get("in_flight")), of_slots),
        ("Oldest wait", duration(oldest) if pending else UNKNOWN, "of those that wait" if pending else "nobody waits"),
        ("Turns", figure(turns), "per minute" if is_known(turns) else quiet),
        ("Tokens", figure(tokens), "per second" if is_known(tokens) else quiet),
        (
            "Active agents",
            count(part(document, "sessions").get("active")),
            f"of {count(part(document, 'sessions').get('live'))} live sessions",
        ),
        ("Errors", count(errors), _error_share(errors, requests)),
    ]
    shown = [
        el(
            "div",
            {"class": "ai-tile", "key": name},
            el("dt", {}, name),
            el("dd", {"class": "ai-large"}, value),
            el("dd", {"class": "ai-muted"}, note),
        )
        for name, value, note in tiles
    ]
    return panel(
        "queue", "Queue Status", el("dl", {"class": "ai-tiles"}, *shown), _waiting_list(listed(queue, "waiting"))
    )


def _error_share(errors: Any, requests: Any) -> Child:
    if not is_known(errors) or not requests:
        return "no traffic"
    share = errors / requests
    text = f"{percent(share)} of {count(requests)} turns"
    return text if share < 0.01 else badge(BAD if share >= 0.05 else BUSY, text)


def _waiting_list(waiting: Sequence[Mapping[str, Any]]) -> Node | None:
    if not waiting:
        return None
    items = [
        el("li", {}, foreign(row.get("session") or "no session"), f" {duration(row.get('waited_ms'))}")
        for row in waiting[:LISTED_WAITING]
    ]
    return el("ul", {"class": "ai-waiting", "aria-label": "who waits longest"}, *items)


def backends_panel(frame: pd.DataFrame, is_open: bool) -> Node:
    """The replicas. Omits columns without any known value."""
    if frame.empty:
        return panel(
            "backends",
            "GPU Backends",
            el("p", {"class": "ai-muted"}, "There are no replicas; “python agent_infra.py start” starts them."),
        )
    shown = [name for name in _BACKEND_CELLS if _BACKEND_CELLS[name].is_shown(frame)]
    rows = frame if is_open else frame.head(LISTED_BACKENDS)
    lines = [
        el(
            "tr",
            {"key": str(row.id), "data-row": "", "tabindex": "-1"},
            *(_BACKEND_CELLS[name].show(row) for name in shown),
        )
        for row in rows.itertuples(index=False)
    ]
    ready = int((frame["state"] == "ready").sum())
    aside = el("span", {"class": "ai-muted"}, f"{ready} of {len(frame)} ready")
    columns = [(_BACKEND_CELLS[name].title, _BACKEND_CELLS[name].style) for name in shown]
    more = show_all("backends", len(frame), LISTED_BACKENDS, "replicas", is_open)
    return panel("backends", "GPU Backends", table("GPU backends", columns, lines), more, aside=aside)


@dataclass(frozen=True)
class BackendCell:
    """A column of the replicas' table."""

    title: str
    style: str
    needs: tuple[str, ...]  # columns of the frame: shown when something is known of one of them
    show: Callable[[Any], Node]

    def is_shown(self, frame: pd.DataFrame) -> bool:
        return any(bool(frame[name].notna().any()) for name in self.needs)


def _state_cell(row: Any) -> Node:
    reason = (
        el("div", {"class": "ai-reason", "title": str(row.reason)}, str(row.reason))
        if isinstance(row.reason, str)
        else None
    )
    restarts = f" · {things(row.restarts, 'restart')}" if is_known(row.restarts) and row.restarts else None
    return cell(
        badge(row.judgement, row.state), el("span", {"class": "ai-muted"}, restarts) if restarts else None, reason
    )


def _place_cell(row: Any) -> Node:
    place = " · ".join(text for text in (row.node, row.partition) if isinstance(text, str))
    return cell(foreign(place) if place else UNKNOWN)


def _gpu_cell(row: Any) -> Node:
    label = f"{int(row.gpus)} × {row.gpu_name}" if is_known(row.gpus) else "GPU"
    shown = meter(row.gpu_utilization, f"utilisation of {label}", percent(row.gpu_utilization))
    return cell(shown, kind="ai-gauge", title=label)


def _memory_cell(row: Any) -> Node:
    share = row.memory_used / row.memory_total if is_known(row.memory_used) and row.memory_total else None
    total = gibibytes(row.memory_total)
    shown = meter(share, f"GPU memory of {total}:", gibibytes(row.memory_used))
    return cell(shown, kind="ai-gauge", title=f"of {total}")


def _kv_cell(row: Any) -> Node:
    is_full = is_known(row.kv_usage) and row.kv_usage >= FULL_KV
    text = percent(row.kv_usage) + (" full" if is_full else "")
    mark, judgement = (f"{SHAPES[BUSY]} ", BUSY) if is_full else ("", NEUTRAL)
    return cell(meter(row.kv_usage, "KV cache", mark + text, judgement), kind="ai-gauge")


def _flight_cell(row: Any) -> Node:
    slots = f"/{count(row.slots)}" if is_known(row.slots) else ""
    figures = el("span", {}, f"{count(row.in_flight)}{slots}")
    return cell(el("span", {"class": "ai-flight"}, figures, sparkline(row.in_flight_history)), kind="ai-course")


def _latency_cell(row: Any) -> Node:
    if not is_known(row.p50_ms):
        return cell(el("span", {"class": "ai-muted"}, "no traffic"), kind="ai-num")
    slowest = el("span", {}, badge(BUSY, "slowest"), " ") if row.is_slowest else None
    return cell(slowest, f"{duration(row.p50_ms)} / {duration(row.p95_ms)}", kind="ai-num")


def _tunnel_cell(row: Any) -> Node:
    if not isinstance(row.tunnel, str):
        return cell(el("span", {"class": "ai-muted"}, "none"))
    return cell(row.tunnel if row.tunnel == "up" else badge(row.tunnel_judgement, row.tunnel))


def _left_cell(row: Any) -> Node:
    text = seconds(row.left_s)
    return cell(badge(BUSY, text) if is_known(row.left_s) and row.left_s < SOON_S else text, kind="ai-num")


def _errors_cell(row: Any) -> Node:
    return cell(f"{count(row.requests)} / {count(row.errors)}", kind="ai-num")


_BACKEND_CELLS: Mapping[str, BackendCell] = {
    "id": BackendCell("replica", "", ("id",), lambda row: cell(foreign(row.id))),
    "place": BackendCell("node", "", ("node", "partition"), _place_cell),
    "state": BackendCell("state", "", ("state",), _state_cell),
    "gpu": BackendCell("GPU busy", "ai-gauge", ("gpu_utilization",), _gpu_cell),
    "memory": BackendCell("GPU memory", "ai-gauge", ("memory_used",), _memory_cell),
    "kv": BackendCell("KV cache", "ai-gauge", ("kv_usage",), _kv_cell),
    "flight": BackendCell("in flight", "ai-course", ("in_flight",), _flight_cell),
    "ttft": BackendCell("first token", "ai-num", ("ttft_ms",), lambda row: cell(duration(row.ttft_ms), kind="ai-num")),
    "latency": BackendCell("latency p50 / p95", "ai-num", ("id",), _latency_cell),
    "errors": BackendCell("turns / errors", "ai-num", ("requests",), _errors_cell),
    "tunnel": BackendCell("tunnel", "", ("tunnel",), _tunnel_cell),
    "left": BackendCell("job ends in", "ai-num", ("left_s",), _left_cell),
}


SESSION_STATES = {
    "waiting": "waiting",
    "prefill": "reading the prompt",
    "decoding": "answering",
    "idle": "thinking",
    "ended": "ended",
}
_SESSION_COLUMNS = (
    *(("session", ""), ("task", ""), ("replica", ""), ("state", ""), ("turns", "ai-num"), ("time so far", "ai-wide")),
    *(("waited", "ai-num"), ("context", "ai-num"), ("cached", "ai-num"), ("cache misses", ""), ("last seen", "ai-num")),
)


def sessions_panel(
    document: Mapping[str, Any],
    frame: pd.DataFrame,
    open_names: frozenset[str],
    details: Mapping[str, Mapping[str, Any]],
) -> Node:
    """Client → session → turn. ``open_names`` are the toggles that were used: "session:ID", "client:ID", "all:ID"."""
    counts = part(document, "sessions")
    if frame.empty:
        return panel(
            "sessions",
            "Session Tracking",
            el("p", {"class": "ai-muted"}, "No traffic yet: no agent has sent a turn that names its session."),
        )
    clients: dict[tuple[Any, Any], list[Any]] = {}
    for row in frame.itertuples(index=False):
        clients.setdefault((_none(row.client), _none(row.command)), []).append(row)
    scale = max([1.0, *(_phase_sum(row) for row in frame.itertuples(index=False))])
    rows: list[Node] = []
    for (client, command), sessions in list(clients.items())[: None if "clients" in open_names else LISTED_CLIENTS]:
        rows += _client_rows(client, command, sessions, open_names, details, scale, document.get("now"))
    told = f"{count(counts.get('live'))} live, {count(counts.get('active'))} active, {count(counts.get('ended'))} ended"
    if is_known(counts.get("live")) and is_known(counts.get("listed")) and counts["live"] > counts["listed"]:
        told += f"; the {count(counts['listed'])} most recent are listed"
    more = show_all("clients", len(clients), LISTED_CLIENTS, "clients", "clients" in open_names)
    legend = phase_legend()
    aside = el("span", {"class": "ai-muted"}, told)
    return panel(
        "sessions", "Session Tracking", legend, table("sessions by client", _SESSION_COLUMNS, rows), more, aside=aside
    )


def _none(value: Any) -> Any:
    """pandas' NaN as None."""
    return value if isinstance(value, str) else None


def _phase_sum(row: Any) -> float:
    values = [getattr(row, name, None) for name in PHASES]
    return float(sum(value for value in values if is_known(value)))


def _client_rows(
    client: str | None,
    command: str | None,
    sessions: Sequence[Any],
    open_names: frozenset[str],
    details: Mapping[str, Mapping[str, Any]],
    scale: float,
    now: Any,
) -> list[Node]:
    """A client's row, then the rows of its sessions."""
    key = f"{client or ''} {command or ''}"
    is_open = f"client:{key}" not in open_names
    busy = sum(1 for row in sessions if row.state not in ("idle", "ended"))
    name = foreign(client) if client else el("span", {}, "clients without a name")
    note = f"{things(len(sessions), 'session')}, {busy} with a turn in flight"
    head = el(
        "tr",
        {"key": f"client:{key}", "class": "ai-client", "data-row": "", "tabindex": "-1"},
        cell(
            toggle(f"client:{key}", is_open, name, "show or hide this client's sessions"),
            el("span", {"class": "ai-muted"}, " ", foreign(command, "ai-command") if command else None, f" · {note}"),
            colspan=str(len(_SESSION_COLUMNS)),
        ),
    )
    if not is_open:
        return [head]
    rows = [head]
    all_name = f"all:{key}"
    for row in sessions[: None if all_name in open_names else LISTED_SESSIONS]:
        is_session_open = f"session:{row.id}" in open_names
        rows.append(_session_row(row, is_session_open, scale))
        if is_session_open:
            inner = session_detail(details.get(str(row.id)), now)
            rows.append(
                el("tr", {"key": f"detail:{row.id}"}, cell(inner, colspan=str(len(_SESSION_COLUMNS)), kind="ai-detail"))
            )
    more = show_all(all_name, len(sessions), LISTED_SESSIONS, "sessions of this client", all_name in open_names)
    if more:
        rows.append(el("tr", {"key": all_name}, cell(more, colspan=str(len(_SESSION_COLUMNS)))))
    return rows


def _session_row(row: Any, is_open: bool, scale: float) -> Node:
    misses = (
        count(row.cache_misses)
        if is_known(row.cache_misses) and row.cache_misses
        else "0"
        if is_known(row.cache_misses)
        else UNKNOWN
    )
    reason = (
        el("span", {"class": "ai-muted ai-cut", "title": row.last_miss}, f" {row.last_miss}")
        if isinstance(row.last_miss, str)
        else None
    )
    share = (
        row.cached_tokens / row.prompt_tokens
        if is_known(row.cached_tokens) and is_known(row.prompt_tokens) and row.prompt_tokens
        else None
    )
    alerts = [el("span", {}, " ", badge(BUSY, alert.replace("_", " "))) for alert in row.alerts]
    errors = (
        el("span", {}, " ", badge(BAD, things(row.errors, "error"))) if is_known(row.errors) and row.errors else None
    )
    return el(
        "tr",
        {"key": f"session:{row.id}", "data-row": "", "tabindex": "-1"},
        cell(
            toggle(f"session:{row.id}", is_open, foreign(row.id), "show or hide this session's turns"),
            *alerts,
            kind="ai-indent",
        ),
        cell(foreign(row.task) if isinstance(row.task, str) else UNKNOWN),
        cell(foreign(row.backend) if isinstance(row.backend, str) else UNKNOWN),
        cell(SESSION_STATES.get(str(row.state), str(row.state)), kind="ai-muted" if row.state == "ended" else ""),
        cell(count(row.turns), errors, kind="ai-num"),
        cell(phase_bar({name: getattr(row, name, None) for name in PHASES}, scale), kind="ai-wide"),
        cell(duration(row.queue), kind="ai-num"),
        cell(f"{count(row.context_tokens)}{SPACE}tok" if is_known(row.context_tokens) else UNKNOWN, kind="ai-num"),
        cell(percent(share), kind="ai-num"),
        cell(misses, reason),
        cell(f"{seconds(row.silent_s)} ago" if is_known(row.silent_s) else UNKNOWN, kind="ai-num"),
    )


_TURN_COLUMNS = (
    *(("finished", "ai-num"), ("outcome", ""), ("replica", ""), ("turn", "ai-wide"), ("total", "ai-num")),
    *(
        ("waited", "ai-num"),
        ("first token", "ai-num"),
        ("tokens in → out", "ai-num"),
        ("cached", "ai-num"),
        ("cache miss", ""),
    ),
)


def session_detail(detail: Mapping[str, Any] | None, now: Any) -> Node:
    """The turns of a session, latest first, as waterfalls on one scale."""
    if detail is None:
        return el("p", {"class": "ai-muted"}, "Asking the proxy for its turns…")
    if "problem" in detail:
        return el("p", {"class": "ai-muted"}, f"No turns to show: {detail['problem']}")
    frame = turn_frame(listed(detail, "turns"), detail.get("now", now))
    if frame.empty:
        return el("p", {"class": "ai-muted"}, "No finished turn yet.")
    scale = max([1.0, *frame["total_ms"].dropna()])
    rows = [el("tr", {"key": str(row.turn)}, *_turn_cells(row, scale)) for row in frame.itertuples(index=False)]
    return el(
        "div",
        {},
        el(
            "p", {"class": "ai-muted"}, f"{len(frame)} latest turns, latest first; the longest bar is {duration(scale)}"
        ),
        table("turns of this session", _TURN_COLUMNS, rows, "ai-inner"),
    )


def _turn_cells(row: Any, scale: float) -> list[Node]:
    tokens = f"{count(row.prompt_tokens)} → {count(row.completion_tokens)}"
    if row.is_estimated:
        tokens = "≈ " + tokens
    retries = (
        f" · {count(row.retries)} {'retry' if row.retries == 1 else 'retries'}"
        if is_known(row.retries) and row.retries
        else ""
    )
    outcome = str(row.outcome) + retries
    return [
        cell(f"{seconds(row.ago_s)} ago", kind="ai-num"),
        cell(outcome if row.judgement in (GOOD, NEUTRAL) else badge(row.judgement, outcome, str(row.error or ""))),
        cell(foreign(row.backend) if isinstance(row.backend, str) else UNKNOWN),
        cell(phase_bar({name: getattr(row, name) for name in PHASES}, scale), kind="ai-wide"),
        cell(duration(row.total_ms), kind="ai-num"),
        cell(duration(row.queue), kind="ai-num"),
        cell(duration(row.ttft_ms), kind="ai-num"),
        cell(tokens, kind="ai-num"),
        cell(count(row.cached_tokens), kind="ai-num"),
        cell(
            el("span", {"class": "ai-cut", "title": row.cache_miss}, row.cache_miss)
            if isinstance(row.cache_miss, str)
            else UNKNOWN
        ),
    ]


def turns_panel(frame: pd.DataFrame, open_names: frozenset[str]) -> Node:
    """The turns that finished last, from any session."""
    if frame.empty:
        return panel("turns", "Recent Turns", el("p", {"class": "ai-muted"}, "No traffic yet: no turn has finished."))
    is_all = "turns" in open_names
    shown = frame if is_all else frame.head(LISTED_TURNS)
    scale = max([1.0, *shown["total_ms"].dropna()])
    columns = (("session", ""), *_TURN_COLUMNS, ("prompt → answer", "ai-text-head"))
    rows: list[Node] = []
    for row in shown.itertuples(index=False):
        name = f"turn:{row.turn}"
        is_open = name in open_names
        label = (
            foreign(row.session)
            if isinstance(row.session, str) and row.session
            else el("span", {"class": "ai-muted"}, "no session")
        )
        text = " → ".join(each for each in (row.prompt, row.answer) if each)
        rows.append(
            el(
                "tr",
                {"key": name, "data-row": "", "tabindex": "-1"},
                cell(toggle(name, is_open, label, "show or hide the text of this turn")),
                *_turn_cells(row, scale),
                cell(foreign(text, "ai-text") if text else UNKNOWN),
            )
        )
        if is_open:
            rows.append(
                el("tr", {"key": f"detail:{name}"}, cell(_turn_text(row), colspan=str(len(columns)), kind="ai-detail"))
            )
    more = show_all("turns", len(frame), LISTED_TURNS, "recent turns", is_all)
    return panel("turns", "Recent Turns", table("recent turns", columns, rows), more)


def _turn_text(row: Any) -> Node:
    parts = [
        ("prompt", row.prompt),
        ("answer", row.answer),
        ("error", row.error),
        ("turn", row.turn),
        ("task", row.task),
    ]
    items = [
        each
        for name, text in parts
        if isinstance(text, str) and text
        for each in (el("dt", {}, name), el("dd", {}, el("bdi", {"class": "ai-whole"}, text)))
    ]
    return el("dl", {"class": "ai-texts"}, *items)


def pipeline_panel(document: Mapping[str, Any], entry: Mapping[str, Any], labels: Sequence[str]) -> Node:
    """The first part of Bottleneck Analysis: where the time went, and what limits throughput."""
    chosen = entry_label(entry) if entry else ""
    choices = [
        el("button", {"class": "ai-choice", "data-set": label, "aria-pressed": str(label == chosen).lower()}, label)
        for label in labels
    ]
    chooser = (
        el("div", {"class": "ai-choices", "role": "group", "aria-label": "model and GPU"}, *choices)
        if len(labels) > 1
        else None
    )
    return panel(
        "analysis", "Bottleneck Analysis", chooser, _pipeline_shares(pipeline_frame(document)), _holding_back(entry)
    )


def _pipeline_shares(frame: pd.DataFrame) -> Node:
    if frame.empty:
        return el("p", {"class": "ai-muted"}, "No traffic in the last five minutes.")
    bar = phase_bar({row.part: row.share * 1000 for row in frame.itertuples(index=False)}, 1000.0)
    text = ", ".join(f"{row.part} {percent(row.share)}" for row in frame.itertuples(index=False))
    bar[1].update({"aria-label": text, "title": text, "class": "ai-bar ai-bar-large"})
    rows = [
        el(
            "tr",
            {},
            el(
                "th",
                {"scope": "row"},
                el("span", {"class": f"ai-swatch ai-{row.part}", "aria-hidden": "true"}),
                row.part,
            ),
            cell(percent(row.share), kind="ai-num"),
            cell(duration(row.mean_ms), kind="ai-num"),
            cell(duration(row.p50_ms), kind="ai-num"),
            cell(duration(row.p95_ms), kind="ai-num"),
        )
        for row in frame.itertuples(index=False)
    ]
    columns = (("part of a turn", ""), ("share", "ai-num"), ("mean", "ai-num"), ("p50", "ai-num"), ("p95", "ai-num"))
    return el(
        "div",
        {},
        el("h3", {}, "Where the time of turns went, last 5 minutes"),
        bar,
        table("pipeline shares", columns, rows),
    )


def _holding_back(entry: Mapping[str, Any]) -> Node:
    frame = share_frame(entry)
    if frame.empty:
        reason = part(entry, "verdict").get("reason") or part(entry, "verdict").get("sentence") or "no traffic"
        return el("div", {"class": "ai-apart"}, el("p", {}, f"What limits the run is unknown: {reason}"), *_glossary())
    items = [
        el(
            "tr",
            {},
            el("th", {"scope": "row"}, row.name),
            cell(meter(row.share, row.name, percent(row.share)), kind="ai-wide"),
            cell(f"{percent(row.low)} to {percent(row.high)}", kind="ai-num ai-muted"),
        )
        for row in frame.itertuples(index=False)
    ]
    columns = (("throughput is limited by", ""), ("share", "ai-wide"), ("interval", "ai-num"))
    return table("what limits throughput", columns, items)


def _glossary() -> list[Node]:
    """An explanation of the parts of a turn, shown while there is room."""
    meanings = (
        ("pre", "the agent makes its next observation, as its client timed it"),
        ("queue", "the turn waits for a replica with a free slot"),
        ("inference", "the replica reads the prompt and answers"),
        ("post", "the agent acts on the answer"),
        ("unaccounted", "time between turns that no client explained"),
    )
    items = [each for name, text in meanings for each in (el("dt", {}, name), el("dd", {}, text))]
    return [el("h3", {}, "The parts of a turn"), el("dl", {"class": "ai-texts"}, *items)]


def what_if_panel(entry: Mapping[str, Any]) -> Node:
    """The last part of Bottleneck Analysis, below the curve: what-ifs, and the data behind the fit."""
    frame = what_if_frame(entry)
    children: list[Child] = []
    if not frame.empty and bool(frame["change"].notna().any()):
        spread = frame[["change", "low", "high"]].apply(pd.to_numeric).abs().max(axis=None)
        reach = max(0.05, float(spread))
        rows = [
            el(
                "tr",
                {},
                el("th", {"scope": "row"}, str(row.name)),
                cell(percent(row.change, signed=True), kind="ai-num"),
                cell(change_bar(row.change, row.low, row.high, reach), kind="ai-wide"),
                cell(
                    f"{percent(row.low, signed=True)} to {percent(row.high, signed=True)}"
                    if is_known(row.low)
                    else el("span", {"class": "ai-why"}, str(row.reason or UNKNOWN)),
                    kind="ai-num ai-muted",
                ),
                cell(
                    f"{count(row.turns_per_hour)}{SPACE}/h" if is_known(row.turns_per_hour) else UNKNOWN, kind="ai-num"
                ),
            )
            for row in frame.itertuples(index=False)
        ]
        columns = (
            *(("what if", ""), ("turns/h", "ai-num"), ("less ← → more", "ai-wide ai-middle")),
            *(("interval", "ai-num"), ("then", "ai-num")),
        )
        children.append(table("what ifs", columns, rows))
    elif not share_frame(entry).empty:
        reason = next((str(row.reason) for row in frame.itertuples() if isinstance(row.reason, str)), "not known")
        children.append(el("p", {"class": "ai-muted"}, f"No curve and no what-ifs: {reason}."))
    return el("div", {"class": "ai-panel"}, *children, _basis(entry))


def _basis(entry: Mapping[str, Any]) -> Node | None:
    """The data that the model was fitted to, and whether the fit holds."""
    fit, operating, law = part(entry, "fit"), part(entry, "operating"), part(entry, "littles_law")
    if not is_known(part(fit, "base_latency_s").get("value")):
        return None
    basis = part(operating, "turns_per_hour", "basis")
    told = [
        f"A turn takes {estimate(part(fit, 'base_latency_s'))} alone and {estimate(part(fit, 'per_request_s'))} more "
        f"for each turn in flight on its replica; agents think for {estimate(part(fit, 'think_s'))}.",
        f"Utilisation of the replicas: {estimate(part(operating, 'utilisation'), percent, '')}.",
    ]
    if is_known(law.get("error")):
        told.append(
            f"Little's law {'holds' if law.get('holds') else 'does not hold'}: "
            f"{figure(law.get('agents_sampled'))} agents seen, "
            f"{figure(law.get('agents_computed'))} computed ({percent(law['error'], signed=True)})."
        )
    if is_known(basis.get("turns")):
        told.append(f"From {count(basis['turns'])} turns in {seconds(basis.get('window_s'))}.")
    return el("p", {"class": "ai-muted ai-basis"}, " ".join(told))


def watchdog_panel(frame: pd.DataFrame) -> Node:
    """Sessions that may need attention."""
    if frame.empty:
        return panel(
            "watchdog",
            "Watchdog",
            el(
                "p",
                {},
                badge(GOOD, "nothing to report"),
                " No session is silent, repeating, oversized or thrashing.",
            ),
        )
    items = [
        el(
            "li",
            {"key": f"{row.kind}:{row.session}", "data-row": "", "tabindex": "-1"},
            badge(BUSY, str(row.kind).replace("_", " ")),
            " ",
            foreign(row.session) if isinstance(row.session, str) else None,
            el("span", {}, f" {row.sentence or ''}"),
            el("span", {"class": "ai-muted"}, f" since {seconds(row.ago_s)}") if is_known(row.ago_s) else None,
        )
        for row in frame.itertuples(index=False)
    ]
    return panel("watchdog", "Watchdog", el("ul", {"class": "ai-list"}, *items))


def cost_panel(document: Mapping[str, Any]) -> Node:
    """GPU-hours by state, and the cost of a turn, a session and a task."""
    frame = hours_frame(document)
    children: list[Child] = []
    if not frame.empty:
        children.append(_hours_table(frame, _ago(document.get("now"), part(document, "accounting").get("since"))))
    entries = [entry for entry in listed(document, "analysis") if part(entry, "cost")]
    if entries:
        names = (
            ("turn", "gpu_seconds_per_turn"),
            ("session", "gpu_seconds_per_session"),
            ("task", "gpu_seconds_per_task"),
        )
        rows = [
            el(
                "tr",
                {},
                el("th", {"scope": "row"}, foreign(entry_label(entry))),
                *(_cost_cell(part(entry, "cost", name)) for _, name in names),
            )
            for entry in entries
        ]
        columns = (("GPU-seconds", ""), *((f"per {name}", "ai-num") for name, _ in names))
        children.append(table("GPU-seconds per turn, session and task", columns, rows))
    if not children:
        children.append(el("p", {"class": "ai-muted"}, "No GPU time has been recorded yet."))
    return panel("cost", "GPU-Hours and Cost", *children)


def _cost_cell(value: Mapping[str, Any]) -> Node:
    text = estimate(value, unit="s")
    reason = value.get("reason")
    return cell(text, kind="ai-num", title=str(reason)) if text == UNKNOWN and reason else cell(text, kind="ai-num")


def _hours_table(frame: pd.DataFrame, kept_s: float | None) -> Node:
    unit = str(frame["unit"].iloc[0])
    rows = []
    for row in frame.itertuples(index=False):
        spent = [getattr(row, state) for state in HOUR_STATES]
        total = sum(value for value in spent if is_known(value))
        share = row.ready_busy / total if is_known(row.ready_busy) and total else None
        name = foreign(row.model) if isinstance(row.model, str) else el("span", {}, "all")
        cells = [cell(figure(value) + (f"{SPACE}h" if is_known(value) else ""), kind="ai-num") for value in spent]
        rows.append(el("tr", {}, el("th", {"scope": "row"}, name), *cells, cell(meter(share, "busy", percent(share)))))
    columns = (
        (unit, ""),
        ("busy", "ai-num"),
        ("idle", "ai-num"),
        ("loading", "ai-num"),
        ("pending", "ai-num"),
        ("busy share", ""),
    )
    note = el("p", {"class": "ai-muted"}, f"in the last {seconds(kept_s)}") if kept_s is not None else None
    return el("div", {}, table(unit, columns, rows), note)


def card(panel: Node) -> Node:
    """A panel on its card."""
    return el("div", {"class": "ai-card"}, panel)


def slots_of(
    document: Mapping[str, Any],
    entry: Mapping[str, Any],
    opened: frozenset[str],
    sessions: Mapping[str, Mapping[str, Any]],
) -> dict[str, list[Node]]:
    """Slot → its nodes: the parts below the verdict and the queue, around and below the charts."""
    turns = turn_frame(listed(document, "recent_turns"), document.get("now"))
    has_points = bool(listed(part(document, "throughput"), "history"))
    note = None if has_points else el("p", {"class": "ai-muted"}, "The first points appear within seconds.")
    labels = [entry_label(each) for each in listed(document, "analysis")]
    rest = [
        card(backends_panel(backend_frame(document), "backends" in opened)),
        card(sessions_panel(document, session_frame(document), opened, sessions)),
        card(turns_panel(turns, opened)),
        el("div", {"class": "ai-pair"}, card(watchdog_panel(watchdog_frame(document))), card(cost_panel(document))),
    ]
    return {
        "analysis": [pipeline_panel(document, entry, labels)],
        "what_ifs": [what_if_panel(entry)],
        "timeline": [panel("timeline", "Throughput, Latency, Agents", note)],
        "rest": rest,
    }


# =====================================================================================================================
# Browser part: makes elements of nodes, and changes only what has changed, so that focus, selection and scroll
# position stay. It sets text and attributes, never markup.
# =====================================================================================================================

JS = r"""
const SVG = new Set(["svg", "polyline"]);
const attributesOf = node => node[1] || {};

function keysOf(nodes) {
  const seen = new Set();
  return nodes.map((node, index) => {
    const own = typeof node === "string" ? undefined : attributesOf(node).key;
    let key = typeof node === "string" ? "#" + index : node[0] + (own === undefined ? ":" + index : "=" + own);
    if (seen.has(key)) key += "\u0000" + index;
    seen.add(key);
    return key;
  });
}

function build(node) {
  if (typeof node === "string") return document.createTextNode(node);
  const made = SVG.has(node[0]) ? document.createElementNS("http://www.w3.org/2000/svg", node[0])
    : document.createElement(node[0]);
  for (const [name, value] of Object.entries(attributesOf(node))) if (name !== "key") made.setAttribute(name, value);
  for (const child of node.slice(2)) made.appendChild(build(child));
  return made;
}

function change(element, was, now) {
  if (typeof now === "string") { if (was !== now) element.data = now; return; }
  const before = attributesOf(was), after = attributesOf(now);
  for (const name in before) if (!(name in after)) element.removeAttribute(name);
  for (const name in after) if (name !== "key" && before[name] !== after[name]) element.setAttribute(name, after[name]);
  changeChildren(element, was.slice(2), now.slice(2));
}

// Whether the nodes are those of before, in their order, so that there is nothing to look for.
function areInPlace(was, now) {
  return was.length === now.length && now.every((node, index) => typeof node === "string"
    ? typeof was[index] === "string"
    : was[index][0] === node[0] && attributesOf(was[index]).key === attributesOf(node).key);
}

function changeChildren(element, was, now) {
  if (areInPlace(was, now)) {
    let child = element.firstChild;
    now.forEach((node, index) => {
      if (child) change(child, was[index], node);
      child = child?.nextSibling;
    });
    return;
  }
  const known = new Map(), keys = keysOf(now), wanted = new Set(keys), old = [...element.childNodes];
  keysOf(was).forEach((key, index) => wanted.has(key) ? known.set(key, [old[index], was[index]]) : old[index].remove());
  now.forEach((child, index) => {
    const found = known.get(keys[index]);
    const there = element.childNodes[index];
    if (!found) { element.insertBefore(build(child), there || null); return; }
    if (found[0] !== there) element.insertBefore(found[0], there || null);
    change(found[0], found[1], child);
  });
}

function age(text) {
  const s = Math.max(0, Math.round(text));
  return s < 60 ? s + "\u00a0s" : s < 3600 ? Math.floor(s / 60) + "\u00a0min" : Math.floor(s / 3600) + "\u00a0h";
}

function showAges(root) {
  for (const each of root.querySelectorAll("[data-age]")) {
    const text = age(Number(each.dataset.age) + (performance.now() - root.came) / 1000);
    if (each.textContent !== text) each.textContent = text;
  }
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  const target = event.target;
  if (target.closest("input:not([type=checkbox]):not([type=radio]), textarea, select, [contenteditable]")) return;
  if (target.closest("[role=menu], [role=dialog], [role=listbox]")) return;
  const panels = [...document.querySelectorAll("[data-panel]")];
  const panel = target.closest("[data-panel]");
  const rows = panel ? [...panel.querySelectorAll("[data-row]")] : [];
  const at = rows.indexOf(target.closest("[data-row]"));
  const step = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
  let next = null;
  if (event.key === "Tab") next = panels[panels.indexOf(panel) + (event.shiftKey ? -1 : 1)];
  else if (step && panel && rows.length) next = rows[Math.min(rows.length - 1, Math.max(0, at + step))];
  else if (step && !panel && event.key.length === 1) next = panels[0];
  else if (event.key === "Enter" && at >= 0 && target === rows[at]) rows[at].querySelector("[data-toggle]")?.click();
  else if (event.key === "q" || event.key === "Escape") document.querySelector(".st-key-pause button")?.click();
  if (!next) return;  // at the ends Tab is the browser's, so that nobody is caught here
  event.preventDefault();
  next.focus({ preventScroll: true });
  next.scrollIntoView({ block: "nearest" });
}

function fill(place, nodes) {
  const focused = place.contains(document.activeElement) ? document.activeElement : null;
  changeChildren(place, place.nodes || [], nodes);
  place.nodes = nodes;
  if (focused && focused.isConnected && focused !== document.activeElement) focused.focus({ preventScroll: true });
}

// Streamlit makes the slots when it gets to them, and makes one anew now and then.
function fillSlots(root) {
  clearTimeout(root.waiting);
  let isWhole = true;
  for (const [name, nodes] of Object.entries(root.slots)) {
    const slot = document.querySelector(`[data-slot="${name}"]`);
    if (!slot) isWhole = false;
    else if (slot.nodes !== nodes) fill(slot, nodes);
  }
  if (!isWhole) root.waiting = setTimeout(() => fillSlots(root), 50);
}

function onClick(root, event) {
  const toggle = event.target.closest("[data-toggle]"), choice = event.target.closest("[data-set]");
  if (toggle) {
    const name = toggle.dataset.toggle;
    if (!root.flipped.delete(name)) root.flipped.add(name);
    root.setStateValue("flipped", [...root.flipped].slice(-64));
  } else if (choice) root.setStateValue("chosen", choice.dataset.set);
}

function begin(parentElement, data) {
  const root = parentElement.appendChild(document.createElement("div"));
  parentElement.__agentInfra = root;
  root.className = "ai-page";
  root.flipped = new Set(data.flipped);
  root.onClick = event => onClick(root, event);
  document.addEventListener("click", root.onClick);
  root.timer = setInterval(() => showAges(root), 1000);
  return root;
}

function end(parentElement, root) {
  clearInterval(root.timer);
  clearTimeout(root.waiting);
  document.removeEventListener("click", root.onClick);
  document.removeEventListener("keydown", root.onKey);
  delete parentElement.__agentInfra;
  root.remove();
}

export default function (component) {
  const { parentElement, setStateValue } = component;
  const data = JSON.parse(new TextDecoder().decode(component.data));
  const root = parentElement.__agentInfra || begin(parentElement, data);
  root.setStateValue = setStateValue;
  root.came = performance.now();
  root.slots = data.slots;
  fill(root, data.nodes);
  fillSlots(root);
  showAges(root);
  if (document.documentElement.lang !== "en") document.documentElement.lang = "en";  // to set it restyles everything
  document.querySelector(".stApp")?.toggleAttribute("data-ai-stale", data.isStale);
  document.removeEventListener("keydown", root.onKey);
  root.onKey = onKey;
  if (data.hasKeys) document.addEventListener("keydown", root.onKey);
  // The rest takes longer: it is asked for when this much can be seen.
  if (data.isFirst) requestAnimationFrame(() => setTimeout(() => root.setStateValue("isPainted", true)));
  return () => end(parentElement, root);
}
"""

# A place in Streamlit's layout that the page's nodes go to.
SLOT_JS = r"""
export default function ({ data, parentElement }) {
  const name = new TextDecoder().decode(data);
  if (parentElement.querySelector("[data-slot]")) return;
  parentElement.appendChild(document.createElement("div")).dataset.slot = name;
}
"""

CSS = """
.stApp {
  --ai-muted: light-dark(#566070, #a3abb6); --ai-line: light-dark(#e1e5ea, #2c3238);
  --ai-card: light-dark(#fff, #1a1d21);
  --ai-good: light-dark(#17693f, #62c794); --ai-busy: light-dark(#974600, #f0a860);
  --ai-bad: light-dark(#ab1f17, #f4938b);
  --ai-track: light-dark(#e7eaee, #2d3339); --ai-plain: light-dark(#7f93ab, #6d8096);
  --ai-pre: light-dark(#8a74bd, #a68fdc); --ai-post: light-dark(#c4b6e2, #6d5a9e);
  --ai-queue: light-dark(#59626d, #98a2ad);
  --ai-prefill: light-dark(#2f5fa8, #4a7fc4); --ai-decode: light-dark(#76a5dc, #8ab4f0);
  --ai-inference: light-dark(#4f83c4, #6b9bdb);
}
.stApp .stMainBlockContainer { padding: 14px 28px 40px; max-width: 1880px; }
.stApp .stMainBlockContainer > .stVerticalBlock { gap: 14px; }
[data-testid="stHeader"] { background: transparent; }
[data-testid="stHeader"], [data-testid="stHeader"] * { pointer-events: none; }
[data-testid="stHeader"] :is(button, button *) { pointer-events: auto; }
.stApp .st-key-controls { position: absolute; top: 6px; right: 64px; width: auto; z-index: 2; }
.stApp .st-key-controls button { min-height: 34px; padding-block: 2px; }
.stApp .st-key-keys label { align-items: center; }
[data-testid="stStatusWidget"] { visibility: hidden; }
[data-stale="true"] { opacity: 1 !important; transition: none !important; }
.stApp[data-ai-stale] :is([data-panel], .ai-panel, .stVegaLiteChart) { filter: grayscale(1); opacity: .8; }
.ai-page, [data-slot=rest] { display: flex; flex-direction: column; gap: 14px; }
.ai-pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 14px; }
.ai-card, .stApp [class*="st-key-card"] { background: var(--ai-card); border: 1px solid var(--ai-line);
  border-radius: 8px; padding: 14px 18px 16px; gap: 10px; min-width: 0; }
.ai-card:has(> [data-panel]:focus), .stApp [class*="st-key-card"]:has([data-panel]:focus) {
  outline: 2px solid var(--st-primary-color); outline-offset: 1px; }
[data-slot=rest] .ai-card { content-visibility: auto; contain-intrinsic-height: auto 300px; }
.ai-panel { font-size: 14px; line-height: 1.4; font-variant-numeric: tabular-nums; outline: none; }
.ai-panel h2 { font-size: 16px; font-weight: 600; margin: 0; padding: 0; letter-spacing: 0; }
.ai-panel h3 { font-size: 13px; font-weight: 600; margin: 12px 0 6px; padding: 0; color: var(--ai-muted);
  letter-spacing: 0; }
.ai-panel p { margin: 0 0 4px; font-size: 14px; }
[data-panel=verdict] .ai-head { position: absolute; clip-path: inset(50%); }
.ai-head { display: flex; align-items: baseline; justify-content: space-between; gap: 12px; margin-bottom: 8px; }
.ai-muted, .ai-panel p.ai-muted { color: var(--ai-muted); font-weight: 400; }
.ai-basis { margin-top: 10px !important; font-size: 13px !important; }
.ai-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
.ai-header { font-size: 14px; padding: 8px 0 0; font-variant-numeric: tabular-nums; }
.ai-title { display: flex; align-items: baseline; gap: 14px; min-height: 34px; }
.ai-header h1 { font-size: 21px; font-weight: 650; margin: 0; padding: 0; letter-spacing: -.01em; }
.ai-facts { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 20px; }
.ai-fact { white-space: nowrap; max-width: 100%; display: inline-flex; gap: 4px; align-items: baseline; }
.ai-badge { white-space: nowrap; font-weight: 600; }
.ai-problem .ai-badge { white-space: normal; }
.ai-good { color: var(--ai-good); } .ai-busy { color: var(--ai-busy); } .ai-bad { color: var(--ai-bad); }
.ai-badge.ai-neutral { color: var(--ai-muted); }
.ai-problem { border: 1px solid var(--ai-bad); border-radius: 8px; background: var(--ai-card); padding: 10px 16px;
  font-size: 14px; }
.ai-keys { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; margin: 0; padding: 0; font-size: 13px;
  color: var(--ai-muted); }
.ai-keys li { margin: 0; padding: 0; font-size: 13px; }
.ai-keys kbd { font: 12px var(--st-code-font); border: 1px solid var(--ai-line); border-radius: 4px;
  padding: 1px 6px; background: var(--ai-card); color: var(--st-text-color); }
.ai-verdict { display: grid; grid-template-columns: 150px auto minmax(0, 1fr); gap: 4px 32px; align-items: start;
  padding: 8px 0; border-top: 1px solid var(--ai-line); }
.ai-head + .ai-verdict { border-top: 0; padding-top: 0; }
.ai-verdict:last-child { padding-bottom: 0; } .ai-verdict-text > :last-child { margin-bottom: 0; }
.ai-verdict-name .ai-badge { font-size: 16px; }
.ai-verdict-text { grid-column: 3; }
.ai-verdict-text p { max-width: 120ch; text-wrap: pretty; }
.ai-suggestion { min-width: 150px; white-space: nowrap; }
.ai-table .ai-middle { text-align: center; }
.ai-large { font-size: 22px; font-weight: 600; line-height: 1.25; }
.ai-unit { font-size: 14px; font-weight: 400; }
.ai-tiles { display: grid; grid-template-columns: repeat(7, minmax(0, 1fr)); gap: 8px 0; margin: 0; }
.ai-tile { padding: 0 14px; border-left: 1px solid var(--ai-line); min-width: 0; }
.ai-tile:first-child { padding-left: 0; border-left: 0; }
.ai-tile dt { font-size: 13px; font-weight: 400; color: var(--ai-muted); }
.ai-tile dd { margin: 0; }
.ai-tile dd.ai-muted { font-size: 13px; }
.ai-waiting { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 10px 0 0; padding: 0; list-style: none;
  color: var(--ai-muted); }
.ai-waiting li { display: inline-flex; gap: 6px; margin: 0; font-size: 13px; }
.ai-scroll { overflow-x: auto; }
.ai-scroll + .ai-scroll { margin-top: 10px; }
.ai-why { display: inline-block; max-width: 30ch; white-space: normal; font-size: 12.5px; line-height: 1.25; }
.st-key-card_analysis tbody th { white-space: normal; }
[data-panel=analysis] > .ai-scroll { margin-top: 12px; }
[data-panel=analysis] .ai-wide { width: 50%; }
.ai-scroll:focus-visible { outline: 2px solid var(--st-primary-color); }
.ai-table { width: 100%; border-collapse: collapse; font-size: 13.5px; }
.ai-table th, .ai-table td { padding: 4px 10px 4px 0; border: 0; border-bottom: 1px solid var(--ai-line);
  text-align: left; vertical-align: middle; white-space: nowrap; }
.ai-table :is(th, td):last-child { padding-right: 2px; }
.ai-table th { font-weight: 400; color: var(--ai-muted); font-size: 13px; }
.ai-table tbody th { color: inherit; font-size: 13.5px; }
.ai-table tr:last-child > :is(td, th) { border-bottom: 0; }
.ai-table thead tr:last-child > th { border-bottom: 1px solid var(--ai-line); }
.ai-table .ai-num { text-align: right; }
.ai-table .ai-num + :not(.ai-num) { padding-left: 12px; }
@media (min-width: 1600px) { .ai-table .ai-gauge { width: 10%; } .ai-table .ai-course { width: 14%; }
  .ai-gauge .ai-metered { max-width: 220px; } .ai-course .ai-flight { width: 100%; padding-right: 20px; }
  .ai-course .ai-spark { flex: 1; } }
.ai-table .ai-wide { min-width: 120px; width: 22%; }
.ai-table tr:hover > td { background: light-dark(#f7f9fb, #1f2327); }
[data-row]:focus { outline: 2px solid var(--st-primary-color); outline-offset: -2px; }
.ai-id { display: inline-block; max-width: clamp(12ch, 10vw, 32ch); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; vertical-align: bottom; }
.ai-header .ai-id { max-width: 44ch; }
.ai-command { display: inline-block; max-width: 60ch; overflow: hidden; text-overflow: ellipsis;
  vertical-align: bottom; }
td > .ai-muted.ai-cut { margin-left: 6px; }
.ai-cut { display: inline-block; max-width: clamp(12ch, 9vw, 34ch); overflow: hidden; text-overflow: ellipsis;
  vertical-align: bottom; }
.ai-text { display: block; max-width: clamp(14ch, 14vw, 60ch); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; color: var(--ai-muted); }
.ai-whole { white-space: pre-wrap; overflow-wrap: anywhere; }
.ai-reason { font-size: 12.5px; color: var(--ai-muted); max-width: 48ch; white-space: normal;
  overflow-wrap: anywhere; display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical;
  overflow: hidden; }
.ai-metered { display: inline-flex; flex-direction: column; gap: 2px; min-width: 76px; width: 100%;
  max-width: 150px; line-height: 1.2; }
.ai-wide .ai-metered { flex-direction: row-reverse; align-items: center; gap: 8px; max-width: none; }
.ai-wide .ai-metered > :first-child { min-width: 42px; text-align: right; }
.ai-meter { display: block; flex: 1; min-height: 4px; height: 4px; border-radius: 2px; background: var(--ai-track);
  overflow: hidden; }
.ai-wide .ai-meter { min-height: 8px; height: 8px; }
.ai-fill { display: block; height: 8px; background: var(--ai-plain); }
.ai-fill-busy { background: var(--ai-busy); } .ai-fill-bad { background: var(--ai-bad); } .ai-fill-good {
  background: var(--ai-good); }
.ai-flight { display: inline-flex; align-items: center; gap: 8px; }
.ai-spark { width: 64px; height: 18px; } .ai-spark polyline { stroke: var(--ai-plain); stroke-width: 1.5; }
.ai-bar { display: flex; height: 12px; min-width: 110px; background: transparent; border-radius: 2px;
  overflow: hidden; }
.ai-bar-large { height: 20px; margin-bottom: 6px; }
.ai-phase { display: block; height: 100%; min-width: 1px; }
.ai-swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
.ai-pre { background: var(--ai-pre); } .ai-queue { background: var(--ai-queue); } .ai-prefill {
  background: var(--ai-prefill); }
.ai-decode { background: var(--ai-decode); } .ai-inference { background: var(--ai-inference); } .ai-post {
  background: var(--ai-post); }
.ai-unaccounted { background: repeating-linear-gradient(135deg, var(--ai-plain) 0 2px, var(--ai-track) 2px 5px); }
.ai-legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0 0 6px; padding: 0; list-style: none;
  font-size: 13px; color: var(--ai-muted); }
.ai-legend li { margin: 0; font-size: 13px; }
.ai-table .ai-wide:has(.ai-change) { min-width: 80px; }
.ai-change { display: block; position: relative; height: 12px; min-width: 76px;
  background: linear-gradient(var(--ai-plain) 0 0) 50% / 1px 100% no-repeat; }
.ai-change-fill { position: absolute; top: 2px; height: 8px; background: var(--ai-plain); opacity: .65; }
.ai-change-range { position: absolute; top: 5.5px; height: 1.5px; background: var(--st-text-color); }
.ai-panel button { font: inherit; color: inherit; background: none; border: 0; padding: 0; margin: 0;
  cursor: pointer; text-align: left; }
.ai-panel button:focus-visible { outline: 2px solid var(--st-primary-color); outline-offset: 1px;
  border-radius: 3px; }
.ai-toggle { display: inline-flex; align-items: baseline; gap: 6px; max-width: 100%; }
.ai-arrow { color: var(--ai-muted); width: 1ch; }
.ai-panel button.ai-more { color: var(--st-link-color); margin-top: 8px; font-size: 13px;
  text-decoration: underline; text-underline-offset: 2px; }
.ai-table button.ai-more { margin: 0 0 0 22px; }
.ai-choices { display: flex; flex-wrap: wrap; gap: 8px; margin-bottom: 4px; }
.ai-panel button.ai-choice { border: 1px solid var(--ai-line); border-radius: 6px; padding: 2px 10px;
  font-size: 13px; }
.ai-panel button.ai-choice[aria-pressed=true] { border-color: var(--st-primary-color); color: var(--st-link-color);
  font-weight: 600; }
.ai-client > td { padding-top: 10px; }
.ai-client .ai-toggle { font-weight: 600; }
.ai-indent { padding-left: 16px !important; }
.ai-detail { padding: 6px 0 12px 36px !important; white-space: normal !important; }
.ai-apart { margin-top: 12px; }
.ai-texts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; font-size: 13.5px; }
.ai-texts dt { color: var(--ai-muted); font-weight: 400; } .ai-texts dd { margin: 0; }
.ai-list { list-style: none; margin: 0; padding: 0; } .ai-list li { padding: 5px 0;
  border-bottom: 1px solid var(--ai-line); margin: 0; font-size: 14px; }
.ai-list li:last-child { border-bottom: 0; }
"""
# =====================================================================================================================
# Views: the only part that speaks to Streamlit.
# =====================================================================================================================


def _nothing() -> None:
    """Streamlit reports a component's state only if it has a callback."""


def mount(nodes: Sequence[Node | None], slots: Mapping[str, Sequence[Node]] | None = None, **data: Any) -> None:
    """Show nodes here and in the slots. The viewer's actions come back as ``flipped``, ``chosen``, ``isPainted``.

    All text is one Streamlit element, because an element costs the browser much more per refresh than its nodes do.
    """
    show = st.components.v2.component("agent_infra", css=CSS, js=JS, isolate_styles=False)
    shown = [node for node in nodes if node is not None]
    message = {"nodes": shown, "slots": dict(slots or {}), "flipped": sorted(flipped()), **data}
    show(
        key="page",
        data=json.dumps(message).encode(),
        on_flipped_change=_nothing,
        on_chosen_change=_nothing,
        on_isPainted_change=_nothing,
    )


def slot(name: str) -> None:
    """A slot for nodes that ``mount`` fills."""
    st.components.v2.component("agent_infra_slot", js=SLOT_JS, isolate_styles=False)(data=name.encode())


def told(name: str) -> Any:
    """What the browser part has reported for ``name``; None until it does."""
    state = st.session_state.get("page")
    return state.get(name) if state else None


def flipped() -> frozenset[str]:
    """The names whose toggles were used."""
    return frozenset(name for name in told("flipped") or () if isinstance(name, str))


@st.cache_resource(show_spinner=False)
def _templates() -> Mapping[str, dict[str, Any]]:
    """The charts without their data, built once per process.

    Streamlit collects garbage after every run, a fragment's too: 0.2 s of CPU with all that pandas and Altair have
    made. Objects that exist by now stay, so collections skip them from here on.
    """
    templates = {"timeline": chart_template(timeline_chart), "capacity": chart_template(capacity_chart)}
    gc.freeze()
    return templates


def show_chart(name: str, template: Mapping[str, Any], frame: pd.DataFrame) -> None:
    """Show a chart of ``frame``; nothing without rows. The browser changes its data in place."""
    if not frame.empty:
        specification = {**template, "datasets": {"rows": frame}}
        st.vega_lite_chart(spec=specification, key=name, width="stretch", alt=CHART_ALT[name])


@dataclass(frozen=True)
class Source:
    """The source of a viewer's figures, and how often they are read."""

    poller: Poller
    url: str
    interval_s: float
    is_paused: bool

    def read(self, sessions: Sequence[str] = ()) -> Reading:
        """The reading to show: the current one, or the one from when the viewer paused."""
        if not self.is_paused:
            st.session_state["reading"] = self.poller.read(self.interval_s * 0.9, sessions)
        elif sessions:
            asked = self.poller.read(math.inf, sessions)
            st.session_state["reading"] = replace(st.session_state["reading"], sessions=asked.sessions)
        reading: Reading = st.session_state["reading"]
        return reading

    def refreshed(self, view: Callable[[Source], None], least_s: float = 0.0) -> None:
        """Show a view repeatedly unless paused."""
        every = None if self.is_paused else max(self.interval_s, least_s)
        st.fragment(view, run_every=every)(self)


def text_view(source: Source) -> None:
    """Everything except the charts."""
    if st.session_state["answered"] != (told("isPainted"), told("chosen")):
        st.rerun()  # a run of the whole page notes what it answers, so one that is lost is asked for again
    opened = flipped()
    names = sorted(name.removeprefix("session:") for name in opened if name.startswith("session:"))
    reading = source.read(names[:OPEN_SESSIONS])
    document = reading.document or {}
    problem, age_s = reading.problem, None
    if reading.document is not None:
        stale_s = (document.get("snapshot_age_ms") or 0) / 1000
        age_s = max(0.0, source.poller.clock() - reading.read_at) + stale_s
        problem = problem or stale_problem(stale_s)
    has_keys = bool(st.session_state.get("keys"))
    header = header_panel(document, source.url, age_s, problem, source.is_paused)
    nodes = [header, keys_panel() if has_keys else None, problem_panel(problem, bool(document))]
    slots: dict[str, list[Node]] = {}
    if document:
        nodes += [card(verdict_panel(document)), card(queue_panel(document))]
        if is_painted():
            slots = slots_of(document, chosen_entry(document), opened, reading.sessions)
    # "at": without anything new in it, the data would not be handed over, and the age would seem to grow.
    flags = {"isStale": problem is not None, "hasKeys": has_keys, "isFirst": not is_painted(), "at": time.monotonic()}
    mount(nodes, slots, **flags)


def is_painted() -> bool:
    """Whether the browser shows header and verdict. They are sent first, on their own, so they appear quickly."""
    if told("isPainted"):
        st.session_state["painted"] = True
    return bool(st.session_state.get("painted"))


def chosen_entry(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry of the analysis to show: the viewer's choice, or the first."""
    entries = listed(document, "analysis")
    chosen = [entry for entry in entries if entry_label(entry) == told("chosen")]
    return next(iter(chosen + entries), {})


def charts_view(source: Source) -> None:
    """Bottleneck analysis beside the time axis; the charts no more often than the proxy computes their data."""
    document = source.read().document
    if not document:
        return
    templates, curve = _templates(), capacity_frame(chosen_entry(document))
    left, right = st.columns(2, gap="small")
    with left, st.container(key="card_analysis", height="stretch"):
        slot("analysis")
        with st.container():
            show_chart("capacity", templates["capacity"], curve)
        slot("what_ifs")
    with right, st.container(key="card_timeline", height="stretch"):
        slot("timeline")
        timeline = templates["timeline"]
        show_chart("timeline", lowered(timeline) if curve.empty else timeline, timeline_frame(document))


def controls_view() -> None:
    """Pause, interval, keys."""
    if st.button("Go on" if st.session_state.get("paused") else "Pause", key="pause"):
        st.session_state["paused"] = not st.session_state.get("paused")
        st.rerun()
    st.segmented_control(
        "refresh every",
        INTERVALS_S,
        default=INTERVALS_S[0],
        format_func=lambda s: f"{s} s",
        key="interval",
        label_visibility="collapsed",
    )
    st.toggle("Keys", key="keys", help="Tab, arrows, Enter and q act on the panels")


@st.cache_resource(show_spinner=False)
def shared_poller(url: str, token_file: str | None) -> Poller:
    """Shared by all viewers of one proxy."""
    token = Path(token_file).read_text(encoding="utf-8") if token_file else os.environ.get("AGENT_INFRA_TOKEN", "")
    return Poller(ProxyClient(url, token.strip()))


def is_admitted() -> bool:
    """Whether this viewer may see the page: with AGENT_INFRA_PAGE_KEY set, only those who have the key.

    The page reads the proxy as the user who runs it, and any user of this machine can open a port on loopback.
    """
    key = os.environ.get("AGENT_INFRA_PAGE_KEY")
    given = st.query_params.get("key", "")
    return not key or hmac.compare_digest(key.encode(), str(given).encode())


# =====================================================================================================================
# Main
# =====================================================================================================================


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The words after "--" on Streamlit's command line."""
    parser = argparse.ArgumentParser(prog="streamlit run streamlit_dashboard.py --")
    parser.add_argument("--proxy", default=DEFAULT_PROXY, type=checked_url, metavar="URL", help="where the proxy is")
    parser.add_argument("--token-file", metavar="FILE", help="file with the proxy's key; or set AGENT_INFRA_TOKEN")
    return parser.parse_args(words)


def main() -> None:
    """One viewer's page."""
    st.set_page_config(page_title="Agent Infra", layout="wide")
    try:
        arguments = parse_arguments(sys.argv[1:])
    except SystemExit:  # argparse has printed the error
        st.error("Streamlit was started with options that this page doesn't know; the terminal says which.")
        return
    if not is_admitted():
        text = "This page shows prompts and answers: open it with the complete address that the terminal printed."
        mount([el("p", {}, text)], isStale=False, hasKeys=False, isFirst=False)
        return
    interval_s = float(st.session_state.get("interval") or INTERVALS_S[0])
    poller = shared_poller(arguments.proxy, arguments.token_file)
    source = Source(poller, arguments.proxy, interval_s, bool(st.session_state.get("paused")))
    st.session_state["answered"] = told("isPainted"), told("chosen")
    controls = st.container(horizontal=True, horizontal_alignment="right", vertical_alignment="center", key="controls")
    source.refreshed(text_view)
    if is_painted():
        with controls:
            controls_view()
        source.refreshed(charts_view, EXPLAIN_EVERY_S)
        slot("rest")


if __name__ == "__main__":
    main()
