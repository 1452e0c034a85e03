"""The page of Agent Infra: replicas, sessions and their turns, what limits the run, and how it went over time.

    python agent_infra.py dashboard
    streamlit run streamlit_dashboard.py -- --proxy http://127.0.0.1:5800 [--token-file FILE]

A separate program in one file: it reads GET /stats, /history, /sessions and /stats/sessions/{id}, and stores nothing.
The sections, each of which refers only to those above it: formats · client · status · shaping (dict → DataFrame) ·
charts (DataFrame → alt.Chart) · browser parts · views (the only ones that speak to Streamlit) · main.

Text from agents (prompts, answers, ids) is shown by st.text, st.code, cells of dataframes and text nodes alone,
never as markup or Markdown.
"""

from __future__ import annotations

import argparse
import functools
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
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard
from urllib.parse import quote, urlencode, urlsplit
from zoneinfo import ZoneInfo

import altair as alt
import pandas as pd
import streamlit as st

DEFAULT_PROXY = "http://127.0.0.1:5800"
SCHEMA_VERSION = 2  # of /stats, as this page reads it
INTERVALS_S = (1, 2, 5, 10)
CHARTS_EVERY_S = 5.0
HISTORY_EVERY_S = 10.0  # ten charts
LIST_EVERY_S = 2.0
READ_TIMEOUT_S = 15.0  # longer than the 10 s after which the proxy itself gives up on a question
LISTED_SESSIONS = 200  # on one page of the list
LISTED_TURNS = 200  # on one page of a session

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
    """A duration of ``ms`` with about three digits: 0.4 ms, 340 ms, 3.21 s, 2 min 05 s, 5 min, 3 h 12 min."""
    if not is_known(ms):
        return UNKNOWN
    if ms < 9.95:
        return f"{ms:.1f}{SPACE}ms" if ms > 0 else f"0{SPACE}ms"
    if ms < 999.5:
        return f"{ms:.0f}{SPACE}ms"
    seconds = ms / 1000
    if seconds < 59.95:
        return f"{seconds:.{2 if seconds < 9.995 else 1}f}{SPACE}s"
    whole = round(seconds)
    size, unit, part, part_unit = next(
        row for row in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")) if whole >= row[0]
    )
    rest = whole % size // part
    tail = f" {rest:0{1 if size == 86400 else 2}d}{SPACE}{part_unit}" if rest else ""
    return f"{whole // size}{SPACE}{unit}{tail}"


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
    """A share: 4 %, 0.4 %, and with ``signed`` +4 %, −12 %; a change that rounds to nothing has no sign."""
    if not is_known(fraction):
        return UNKNOWN
    value = fraction * 100
    text = f"{value:{'+' if signed else ''}.{1 if 0 < abs(value) < 0.95 else 0}f}"
    if float(text) == 0:
        text = "0"
    return f"{text}{SPACE}%".replace("-", "−")


def gibibytes(value: Any) -> str:
    return f"{value / 2**30:.1f}{SPACE}GiB" if is_known(value) else UNKNOWN


def estimate(value: Mapping[str, Any], show: Callable[[Any], str] = figure, unit: str | None = None) -> str:
    """An Estimate as text: "147 agents (135 to 159)", a range alone, or a dash."""
    low, high = value.get("low"), value.get("high")
    unit = str(value.get("unit") or "") if unit is None else unit
    tail = f"{SPACE}{unit}" if unit else ""
    span = f"{show(low)} to {show(high)}" if is_known(low) and is_known(high) else None
    if is_known(value.get("value")):
        return f"{show(value['value'])}{tail}" + (f" ({span})" if span and show(low) != show(high) else "")
    return f"{span}{tail}" if span else UNKNOWN


def ago(now: Any, at: Any) -> float | None:
    """Seconds since ``at`` by the proxy's clock, at least 0."""
    return max(0.0, now - at) if is_known(now) and is_known(at) else None


def clock(at: float, zone: str | None, now: float) -> str:
    """A time of day in the viewer's zone: 14:32:05, with the day, 3 Dec 14:32:05, if it is another one than today."""
    try:
        tz: Any = ZoneInfo(zone) if zone else timezone.utc
    except (KeyError, ValueError):
        tz = timezone.utc
    then, today = datetime.fromtimestamp(at, tz), datetime.fromtimestamp(now, tz)
    day = "" if then.date() == today.date() else f"{then.day} {then:%b} "
    return f"{day}{then:%H:%M:%S}"


# =====================================================================================================================
# Client: asks the proxy. The only part that does I/O.
# =====================================================================================================================


@dataclass(frozen=True)
class Problem:
    """Why there are no current figures: what happened, and what to do."""

    what: str
    fix: str
    is_final: bool = False  # what was asked for isn't there, and won't be


@dataclass(frozen=True)
class Reading:
    """The last reading of a document. ``document`` stays the last good one while there is a problem."""

    document: Mapping[str, Any] | None = None
    read_at: float = 0.0  # monotonic seconds: when the document came
    problem: Problem | None = None


class ProxyError(Exception):
    """The proxy returned no document that this page can show."""

    def __init__(self, what: str, fix: str, is_final: bool = False) -> None:
        super().__init__(what)
        self.problem = Problem(what, fix, is_final)


def checked_url(url: str) -> str:
    """The proxy's base URL without a slash at its end; ValueError if it isn't one."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError(f"--proxy {url}: a URL such as {DEFAULT_PROXY} is needed")
    return parts.geturl().rstrip("/")


class ProxyClient:
    """GET requests to one proxy, over one kept connection per thread."""

    def __init__(self, url: str, token: str | None) -> None:
        import requests

        self.url = url
        self._requests = requests
        self._token = token
        self._of_thread = threading.local()

    def get(self, path: str) -> Mapping[str, Any]:
        """The JSON document at ``path``; ProxyError, with what to do, if there is none."""
        session = getattr(self._of_thread, "session", None)
        if session is None:
            session = self._of_thread.session = self._requests.Session()
            session.trust_env = False  # ignores http_proxy and ~/.netrc
            if self._token:
                session.headers["Authorization"] = f"Bearer {self._token}"
        try:
            answer = session.get(self.url + path, timeout=(2.0, READ_TIMEOUT_S), allow_redirects=False)
        except self._requests.Timeout:
            raise ProxyError(
                f"The proxy at {self.url} doesn't answer in time.",
                "It may be overloaded, or the network is down; this page keeps trying.",
            ) from None
        except self._requests.RequestException:
            raise ProxyError(
                f"There is no proxy at {self.url}.",
                "Start one with “python agent_infra.py up” or “connect”, or say where it is with --proxy; "
                "this page keeps trying.",
            ) from None
        return document_of(self.url, path, answer.status_code, answer.content)


def document_of(url: str, path: str, status: int, body: bytes) -> Mapping[str, Any]:
    """The document of an answer; ProxyError if it isn't one, or is of another version than this page."""
    if status in (401, 403):
        raise ProxyError(
            f"The proxy at {url} asks for its key.",
            "Name the file that has it with --token-file, or set the key in the environment variable "
            "AGENT_INFRA_TOKEN; on the proxy's machine it is “api_key” in the deployment's state directory.",
        )
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    message = part(document, "error").get("message")
    if status == 503:
        raise ProxyError(str(message or f"The proxy at {url} has no figures yet."), "This page keeps trying.")
    if status != 200 and path != "/stats" and isinstance(message, str):
        raise ProxyError(message, "", is_final=status == 404)
    version = document.get("schema_version") if isinstance(document, dict) else None
    if status != 200 or not isinstance(document, dict) or (path == "/stats" and not isinstance(version, int)):
        raise ProxyError(
            f"What answers at {url} isn't Agent Infra's proxy (status {status}).", "Say where it is with --proxy."
        )
    if path == "/stats" and version != SCHEMA_VERSION:
        older, newer = ("proxy", "page") if int(version or 0) < SCHEMA_VERSION else ("page", "proxy")
        raise ProxyError(
            f"The proxy at {url} speaks version {version} of /stats, this page reads {SCHEMA_VERSION}.",
            f"The {older} is older than the {newer}: run both from the same release of Agent Infra.",
        )
    return document


class Kept:
    """A document that viewers read: its last reading, and the request under way or done last."""

    def __init__(self) -> None:
        self.reading = Reading()
        self.asked_at = -math.inf
        self.request: Future[None] | None = None


class Documents:
    """The documents of one proxy, shared by all viewers, so each is requested once per interval.

    Requests run in threads of their own, so an unresponsive proxy delays nobody: a caller waits for ``patience_s`` and
    then gets the last reading. At most MOST documents are kept; the one read longest ago goes first.
    """

    MOST = 48

    def __init__(self, client: ProxyClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self.clock = clock
        self._threads = ThreadPoolExecutor(3, "agent-infra-page")
        self._stats_thread = ThreadPoolExecutor(1, "agent-infra-page-stats")  # the status waits for no slow question
        self._lock = threading.Lock()  # guards the two below and what is in them
        self._kept: dict[str, Kept] = {}  # path → document, the one read last at the end

    def read(self, path: str, max_age_s: float, patience_s: float = 0.5) -> Reading:
        """The last reading of ``path``; requested again if it is older than ``max_age_s``."""
        with self._lock:
            kept = self._kept.pop(path) if path in self._kept else Kept()
            self._kept[path] = kept
            while len(self._kept) > self.MOST:
                del self._kept[next(iter(self._kept))]
            is_idle = kept.request is None or kept.request.done()
            if is_idle and self.clock() - kept.asked_at > max_age_s:
                kept.asked_at = self.clock()
                threads = self._stats_thread if path == "/stats" else self._threads
                kept.request = threads.submit(self._request, path, kept)
            request = kept.request
        if request is not None:
            wait((request,), patience_s)
        return kept.reading

    def _request(self, path: str, kept: Kept) -> None:
        try:
            kept.reading = Reading(self._client.get(path), self.clock())
        except ProxyError as error:
            kept.reading = replace(kept.reading, problem=error.problem)
        except Exception as error:  # noqa: BLE001 - whatever it is, the viewers are told and the next read tries again
            kept.reading = replace(kept.reading, problem=Problem(f"This page failed: {error!r}.", "It keeps trying."))


# =====================================================================================================================
# Status: what is going on, in one line. Pure: a function of /stats and of how old it is.
# =====================================================================================================================

# Judgements: a word always stands beside the colour, and a shape before it.
GOOD, BUSY, BAD, NEUTRAL = "good", "busy", "bad", "neutral"
SHAPES = {GOOD: "●", BUSY: "▲", BAD: "✕", NEUTRAL: "○"}
COLOURS: Mapping[str, Any] = {GOOD: "green", BUSY: "orange", BAD: "red", NEUTRAL: "gray"}  # as Streamlit names them
JUDGEMENT_OF_STATE = {
    "ready": GOOD,
    "pending": NEUTRAL,
    "starting": BUSY,
    "loading": BUSY,
    "draining": BUSY,
    "stopped": NEUTRAL,
    "gone": NEUTRAL,
    "failed": BAD,
    "lost": BAD,
    "unhealthy": BAD,
}
JUDGEMENT_OF_VERDICT = {"BALANCED": GOOD, "NO DATA": NEUTRAL, "UNHEALTHY": BAD}  # all others: BUSY
STARTING = ("pending", "starting", "loading")
HOLDING_TURNS = ("ready", "unhealthy", "draining")  # states of replicas that have turns
FAILED_OUTCOMES = ("error", "cut")
RECENT = f"5{SPACE}min"  # window of recent_outcomes, pipeline and the replicas' latencies in /stats
STALE_S = 10.0  # figures older than this are of the past
IDLE_S = 60.0  # without a turn for so long, nothing is going on
BAD_ERROR_SHARE = 0.05
RESTARTED_S = 120.0


@dataclass(frozen=True)
class Status:
    """One statement about the deployment: its judgement, a word, a sentence, and what to do."""

    judgement: str
    word: str
    sentence: str
    hint: str = ""


def status_of(
    document: Mapping[str, Any], problem: Problem | None, age_s: float | None, zone: str | None = None
) -> list[Status]:
    """What is going on, the most urgent first; the first one is the headline, and the others never contradict it.

    Without current figures, that is all that is said: figures of the past say nothing about now.
    """
    if problem is not None:
        old = f" The figures below are {seconds(age_s)} old." if document and age_s is not None else ""
        return [Status(BAD, "NO CONNECTION", problem.what + old, problem.fix)]
    if not document:
        return [Status(NEUTRAL, "CONNECTING", "Waiting for the proxy's first answer.")]
    if (document.get("snapshot_age_ms") or 0) / 1000 >= STALE_S:
        text = f"The figures below are {seconds(age_s)} old: the controller is gone. Turns are still served."
        return [Status(BAD, "CONTROLLER GONE", text, "“python agent_infra.py connect” takes over.")]
    if age_s is not None and age_s >= STALE_S:
        text = f"The proxy hasn't answered for {seconds(age_s)}; the figures below are as old."
        return [Status(BAD, "NO CONNECTION", text, "This page keeps trying.")]
    found = [*_replica_status(document), *_error_status(document)]
    found += [*_activity_status(document, zone, is_down=not _ready(document)), *_side_status(document)]
    order = (BAD, BUSY, GOOD, NEUTRAL)
    return sorted(found, key=lambda status: order.index(status.judgement))


def state_of(row: Mapping[str, Any]) -> str:
    """A replica's state; "unhealthy" if it is ready but gets no turns."""
    state = str(row.get("state") or "unknown")
    return "unhealthy" if state == "ready" and row.get("healthy") is False else state


def _ready(document: Mapping[str, Any]) -> int:
    return sum(state_of(row) == "ready" for row in listed(document, "backends"))


def reason_of(row: Mapping[str, Any]) -> str:
    """Why a replica is in its state: the class of its failure, its progress or its reason; empty if unknown."""
    failure = part(row, "failure")
    known = (row.get("state") == "failed" and failure.get("kind"), row.get("progress"), row.get("reason"))
    return next((str(text).replace("_", " ") for text in known if text), "")


def hint_of(row: Mapping[str, Any]) -> str:
    """What to do about a replica's failure."""
    return str(part(row, "failure").get("hint") or "")


def _named(rows: Sequence[Mapping[str, Any]], most: int = 3) -> str:
    """qwen-2 (out of memory), qwen-3 (driver) and 4 more."""
    shown = []
    for row in rows[:most]:
        reason = reason_of(row)
        short = reason if len(reason) <= 80 else reason[:80].rstrip() + "…"
        shown.append(f"{row.get('id')}" + (f" ({short})" if reason else ""))
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return ", ".join(shown) + more


def _replica_status(document: Mapping[str, Any]) -> list[Status]:
    rows = [row for row in listed(document, "backends") if state_of(row) != "stopped"]
    by_state: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_state.setdefault(state_of(row), []).append(row)
    ready, total = len(by_state.get("ready", ())), len(rows)
    if not total:
        return [Status(NEUTRAL, "NO REPLICAS", "There are no replicas.", "“python agent_infra.py start” starts them.")]
    found = []
    failed = by_state.get("failed", []) + by_state.get("lost", [])
    if failed:
        hints = list(dict.fromkeys(filter(None, map(hint_of, failed))))
        text = f"{len(failed)} of {things(total, 'replica')} failed: {_named(failed)}."
        advice = hints[0] if hints else "“python agent_infra.py logs” shows why."
        found.append(Status(BAD, "DOWN" if not ready else "FAILED", text, advice))
    unhealthy = by_state.get("unhealthy", [])
    if unhealthy:
        verb = "gets" if len(unhealthy) == 1 else "get"
        text = f"{len(unhealthy)} of {things(total, 'replica')} {verb} no turns: {_named(unhealthy)}."
        found.append(Status(BAD, "UNHEALTHY", text, "“python agent_infra.py logs” shows why."))
    starting = [row for state in STARTING for row in by_state.get(state, ())]
    if starting:
        what = ", ".join(f"{len(by_state[state])} {state}" for state in STARTING if state in by_state)
        text = f"{ready} of {things(total, 'replica')} ready; {what}: {_named(starting)}."
        found.append(Status(NEUTRAL if ready else BUSY, "STARTING", text))
    if not found and not ready:
        found.append(Status(BUSY, "DRAINING", f"None of {things(total, 'replica')} takes new turns."))
    return found


def recent_failures(document: Mapping[str, Any]) -> tuple[int, int]:
    """``(failed, finished)`` of the last 5 minutes. Failed: error answers and answers that broke off."""
    counts = {name: value for name, value in part(document, "recent_outcomes").items() if is_known(value)}
    counts.pop("window_s", None)
    return int(counts.get("errors", 0)), int(sum(counts.values()))


def _error_status(document: Mapping[str, Any]) -> list[Status]:
    failed, finished = recent_failures(document)
    if not failed:
        return []
    text = f"{count(failed)} of {things(finished, 'turn')} failed in the last {RECENT}"
    latest = next((row for row in listed(document, "recent_turns") if row.get("outcome") in FAILED_OUTCOMES), {})
    why = str(latest.get("error") or "")[:200]
    text += f": {why.rstrip('.')}." if why else "."
    is_bad = failed / finished >= BAD_ERROR_SHARE
    return [Status(BAD if is_bad else BUSY, "ERRORS", text, "See Sessions → failed.")]


def _side_status(document: Mapping[str, Any]) -> list[Status]:
    """What doesn't concern turns: tunnels, the history, a restart."""
    found = []
    down = [row for row in listed(document, "backends") if part(row, "tunnel").get("state") == "down"]
    if down:
        names = ", ".join(str(row.get("id")) for row in down[:3])
        found.append(Status(BAD, "TUNNEL DOWN", f"No tunnel to {names}; it is being replaced."))
    history = part(document, "history")
    if history.get("state") == "failing":
        found.append(Status(BUSY, "HISTORY FAILS", f"Turns aren't recorded: {history.get('reason') or 'unknown'}."))
    now, uptime = document.get("now"), document.get("uptime_seconds")
    points = listed(part(document, "throughput"), "history")
    if is_known(now) and is_known(uptime) and uptime < RESTARTED_S and points:
        began = points[0].get("at")
        if is_known(began) and began < now - uptime - 1:  # measured by an earlier controller, and restored
            text = f"The controller restarted {seconds(uptime)} ago; rates and verdicts start again, totals go on."
            found.append(Status(NEUTRAL, "RESTARTED", text))
    return found


def last_finish(document: Mapping[str, Any]) -> float | None:
    """When the last turn finished (s since the epoch); None if /stats lists none."""
    known = [row["finished_at"] for row in listed(document, "recent_turns") if is_known(row.get("finished_at"))]
    return max(known, default=None)


def open_turns(document: Mapping[str, Any]) -> int:
    """Turns with a replica or in the queue."""
    queue = part(document, "queue")
    return int(queue.get("in_flight") or 0) + int(queue.get("pending") or 0)


def idle_s(document: Mapping[str, Any]) -> float | None:
    """For how long nothing has been going on (s); None while turns are open, or finished less than IDLE_S ago."""
    if open_turns(document) > 0:
        return None
    finished = last_finish(document)
    since = ago(document.get("now"), finished) if finished is not None else document.get("uptime_seconds")
    return since if is_known(since) and since >= IDLE_S else None


def verdict_name(entry: Mapping[str, Any]) -> str:
    return str(part(entry, "verdict").get("name") or "NO DATA")


def last_verdict(entry: Mapping[str, Any], now: Any) -> str:
    """The last verdict with its age: "GPU-BOUND as of 12 min ago"; empty if there was none."""
    last = part(entry, "last_verdict")
    return f"{last['name']} as of {seconds(ago(now, last.get('at')))} ago" if last.get("name") else ""


def _activity_status(document: Mapping[str, Any], zone: str | None, is_down: bool) -> list[Status]:
    """Whether turns are flowing, and what limits them."""
    requests, finished, idle = part(document, "totals").get("requests"), last_finish(document), idle_s(document)
    queue, now = part(document, "queue"), document.get("now")
    if open_turns(document) <= 0 and finished is None:
        text = "No turn has arrived yet." if not requests else "No turn since the controller started."
        return [Status(NEUTRAL, "NO TRAFFIC" if not requests else "IDLE", text)]
    entries = listed(document, "analysis")
    if idle is not None and finished is not None:
        text = f"No turn for {seconds(idle)}, since {clock(finished, zone, finished + idle)}."
        last = [f"{entry_label(entry)}: {last_verdict(entry, now)}" for entry in entries if last_verdict(entry, now)]
        if last:
            text += f" Last verdict: {', '.join(last)}."
        return [Status(NEUTRAL, "IDLE", text)]
    if is_down:
        waiting = queue.get("pending") or 0
        return [Status(NEUTRAL, "WAITING", f"{things(waiting, 'turn')} in the queue.")] if waiting else []
    if not entries:
        return [Status(NEUTRAL, "MEASURING", "Turns are arriving; there is no verdict yet.")]
    return [_verdict_status(entry, now, len(entries) > 1) for entry in entries]


def _verdict_status(entry: Mapping[str, Any], now: Any, is_named: bool) -> Status:
    name, verdict = verdict_name(entry), part(entry, "verdict")
    label = f"{entry_label(entry)}: " if is_named else ""
    if name == "NO DATA":
        reason = str(verdict.get("reason") or "too few turns")
        last = f" The last one: {last_verdict(entry, now)}." if last_verdict(entry, now) else ""
        return Status(NEUTRAL, "MEASURING", f"{label}No verdict yet: {reason}.{last}")
    sentence = label + str(verdict.get("sentence") or "").replace(" %", f"{SPACE}%")
    return Status(JUDGEMENT_OF_VERDICT.get(name, BUSY), name, sentence, advice_of(entry))


def advice_of(entry: Mapping[str, Any]) -> str:
    """The suggestion, whose sentence has its price in throughput and in the wait; if that isn't known, why."""
    suggestion = part(entry, "suggestion")
    sentence, change = str(suggestion.get("sentence") or ""), part(suggestion, "then", "change")
    if suggestion.get("bound_by") and not is_known(change.get("low")) and change.get("reason"):
        sentence += f" What it does to throughput isn't known: {change['reason']}."
    return sentence.replace(" %", f"{SPACE}%")


def entry_label(entry: Mapping[str, Any]) -> str:
    """The label that distinguishes an entry of the analysis from the others."""
    return " on ".join(str(entry[name]) for name in ("model", "gpu") if entry.get(name)) or "all"


# =====================================================================================================================
# Shaping: documents → DataFrames and rows. Pure; every figure may be missing. All times are by the proxy's clock.
# =====================================================================================================================

SLOW_FACTOR = 1.2  # a replica whose median exceeds the median of all by this factor is marked
FULL_KV = 0.95  # of the KV cache: from here on sequences are preempted
SOON_S = 900.0  # a job that ends this soon is marked
# As in `sessions.alive` of /stats: longer silences than these are of "silent" sessions, which aren't alive.
THINKING_FACTOR, THINKING_LEAST_S = 4.0, 30.0
REPLICA_COLUMNS = (
    *("state", "id", "model", "note", "gpu", "kv", "in_flight", "slots", "history", "ttft_s", "p50_s", "p95_s"),
    *("memory", "requests", "errors", "restarts", "ends", "tunnel", "node", "partition", "gpu_name"),
)
SESSION_COLUMNS = (
    *("state", "id", "task", "client", "model", "replica", "turns", "errors", "queued_s", "inference_s", "think_s"),
    *("tokens_in", "tokens_out", "cached", "seen_s", "length_s"),
)
STATE_WORDS = {  # of sessions
    "idle": "thinking",
    "silent": "silent",
    "waiting": "in the queue",
    "prefill": "prefill",
    "decoding": "answering",
    "ended": "ended",
}


def replica_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """One row per replica, the most urgent first: REPLICA_COLUMNS; times in s, shares in percent."""
    now = document.get("now")
    rows = [_replica_row(row, now) for row in listed(document, "backends")]
    ready = [row["p50_s"] for row in rows if row["word"] == "ready" and is_known(row["p50_s"])]
    typical = statistics.median(ready) if len(ready) > 1 else math.inf
    for row in rows:
        if is_known(row["p50_s"]) and row["p50_s"] == max(ready, default=None) and row["p50_s"] > SLOW_FACTOR * typical:
            row["notes"].append("slowest")
        row["note"] = ", ".join(row["notes"])
    order = {BAD: 0, BUSY: 1, NEUTRAL: 2, GOOD: 3}
    rows.sort(
        key=lambda row: (order[JUDGEMENT_OF_STATE.get(row["word"], NEUTRAL)], not row["notes"], natural(row["id"]))
    )
    return pd.DataFrame(rows, columns=list(REPLICA_COLUMNS))


def with_gone(current: Sequence[Mapping[str, Any]], former: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """``current`` and those replicas of ``former`` that vanished, as "gone": without them, later rows would move up."""
    known = {row.get("id") for row in current}
    return [*current, *({**row, "state": "gone"} for row in former if row.get("id") not in known)]


def in_order(frame: pd.DataFrame, names: Sequence[Any]) -> pd.DataFrame:
    """``frame`` with its rows in the order of ``names``, which are ids; the others come last."""
    places = {name: place for place, name in enumerate(names)}
    return frame.sort_values("id", key=lambda ids: ids.map(places), kind="stable", ignore_index=True)


def natural(name: Any) -> tuple[Any, ...]:
    """A sort key that puts model-2 before model-10."""
    words = re.split(r"(\d{1,12})", str(name))
    return tuple((1, int(word), "") if word.isdecimal() else (0, 0, word) for word in words)


def state_label(word: str) -> str:
    return f"{SHAPES[JUDGEMENT_OF_STATE.get(word, NEUTRAL)]} {word}"


def _replica_row(row: Mapping[str, Any], now: Any) -> dict[str, Any]:
    word, gpu, tunnel, engine = state_of(row), part(row, "gpu"), part(row, "tunnel"), part(row, "engine")
    ends_at, history, kv = row.get("ends_at"), row.get("inflight_history"), engine.get("kv_usage")
    left_s = ends_at - now if is_known(ends_at) and is_known(now) and ends_at > 0 else None
    notes = [reason_of(row)] if word != "ready" and reason_of(row) else []
    if is_known(kv) and kv >= FULL_KV:
        notes.append("KV cache full")
    if left_s is not None and left_s < SOON_S:
        notes.append("job ends soon")
    if tunnel and tunnel.get("state") != "up":
        notes.append(f"tunnel {tunnel.get('state')}")
    used, total = gpu.get("memory_used"), gpu.get("memory_total")
    return {
        "word": word,
        "state": [state_label(word)],
        "notes": notes,
        "id": row.get("id"),
        "model": row.get("model"),
        "gpu": gpu.get("utilization"),
        "kv": 100 * kv if is_known(kv) else None,
        "in_flight": row.get("inflight"),
        "slots": row.get("slots"),
        "history": [each for each in history if is_known(each)] if isinstance(history, list) else [],
        "ttft_s": _in_s(part(row, "ttft_ms").get("p50")),
        "p50_s": _in_s(part(row, "latency_ms").get("p50")),
        "p95_s": _in_s(part(row, "latency_ms").get("p95")),
        "memory": 100 * used / total if is_known(used) and is_known(total) and total else None,
        "requests": row.get("requests"),
        "errors": row.get("errors"),
        "restarts": row.get("restarts"),
        "ends": None if left_s is None else duration(1000 * max(0.0, left_s)),
        "tunnel": tunnel.get("state"),
        "node": row.get("node"),
        "partition": row.get("partition"),
        "gpu_name": gpu.get("name"),
    }


def _in_s(ms: Any) -> float | None:
    return ms / 1000 if is_known(ms) else None


def session_state(row: Mapping[str, Any], now: Any) -> str:
    """A session's state in a word: one that is idle for far longer than it usually thinks is silent, not thinking."""
    state, turns, silent_s = str(row.get("state")), row.get("turns") or 0, ago(now, row.get("last_at"))
    if state == "idle" and silent_s is not None:
        think_s = row.get("think_s")
        usual_s = think_s / max(1, turns - 1) if is_known(think_s) else 0.0
        if silent_s > max(THINKING_LEAST_S, THINKING_FACTOR * usual_s):
            state = "silent"
    return STATE_WORDS.get(state, state)


def session_frame(rows: Iterable[Mapping[str, Any]], now: Any) -> pd.DataFrame:
    """One row per session, in the given order: SESSION_COLUMNS; times in s, ``cached`` in percent of the input."""
    shaped = []
    for row in rows:
        tokens_in, cached = row.get("tokens_in"), row.get("cached_tokens")
        shaped.append(
            {
                **{name: row.get(name) for name in SESSION_COLUMNS},
                "state": session_state(row, now),
                "cached": 100 * cached / tokens_in if is_known(cached) and is_known(tokens_in) and tokens_in else None,
                "seen_s": ago(now, row.get("last_at")),
                "length_s": ago(row.get("last_at"), row.get("started_at")),
            }
        )
    return pd.DataFrame(shaped, columns=list(SESSION_COLUMNS))


def arranged(
    former: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], int]:
    """``(rows, number held back)``: the sessions of ``former`` in their order, with their current figures.

    So no row moves while somebody points at it. Sessions that came since are held back until they are asked for; one
    that has left this part of the list keeps its last figures, and says so.
    """
    by_id = {row.get("id"): row for row in current}
    known = {row.get("id") for row in former}
    rows = [by_id.get(row.get("id")) or {**row, "state": "not current"} for row in former]
    return rows, sum(name not in known for name in by_id)


# The phases of a turn on the time axis: what is drawn before its arrival, and then one after the other.
BEFORE = ("think", "idle")
PHASE_MEANINGS = {
    "think": "the agent observes and acts, before the turn",
    "idle": "time before the turn that the agent didn't explain",
    "queued": "waiting for a slot",
    "held": "waiting for room in a KV cache",
    "retry": "lost at a replica that failed",
    "replayed prefill": "reading tokens again that should have been cached",
    "prefill": "reading the prompt, until the first token",
    "decode": "writing the answer",
    "inference": "reading and writing; it wasn't streamed, so no more is known",
}


def phases_of(turn: Mapping[str, Any]) -> dict[str, float]:
    """A turn's known phases in ms, in their order on the time axis."""
    known = {name: turn.get(f"{name.replace(' ', '_')}_ms") for name in PHASE_MEANINGS}
    if is_known(known["prefill"]) or is_known(known["decode"]):
        known["inference"] = None
    if is_known(known["think"]) and is_known(known["idle"]):
        known["think"] = max(0.0, known["think"] - known["idle"])  # think_ms is the whole gap
    return {name: float(value) for name, value in known.items() if is_known(value) and value > 0}


def waterfall(turns: Sequence[Mapping[str, Any]], chosen: int | None) -> dict[str, Any]:
    """A session's turns on one time axis, the first one at the top: what the trace draws.

    {"rows": [{number, title, note, judgement, is_open, bars: [[phase, left %, width %]]}], "ticks": [[left %, text]]}
    """
    rows = []
    for turn in sorted(turns, key=lambda turn: turn.get("number") or 0):
        if not is_known(turn.get("number")) or not is_known(turn.get("started_at")):
            continue
        phases, bars = phases_of(turn), []
        at = turn["started_at"] * 1000 - sum(phases.get(name, 0.0) for name in BEFORE)
        for name, ms in phases.items():
            bars.append((name, at, ms))
            at += ms
        rows.append((turn, phases, bars))
    begins = [bar[1] for _, _, bars in rows for bar in bars]
    ends = [bar[1] + bar[2] for _, _, bars in rows for bar in bars]
    begin, span = min(begins, default=0.0), max(1.0, max(ends, default=1.0) - min(begins, default=0.0))
    return {
        "rows": [
            {
                "number": int(turn["number"]),
                "title": ", ".join(f"{name} {duration(ms)}" for name, ms in phases.items()) or "no times known",
                "note": turn_note(turn, phases),
                "judgement": outcome_judgement(turn.get("outcome")),
                "is_open": turn["number"] == chosen,
                "bars": [
                    [name, round(100 * (at - begin) / span, 3), round(100 * ms / span, 3)] for name, at, ms in bars
                ],
            }
            for turn, phases, bars in rows
        ],
        "ticks": [[round(100 * ms / span, 2), duration(ms)] for ms in ticks(span)],
    }


def ticks(span_ms: float, most: int = 5) -> list[float]:
    """Round times from 0 to ``span_ms``, at most ``most`` steps."""
    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500, *(1000 * s for s in (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)))
    step = next((step for step in steps if span_ms / step <= most), 3_600_000 * math.ceil(span_ms / 3_600_000 / most))
    return [index * step for index in range(int(span_ms / step) + 1)]


def outcome_judgement(outcome: Any) -> str:
    return {"completed": GOOD, "aborted": NEUTRAL}.get(str(outcome), BAD)


def turn_note(turn: Mapping[str, Any], phases: Mapping[str, float]) -> str:
    """A turn's length without think time, and what went wrong: "3.21 s", "3.21 s · error"."""
    took = sum(ms for name, ms in phases.items() if name not in BEFORE)
    words = [duration(took) if took else UNKNOWN]
    if turn.get("outcome") not in ("completed", None):
        words.append(str(turn["outcome"]))
    if turn.get("miss_reason"):
        words.append("cache miss")
    return " · ".join(words)


def turn_facts(turn: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of a turn, as (name, text)."""
    retries, expected = turn.get("retries"), turn.get("expected_cached_tokens")
    tokens = f"{count(turn.get('tokens_in'))} in, {count(turn.get('tokens_out'))} out"
    cached = f"{count(turn.get('cached_tokens'))} of {count(turn.get('tokens_in'))} input tokens"
    if is_known(expected):
        cached += f", {count(expected)} expected"
    outcome = str(turn.get("outcome") or UNKNOWN)
    if is_known(turn.get("status")) and turn["status"]:
        outcome += f", HTTP {turn['status']}"
    if is_known(retries) and retries:
        outcome += f", retried {'once' if retries == 1 else f'{retries} times'}"
    facts = [
        ("outcome", outcome),
        ("replica", str(turn.get("replica") or UNKNOWN)),
        ("tokens", ("≈ " if turn.get("tokens_estimated") else "") + tokens),
        ("cached", cached),
        *((name, duration(ms)) for name, ms in phases_of(turn).items()),
    ]
    if turn.get("miss_reason"):
        facts.append(("cache miss", str(turn["miss_reason"])))
    return facts


def failure_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """The latest turns that failed or were refused: ago_s, session, model, replica, outcome, error."""
    rows = [
        {
            "ago": f"{seconds(ago(document.get('now'), row.get('finished_at')))} ago",
            **{name: row.get(name) for name in ("session", "model", "outcome", "error")},
            "replica": row.get("backend"),
        }
        for row in listed(document, "recent_turns")
        if row.get("outcome") in (*FAILED_OUTCOMES, "rejected")
    ]
    return pd.DataFrame(rows[:20], columns=["ago", "session", "model", "replica", "outcome", "error"])


def watchdog_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """Sessions that may need attention: kind, session, model, sentence, since."""
    rows = [
        {
            "kind": str(row.get("kind")).replace("_", " "),
            **{name: row.get(name) for name in ("session", "model", "sentence")},
            "since": f"{seconds(ago(document.get('now'), row.get('since')))} ago",
        }
        for row in listed(document, "watchdog")
    ]
    return pd.DataFrame(rows, columns=["kind", "session", "model", "sentence", "since"])


def run_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """Announced runs: name, done (%), tasks, remaining, stragglers, GPU time wasted per task."""
    rows = []
    for row in listed(document, "runs"):
        left, tasks, done = part(row, "remaining_s"), row.get("tasks"), row.get("done")
        span = f" ({seconds(left.get('low'))} to {seconds(left.get('high'))})" if is_known(left.get("low")) else ""
        text = f"{seconds(left['value'])}{span}" if is_known(left.get("value")) else str(left.get("reason") or UNKNOWN)
        spent = part(row, "gpu_time")
        wasted = f"{seconds(spent.get('wasted_per_task'))} of {seconds(spent.get('held_per_task'))}"
        late = ", ".join(str(each.get("task")) for each in listed(row, "stragglers"))
        share = 100 * done / tasks if is_known(done) and is_known(tasks) and tasks else None
        rows.append(
            {
                "name": row.get("name"),
                "done": share,
                "tasks": f"{count(done)} of {count(tasks)}",
                "left": text,
                "late": late,
                "wasted": wasted if is_known(spent.get("held_per_task")) else UNKNOWN,
            }
        )
    return pd.DataFrame(rows, columns=["name", "done", "tasks", "left", "late", "wasted"])


PIPELINE_WORDS = {
    "pre": "observing",
    "queue": "queue",
    "inference": "inference",
    "post": "acting",
    "unaccounted": "unexplained",
}


def pipeline_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """Where turns of the last 5 minutes spent their time: part, share (0 to 1), mean, p50, p95. Empty without any."""
    pipeline = part(document, "pipeline")
    rows = [
        {"part": name, "share": row["share"], **{key: duration(row.get(f"{key}_ms")) for key in ("mean", "p50", "p95")}}
        for name in PIPELINE_WORDS
        for row in [part(pipeline, name)]
        if is_known(row.get("share"))
    ]
    return pd.DataFrame(rows, columns=["part", "share", "mean", "p50", "p95"])


RANGES = {"15m": 900.0, "1h": 3600.0, "6h": 21_600.0, "24h": 86_400.0, "7d": 604_800.0, "all": math.inf}
RANGE_WORDS = {"15m": "15 min", "1h": "hour", "6h": "6 h", "24h": "24 h", "7d": "7 days"}


def history_path(now: float, span_s: float, points: int, model: str | None) -> str:
    """The path of GET /history for the last ``span_s``; the same for a step's time, so viewers share it."""
    step = max(1.0, span_s / points)
    begin = 0 if math.isinf(span_s) else int((now - span_s) // step * step)
    options = {"from": begin, "points": points, **({"model": model} if model else {})}
    return "/history?" + urlencode(options)


def history_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """GET /history as steps: at (UTC) and one column per series, two rows per step so that lines are drawn as steps.

    Latencies are in s. Unknown values are NaN, which break the line: a gap of the controller is a gap everywhere.
    """
    series, step_s = part(document, "series"), document.get("step_s")
    at = series.get("at")
    if not isinstance(at, list) or not at or not is_known(step_s):
        return pd.DataFrame({"at": pd.to_datetime([], utc=True)})
    columns: dict[str, Any] = {"at": [moment for begin in at for moment in (begin, begin + step_s * 0.999)]}
    for name, values in series.items():
        if name != "at" and isinstance(values, list) and len(values) == len(at):
            scale = 0.001 if name.startswith(("latency_ms", "ttft_ms", "queued_ms")) else 1.0
            known = [value * scale if is_known(value) else None for value in values]
            columns[column(name)] = [value for value in known for _ in (0, 1)]
    frame = pd.DataFrame(columns).astype(dict.fromkeys(columns, float))
    frame["at"] = pd.to_datetime(frame["at"], unit="s", utc=True)
    return frame


def column(series: str) -> str:
    """The column of a series; Vega reads dots and brackets in a name as a path."""
    return re.sub(r"\W", "_", series)


def run_markers(document: Mapping[str, Any]) -> pd.DataFrame:
    """The announced runs in the range of GET /history: at (UTC, where each began), run."""
    begin = document.get("from")
    rows = [
        {"at": max(row["from"], begin) if is_known(begin) else row["from"], "run": str(row.get("name"))}
        for row in listed(document, "runs")
        if is_known(row.get("from"))
    ]
    frame = pd.DataFrame(rows, columns=["at", "run"])
    frame["at"] = pd.to_datetime(frame["at"].astype(float), unit="s", utc=True)
    return frame


CAPACITY = {"curve": "predicted, with its interval", "here": "you are here, as measured"}
_LIMITS = (("knee", "knee_agents"), ("KV cache full", "kv_agents"), ("70 % utilisation", "utilisation_agents"))


def capacity_frame(entry: Mapping[str, Any]) -> pd.DataFrame:
    """The predicted curve, the current position and the limits on the number of agents: one row per point.

    kind (of CAPACITY, or "limit"), agents, turns_per_hour, low, high, text and side (of limits: their label, and to
    which side of the line it stands). A limit's turns_per_hour is the height of its label, above the curve.
    Limits beyond the curve are left out. Empty if there is no curve.
    """
    columns = ["kind", "agents", "turns_per_hour", "low", "high", "text", "side"]
    curve = [{**row, "kind": CAPACITY["curve"]} for row in listed(entry, "curve")]
    curve = [row for row in curve if all(is_known(row.get(name)) for name in columns[1:5])][:500]
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
    """What a change would do: what, change, interval, then (all texts)."""
    rows = []
    for row in listed(entry, "what_ifs"):
        change = part(row, "change")
        span = f"{percent(change.get('low'), True)} to {percent(change.get('high'), True)}"
        rows.append(
            {
                "what": row.get("name"),
                "change": percent(change.get("value"), signed=True),
                "interval": span if is_known(change.get("low")) else str(change.get("reason") or UNKNOWN),
                "then": _per_hour(part(row, "turns_per_hour")),
            }
        )
    return pd.DataFrame(rows, columns=["what", "change", "interval", "then"])


def _per_hour(value: Mapping[str, Any]) -> str:
    return f"{count(value['value'])}{SPACE}/h" if is_known(value.get("value")) else UNKNOWN


_OPTION_WORDS = {
    "utilisation": "70 % utilisation",
    "knee": "the knee: more would mostly wait",
    "efficient": "most throughput for its wait",
    "latency_goal": "the latency goal",
}


def option_frame(entry: Mapping[str, Any]) -> pd.DataFrame:
    """Numbers of agents worth knowing, with their price: what, agents, then, change, wait (all texts)."""
    suggestion = part(entry, "suggestion")
    now = {"name": "now", "agents": part(entry, "operating", "agents"), **part(suggestion, "now")}
    then = {"name": "suggested", "agents": part(suggestion, "agents"), **part(suggestion, "then")}
    rows = [
        {
            "what": _OPTION_WORDS.get(str(row.get("name")), str(row.get("name"))),
            "agents": estimate(part(row, "agents"), count, ""),
            "then": _per_hour(part(row, "turns_per_hour")),
            "change": percent(part(row, "change").get("value"), signed=True),
            "wait": estimate(part(row, "wait_s")),
        }
        for row in (now, then, *listed(suggestion, "options"))
        if is_known(part(row, "agents").get("value"))
    ]
    return pd.DataFrame(rows, columns=["what", "agents", "then", "change", "wait"])


def share_frame(entry: Mapping[str, Any]) -> pd.DataFrame:
    """What limits throughput: name, share (percent), interval; empty if unknown."""
    named = (
        ("think time of the agents", "agent"),
        ("unloaded latency", "base_latency"),
        ("contention for the GPUs", "contention"),
    )
    rows = [
        {
            "name": text,
            "share": 100 * share["value"],
            "interval": f"{percent(share.get('low'))} to {percent(share.get('high'))}",
        }
        for text, key in named
        for share in [part(entry, "verdict", "shares", key)]
        if is_known(share.get("value"))
    ]
    return pd.DataFrame(rows, columns=["name", "share", "interval"])


def basis_of(entry: Mapping[str, Any]) -> str:
    """The data that the model was fitted to, and whether the fit holds; empty without a fit."""
    fit, operating, law = part(entry, "fit"), part(entry, "operating"), part(entry, "littles_law")
    if not is_known(part(fit, "base_latency_s").get("value")):
        return ""
    basis = part(operating, "turns_per_hour", "basis")
    sentences = [
        f"A turn takes {estimate(part(fit, 'base_latency_s'))} alone and {estimate(part(fit, 'per_request_s'))} more "
        f"for each turn in flight on its replica; agents think for {estimate(part(fit, 'think_s'))}.",
        f"The replicas are {estimate(part(operating, 'utilisation'), percent, '')} utilised.",
    ]
    if is_known(law.get("error")):
        sentences.append(
            f"Little's law {'holds' if law.get('holds') else 'does not hold'}: "
            f"{figure(law.get('agents_sampled'))} agents seen, "
            f"{figure(law.get('agents_computed'))} computed ({percent(law['error'], signed=True)})."
        )
    if is_known(basis.get("turns")):
        sentences.append(f"From {count(basis['turns'])} turns in {seconds(basis.get('window_s'))}.")
    return " ".join(sentences)


HOUR_STATES = ("ready_busy", "ready_idle", "loading", "pending")


def hours_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """Time of GPUs by model and state, with their sum last if there are several: model, unit, HOUR_STATES, busy (%).

    It is GPU time, or replica time if no replica has a GPU. Empty if it isn't recorded.
    """
    accounting = part(document, "accounting")
    kept = [(row.get("model"), row) for row in listed(accounting, "by_model")]
    if len(kept) > 1:
        kept.append(("all", accounting))
    has_gpus = any(part(accounting, "gpu_hours").values())
    key, unit = ("gpu_hours", "GPU time") if has_gpus else ("replica_hours", "replica time")
    rows = []
    for model, row in kept:
        hours = {state: part(row, key).get(state) for state in HOUR_STATES}
        total = sum(value for value in hours.values() if is_known(value))
        busy = 100 * hours["ready_busy"] / total if is_known(hours["ready_busy"]) and total else None
        texts = {state: duration(3.6e6 * value) if is_known(value) else UNKNOWN for state, value in hours.items()}
        rows.append({"model": model, "unit": unit, **texts, "busy": busy})
    return pd.DataFrame(rows, columns=["model", "unit", *HOUR_STATES, "busy"])


def cost_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """GPU time per turn, session and task: of, turn, session, task, lost (share spent on cache misses), all texts."""
    rows = []
    for entry in listed(document, "analysis"):
        cost = part(entry, "cost")
        spent = {
            name: estimate(part(cost, f"gpu_seconds_per_{name}"), unit="s") for name in ("turn", "session", "task")
        }
        if cost:
            lost = estimate(part(cost, "cache_miss_share"), percent, "")
            rows.append({"of": entry_label(entry), **spent, "lost": lost})
    return pd.DataFrame(rows, columns=["of", "turn", "session", "task", "lost"])


COURSE_S = 15.0
COURSE_BLOCKS = 40  # at most: the ten minutes that /stats lists, also where a controller was away in between


@dataclass(frozen=True)
class Metric:
    """A figure of the overview: its label with its window, its value, a note, its course and its judgement."""

    label: str
    value: str
    note: str
    course: tuple[float, ...] = ()
    judgement: str = NEUTRAL


def metrics_of_now(document: Mapping[str, Any]) -> list[Metric]:
    """What is going on, and the share of recent turns that failed."""
    queue, sessions = part(document, "queue"), part(document, "sessions")
    slots = [row.get("slots") for row in listed(document, "backends") if state_of(row) in HOLDING_TURNS]
    of_slots = f"of {things(sum(filter(is_known, slots)), 'slot')}" if any(map(is_known, slots)) else "now"
    failed, finished = recent_failures(document)
    share = failed / finished if finished else None
    pending, oldest = queue.get("pending"), queue.get("oldest_ms")
    waiting = f"for up to {duration(oldest)}" if pending and is_known(oldest) else "now"
    judgement = NEUTRAL if not share else BAD if share >= BAD_ERROR_SHARE else BUSY
    return [
        Metric("Sessions alive", count(sessions.get("alive")), "in a turn or thinking"),
        Metric("In flight", count(queue.get("in_flight")), of_slots),
        Metric("Waiting", count(pending), waiting),
        Metric("Failed turns", percent(share), f"last {RECENT}", (), judgement),
    ]


def metrics_of_minute(document: Mapping[str, Any]) -> list[Metric]:
    """The rates and latencies of the last minute, with their course over the last minutes."""
    rates = part(document, "throughput")
    points = [point for point in listed(rates, "history") if is_known(point.get("at"))]
    current = {**rates, "latency_ms": part(points[-1], "latency_ms") if points else {}}
    shown: tuple[tuple[str, Callable[[Any], str], tuple[str, ...]], ...] = (
        ("Turns per min", figure, ("turns_per_minute",)),
        ("Tokens per s", figure, ("tokens_per_second",)),
        ("Latency, median", duration, ("latency_ms", "p50")),
        ("Latency, p95", duration, ("latency_ms", "p95")),
    )

    def read(point: Mapping[str, Any], path: Sequence[str]) -> Any:
        return part(point, *path[:-1]).get(path[-1])

    return [
        Metric(label, show(read(current, path)), "last minute", course((p["at"], read(p, path)) for p in points))
        for label, show, path in shown
    ]


def course(points: Iterable[tuple[float, Any]]) -> tuple[float, ...]:
    """Means of a figure, from its ``(time, value)``, over blocks of COURSE_S: what is drawn changes no more often.

    NaN where nothing is known. The latest block, which isn't over, is left out.
    """
    blocks: dict[int, list[float]] = {}
    for at, value in points:
        blocks.setdefault(int(at // COURSE_S), []).extend([value] if is_known(value) else [])
    spanned = range(min(blocks, default=0), max(blocks, default=0))
    means = [statistics.fmean(blocks[block]) if blocks.get(block) else math.nan for block in spanned]
    return tuple(means[-COURSE_BLOCKS:]) if any(map(is_known, means)) else ()


# =====================================================================================================================
# Charts: DataFrames → alt.Chart. Pure. Colours come from the theme (range "category"), so light and dark both fit.
# =====================================================================================================================

TIMES = {  # of axes, by what a tick begins
    "seconds": "%H:%M:%S",
    "minutes": "%H:%M",
    "hours": "%H:%M",
    "day": "%d %b",
    "date": "%d %b",
    "week": "%d %b",
    "month": "%b",
    "quarter": "%b",
    "year": "%Y",
}
AXIS_PX = 44  # of the time axes' labels: "1,000" and some room
Data: TypeAlias = (
    "pd.DataFrame | alt.NamedData"  # named: the chart without its data, built once and filled again and again
)


@dataclass(frozen=True)
class Panel:
    """One of the charts over time: its title with its unit, and its lines, by column of history_frame."""

    title: str
    lines: Mapping[str, str]


THROUGHPUT = Panel("turns per minute, completed", {"turns_per_minute": "turns"})
TOKENS = Panel("output tokens per second", {"tokens_per_second": "tokens"})
LATENCY = Panel(
    "latency of completed turns, s: queue and inference", {"latency_ms_p50": "median", "latency_ms_p95": "p95"}
)
FIRST_TOKEN = Panel("time to the first token, s", {"ttft_ms_p50": "median", "ttft_ms_p95": "p95"})
TOKEN_GAP = Panel("inter-token latency, ms", {"itl_ms_p50": "median"})
QUEUE = Panel("concurrent turns", {"in_flight": "in flight", "queue": "waiting"})
CACHE = Panel(
    "KV cache, prefix hits, GPU: share",
    {"kv_usage": "KV cache in use", "hit_rate": "prefix cache hits", "gpu_utilization": "GPUs utilised"},
)
FAILURES = Panel(
    "turns per minute that failed",
    {"errors_per_minute": "errors", "rejected_per_minute": "refused", "aborted_per_minute": "client left"},
)
PREEMPTIONS = Panel("preemptions by the engines, per step", {"preemptions": "preemptions"})
OVERVIEW_PANELS = (THROUGHPUT, LATENCY, QUEUE)
HISTORY_PANELS = (
    *(THROUGHPUT, TOKENS, LATENCY, FIRST_TOKEN, TOKEN_GAP, QUEUE, CACHE, FAILURES, PREEMPTIONS),
    Panel("turns by finish reason, per step", {}),  # its lines are those that the engines report
)
REASON = "finish_reasons_"


def panels_of(panels: Sequence[Panel], columns: Iterable[str]) -> tuple[Panel, ...]:
    """``panels`` with the lines that there are columns for; those of finish reasons are found by name."""
    names = set(columns)
    reasons = {name: name.removeprefix(REASON) for name in sorted(names) if name.startswith(REASON)}
    filled = [panel if panel.lines else replace(panel, lines=dict(list(reasons.items())[:6])) for panel in panels]
    return tuple(
        replace(panel, lines=lines)
        for panel in filled
        for lines in [{name: word for name, word in panel.lines.items() if name in names}]
        if lines
    )


def _steps(data: Data, panel: Panel, is_last: bool, height: int, brush: Any, crosshair: Any) -> Any:
    """One panel of the time axis.

    Streamlit gives each of several charts the whole width, without room for an axis beside it: so the lines begin
    AXIS_PX inside, and the labels stand before them, aligned over the panels.
    """
    names, own = list(panel.lines), alt.Chart(data)
    times = alt.Axis(title=None, format=TIMES, tickCount=6, labelOverlap=True, labelFlush=True, grid=False)
    times.labels = is_last  # the axis is common
    figures = alt.Axis(title=None, tickCount=3, ticks=False, domain=False, offset=-AXIS_PX, labelPadding=6)
    figures.labelExpr = "abs(datum.value) >= 1000 ? format(datum.value, '~s') : format(datum.value, '~g')"
    x = alt.X("at:T", axis=times, scale=alt.Scale(domain=brush, range=[AXIS_PX, alt.ExprRef("width")]))
    titles = f"{json.dumps(dict(panel.lines))}[datum.label]"
    legend = alt.Legend(symbolType="stroke", offset=10, labelExpr=titles) if len(names) > 1 else None
    dashes = alt.Scale(domain=names, range=[[1, 0], [6, 3], [2, 2]])
    folded = own.transform_fold(names, as_=["name", "value"])
    lines = folded.mark_line(strokeWidth=1.75, clip=True).encode(
        x=x,
        y=alt.Y("value:Q", scale=alt.Scale(zero=True, nice=3), axis=figures),
        color=alt.Color("name:N", scale=alt.Scale(domain=names), legend=legend),
        strokeDash=alt.StrokeDash("name:N", scale=dashes, legend=legend),
    )
    tooltip = [alt.Tooltip("at:T", title="time", format="%d %b %H:%M:%S")]
    tooltip += [alt.Tooltip(f"{name}:Q", title=word, format=",.3~r") for name, word in panel.lines.items()]
    shown = alt.condition(crosshair, alt.value(1), alt.value(0), empty=False)
    rule = own.mark_rule(strokeWidth=1, clip=True).encode(x=x, tooltip=tooltip, opacity=shown).add_params(crosshair)
    runs = alt.Chart(alt.NamedData("runs")).encode(x=x, tooltip=[alt.Tooltip("run:N", title="run")])
    marks = runs.mark_rule(strokeWidth=1.5, strokeDash=[3, 3], clip=True)
    return alt.layer(lines, rule, marks).properties(height=height, title=panel.title)


def timeline_chart(data: Data, panels: Sequence[Panel], height: int = 110) -> Any:
    """``panels`` of history_frame on one time axis, above each other, with a crosshair through all of them.

    A stretch chosen by dragging over the strip at the top is what all of them show; a double click shows all again.
    """
    brush = alt.selection_interval(name="zoom", encodings=["x"])
    crosshair = alt.selection_point(
        name="moment", fields=["at"], nearest=True, on="pointerover", clear="pointerout", empty=False
    )
    axis = alt.Axis(title=None, labels=False, ticks=False, grid=False)
    x = alt.X("at:T", axis=axis, scale=alt.Scale(range=[AXIS_PX, alt.ExprRef("width")]))
    y = alt.Y(f"{next(iter(panels[0].lines))}:Q", axis=None)
    hint = "drag here to zoom all charts; double-click to show all"
    area = alt.Chart(data).mark_area(opacity=0.5).encode(x=x, y=y)
    strip = area.properties(height=28, title=hint).add_params(brush)
    rest = [_steps(data, panel, panel is panels[-1], height, brush, crosshair) for panel in panels]
    with warnings.catch_warnings():  # Altair warns that several charts share a crosshair, which is intended
        warnings.simplefilter("ignore", UserWarning)
        joined = alt.vconcat(strip, *rest, spacing=14)
    return joined.resolve_scale(color="independent", strokeDash="independent")


def capacity_chart(data: Data, height: int = 300) -> Any:
    """Throughput by agents, of capacity_frame: the fitted curve, its limits, and "you are here", with intervals."""
    everything = alt.Chart(data).encode(
        x=alt.X("agents:Q", title="agents in parallel", scale=alt.Scale(zero=True, nice=False)),
        y=alt.Y("turns_per_hour:Q", title="turns per hour", scale=alt.Scale(zero=True, nice=False)),
    )
    names = list(CAPACITY.values())
    legend = alt.Legend(offset=16, symbolOpacity=1)
    colour = alt.Color("kind:N", scale=alt.Scale(domain=names), legend=legend)
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
        limits.mark_rule(strokeDash=[4, 4], strokeWidth=1).encode(y2=alt.datum(0)),
        left.mark_text(align="left", dx=5, fontSize=12).encode(text="text:N"),
        right.mark_text(align="right", dx=-5, fontSize=12).encode(text="text:N"),
        measured.mark_rule(strokeWidth=2).encode(**span),
        measured.mark_point(size=150, filled=True, shape="diamond", opacity=1).encode(color=colour, tooltip=tooltip),
    ]
    return alt.layer(*layers).properties(height=height)


def themed(specification: Mapping[str, Any], is_dark: bool) -> dict[str, Any]:
    """A chart's specification with text and lines that read on the theme's background."""
    text, line, grid = ("#b4bcc6", "#98a2ad", "#2d3339") if is_dark else ("#4f5965", "#59626d", "#e1e5ea")
    light = ("#1f5fb4", "#b0448f", "#0b8076", "#7a6a00", "#6d4fc2", "#59626d")
    dark = ("#5a96e6", "#e08ac4", "#3fc4b0", "#d2bd4a", "#b39df0", "#98a2ad")
    at_the_top = {"orient": "top", "direction": "horizontal"}
    config = {
        **part(specification, "config"),
        "background": "transparent",
        "view": {"strokeWidth": 0},
        "font": '"Source Sans", sans-serif',
        "range": {"category": list(dark if is_dark else light)},
        "area": {"color": dark[0] if is_dark else light[0]},
        "axis": {"labelColor": text, "titleColor": text, "gridColor": grid, "labelFontSize": 12, "titleFontSize": 12},
        "legend": {"labelColor": text, "labelFontSize": 12, "labelLimit": 300, "title": None, **at_the_top},
        "title": {"color": text, "anchor": "start", "fontSize": 13, "fontWeight": "normal", "offset": 6},
        "rule": {"color": line},
        "text": {"color": text},
    }
    return {**specification, "config": config}


def chart_template(chart: Any) -> dict[str, Any]:
    """A chart's Vega-Lite specification, of which the data are looked for under their names.

    Altair takes a few hundred milliseconds to build one; filling this one takes almost none.
    """
    specification: dict[str, Any] = chart.to_dict()
    # Vega warns about layers without rows
    specification["usermeta"] = {"embedOptions": {"logLevel": 1, "renderer": "canvas", "actions": False}}
    return specification


# =====================================================================================================================
# Browser parts: the bar of phases, and a session's trace. They set text and attributes, never markup.
# =====================================================================================================================

COLOURS_CSS = """
:host, .root { --think: light-dark(#8172b3, #9a8bd0); --post: light-dark(#b0448f, #e08ac4);
  --queued: light-dark(#59626d, #98a2ad); --prefill: light-dark(#1f5fb4, #5a96e6);
  --decode: light-dark(#0b8076, #3fc4b0); --inference: light-dark(#23809f, #5db3cf);
  --lost: light-dark(#b45309, #f0a860); --bad: light-dark(#ab1f17, #f4938b); --none: light-dark(#6f7a87, #8994a1);
  --muted: light-dark(#566070, #a3abb6); --line: light-dark(#d9dee4, #31373e); --card: light-dark(#fff, #1a1d21);
  font: 14px/1.4 var(--st-font, sans-serif); color: var(--st-text-color); }
.think, .pre { background: var(--think); } .post { background: var(--post); }
.queued, .queue { background: var(--queued); } .prefill { background: var(--prefill); }
.decode { background: var(--decode); } .inference { background: var(--inference); } .retry { background: var(--bad); }
.held { background: repeating-linear-gradient(135deg, var(--queued) 0 3px, transparent 3px 6px); }
.replayed-prefill { background: repeating-linear-gradient(135deg, var(--lost) 0 3px, var(--prefill) 3px 6px); }
.idle, .unaccounted { background: repeating-linear-gradient(135deg, var(--none) 0 2px, transparent 2px 6px); }
ul { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 6px 0 0; padding: 0; list-style: none; font-size: 13px;
  color: var(--muted); }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
"""

MAKE_JS = """
function make(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
"""

BAR_CSS = (
    COLOURS_CSS
    + """
.bar { display: flex; height: 14px; border-radius: 3px; overflow: hidden; outline: 1px solid var(--line); }
.bar > span { display: block; height: 100%; border-right: 1px solid var(--card); box-sizing: border-box; }
[role=alert] { position: fixed; inset: auto 0 0 0; z-index: 1000; padding: 12px 20px; font-weight: 600;
  background: light-dark(#ab1f17, #7d1a14); color: #fff; }
[hidden] { display: none; }
"""
)

# The bar of phases is always there, so it also owns what belongs to the whole page: it notices that the page's server
# is gone, and hears the keys.
BAR_JS = (
    MAKE_JS
    + r"""
const SILENT_MS = 5000;

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  const target = event.composedPath()[0];
  if (target.closest?.("input, textarea, select, [contenteditable], [role=dialog], [role=listbox]")) return;
  if (event.key === "q" || event.key === "Escape") document.querySelector(".st-key-pause button")?.click();
  const arrow = { j: "ArrowDown", k: "ArrowUp" }[event.key];  // tables know the arrows
  if (arrow && target.closest?.("[data-testid=stDataFrame]"))
    target.dispatchEvent(new KeyboardEvent("keydown", { key: arrow, code: arrow, bubbles: true, cancelable: true }));
}

async function watch(root) {
  let isAlive = false;
  try {
    const ping = await fetch("_stcore/health", { cache: "no-store", signal: AbortSignal.timeout(SILENT_MS) });
    isAlive = ping.ok;
  } catch { /* it is gone */ }
  root.alarm.hidden = isAlive;
}

function begin(parentElement) {
  const root = parentElement.appendChild(make("div", "root"));
  root.bar = root.appendChild(make("div", "bar"));
  root.bar.setAttribute("role", "img");
  root.legend = root.appendChild(make("ul"));
  root.alarm = root.appendChild(make("div", "", "The page's server is gone: nothing here is current. " +
    "Start it again with “python agent_infra.py dashboard”, and reload."));
  root.alarm.setAttribute("role", "alert");
  root.alarm.hidden = true;
  root.timer = setInterval(() => watch(root), SILENT_MS);
  return root;
}

export default function ({ data, parentElement, setStateValue }) {
  const root = parentElement.root || (parentElement.root = begin(parentElement));
  const { parts, label, hasKeys, isFirst } = JSON.parse(new TextDecoder().decode(data));
  root.bar.setAttribute("aria-label", label);
  root.bar.replaceChildren(...parts.map(([name, share]) => {
    const made = make("span", name);
    made.style.width = 100 * share + "%";
    return made;
  }));
  root.legend.replaceChildren(...(parts.length ? parts : [["", 0, label]]).map(([name, , text]) => {
    const item = make("li");
    if (name) item.append(make("span", "swatch " + name));
    item.append(text);
    return item;
  }));
  if (isFirst) requestAnimationFrame(() => setTimeout(() => setStateValue("isPainted", true)));
  if (document.documentElement.lang !== "en") document.documentElement.lang = "en";  // to set it restyles everything
  document.removeEventListener("keydown", root.onKey);
  root.onKey = hasKeys ? onKey : null;
  if (hasKeys) document.addEventListener("keydown", root.onKey);
  return () => {
    clearInterval(root.timer);
    document.removeEventListener("keydown", root.onKey);
    delete parentElement.root;
    root.remove();
  };
}
"""
)

TRACE_CSS = (
    COLOURS_CSS
    + """
.axis, .row { display: grid; grid-template-columns: 3.2ch minmax(0, 1fr) 23ch; gap: 0 12px; align-items: center; }
.axis { font-size: 12px; color: var(--muted); height: 20px; }
.axis > div, .lane { position: relative; height: 100%; }
.axis div span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.axis div span:first-child { transform: none; }
.rows { max-height: 520px; overflow-y: auto; border-block: 1px solid var(--line); }
.row { height: 24px; padding: 0 6px 0 2px; border-radius: 4px; cursor: pointer; scroll-margin: 24px; }
.row:hover { background: light-dark(#eef1f5, #24292f); }
.row[aria-selected=true] { background: light-dark(#e1ebf8, #22344d); }
.row:focus { outline: 2px solid var(--st-primary-color); outline-offset: -2px; }
.number, .note { font-variant-numeric: tabular-nums; color: var(--muted); white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; font-size: 13px; }
.number { text-align: right; }
.row[data-judgement=bad] .note { color: var(--bad); font-weight: 600; }
.lane { border-left: 1px solid var(--line); }
.lane span { position: absolute; top: 5px; height: 14px; min-width: 2px; border-radius: 1px; }
.lane .think, .lane .idle { top: 10px; height: 4px; }
@media (max-width: 700px) { .axis, .row { grid-template-columns: 2.6ch minmax(0, 1fr) 12ch; gap: 0 6px; } }
"""
)

TRACE_JS = (
    MAKE_JS
    + r"""
const rowsOf = root => [...root.rows.children];

// One row is in the order of Tab: the current one, by its number, whatever moves around it.
function setCurrent(root, row, isFocused) {
  for (const each of rowsOf(root)) each.tabIndex = each === row ? 0 : -1;
  root.current = row ? row.dataset.number : null;
  if (row && isFocused) {
    row.focus({ preventScroll: true });
    row.scrollIntoView({ block: "nearest" });
  }
}

function choose(root, row) {
  setCurrent(root, row, true);
  const number = Number(row.dataset.number);
  root.setStateValue("turn", row.ariaSelected === "true" ? null : number);
}

function onKey(root, event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const rows = rowsOf(root), at = rows.indexOf(event.target.closest(".row"));
  const step = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
  const open = rows.find(row => row.ariaSelected === "true");
  if (step) setCurrent(root, rows[Math.min(rows.length - 1, Math.max(0, at + step))], true);
  else if (event.key === "Home" || event.key === "End") setCurrent(root, rows.at(event.key === "Home" ? 0 : -1), true);
  else if (event.key === "Enter" || event.key === " ") choose(root, rows[at]);
  else if (event.key === "Escape" && open) root.setStateValue("turn", null);
  else return;
  event.preventDefault();
  event.stopPropagation();
}

function begin(parentElement) {
  const root = parentElement.appendChild(make("div", "root"));
  const axis = root.appendChild(make("div", "axis"));
  axis.setAttribute("aria-hidden", "true");
  axis.append(make("span"), root.axis = make("div"), make("span"));
  root.rows = root.appendChild(make("div", "rows"));
  root.rows.setAttribute("role", "listbox");
  root.legend = root.appendChild(make("ul"));
  root.rows.addEventListener("click", event => {
    const row = event.target.closest(".row");
    if (row) choose(root, row);
  });
  root.rows.addEventListener("keydown", event => onKey(root, event));
  return root;
}

function update(row, data) {
  const { number, title, note, judgement, is_open, bars } = data, text = JSON.stringify(data);
  if (row.text === text) return;  // what hasn't changed is left alone
  row.text = text;
  row.ariaSelected = String(is_open);
  row.dataset.judgement = judgement;
  row.title = title;
  const lane = make("div", "lane");
  for (const [name, left, width] of bars) {
    const bar = lane.appendChild(make("span", name.replace(" ", "-")));
    bar.style.left = left + "%";
    bar.style.width = width + "%";
  }
  row.replaceChildren(make("span", "number", String(number)), lane, make("span", "note", note));
}

export default function ({ data, parentElement, setStateValue }) {
  const root = parentElement.root || (parentElement.root = begin(parentElement));
  root.setStateValue = setStateValue;
  const { rows, ticks, phases, label } = JSON.parse(new TextDecoder().decode(data));
  root.rows.ariaLabel = label;
  root.axis.replaceChildren(...ticks.map(([left, text]) => {
    const tick = make("span", "", text);
    tick.style.left = left + "%";
    return tick;
  }));
  const wanted = new Set(rows.map(each => String(each.number)));
  for (const row of rowsOf(root)) if (!wanted.has(row.dataset.number)) row.remove();
  const known = new Map(rowsOf(root).map(row => [row.dataset.number, row]));
  rows.forEach((each, index) => {
    const row = known.get(String(each.number)) || make("div", "row");
    if (!row.dataset.number) {
      row.dataset.number = each.number;
      row.setAttribute("role", "option");
      row.tabIndex = -1;
    }
    update(row, each);
    if (root.rows.children[index] !== row) root.rows.insertBefore(row, root.rows.children[index] || null);
  });
  const current = rowsOf(root).find(row => row.dataset.number === root.current) || root.rows.firstElementChild;
  if (current && current.tabIndex !== 0) setCurrent(root, current, false);
  const names = phases.map(([name]) => name).join();
  if (root.names !== names) root.legend.replaceChildren(...phases.map(([name, meaning]) => {
    const item = make("li");
    item.title = meaning;
    item.append(make("span", "swatch " + name.replace(" ", "-")), name);
    return item;
  }));
  root.names = names;
  if (!root.isShown && current && document.activeElement === document.body) setCurrent(root, current, true);
  root.isShown = true;
  return () => { delete parentElement.root; root.remove(); };
}
"""
)

# What Streamlit has no setting for: less room above, no fading while figures are refreshed, cards in a grid.
PAGE_CSS = """
.stMainBlockContainer { padding: 3.6rem clamp(12px, 2vw, 32px) 40px; max-width: 2600px; }
[data-stale="true"] { opacity: 1 !important; transition: none !important; }
[data-testid="stStatusWidget"] { visibility: hidden; }
[class*=st-key-metrics_] { display: grid !important; gap: 12px;
  grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); }
[class*=st-key-metrics_] > * { width: auto !important; min-width: 0; }
.st-key-status { min-height: 132px; }
"""


# =====================================================================================================================
# Views: the only part that speaks to Streamlit.
# =====================================================================================================================

STATES = {"all": "all", "live": "not ended", "ended": "ended"}  # of GET /sessions → its words
OUTCOME_WORDS = {"completed": "completed", "error": "failed", "rejected": "refused", "aborted": "client left"}
ORDERS = {  # of the list: its words → the field of GET /sessions, all with the highest first
    "most recent": "last_at",
    "longest wait": "queued_s",
    "most failures": "errors",
    "most turns": "turns",
    "most input tokens": "tokens_in",
    "most inference": "inference_s",
}


@dataclass(frozen=True)
class Source:
    """The source of a viewer's figures, and how often they are read."""

    documents: Documents
    url: str
    interval_s: float
    is_paused: bool

    def read(self, path: str, every_s: float = 0.0, name: str | None = None, patience_s: float = 0.5) -> Reading:
        """The reading of ``path`` to show: the current one, or the one from when the viewer paused.

        ``name`` stands for paths that differ only in their time.
        """
        kept: dict[str, Reading] = st.session_state.setdefault("readings", {})
        name = name or path
        former = kept.pop(name, None)
        if former is None or not self.is_paused:
            found = self.documents.read(path, 0.9 * max(self.interval_s, every_s), patience_s)
            is_open = found.document is None and found.problem is None  # a later path of the same name
            former = former if former is not None and is_open else found
        kept[name] = former  # the one read last is at the end
        while len(kept) > 16:
            del kept[next(iter(kept))]
        return former

    def stats(self) -> Mapping[str, Any]:
        """The last body of GET /stats; empty before the first."""
        return self.read("/stats").document or {}

    def refreshed(self, view: Callable[[Source], None], least_s: float = 0.0) -> None:
        """Show a view repeatedly unless paused."""
        every = None if self.is_paused else max(self.interval_s, least_s)
        st.fragment(view, run_every=every)(self)


def titled(titles: Mapping[str, str]) -> dict[str, Any]:
    """Columns of text with these titles."""
    return {name: st.column_config.TextColumn(title) for name, title in titles.items()}


def share(title: str, **options: Any) -> Any:
    """A column of bars, of shares in percent."""
    return st.column_config.ProgressColumn(title, format="%.0f %%", min_value=0, max_value=100, **options)


def open_session(name: str | None) -> None:
    """Open a session's trace, or the list with None."""
    st.session_state.pop("turns_page", None)
    if name is None:
        st.query_params.pop("session", None)
        return
    st.query_params["session"] = name
    if st.session_state.get("tab") != "Sessions":
        st.session_state["tab"] = "Sessions"
        st.session_state["is_moved"] = True


def _open_selected(key: str, names: Sequence[Any]) -> None:
    rows = st.session_state[key]["selection"]["rows"]
    if rows and isinstance(names[rows[0]], str):
        open_session(names[rows[0]])


def show_table(frame: pd.DataFrame, columns: Mapping[str, Any], key: str, opens: str = "", **options: Any) -> None:
    """A table of the columns of ``frame`` that are in ``columns`` and of which anything is known.

    A row's box opens the session that the column ``opens`` names.
    """
    if opens:
        on_select = functools.partial(_open_selected, key, list(frame[opens]))
        options.update(on_select=on_select, selection_mode="single-row")
    known = frame.notna() & ~frame.isin([UNKNOWN])
    shown = [name for name in columns if name in frame and known[name].any()]
    st.dataframe(
        frame[shown],
        hide_index=True,
        column_config={name: columns[name] for name in shown},
        key=key,
        placeholder=UNKNOWN,
        row_height=32,
        **options,
    )


def show_badge(judgement: str, word: str) -> None:
    st.badge(f"{SHAPES[judgement]} {word}", color=COLOURS[judgement])


def show_problem(problem: Problem | None) -> None:
    """Why a part of the page isn't current."""
    if problem is not None and problem.is_final:
        st.text(problem.what)
    elif problem is not None:
        with st.container(horizontal=True):
            show_badge(BAD, "not current")
            st.text(" ".join(filter(None, (problem.what, problem.fix))))


@st.cache_resource(show_spinner=False, hash_funcs={Panel: repr})
def _template(panels: Sequence[Panel], dark: bool) -> dict[str, Any]:
    """A chart without its data, built once per process; without panels, the curve of the capacity.

    Streamlit collects garbage after every run, a fragment's too: 0.2 s of CPU with all that pandas and Altair have
    made. Objects that exist by now stay, so collections skip them from here on.
    """
    rows = alt.NamedData("rows")
    template = chart_template(timeline_chart(rows, panels) if panels else capacity_chart(rows))
    gc.freeze()
    return themed(template, dark)


def show_chart(name: str, label: str, data: Mapping[str, pd.DataFrame], panels: Sequence[Panel] = ()) -> None:
    """Show a chart. The browser changes its data in place, so what is zoomed stays zoomed."""
    specification = {**_template(panels, st.context.theme.type == "dark"), "datasets": dict(data)}
    st.vega_lite_chart(spec=specification, key=name, width="stretch", alt=label, theme=None)


def _nothing() -> None:
    """Streamlit reports a component's state only if it has a callback."""


def is_painted() -> bool:
    """Whether the browser shows the status. It is sent first, on its own, so it appears quickly."""
    state = st.session_state.get("phases")
    if state and state.get("isPainted"):
        st.session_state["painted"] = True
    return bool(st.session_state.get("painted"))


def phase_bar(document: Mapping[str, Any]) -> None:
    """Where the time of recent turns went, as a bar."""
    frame = pipeline_frame(document)
    parts = [
        [row.part, row.share, f"{PIPELINE_WORDS[row.part]} {percent(row.share)}"]
        for row in frame.itertuples(index=False)
        if row.share > 0
    ]
    label = "No turn has finished in the last 5 minutes."
    if parts:
        label = "Where the time of turns went, last 5 minutes: " + ", ".join(text for _, _, text in parts)
    flags = {"hasKeys": bool(st.session_state.get("keys")), "isFirst": not is_painted()}
    show = st.components.v2.component("agent_infra_phases", css=BAR_CSS, js=BAR_JS)
    data = json.dumps({"parts": parts, "label": label, **flags}).encode()
    show(key="phases", data=data, on_isPainted_change=_nothing)


def status_view(source: Source, body: Callable[[Source], None] | None) -> None:
    """What is going on and where the time goes, on every tab; below it ``body``."""
    if is_painted() != st.session_state["was_painted"]:
        st.rerun()  # with the rest of the page
    reading = source.read("/stats")
    document, age_s = reading.document or {}, None
    if model_names(document) != st.session_state["models"]:
        st.rerun()  # with the choice of models
    if reading.document is not None:
        age_s = max(0.0, source.documents.clock() - reading.read_at) + (document.get("snapshot_age_ms") or 0) / 1000
    if source.is_paused:
        age_s = (document.get("snapshot_age_ms") or 0) / 1000
    statements = status_of(document, reading.problem, age_s, st.context.timezone)
    if source.is_paused:
        statements.insert(0, paused_status(document, st.context.timezone, time.time()))
    st.text(facts_of(source, document))
    with st.container(border=True, key="status", gap="xsmall"):
        for status in statements[:5]:
            with st.container(horizontal=True, wrap=False, gap="small"):
                show_badge(status.judgement, status.word)
                st.text(" ".join(filter(None, (status.sentence, status.hint))), width="stretch")
        phase_bar(document)
    if body is not None:
        body(source)


def model_names(document: Mapping[str, Any]) -> list[str]:
    return [str(row.get("name")) for row in listed(document, "models")]


def paused_status(document: Mapping[str, Any], zone: str | None, now: float) -> Status:
    at = document.get("now")
    of = f"The figures are of {clock(at, zone, now)} and" if is_known(at) else "The figures"
    return Status(NEUTRAL, "PAUSED", f"{of} stand still until you resume.")


def facts_of(source: Source, document: Mapping[str, Any]) -> str:
    """What the proxy is, in a line."""
    facts = [source.url, ", ".join(model_names(document)), str(document.get("strategy") or "")]
    if is_known(document.get("uptime_seconds")):
        facts.append(f"up {seconds(document['uptime_seconds'])}")
    return " · ".join(filter(None, facts))


# --- Overview ---------------------------------------------------------------------------------------------------------

FIRST_REQUEST = """curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'"""
ATTACH = """from agent_infra.client import attach
attach(client, session_id="task-17")  # client = OpenAI(base_url="{url}/v1", api_key="unused")"""


def show_metrics(metrics: Iterable[Metric], key: str) -> None:
    with st.container(key=key):
        for metric in metrics:
            st.metric(
                metric.label,
                metric.value,
                metric.note,
                delta_color=COLOURS[metric.judgement] if metric.judgement != NEUTRAL else "off",
                delta_arrow="off",
                border=True,
                height=176 if metric.course else 124,
                chart_data=list(metric.course) if len(metric.course) > 1 else None,
                chart_type="bar",  # from 0, so that a constant rate is flat
            )


def now_view(source: Source) -> None:
    """The figures of this moment."""
    document = source.stats()
    if document:
        show_metrics(metrics_of_now(document), "metrics_now")


def course_view(source: Source) -> None:
    """What changes more slowly: the last minute, charts, and what needs attention."""
    if st.session_state.pop("is_moved", False):
        st.rerun()  # to another tab
    document = source.stats()
    if not document:
        return
    if not part(document, "totals").get("requests"):
        first_steps(source, document)
    show_metrics(metrics_of_minute(document), "metrics_minute")
    timeline_view(source, "overview", OVERVIEW_PANELS, 300)
    attention_view(document)


def first_steps(source: Source, document: Mapping[str, Any]) -> None:
    model = next((str(row.get("name")) for row in listed(document, "models")), "MODEL")
    with st.container(border=True):
        st.markdown("**A first request**")
        st.code(FIRST_REQUEST.format(url=source.url, model=model), language="bash", wrap_lines=True)
        st.markdown("**In an agent**: sessions, turns and think time")
        st.code(ATTACH.format(url=source.url), language="python", wrap_lines=True)


def attention_view(document: Mapping[str, Any]) -> None:
    """Runs, sessions that may need attention, and the latest failures."""
    runs = run_frame(document)
    if not runs.empty:
        st.markdown("**Runs**")
        titles = {"tasks": "tasks", "left": "remaining (90 % interval)", "late": "stragglers"}
        titles |= {"wasted": "GPU time wasted per task"}
        show_table(runs, {**titled({"name": "run"}), "done": share("done"), **titled(titles)}, "runs")
    left, right = st.columns(2)
    with left, st.container(border=True, height="stretch"):
        st.markdown("**Sessions that may need attention**")
        watched = watchdog_frame(document)
        if watched.empty:
            st.text("None: no session is silent, repeating, oversized or thrashing.")
        else:
            columns = titled({name: name for name in ("kind", "session", "sentence", "since")})
            show_table(watched, columns, "watchdog", "session", height=260)
    with right, st.container(border=True, height="stretch"):
        st.markdown("**Latest turns that failed or were refused**")
        failed = failure_frame(document)
        if failed.empty:
            st.text(f"None among the {things(len(listed(document, 'recent_turns')), 'turn')} that finished last.")
        else:
            columns = titled({name: name for name in ("ago", "session", "outcome", "error", "replica")})
            show_table(failed, columns, "failures", "session", height=260)


def timeline_view(source: Source, name: str, panels: Sequence[Panel], points: int) -> None:
    """Charts over the chosen time."""
    now, chosen = source.stats().get("now"), str(st.session_state.get("range") or "1h")
    if not is_known(now):
        return
    model = st.session_state.get("model")
    path = history_path(now, RANGES[chosen], points, model)
    reading = source.read(path, CHARTS_EVERY_S, name=f"history {chosen} {points} {model}")
    show_problem(reading.problem)
    frame = history_frame(reading.document or {})
    if frame.empty:
        if reading.problem is None:
            st.text("Nothing has been recorded in this time.")
        return
    of = f" of {model}" if model else ""
    step = seconds(float((reading.document or {})["step_s"]))
    span = f"Last {RANGE_WORDS.get(chosen, chosen)}" if chosen != "all" else "All that is recorded"
    st.text(
        f"{span}{of}, in steps of {step}. Gaps: no controller ran, or nothing was measured. "
        "Latency is the time from a turn's arrival to the last byte of its answer: queue and inference."
    )
    label = "Lines over time, on one axis: " + "; ".join(panel.title for panel in panels)
    drawn = panels_of(panels, frame.columns)
    rows = frame[["at", *(line for panel in drawn for line in panel.lines)]]  # Vega copies all columns for each line
    show_chart(name, label, {"rows": rows, "runs": run_markers(reading.document or {})}, drawn)


# --- Sessions ---------------------------------------------------------------------------------------------------------


def sessions_view(source: Source) -> None:
    name = st.query_params.get("session")
    if name:
        trace_view(source, name)
    else:
        list_view(source)


def sessions_path(offset: int) -> str:
    """The path of GET /sessions for the chosen filters."""
    chosen = st.session_state
    options = {
        "query": str(chosen.get("query") or "").strip(),
        "state": chosen.get("state") or "all",
        "model": chosen.get("model") or "",
        "outcome": chosen.get("outcome") or "",
        "sort": ORDERS.get(str(chosen.get("order")), "last_at"),
        "descending": 1,
        "limit": LISTED_SESSIONS,
        "offset": offset,
    }
    return "/sessions?" + urlencode({name: value for name, value in options.items() if value != ""})


def list_filters() -> None:
    """Search, state, outcome and order; kept while a session is open."""
    kept: dict[str, Any] = {"persist_state": "session"}
    of_state = {**kept, "default": "all", "required": True, "format_func": STATES.__getitem__}
    of_outcome = {**kept, "format_func": OUTCOME_WORDS.__getitem__}
    with st.container(horizontal=True, vertical_alignment="bottom"):
        hint = "id, task, client or model"
        st.text_input("Search", key="query", type="search", live=True, placeholder=hint, width=300, **kept)
        st.pills("State", list(STATES), key="state", **of_state)
        st.pills("With a turn that", list(OUTCOME_WORDS), key="outcome", **of_outcome)
        st.selectbox("Order", list(ORDERS), key="order", width=180, **kept)


def list_view(source: Source) -> None:
    """The sessions, searched, filtered and ordered by the proxy; each row keeps its place until the viewer moves it."""
    list_filters()
    pages = f"page of {sessions_path(0)}"
    page = int(st.session_state.get(pages) or 1)
    path = sessions_path(LISTED_SESSIONS * (page - 1))
    reading = source.read(path, LIST_EVERY_S)
    show_problem(reading.problem)
    current, total = listed(reading.document, "sessions"), (reading.document or {}).get("total")
    shown = st.session_state.get("listing")
    if shown is None or shown[0] != path or st.session_state.pop("is_reordered", False) or not shown[1]:
        shown = (path, current)
    rows, held_back = arranged(shown[1], current)
    st.session_state["listing"] = (path, rows)
    many = total if is_known(total) and total > LISTED_SESSIONS else 0
    with st.container(horizontal=True, vertical_alignment="center"):
        before, order = LISTED_SESSIONS * (page - 1), st.session_state.get("order") or next(iter(ORDERS))
        span = f"Showing {count(before + 1)} to {count(before + len(rows))} of " if many else ""
        st.text(f"{span}{things(many or len(rows), 'session')}, {order} first.")
        others = f"{things(held_back, 'other session')} in this order now: refresh"
        label = others if held_back else "Refresh order"
        st.button(label, key="reorder", on_click=_reorder, type="secondary" if held_back else "tertiary")
    if not rows:
        st.text("No session matches." if reading.document else "Loading sessions…")
        return
    show_table(session_frame(rows, source.stats().get("now")), session_columns(), "sessions", "id", height=640)
    if many:
        st.pagination(math.ceil(many / LISTED_SESSIONS), key=pages)


def _reorder() -> None:
    st.session_state["is_reordered"] = True


def session_columns() -> dict[str, Any]:
    text, number = st.column_config.TextColumn, st.column_config.NumberColumn
    return {
        "id": text("session", width=190),
        "state": text("state", width=90),
        "turns": number("turns", width=60),
        "errors": number("failed", width=60, help="turns that failed or broke off"),
        "queued_s": number("waited, s", format="%.1f", width=80, help="in the queue, sum over its turns"),
        "inference_s": number("inference, s", format="%.1f", width=95, help="sum over its turns"),
        "think_s": number("thinking, s", format="%.1f", width=90, help="sum of the times between its turns"),
        "seen_s": number("seen, s ago", format="%,.0f", width=90),
        "length_s": number(
            "lasted, s", format="%,.0f", width=80, help="from its first turn to its latest sign of life"
        ),
        "tokens_in": number("tokens in", format="compact", width=80),
        "tokens_out": number("tokens out", format="compact", width=85),
        "cached": share("cached", width=110, help="share of the input tokens"),
        "task": text("task", width=130),
        "replica": text("replica", width=110),
        "model": text("model", width=110),
        "client": text("client", width=220),
    }


def trace_view(source: Source, name: str) -> None:
    """One session: its turns on a time axis, and what was said in the chosen one."""
    page, turns_total = int(st.session_state.get("turns_page") or 1), st.session_state.get("turns_total")
    path = f"/stats/sessions/{quote(name, safe='')}?limit={LISTED_TURNS}"
    if page > 1 and is_known(turns_total):
        path += f"&before={turns_total + 1 - LISTED_TURNS * (page - 1)}"
    reading = source.read(path, 1.0)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button("All sessions", icon=":material/arrow_back:", on_click=open_session, args=(None,))
        st.code(name, language=None, width="content", wrap_lines=True)
    show_problem(reading.problem)
    document = reading.document or {}
    turns, session = listed(document, "turns"), part(document, "session")
    if not turns:
        if reading.problem is None:
            st.text("No finished turn yet." if document else "Loading turns…")
        return
    total = document.get("turns_total")
    st.session_state["turns_total"] = total if page == 1 else turns_total
    st.text(session_facts(session, document.get("now")))
    chosen = _chosen_turn(turns)
    left, right = st.columns([3, 2] if chosen is not None else [1, 0.001], gap="medium")
    with left:
        drawn = waterfall(turns, chosen)
        known = {phase for turn in turns for phase in phases_of(turn)}
        phases = [[phase, text] for phase, text in PHASE_MEANINGS.items() if phase in known]
        label = f"{things(len(drawn['rows']), 'turn')}; Enter shows a turn's text"
        show = st.components.v2.component("agent_infra_trace", css=TRACE_CSS, js=TRACE_JS)
        message = json.dumps({**drawn, "phases": phases, "label": label}).encode()
        show(key="trace", data=message, on_turn_change=_nothing)
        if is_known(total) and total > LISTED_TURNS:
            st.text(f"Showing {LISTED_TURNS} of {count(total)} turns, the most recent ones on page 1.")
            st.pagination(math.ceil(total / LISTED_TURNS), key="turns_page")
    if chosen is not None:
        with right:
            turn_view(next(turn for turn in turns if turn.get("number") == chosen))


def _chosen_turn(turns: Sequence[Mapping[str, Any]]) -> int | None:
    """The number of the turn that the trace reports as chosen, if it is there."""
    state = st.session_state.get("trace")
    number = state.get("turn") if state else None
    return int(number) if is_known(number) and any(turn.get("number") == number for turn in turns) else None


def session_facts(session: Mapping[str, Any], now: Any) -> str:
    """A session in a line."""
    replica = session.get("replica") or session.get("backend")
    seen = session.get("last_at") or session.get("last_seen")
    thought = [ms for name in ("pre_ms", "post_ms", "unaccounted_ms") for ms in [session.get(name)] if is_known(ms)]
    state = session_state({"think_s": sum(thought) / 1000 if thought else None, **session, "last_at": seen}, now)
    facts = [
        state,
        f"seen {seconds(ago(now, seen))} ago",
        f"task {session['task']}" if session.get("task") else "",
        str(session.get("model") or ""),
        f"on {replica}" if replica else "",
        things(session.get("turns"), "turn"),
        f"{count(session['errors'])} failed" if session.get("errors") else "",
    ]
    return " · ".join(filter(None, facts))


def turn_view(turn: Mapping[str, Any]) -> None:
    """A turn: what it was about, and what is known of it."""
    st.markdown(f"**Turn {int(turn['number'])}**")
    if turn.get("error"):
        show_badge(BAD, "failed")
        st.code(str(turn["error"]), language=None, wrap_lines=True)
    for name in ("prompt", "answer"):
        st.text(name)
        st.code(str(turn.get(name) or UNKNOWN), language=None, wrap_lines=True)
    st.text("details")
    st.code("\n".join(f"{name}: {text}" for name, text in turn_facts(turn)), language=None, wrap_lines=True)


# --- Replicas ---------------------------------------------------------------------------------------------------------


def replicas_view(source: Source) -> None:
    """The replicas, the most urgent first, and all that is known of the chosen one."""
    document = source.stats()
    former: Sequence[Mapping[str, Any]] = ()
    if part(st.session_state.get("replicas"), "selection").get("rows"):  # Streamlit knows a ticked row by its place
        former = st.session_state.get("former replicas", ())
    rows = with_gone(listed(document, "backends"), former)
    frame = in_order(replica_frame({**document, "backends": rows}), [row["id"] for row in former])
    if frame.empty:
        st.text("There are no replicas; “python agent_infra.py start” starts them." if document else "")
        return
    st.session_state["former replicas"] = frame[["id", "model"]].to_dict("records")
    total = sum(state_of(row) not in ("stopped", "gone") for row in rows)
    st.text(
        f"{_ready(document)} of {things(total, 'replica')} ready. Inference and first token: last {RECENT}. "
        "Turns and failures: since the proxy started."
    )
    height = min(640, 40 + 32 * len(frame))
    columns = replica_columns(frame)
    show_table(frame, columns, "replicas", on_select="rerun", selection_mode="single-row", height=height)
    ticked = st.session_state["replicas"]["selection"]["rows"]
    if ticked and ticked[0] < len(frame):
        name = frame["id"].iloc[ticked[0]]
        replica_view(next(row for row in rows if row.get("id") == name))


def replica_columns(frame: pd.DataFrame) -> dict[str, Any]:
    text, number = st.column_config.TextColumn, st.column_config.NumberColumn
    colours: list[Any] = [COLOURS[judgement] for judgement in JUDGEMENT_OF_STATE.values()]
    most = max([1.0, *(value for row in frame["history"] for value in row)])
    return {
        "id": text("replica"),
        "state": st.column_config.MultiselectColumn(
            "state", options=[state_label(state) for state in JUDGEMENT_OF_STATE], color=colours, width=110
        ),
        "note": text("note", width=150),
        "model": text("model"),
        "gpu": share("GPU utilised", width=110),
        "kv": share("KV cache", width=110),
        "memory": share("GPU memory", width=110),
        "in_flight": number("in flight", width=70),
        "slots": number("slots", width=60),
        "history": st.column_config.LineChartColumn("in flight, 2 min", y_min=0, y_max=most, width=130),
        "ttft_s": number("first token, s", format="%.2f", help="median", width=100),
        "p50_s": number("inference, s", format="%.2f", help="median", width=100),
        "p95_s": number("p95, s", format="%.2f", width=80),
        "requests": number("turns", width=80),
        "errors": number("failed", width=70),
        "restarts": number("restarts", width=70),
        "ends": text("job ends in", width=100),
        "tunnel": text("tunnel", width=80),
        "node": text("node", width=100),
        "partition": text("partition", width=90),
        "gpu_name": text("GPU", width=200),
    }


def replica_view(row: Mapping[str, Any]) -> None:
    """Why a replica is as it is."""
    with st.container(border=True):
        state = state_of(row)
        with st.container(horizontal=True, vertical_alignment="center"):
            show_badge(JUDGEMENT_OF_STATE.get(state, NEUTRAL), state)
            st.code(str(row.get("id")), language=None, width="content")
        failure, tunnel = part(row, "failure"), part(row, "tunnel")
        for text in (reason_of(row), hint_of(row), tunnel.get("reason")):
            if text:
                st.text(str(text))
        if failure.get("line"):
            st.text("The line of its log that decides it:")
            st.code(str(failure["line"]), language=None, wrap_lines=True)
        memory, total = part(row, "gpu").get("memory_used"), part(row, "gpu").get("memory_total")
        facts = [
            f"GPU memory {gibibytes(memory)} of {gibibytes(total)}" if is_known(memory) else "",
            f"port {row['port']}" if row.get("port") else "",
            f"{things(row['sessions'], 'session')}" if is_known(row.get("sessions")) else "",
            f"tunnel {tunnel.get('state')}, replaced {things(tunnel['reconnects'], 'time')}"
            if is_known(tunnel.get("reconnects"))
            else "",
        ]
        st.text(" · ".join(filter(None, facts)))


# --- Analysis ---------------------------------------------------------------------------------------------------------


def analysis_view(source: Source) -> None:
    """What limits throughput, and what would help; below, where the time and the GPU time went."""
    document = source.stats()
    entries = listed(document, "analysis")
    chosen = st.session_state.get("model")
    shown = [entry for entry in entries if chosen is None or entry.get("model") == chosen]
    for index, entry in enumerate(shown):
        with st.container(border=True):
            entry_view(entry, index, document.get("now"), idle_s(document) is not None)
    if not shown:
        st.text("There is no analysis yet: it needs turns.")
    left, right = st.columns(2)
    with left, st.container(border=True, height="stretch"):
        st.markdown("**Where the time of turns goes**, last 5 minutes")
        pipeline = pipeline_frame(document)
        if pipeline.empty:
            st.text("No turn has finished in the last 5 minutes.")
        else:
            pipeline["share"] *= 100
            pipeline["part"] = [PIPELINE_WORDS[name] for name in pipeline["part"]]
            titles = {name: name for name in ("mean", "p50", "p95")}
            show_table(pipeline, {**titled({"part": "part"}), "share": share("share"), **titled(titles)}, "pipeline")
    with right, st.container(border=True, height="stretch"):
        hours_view(document)


def hours_view(document: Mapping[str, Any]) -> None:
    """Time of GPUs by state, and the cost of a turn, a session and a task."""
    hours, cost = hours_frame(document), cost_frame(document)
    since = ago(document.get("now"), part(document, "accounting").get("since"))
    if hours.empty:
        st.markdown("**GPU time**")
        st.text("No GPU time has been recorded yet.")
    else:
        st.markdown(f"**{hours['unit'].iloc[0]}**, last {seconds(since)}")
        titles = {"model": "model", "ready_busy": "busy", "ready_idle": "idle"}
        columns = titled({**titles, "loading": "loading", "pending": "pending"})
        show_table(hours, {**columns, "busy": share("busy share")}, "hours")
    if not cost.empty:
        titles = {"turn": "per turn", "session": "per session", "task": "per task", "lost": "cache misses"}
        show_table(cost, {"of": st.column_config.TextColumn("GPU time", width=130), **titled(titles)}, "cost")


def entry_view(entry: Mapping[str, Any], index: int, now: Any, is_idle: bool) -> None:
    """The verdict on one model and GPU type: the last one, with its age, while ``is_idle`` or while there is none."""
    verdict, last = part(entry, "verdict"), part(entry, "last_verdict")
    word = name = verdict_name(entry)
    judgement, advice = JUDGEMENT_OF_VERDICT.get(name, BUSY), advice_of(entry)
    if last and (is_idle or name == "NO DATA"):
        word, judgement, verdict, advice = last_verdict(entry, now), NEUTRAL, last, str(last.get("suggestion") or "")
    with st.container(horizontal=True, vertical_alignment="center"):
        show_badge(judgement, word)
        st.text(entry_label(entry))
    st.text(str(verdict.get("sentence") or verdict.get("reason") or ""))
    if advice:
        st.text(advice)
    for flag in listed(entry, "flags"):
        with st.container(horizontal=True, wrap=False):
            show_badge(JUDGEMENT_OF_VERDICT.get(str(flag.get("name")), BUSY), str(flag.get("name")))
            st.text(str(flag.get("sentence") or ""), width="stretch")
    shares, curve = share_frame(entry), capacity_frame(entry)
    if shares.empty or (is_idle and last and last.get("name") != name):  # what an idle fleet looks like
        return
    left, right = st.columns(2)
    with left:
        columns = {**titled({"name": "throughput is limited by"}), "share": share("share")}
        show_table(shares, {**columns, **titled({"interval": "interval"})}, f"shares {index}")
        titles = {"what": "agents", "agents": "number", "then": "turns", "change": "change", "wait": "wait per turn"}
        show_table(option_frame(entry), titled(titles), f"options {index}")
        titles = {"what": "what if", "change": "turns", "interval": "interval", "then": "then"}
        show_table(what_if_frame(entry), titled(titles), f"what ifs {index}")
    with right:
        if curve.empty:
            st.text("No curve: too little is known to predict throughput.")
        else:
            label = "Predicted turns per hour by number of agents, with the current position and the limits."
            show_chart("capacity" if index == 0 else f"capacity {index}", label, {"rows": curve})
    st.text(basis_of(entry))


# --- The page ---------------------------------------------------------------------------------------------------------


def controls_view(source: Source, models: Sequence[str]) -> None:
    """What the figures are of, and how they are refreshed."""
    with st.container(horizontal=True, vertical_alignment="center", key="controls"):
        st.markdown("#### Agent Infra", width="stretch")
        if len(models) > 1:
            st.pills("Model", models, key="model", label_visibility="collapsed", bind="query-params")
        st.segmented_control(
            "Time",
            list(RANGES),
            default="1h",
            required=True,
            key="range",
            label_visibility="collapsed",
            bind="query-params",
        )
        st.button("Resume" if source.is_paused else "Pause", key="pause", on_click=_pause)
        with st.popover("Settings"):
            st.segmented_control(
                "Refresh every", INTERVALS_S, default=1, format_func=lambda s: f"{s} s", key="interval", required=True
            )
            st.toggle("Keys", key="keys", help="q or Esc pauses; j and k move in tables")


def _pause() -> None:
    st.session_state["paused"] = not st.session_state.get("paused")
    if not st.session_state["paused"]:
        st.session_state.pop("readings", None)


def history_view(source: Source) -> None:
    timeline_view(source, "history", HISTORY_PANELS, 600)


# Of each tab: what is shown with the status, at every refresh; what is refreshed less often; and how often, in s.
View: TypeAlias = "Callable[[Source], None] | None"
TABS: Mapping[str, tuple[View, View, float]] = {
    "Overview": (now_view, course_view, CHARTS_EVERY_S),
    "Sessions": (None, sessions_view, LIST_EVERY_S),
    "Replicas": (replicas_view, None, 0.0),
    "Analysis": (None, analysis_view, CHARTS_EVERY_S),
    "History": (None, history_view, HISTORY_EVERY_S),
}


def tabs_view(source: Source) -> None:
    """The open tab; the others aren't computed. Each fragment costs the browser a pass over the page: so few."""
    if "tab" not in st.session_state and "session" in st.query_params and "tab" not in st.query_params:
        st.session_state["tab"] = "Sessions"
    tabs = st.tabs(list(TABS), key="tab", on_change="rerun", bind="query-params")
    for tab, (fast, slow, least_s) in zip(tabs, TABS.values(), strict=True):
        if tab.open:
            with tab:
                models = st.session_state["models"] = model_names(source.stats())
                controls_view(source, models)
                source.refreshed(
                    functools.partial(status_view, body=fast if is_painted() else None),
                )
                if slow is not None and is_painted():
                    source.refreshed(slow, least_s)


@st.cache_resource(show_spinner=False)
def shared_documents(url: str, token_file: str | None) -> Documents:
    """Shared by all viewers of one proxy."""
    token = Path(token_file).read_text(encoding="utf-8") if token_file else os.environ.get("AGENT_INFRA_TOKEN", "")
    return Documents(ProxyClient(url, token.strip()))


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
        st.text("This page shows prompts and answers: open it with the complete address that the terminal printed.")
        return
    st.html(f"<style>{PAGE_CSS}</style>")
    documents = shared_documents(arguments.proxy, arguments.token_file)
    interval_s = float(st.session_state.get("interval") or INTERVALS_S[0])
    source = Source(documents, arguments.proxy, interval_s, bool(st.session_state.get("paused")))
    st.session_state["was_painted"] = is_painted()
    tabs_view(source)


if __name__ == "__main__":
    main()
