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
import itertools
import json
import math
import os
import re
import statistics
import sys
import textwrap
import threading
import time
import warnings
from collections import defaultdict
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
import requests
import streamlit as st

DEFAULT_PROXY = "http://127.0.0.1:5800"
SCHEMA_VERSION = 2  # of /stats, as this page reads it
INTERVALS_S = (1, 2, 5, 10)
CHARTS_EVERY_S = 5.0
HISTORY_EVERY_S = 10.0  # ten charts
HISTORY_STEPS = 300  # of a chart over time
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
    sizes = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
    size, unit, part, part_unit = next(row for row in sizes if whole >= row[0])
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


class ProxyError(Exception):
    """Why there are no current figures: what happened, and what to do."""

    def __init__(self, what: str, fix: str, is_final: bool = False) -> None:
        """``is_final``: what was asked for isn't there, and won't be."""
        super().__init__(what)
        self.what, self.fix, self.is_final = what, fix, is_final


@dataclass(frozen=True)
class Reading:
    """The last reading of a document. ``document`` stays the last good one while there is a problem."""

    document: Mapping[str, Any] | None = None
    read_at: float = 0.0  # monotonic seconds: when the document came
    problem: ProxyError | None = None


def checked_url(url: str) -> str:
    """The proxy's base URL without a slash at its end; ValueError if it isn't one."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError(f"--proxy {url}: a URL such as {DEFAULT_PROXY} is needed")
    return parts.geturl().rstrip("/")


class ProxyClient:
    """GET requests to one proxy, over one kept connection per thread."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url, self._token = url, token
        self._of_thread = threading.local()

    def get(self, path: str) -> Mapping[str, Any]:
        """The JSON document at ``path``; ProxyError, with what to do, if there is none."""
        session = getattr(self._of_thread, "session", None)
        if session is None:
            session = self._of_thread.session = requests.Session()
            session.trust_env = False  # ignores http_proxy and ~/.netrc
            if self._token:
                session.headers["Authorization"] = f"Bearer {self._token}"
        try:
            answer = session.get(self.url + path, timeout=(2.0, READ_TIMEOUT_S), allow_redirects=False)
        except requests.Timeout:
            raise ProxyError(
                f"The proxy at {self.url} doesn't answer in time.",
                "It may be overloaded, or the network is down; this page keeps trying.",
            ) from None
        except requests.RequestException:
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
        raise ProxyError(
            f"The proxy at {url} speaks version {version} of /stats, this page reads {SCHEMA_VERSION}.",
            "Run both from the same release of Agent Infra.",
        )
    return document


@dataclass
class Kept:
    """A document that viewers read: its last reading, and the request under way or done last."""

    reading: Reading = Reading()
    asked_at: float = -math.inf
    request: Future[None] | None = None


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
            kept.reading = replace(kept.reading, problem=error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the viewers are told and the next read tries again
            problem = ProxyError(f"This page failed: {error!r}.", "It keeps trying.")
            kept.reading = replace(kept.reading, problem=problem)


# =====================================================================================================================
# Status: what is going on, in one line. Pure: a function of /stats and of how old it is.
# =====================================================================================================================

# Judgements: a word always stands beside the colour, and a shape before it.
GOOD, BUSY, BAD, NEUTRAL = "good", "busy", "bad", "neutral"
SHAPES = {GOOD: "●", BUSY: "▲", BAD: "✕", NEUTRAL: "○"}
COLOURS: Mapping[str, Any] = {GOOD: "green", BUSY: "orange", BAD: "red", NEUTRAL: "gray"}  # as Streamlit names them
JUDGEMENTS = {  # of states of replicas, verdicts and flags; all others: BUSY
    **dict.fromkeys(("ready", "BALANCED"), GOOD),
    **dict.fromkeys(("pending", "stopped", "gone", "NO DATA"), NEUTRAL),
    **dict.fromkeys(("failed", "unhealthy", "UNHEALTHY"), BAD),
}
STARTING = ("pending", "starting", "loading")
HOLDING_TURNS = ("ready", "unhealthy", "draining")  # states of replicas that have turns
REPLICA_STATES = (*STARTING, *HOLDING_TURNS, "stopped", "failed", "gone")
FAILED_OUTCOMES = ("error", "cut")
RECENT = f"5{SPACE}min"  # window of recent_outcomes, pipeline and the replicas' latencies in /stats
STALE_S = 10.0  # figures older than this are of the past
IDLE_S = 60.0  # without a turn for so long, nothing is going on
BAD_ERROR_SHARE = 0.05
RESTARTED_S = 120.0
START = "“python agent_infra.py start” starts them."
LOGS = "“python agent_infra.py logs” shows why."


@dataclass(frozen=True)
class Status:
    """One statement about the deployment: its judgement, a word, a sentence, and what to do."""

    judgement: str
    word: str
    sentence: str
    hint: str = ""


def judgement_of(word: str) -> str:
    return JUDGEMENTS.get(word, BUSY)


def status_of(
    document: Mapping[str, Any], problem: ProxyError | None, age_s: float | None, zone: str | None = None
) -> list[Status]:
    """What is going on, the most urgent first; the first one is the headline, and the others never contradict it.

    Without current figures, that is all that is said: figures of the past say nothing about now.
    """
    if problem is not None:
        old = f" The figures below are {seconds(age_s)} old." if document else ""
        return [Status(BAD, "NO CONNECTION", problem.what + old, problem.fix)]
    if not document:
        return [Status(NEUTRAL, "CONNECTING", "Waiting for the proxy's first answer.")]
    if document["snapshot_age_ms"] / 1000 >= STALE_S:
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
    return "unhealthy" if row["state"] == "ready" and row["healthy"] is False else str(row["state"])


def _ready(document: Mapping[str, Any]) -> int:
    return sum(state_of(row) == "ready" for row in listed(document, "backends"))


def reason_of(row: Mapping[str, Any]) -> str:
    """Why a replica is in its state: the class of its failure, its progress or its reason; empty if unknown."""
    kind = part(row, "failure").get("kind") if row["state"] == "failed" else None
    return str(kind or row["progress"] or row["reason"] or "").replace("_", " ")


def hint_of(row: Mapping[str, Any]) -> str:
    """What to do about a replica's failure."""
    return str(part(row, "failure").get("hint") or "")


def _named(rows: Sequence[Mapping[str, Any]], most: int = 3) -> str:
    """qwen-2 (out of memory), qwen-3 (driver) and 4 more."""
    reasons = {row["id"]: textwrap.shorten(reason_of(row), 80, placeholder="…") for row in rows[:most]}
    shown = ", ".join(f"{name} ({reason})" if reason else name for name, reason in reasons.items())
    return shown + (f" and {len(rows) - most} more" if len(rows) > most else "")


def _replica_status(document: Mapping[str, Any]) -> list[Status]:
    by_state: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in listed(document, "backends"):
        by_state[state_of(row)].append(row)
    total = sum(map(len, by_state.values())) - len(by_state["stopped"])
    if not total:
        return [Status(NEUTRAL, "NO REPLICAS", "There are no replicas.", START)]
    found, ready, of_all = [], len(by_state["ready"]), f"of {things(total, 'replica')}"
    if failed := by_state["failed"]:
        hint = next(filter(None, map(hint_of, failed)), LOGS)
        text = f"{len(failed)} {of_all} failed: {_named(failed)}."
        found.append(Status(BAD, "FAILED" if ready else "DOWN", text, hint))
    if unhealthy := by_state["unhealthy"]:
        text = f"{len(unhealthy)} {of_all} {'gets' if len(unhealthy) == 1 else 'get'} no turns: {_named(unhealthy)}."
        found.append(Status(BAD, "UNHEALTHY", text, LOGS))
    if starting := [row for state in STARTING for row in by_state[state]]:
        what = ", ".join(f"{len(by_state[state])} {state}" for state in STARTING if by_state[state])
        text = f"{ready} {of_all} ready; {what}: {_named(starting)}."
        found.append(Status(NEUTRAL if ready else BUSY, "STARTING", text))
    if not found and not ready:
        found.append(Status(BUSY, "DRAINING", f"None {of_all} takes new turns."))
    return found


def recent_failures(document: Mapping[str, Any]) -> tuple[int, int]:
    """``(failed, finished)`` of the last 5 minutes. Failed: error answers and answers that broke off."""
    counts = {name: value for name, value in part(document, "recent_outcomes").items() if name != "window_s"}
    return counts.get("errors", 0), sum(counts.values())


def _error_status(document: Mapping[str, Any]) -> list[Status]:
    failed, finished = recent_failures(document)
    if not failed:
        return []
    errors = (row["error"] for row in document["recent_turns"] if row["outcome"] in FAILED_OUTCOMES)
    why = str(next(errors, None) or "")[:200].rstrip(".")
    text = f"{count(failed)} of {things(finished, 'turn')} failed in the last {RECENT}{f': {why}' if why else ''}."
    judgement = BAD if failed / finished >= BAD_ERROR_SHARE else BUSY
    return [Status(judgement, "ERRORS", text, "See Sessions → failed.")]


def _side_status(document: Mapping[str, Any]) -> list[Status]:
    """What doesn't concern turns: tunnels, the history, a restart."""
    found, history, uptime = [], part(document, "history"), document["uptime_seconds"]
    if down := [row["id"] for row in document["backends"] if part(row, "tunnel").get("state") == "down"]:
        found.append(Status(BAD, "TUNNEL DOWN", f"No tunnel to {', '.join(down[:3])}; it is being replaced."))
    if history.get("state") == "failing":
        found.append(Status(BUSY, "HISTORY FAILS", f"Turns aren't recorded: {history['reason']}."))
    began = [point["at"] for point in document["throughput"]["history"][:1]]
    if uptime < RESTARTED_S and began and began[0] < document["now"] - uptime - 1:  # by an earlier controller
        text = f"The controller restarted {seconds(uptime)} ago; rates and verdicts start again, totals go on."
        found.append(Status(NEUTRAL, "RESTARTED", text))
    return found


def idle_s(document: Mapping[str, Any]) -> float | None:
    """For how long nothing has been going on (s); None while turns are open, or finished less than IDLE_S ago."""
    queue = part(document, "queue")
    if not document or queue["in_flight"] or queue["pending"]:
        return None
    ages = [document["now"] - row["finished_at"] for row in document["recent_turns"]]
    since = min(ages, default=document["uptime_seconds"])
    return since if since >= IDLE_S else None


def last_verdict(entry: Mapping[str, Any], now: Any) -> str:
    """The last verdict with its age: "GPU-BOUND as of 12 min ago"; empty if there was none."""
    last = entry["last_verdict"]
    return f"{last['name']} as of {seconds(ago(now, last['at']))} ago" if last else ""


def _activity_status(document: Mapping[str, Any], zone: str | None, is_down: bool) -> list[Status]:
    """Whether turns are flowing, and what limits them."""
    queue, now, entries, idle = document["queue"], document["now"], document["analysis"], idle_s(document)
    if not document["recent_turns"] and not queue["in_flight"] and not queue["pending"]:
        if document["totals"]["requests"]:
            return [Status(NEUTRAL, "IDLE", "No turn since the controller started.")]
        return [Status(NEUTRAL, "NO TRAFFIC", "No turn has arrived yet.")]
    if idle is not None:
        text = f"No turn for {seconds(idle)}, since {clock(now - idle, zone, now)}."
        last = [f"{entry_label(entry)}: {last_verdict(entry, now)}" for entry in entries if entry["last_verdict"]]
        return [Status(NEUTRAL, "IDLE", text + (f" Last verdict: {', '.join(last)}." if last else ""))]
    if is_down:
        waiting = queue["pending"]
        return [Status(NEUTRAL, "WAITING", f"{things(waiting, 'turn')} in the queue.")] if waiting else []
    if not entries:
        return [Status(NEUTRAL, "MEASURING", "Turns are arriving; there is no verdict yet.")]
    return [_verdict_status(entry, now, len(entries) > 1) for entry in entries]


def _verdict_status(entry: Mapping[str, Any], now: Any, is_named: bool) -> Status:
    verdict, label = entry["verdict"], f"{entry_label(entry)}: " if is_named else ""
    if verdict["name"] == "NO DATA":
        last = f" The last one: {last_verdict(entry, now)}." if entry["last_verdict"] else ""
        return Status(NEUTRAL, "MEASURING", f"{label}No verdict yet: {verdict['reason']}.{last}")
    sentence = label + verdict["sentence"].replace(" %", f"{SPACE}%")
    return Status(judgement_of(verdict["name"]), verdict["name"], sentence, advice_of(entry))


def advice_of(entry: Mapping[str, Any]) -> str:
    """The suggestion, whose sentence has its price in throughput and in the wait; if that isn't known, why."""
    suggestion, change = entry["suggestion"], entry["suggestion"]["then"]["change"]
    sentence = str(suggestion["sentence"])
    if suggestion["bound_by"] and change["low"] is None and change["reason"]:
        sentence += f" What it does to throughput isn't known: {change['reason']}."
    return sentence.replace(" %", f"{SPACE}%")


def entry_label(entry: Mapping[str, Any]) -> str:
    """The label that distinguishes an entry of the analysis from the others."""
    return f"{entry['model']} on {entry['gpu']}" if entry["gpu"] else str(entry["model"])


def paused_status(document: Mapping[str, Any], zone: str | None, now: float) -> Status:
    of = f"The figures are of {clock(document['now'], zone, now)} and" if document else "The figures"
    return Status(NEUTRAL, "PAUSED", f"{of} stand still until you resume.")


# =====================================================================================================================
# Shaping: documents → DataFrames and rows. Pure. The columns of frames are named as they are shown.
# =====================================================================================================================

SLOW_FACTOR = 1.2  # a replica whose median exceeds the median of all by this factor is marked
FULL_KV = 0.95  # of the KV cache: from here on sequences are preempted
SOON_S = 900.0  # a job that ends this soon is marked
# As in `sessions.alive` of /stats: longer silences than these are of "silent" sessions, which aren't alive.
THINKING_FACTOR, THINKING_LEAST_S = 4.0, 30.0
STATE_WORDS = {"idle": "thinking", "waiting": "in the queue", "decoding": "answering"}  # of sessions


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str | Callable[[Any], Any]]) -> pd.DataFrame:
    """One row per object of ``rows``; ``columns``: title → the name of a field, or what makes the cell of an object."""
    cells = [[row.get(read) if isinstance(read, str) else read(row) for read in columns.values()] for row in rows]
    return pd.DataFrame(cells, columns=list(columns))


def scaled(value: Any, factor: float) -> float | None:
    return value * factor if is_known(value) else None


def share_of(value: Any, total: Any) -> float | None:
    """A share in percent."""
    return scaled(value, 100 / total) if total else None


def value_of(document: Any, *names: str) -> Any:
    """The value of the Estimate at the path ``names``."""
    return part(document, *names).get("value")


def ago_text(document: Mapping[str, Any], at: Any) -> str:
    return f"{seconds(ago(document.get('now'), at))} ago"


def by_urgency(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The replicas of /stats, each with its ``notes``, the most urgent first."""
    rows, now = listed(document, "backends"), document.get("now")
    medians = {row["id"]: row["latency_ms"]["p50"] for row in rows if state_of(row) == "ready"}
    known = sorted(filter(is_known, medians.values()))
    slowest = known[-1] if len(known) > 1 and known[-1] > SLOW_FACTOR * statistics.median(known) else math.inf
    noted = [{**row, "notes": _notes(row, now) + ["slowest"] * (medians.get(row["id"]) == slowest)} for row in rows]
    order = (BAD, BUSY, NEUTRAL, GOOD)
    return sorted(
        noted, key=lambda row: (order.index(judgement_of(state_of(row))), not row["notes"], natural(row["id"]))
    )


def replica_frame(rows: Iterable[Mapping[str, Any]], now: Any) -> pd.DataFrame:
    """One row per replica of ``by_urgency``, in the given order; times in s, shares in percent."""
    return table(
        rows,
        {
            "replica": "id",
            "state": lambda row: [state_label(state_of(row))],
            "note": lambda row: ", ".join(row["notes"]),
            "model": "model",
            "GPU utilised": lambda row: part(row, "gpu").get("utilization"),
            "KV cache": lambda row: scaled(row["engine"]["kv_usage"], 100),
            "GPU memory": lambda row: share_of(
                part(row, "gpu").get("memory_used"), part(row, "gpu").get("memory_total")
            ),
            "in flight": "inflight",
            "slots": "slots",
            "in flight, 2 min": lambda row: list(filter(is_known, row["inflight_history"])),
            "first token, s": lambda row: scaled(row["ttft_ms"]["p50"], 0.001),
            "inference, s": lambda row: scaled(row["latency_ms"]["p50"], 0.001),
            "p95, s": lambda row: scaled(row["latency_ms"]["p95"], 0.001),
            "turns": "requests",
            "failed": "errors",
            "restarts": "restarts",
            "job ends in": lambda row: seconds(ago(row["ends_at"], now)),
            "tunnel": lambda row: part(row, "tunnel").get("state"),
            "node": "node",
            "partition": "partition",
            "GPU": lambda row: part(row, "gpu").get("name"),
        },
    )


def _notes(row: Mapping[str, Any], now: Any) -> list[str]:
    """What is unusual about a replica."""
    kv, left_s, tunnel = row["engine"]["kv_usage"], ago(row["ends_at"], now), part(row, "tunnel").get("state", "up")
    notes = {
        reason_of(row): state_of(row) != "ready" and reason_of(row),
        "KV cache full": is_known(kv) and kv >= FULL_KV,
        "job ends soon": left_s is not None and left_s < SOON_S,
        f"tunnel {tunnel}": tunnel != "up",
    }
    return [note for note, applies in notes.items() if applies]


def natural(name: Any) -> tuple[Any, ...]:
    """A sort key that puts model-2 before model-10."""
    words = re.split(r"(\d{1,12})", str(name))
    return tuple((1, int(word), "") if word.isdecimal() else (0, 0, word) for word in words)


def state_label(word: str) -> str:
    return f"{SHAPES[judgement_of(word)]} {word}"


def session_state(row: Mapping[str, Any], now: Any) -> str:
    """A session's state in a word: one that is idle for far longer than it usually thinks is silent, not thinking."""
    state, silent_s = str(row.get("state")), ago(now, row.get("last_at"))
    usual_s = (row.get("think_s") or 0.0) / max(1, (row.get("turns") or 0) - 1)
    if state == "idle" and silent_s is not None and silent_s > max(THINKING_LEAST_S, THINKING_FACTOR * usual_s):
        return "silent"
    return STATE_WORDS.get(state, state)


def session_facts(session: Mapping[str, Any], now: Any) -> str:
    """A session, as GET /stats/sessions/{id} has it, in a line."""
    seen, thought = session["last_seen"], [session[name] or 0.0 for name in ("pre_ms", "post_ms", "unaccounted_ms")]
    facts = [
        session_state({**session, "think_s": sum(thought) / 1000, "last_at": seen}, now),
        f"seen {seconds(ago(now, seen))} ago",
        f"task {session['task']}" if session["task"] else "",
        session["model"],
        f"on {session['backend']}" if session["backend"] else "",
        things(session["turns"], "turn"),
        f"{count(session['errors'])} failed" if session["errors"] else "",
    ]
    return " · ".join(filter(None, facts))


def session_frame(rows: Iterable[Mapping[str, Any]], now: Any) -> pd.DataFrame:
    """One row per session, in the given order; times in s, ``cached`` in percent of the input."""
    return table(
        rows,
        {
            "session": "id",
            "state": lambda row: session_state(row, now),
            "turns": "turns",
            "failed": "errors",
            "waited, s": "queued_s",
            "inference, s": "inference_s",
            "thinking, s": "think_s",
            "seen, s ago": lambda row: ago(now, row.get("last_at")),
            "lasted, s": lambda row: ago(row.get("last_at"), row.get("started_at")),
            "tokens in": "tokens_in",
            "tokens out": "tokens_out",
            "cached": lambda row: share_of(row["cached_tokens"], row["tokens_in"]),
            "task": "task",
            "replica": "replica",
            "model": "model",
            "client": "client",
        },
    )


def arranged(
    former: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]], gone: str
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """``(rows, others)``: the rows of ``former`` in their order, with their current figures, and those that are new.

    So no row moves while somebody points at it. One that isn't in ``current`` keeps its last figures, in the state
    ``gone``.
    """
    by_id: dict[Any, Any] = {row["id"]: row for row in current}
    rows = [by_id.pop(row["id"], None) or {**row, "state": gone} for row in former]
    return rows, list(by_id.values())


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
    known = {name: turn.get(f"{name.replace(' ', '_')}_ms") or 0.0 for name in PHASE_MEANINGS}
    if known["prefill"] or known["decode"]:
        known["inference"] = 0.0
    known["think"] -= known["idle"]  # think_ms is the whole gap
    return {name: value for name, value in known.items() if value > 0}


def waterfall(turns: Sequence[Mapping[str, Any]], chosen: int | None) -> dict[str, Any]:
    """A session's turns on one time axis, the first one at the top: what the trace draws.

    {"rows": [{number, title, note, judgement, is_open, bars: [[phase, left %, width %]]}], "ticks": [[left %, text]]}
    """
    begun = sorted((turn for turn in turns if is_known(turn.get("started_at"))), key=lambda turn: turn["number"])
    bars: list[list[tuple[str, float, float]]] = []  # of each turn: (phase, begin, length), in ms
    for turn in begun:
        phases = phases_of(turn)
        at = turn["started_at"] * 1000 - sum(phases.get(name, 0.0) for name in BEFORE)
        begins = itertools.accumulate(phases.values(), initial=at)
        bars.append([(name, begin, ms) for (name, ms), begin in zip(phases.items(), begins, strict=False)])
    begin = min((at for row in bars for _, at, _ in row), default=0.0)
    span = max((at + ms - begin for row in bars for _, at, ms in row), default=1.0)
    rows = [
        {
            "number": turn["number"],
            "title": ", ".join(f"{name} {duration(ms)}" for name, _, ms in row) or "no times known",
            "note": turn_note(turn),
            "judgement": {"completed": GOOD, "aborted": NEUTRAL}.get(turn["outcome"], BAD),
            "is_open": turn["number"] == chosen,
            "bars": [[name, round(100 * (at - begin) / span, 3), round(100 * ms / span, 3)] for name, at, ms in row],
        }
        for turn, row in zip(begun, bars, strict=True)
    ]
    return {"rows": rows, "ticks": [[round(100 * ms / span, 2), duration(ms)] for ms in ticks(span)]}


def ticks(span_ms: float, most: int = 5) -> list[float]:
    """Round times from 0 to ``span_ms``, at most ``most`` steps."""
    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500, *(1000 * s for s in (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)))
    step = next((step for step in steps if span_ms / step <= most), 3_600_000 * math.ceil(span_ms / 3_600_000 / most))
    return [index * step for index in range(int(span_ms / step) + 1)]


def turn_note(turn: Mapping[str, Any]) -> str:
    """A turn's length without think time, and what went wrong: "3.21 s", "3.21 s · error"."""
    took_ms = sum(ms for name, ms in phases_of(turn).items() if name not in BEFORE)
    wrong = turn["outcome"] if turn["outcome"] != "completed" else ""
    return " · ".join(filter(None, (duration(took_ms or None), wrong, turn.get("miss_reason") and "cache miss")))


def turn_facts(turn: Mapping[str, Any]) -> dict[str, str]:
    """What is known of a turn: name → text."""
    retries = turn["retries"]
    outcome = [str(turn["outcome"])]
    if turn["status"]:
        outcome.append(f"HTTP {turn['status']}")
    if retries:
        outcome.append("retried once" if retries == 1 else f"retried {retries} times")
    tokens_in, expected = count(turn.get("tokens_in")), turn.get("expected_cached_tokens")
    facts = {
        "outcome": ", ".join(outcome),
        "replica": str(turn.get("replica") or UNKNOWN),
        "tokens": f"{'≈ ' * bool(turn['tokens_estimated'])}{tokens_in} in, {count(turn.get('tokens_out'))} out",
        "cached": f"{count(turn.get('cached_tokens'))} of {tokens_in} input tokens"
        + (f", {count(expected)} expected" if is_known(expected) else ""),
        **{name: duration(ms) for name, ms in phases_of(turn).items()},
    }
    return facts | ({"cache miss": turn["miss_reason"]} if turn.get("miss_reason") else {})


def failure_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """The latest turns that failed or were refused."""
    failed = [row for row in listed(document, "recent_turns") if row["outcome"] in (*FAILED_OUTCOMES, "rejected")]
    columns = {name: name for name in ("session", "outcome", "error")}
    when = {"finished": lambda row: ago_text(document, row["finished_at"])}
    return table(failed[:20], {**when, **columns, "replica": "backend"})


def watchdog_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """Sessions that may need attention."""
    return table(
        listed(document, "watchdog"),
        {
            "kind": lambda row: row["kind"].replace("_", " "),
            "session": "session",
            "sentence": "sentence",
            "since": lambda row: ago_text(document, row["since"]),
        },
    )


def run_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """Announced runs, with what is left of them and the GPU time that they waste."""

    def left(value: Mapping[str, Any]) -> str:
        text = estimate(value, seconds, "")
        return text if text != UNKNOWN else str(value["reason"] or UNKNOWN)

    def waste(spent: Mapping[str, Any]) -> str:
        text = f"{seconds(spent['wasted_per_task'])} of {seconds(spent['held_per_task'])}"
        return text if is_known(spent["held_per_task"]) else UNKNOWN

    return table(
        listed(document, "runs"),
        {
            "run": "name",
            "done": lambda row: share_of(row["done"], row["tasks"]),
            "tasks": lambda row: f"{count(row['done'])} of {count(row['tasks'])}",
            "remaining (90 % interval)": lambda row: left(row["remaining_s"]),
            "stragglers": lambda row: ", ".join(each["task"] for each in row["stragglers"]),
            "GPU time wasted per task": lambda row: waste(row["gpu_time"]),
        },
    )


PIPELINE_WORDS = {
    "pre": "observing",
    "queue": "queue",
    "inference": "inference",
    "post": "acting",
    "unaccounted": "unexplained",
}


def pipeline_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """Where turns of the last 5 minutes spent their time; shares in percent. Empty without any."""
    known = [{"part": name, **part(document, "pipeline", name)} for name in PIPELINE_WORDS]
    times = {name: lambda row, key=f"{name}_ms": duration(row[key]) for name in ("mean", "p50", "p95")}
    columns = {"part": lambda row: PIPELINE_WORDS[row["part"]], "share": lambda row: 100 * row["share"]}
    return table([row for row in known if is_known(row.get("share"))], {**columns, **times})


RANGES = {"15m": 900.0, "1h": 3600.0, "6h": 21_600.0, "24h": 86_400.0, "7d": 604_800.0, "all": math.inf}


def history_path(now: float, span_s: float, model: str | None) -> str:
    """The path of GET /history for the last ``span_s``; the same for a step's time, so viewers share it."""
    step = max(1.0, span_s / HISTORY_STEPS)
    begin = 0 if math.isinf(span_s) else int((now - span_s) // step * step)
    return "/history?" + urlencode({"from": begin, "points": HISTORY_STEPS, **({"model": model} if model else {})})


def history_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """GET /history as steps: at (UTC) and one column per series, two rows per step so that lines are drawn as steps.

    Latencies are in s. Unknown values are NaN, which break the line: a gap of the controller is a gap everywhere.
    """
    frame = pd.DataFrame(part(document, "series"), dtype=float)
    if frame.empty:
        return frame
    in_ms = frame.columns.str.match("latency_ms|ttft_ms|queued_ms")
    frame.loc[:, in_ms] /= 1000
    frame.columns = frame.columns.str.replace(r"\W", "_", regex=True)  # Vega reads dots and brackets as a path
    frame = frame.loc[frame.index.repeat(2)].reset_index(drop=True)
    frame.loc[1::2, "at"] += document["step_s"] * 0.999
    frame["at"] = pd.to_datetime(frame["at"], unit="s", utc=True)
    return frame


def run_markers(document: Mapping[str, Any]) -> pd.DataFrame:
    """The announced runs in the range of GET /history: at (UTC, where each began), run."""
    frame = table(listed(document, "runs"), {"at": lambda row: max(row["from"], document["from"]), "run": "name"})
    frame["at"] = pd.to_datetime(frame["at"].astype(float), unit="s", utc=True)
    return frame


CAPACITY = {"curve": "predicted, with its interval", "here": "you are here, as measured"}
_LIMITS = {"knee": "knee_agents", "KV cache full": "kv_agents", "70 % utilisation": "utilisation_agents"}


def capacity_frame(entry: Mapping[str, Any]) -> pd.DataFrame:
    """The predicted curve, the current position and the limits on the number of agents: one row per point.

    kind (of CAPACITY, or "limit"), agents, turns_per_hour, low, high, text and side (of limits: their label, and to
    which side of the line it stands). A limit's turns_per_hour is the height of its label, above the curve.
    Limits beyond the curve are left out. Empty if there is no curve.
    """
    figures = ["agents", "turns_per_hour", "low", "high"]
    rows: list[dict[str, Any]] = [{**row, "kind": CAPACITY["curve"]} for row in listed(entry, "curve")]
    rate, agents = part(entry, "operating", "turns_per_hour"), value_of(entry, "operating", "agents")
    if rows and is_known(agents) and is_known(rate.get("value")):
        here = {"agents": agents, "turns_per_hour": rate["value"], "low": rate.get("low"), "high": rate.get("high")}
        rows.append({**here, "kind": CAPACITY["here"]})
    right = max((row["agents"] for row in rows), default=0.0)
    top = max((row[name] for row in rows for name in ("turns_per_hour", "high") if is_known(row[name])), default=0.0)
    found = [(value_of(entry, "limits", name), label) for label, name in _LIMITS.items()]
    limits = sorted((value, label) for value, label in found if is_known(value) and value <= right)
    # All labels are on the same side of their lines; the line that other labels cross is drawn lowest.
    side = "left" if not limits or limits[-1][0] < right * 0.72 else "right"
    for level, (value, label) in enumerate(limits if side == "right" else reversed(limits)):
        text = {"kind": "limit", "text": f"{label} {count(value)}", "side": side}
        rows.append({**text, "agents": value, "turns_per_hour": top * (1.14 + 0.14 * level)})
    frame = pd.DataFrame(rows, columns=["kind", *figures, "text", "side"])
    return frame.astype(dict.fromkeys(figures, float))


_OPTION_WORDS = {
    "utilisation": "70 % utilisation",
    "knee": "the knee: more would mostly wait",
    "efficient": "most throughput for its wait",
    "latency_goal": "the latency goal",
}


def option_frame(entry: Mapping[str, Any]) -> pd.DataFrame:
    """What other numbers of agents, and other changes, would do to throughput and to the wait, as far as is known."""
    suggestion = part(entry, "suggestion")
    now = {"name": "now", "agents": part(entry, "operating", "agents"), **part(suggestion, "now")}
    then = {"name": "suggested", "agents": part(suggestion, "agents"), **part(suggestion, "then")}
    rows = [now, then, *listed(suggestion, "options"), *listed(entry, "what_ifs")]
    return table(
        [row for row in rows if {estimate(part(row, name)) for name in ("agents", "change")} != {UNKNOWN}],
        {
            "what if": lambda row: _OPTION_WORDS.get(row["name"], row["name"]),
            "agents": lambda row: estimate(part(row, "agents"), count, ""),
            "turns per hour": lambda row: count(value_of(row, "turns_per_hour")),
            "change": lambda row: estimate(part(row, "change"), functools.partial(percent, signed=True), ""),
            "wait per turn": lambda row: estimate(part(row, "wait_s")),
        },
    )


_SHARE_WORDS = {
    "agent": "think time of the agents",
    "base_latency": "unloaded latency",
    "contention": "contention for the GPUs",
}


def share_frame(entry: Mapping[str, Any]) -> pd.DataFrame:
    """What limits throughput; shares in percent. Empty if unknown."""
    shares = [{"name": text, **part(entry, "verdict", "shares", key)} for key, text in _SHARE_WORDS.items()]
    return table(
        [row for row in shares if is_known(row.get("value"))],
        {
            "throughput is limited by": "name",
            "share": lambda row: 100 * row["value"],
            "interval": lambda row: f"{percent(row['low'])} to {percent(row['high'])}",
        },
    )


def basis_of(entry: Mapping[str, Any]) -> str:
    """The model that was fitted, and to what; empty without a fit."""
    fit, operating = part(entry, "fit"), part(entry, "operating")
    if not is_known(value_of(fit, "base_latency_s")):
        return ""
    basis = part(operating, "turns_per_hour", "basis")
    return (
        f"A turn takes {estimate(fit['base_latency_s'])} alone and {estimate(fit['per_request_s'])} more "
        f"for each turn in flight on its replica; agents think for {estimate(fit['think_s'])}. "
        f"The replicas are {estimate(operating['utilisation'], percent, '')} utilised. "
        f"From {count(basis.get('turns'))} turns in {seconds(basis.get('window_s'))}."
    )


def hours_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """Time of GPUs, or of replicas if none has a GPU, by model and state; with the sum if there are several models.

    The first column is titled by what it is the time of. Empty if it isn't recorded.
    """
    accounting = part(document, "accounting")
    has_gpus = any(part(accounting, "gpu_hours").values())
    key, unit = ("gpu_hours", "GPU time") if has_gpus else ("replica_hours", "replica time")
    rows = [{"model": row["model"], **row[key]} for row in listed(accounting, "by_model")]
    if len(rows) > 1:
        rows.append({"model": "all", **accounting[key]})
    states = {"busy": "ready_busy", "idle": "ready_idle", "loading": "loading", "pending": "pending"}

    times = {title: lambda row, state=state: duration(3.6e6 * row[state]) for title, state in states.items()}
    total = {"busy share": lambda row: share_of(row["ready_busy"], sum(row[state] for state in states.values()))}
    return table(rows, {unit: "model", **times, **total})


def cost_frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """GPU time per turn, session and task, and the share of it spent on cache misses."""
    costs = {f"per {name}": f"gpu_seconds_per_{name}" for name in ("turn", "session", "task")}
    shown = {title: lambda row, key=key: estimate(row["cost"][key], unit="s") for title, key in costs.items()}
    lost = {"cache misses": lambda row: estimate(row["cost"]["cache_miss_share"], percent, "")}
    return table(listed(document, "analysis"), {"GPU time": entry_label, **shown, **lost})


COURSE_BLOCK, COURSE_BLOCKS = "15s", 40  # at most: the ten minutes that /stats lists


@dataclass(frozen=True)
class Metric:
    """A figure of the overview: its label with its window, its value, a note, its judgement and its course."""

    label: str
    value: str
    note: str
    judgement: str = NEUTRAL
    course: tuple[float, ...] = ()


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
        Metric("Failed turns", percent(share), f"last {RECENT}", judgement),
    ]


def metrics_of_minute(document: Mapping[str, Any]) -> list[Metric]:
    """The rates and latencies of the last minute, with their course over the last minutes."""
    points = [{**point, **point["latency_ms"]} for point in listed(part(document, "throughput"), "history")]
    current = {**(points[-1] if points else {}), **part(document, "throughput")}
    shown: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("Turns per min", "turns_per_minute", figure),
        ("Tokens per s", "tokens_per_second", figure),
        ("Latency, median", "p50", duration),
        ("Latency, p95", "p95", duration),
    )
    return [
        Metric(label, show(current.get(name)), "last minute", course=course((p["at"], p[name]) for p in points))
        for label, name, show in shown
    ]


def course(points: Iterable[tuple[float, Any]]) -> tuple[float, ...]:
    """Means of a figure, from its ``(time, value)``, over blocks of time: what is drawn changes no more often.

    NaN where nothing is known. The latest block, which isn't over, is left out.
    """
    known = dict(points)
    if not any(map(is_known, known.values())):
        return ()
    figures = pd.Series(known, dtype=float)
    figures.index = pd.to_datetime(figures.index, unit="s")
    return tuple(figures.resample(COURSE_BLOCK).mean()[:-1].tail(COURSE_BLOCKS))


# =====================================================================================================================
# Charts: DataFrames → alt.Chart. Pure. Colours come from the theme (range "category"), so light and dark both fit.
# =====================================================================================================================

TIMES = {  # of axes, by what a tick begins
    **dict.fromkeys(("minutes", "hours"), "%H:%M"),
    **dict.fromkeys(("day", "date", "week"), "%d %b"),
    **dict.fromkeys(("month", "quarter"), "%b"),
    "seconds": "%H:%M:%S",
    "year": "%Y",
}
AXIS_PX = 44  # of the time axes' labels: "1,000" and some room
ROWS, STEPS, RUNS = (alt.NamedData(name) for name in ("rows", "steps", "runs"))  # charts are filled when shown


@dataclass(frozen=True)
class Panel:
    """One of the charts over time: its title with its unit, and its lines, by column of history_frame."""

    title: str
    lines: Mapping[str, str]


THROUGHPUT = Panel("turns per minute, completed", {"turns_per_minute": "turns"})
LATENCY = Panel(
    "latency of completed turns, s: queue and inference", {"latency_ms_p50": "median", "latency_ms_p95": "p95"}
)
QUEUE = Panel("concurrent turns", {"in_flight": "in flight", "queue": "waiting"})
SHARES = {"kv_usage": "KV cache in use", "hit_rate": "prefix cache hits", "gpu_utilization": "GPUs utilised"}
FAILURES = {"errors_per_minute": "errors", "rejected_per_minute": "refused", "aborted_per_minute": "client left"}
OVERVIEW_PANELS = (THROUGHPUT, LATENCY, QUEUE)
HISTORY_PANELS = (
    THROUGHPUT,
    Panel("output tokens per second", {"tokens_per_second": "tokens"}),
    LATENCY,
    Panel("time to the first token, s", {"ttft_ms_p50": "median", "ttft_ms_p95": "p95"}),
    Panel("inter-token latency, ms", {"itl_ms_p50": "median"}),
    QUEUE,
    Panel("KV cache, prefix hits, GPU: share", SHARES),
    Panel("turns per minute that failed", FAILURES),
    Panel("preemptions by the engines, per step", {"preemptions": "preemptions"}),
    Panel("turns by finish reason, per step", {}),  # its lines are those that the engines report
)
REASON = "finish_reasons_"


def panels_of(panels: Sequence[Panel], columns: Iterable[str]) -> tuple[Panel, ...]:
    """``panels`` with the lines that there are columns for; those of finish reasons are found by name."""
    names = sorted(columns)
    reasons = [name for name in names if name.startswith(REASON)][:6]
    lines = [panel.lines or {name: name.removeprefix(REASON) for name in reasons} for panel in panels]
    known = [{name: word for name, word in each.items() if name in names} for each in lines]
    return tuple(replace(panel, lines=each) for panel, each in zip(panels, known, strict=True) if each)


def _steps(panel: Panel, is_last: bool, height: int, brush: Any, crosshair: Any) -> Any:
    """One panel of the time axis.

    Streamlit gives each of several charts the whole width, without room for an axis beside it: so the lines begin
    AXIS_PX inside, and the labels stand before them, aligned over the panels.
    """
    names = list(panel.lines)
    times = alt.Axis(title=None, format=TIMES, tickCount=6, labelOverlap=True, labelFlush=True, grid=False)
    times.labels = is_last  # the axis is common
    figures = alt.Axis(title=None, tickCount=3, ticks=False, domain=False, offset=-AXIS_PX, labelPadding=6)
    figures.labelExpr = "abs(datum.value) >= 1000 ? format(datum.value, '~s') : format(datum.value, '~g')"
    x = alt.X("at:T", axis=times, scale=alt.Scale(domain=brush, range=[AXIS_PX, alt.ExprRef("width")]))
    titles = f"{json.dumps(dict(panel.lines))}[datum.label]"
    legend = alt.Legend(symbolType="stroke", offset=10, labelExpr=titles) if len(names) > 1 else None
    dashes = alt.Scale(domain=names, range=[[1, 0], [6, 3], [2, 2]])
    folded = alt.Chart(ROWS).transform_fold(names, as_=["name", "value"])
    lines = folded.mark_line(strokeWidth=1.75, clip=True).encode(
        x=x,
        y=alt.Y("value:Q", scale=alt.Scale(zero=True, nice=3), axis=figures),
        color=alt.Color("name:N", scale=alt.Scale(domain=names), legend=legend),
        strokeDash=alt.StrokeDash("name:N", scale=dashes, legend=legend),
    )
    tooltip = [alt.Tooltip("at:T", title="time", format="%d %b %H:%M:%S")]
    tooltip += [alt.Tooltip(f"{name}:Q", title=word, format=",.3~r") for name, word in panel.lines.items()]
    shown = alt.condition(crosshair, alt.value(1), alt.value(0), empty=False)
    steps = alt.Chart(STEPS).mark_rule(strokeWidth=1, clip=True)  # each of these marks costs more than a line's point
    rule = steps.encode(x=x, tooltip=tooltip, opacity=shown).add_params(crosshair)
    runs = alt.Chart(RUNS).encode(x=x, tooltip=[alt.Tooltip("run:N", title="run")])
    marks = runs.mark_rule(strokeWidth=1.5, strokeDash=[3, 3], clip=True)
    return alt.layer(lines, rule, marks).properties(height=height, title=panel.title)


def timeline_chart(panels: Sequence[Panel], height: int = 110) -> Any:
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
    area = alt.Chart(ROWS).mark_area(opacity=0.5).encode(x=x, y=y)
    strip = area.properties(height=28, title=hint).add_params(brush)
    rest = [_steps(panel, panel is panels[-1], height, brush, crosshair) for panel in panels]
    with warnings.catch_warnings():  # Altair warns that several charts share a crosshair, which is intended
        warnings.simplefilter("ignore", UserWarning)
        joined = alt.vconcat(strip, *rest, spacing=14)
    return joined.resolve_scale(color="independent", strokeDash="independent")


def capacity_chart(height: int = 300) -> Any:
    """Throughput by agents, of capacity_frame: the fitted curve, its limits, and "you are here", with intervals."""
    everything = alt.Chart(ROWS).encode(
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
        "aria": False,  # descriptions of single marks, which a canvas can't show
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
    # Vega warns about layers without rows
    embedding = {"logLevel": 1, "renderer": "canvas", "actions": False}
    return {**specification, "config": config, "usermeta": {"embedOptions": embedding}}


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

function placed(className, left, width) {
  const made = make("span", className);
  if (left !== null) made.style.left = left + "%";
  made.style.width = width + "%";
  return made;
}

function legend(list, items) {  // [phase, text, title] of each
  list.replaceChildren(...items.map(([phase, text, title]) => {
    const item = make("li");
    if (phase) item.append(make("span", "swatch " + phase.replace(" ", "-")));
    if (title) item.title = title;
    item.append(text);
    return item;
  }));
}
"""

BAR_CSS = """
.bar { display: flex; height: 14px; border-radius: 3px; overflow: hidden; outline: 1px solid var(--line); }
.bar > span { display: block; height: 100%; border-right: 1px solid var(--card); box-sizing: border-box; }
"""

# The bar of phases is always there, so it also hears the keys of the whole page.
BAR_JS = r"""
function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  const target = event.composedPath()[0];
  if (target.closest?.("input, textarea, select, [contenteditable], [role=dialog], [role=listbox]")) return;
  if (event.key === "q" || event.key === "Escape") document.querySelector(".st-key-pause button")?.click();
  const arrow = { j: "ArrowDown", k: "ArrowUp" }[event.key];  // tables know the arrows
  if (arrow && target.closest?.("[data-testid=stDataFrame]"))
    target.dispatchEvent(new KeyboardEvent("keydown", { key: arrow, code: arrow, bubbles: true, cancelable: true }));
}

export default function ({ data, parentElement, setStateValue }) {
  const { parts, label, hasKeys, isFirst } = JSON.parse(new TextDecoder().decode(data));
  const root = make("div", "root"), bar = root.appendChild(make("div", "bar"));
  bar.role = "img";
  bar.ariaLabel = label;
  bar.append(...parts.map(([name, share]) => placed(name, null, 100 * share)));
  legend(root.appendChild(make("ul")), parts.length ? parts.map(([name, , text]) => [name, text]) : [["", label]]);
  parentElement.querySelector(".root")?.remove();
  parentElement.append(root);
  if (isFirst) requestAnimationFrame(() => setTimeout(() => setStateValue("isPainted", true)));
  if (document.documentElement.lang !== "en") document.documentElement.lang = "en";  // to set it restyles everything
  document[hasKeys ? "addEventListener" : "removeEventListener"]("keydown", onKey);
  return () => { document.removeEventListener("keydown", onKey); root.remove(); };
}
"""

TRACE_CSS = """
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

TRACE_JS = r"""
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

function begun(number) {
  const row = make("div", "row");
  row.dataset.number = number;
  row.role = "option";
  row.tabIndex = -1;
  return row;
}

function update(row, data) {
  const { number, title, note, judgement, is_open, bars } = data, text = JSON.stringify(data);
  if (row.text === text) return row;  // what hasn't changed is left alone
  row.text = text;
  row.ariaSelected = String(is_open);
  row.dataset.judgement = judgement;
  row.title = title;
  const lane = make("div", "lane");
  lane.append(...bars.map(([name, left, width]) => placed(name.replace(" ", "-"), left, width)));
  row.replaceChildren(make("span", "number", String(number)), lane, make("span", "note", note));
  return row;
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
  const known = new Map(rowsOf(root).map(row => [row.dataset.number, row]));
  const wanted = rows.map(each => update(known.get(String(each.number)) || begun(each.number), each));
  const kept = new Set(wanted);
  for (const row of known.values()) if (!kept.has(row)) row.remove();
  wanted.forEach((row, index) => {
    if (root.rows.children[index] !== row) root.rows.insertBefore(row, root.rows.children[index] || null);
  });
  const current = rowsOf(root).find(row => row.dataset.number === root.current) || root.rows.firstElementChild;
  if (current && current.tabIndex !== 0) setCurrent(root, current, false);
  const names = phases.map(([name]) => name).join();
  if (root.names !== names) legend(root.legend, phases.map(([name, meaning]) => [name, name, meaning]));
  root.names = names;
  if (!root.isShown && current && document.activeElement === document.body) setCurrent(root, current, true);
  root.isShown = true;
  return () => { delete parentElement.root; root.remove(); };
}
"""

# What Streamlit has no setting for: less room above, no fading while figures are refreshed, cards in a grid.
PAGE_CSS = """
.stMainBlockContainer { padding: 3.6rem clamp(12px, 2vw, 32px) 40px; max-width: 2600px; }
[data-stale="true"] { opacity: 1 !important; transition: none !important; }
[data-testid="stStatusWidget"]:not(:has(.stConnectionStatus)) { visibility: hidden; }
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
_number, _share = st.column_config.NumberColumn, functools.partial(st.column_config.ProgressColumn, format="%.0f %%")
COLUMNS: Mapping[str, Any] = {  # by title, in all tables; the others are text, or numbers as they are
    **{title: _share(max_value=100) for title in ("done", "share", "busy share")},
    **{title: _share(max_value=100, width=110) for title in ("GPU utilised", "KV cache", "GPU memory")},
    "cached": _share(max_value=100, width=110, help="share of the input tokens"),
    "waited, s": _number(format="%.1f", help="in the queue, sum over its turns"),
    "thinking, s": _number(format="%.1f", help="sum of the times between its turns"),
    "seen, s ago": _number(format="%,.0f"),
    "lasted, s": _number(format="%,.0f", help="from its first turn to its latest sign of life"),
    "tokens in": _number(format="compact"),
    "tokens out": _number(format="compact"),
    "first token, s": _number(format="%.2f", help="median"),
    "inference, s": _number(format="%.2f", help="median of a replica; sum of a session"),
    "p95, s": _number(format="%.2f"),
}


@dataclass(frozen=True)
class Source:
    """The source of a viewer's figures, and how often they are read."""

    documents: Documents
    url: str
    interval_s: float
    is_paused: bool

    def read(self, path: str, every_s: float = 0.0, name: str | None = None) -> Reading:
        """The reading of ``path`` to show: the current one, or the one from when the viewer paused.

        ``name`` stands for paths that differ only in their time.
        """
        kept: dict[str, Reading] = st.session_state.setdefault("readings", {})
        name = name or path
        former = kept.pop(name, None)
        if former is None or not self.is_paused:
            found = self.documents.read(path, 0.9 * max(self.interval_s, every_s))
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


def show_table(frame: pd.DataFrame, key: str, opens_session: bool = False, **options: Any) -> None:
    """A table of the columns of ``frame`` of which anything is known. A row's box may open its session."""
    if opens_session:
        on_select = functools.partial(_open_selected, key, list(frame["session"]))
        options.update(on_select=on_select, selection_mode="single-row")
    known = frame.loc[:, (frame.notna() & ~frame.isin([UNKNOWN])).any()]
    columns = {title: column for title, column in {**COLUMNS, **options.pop("columns", {})}.items() if title in known}
    st.dataframe(known, hide_index=True, column_config=columns, key=key, placeholder=UNKNOWN, row_height=32, **options)


def show_card(title: str, frame: pd.DataFrame, key: str, empty: str, **options: Any) -> None:
    """A table under its title, or why there is none."""
    with st.container(border=True, height="stretch"):
        st.markdown(title)
        if frame.empty:
            st.text(empty)
        else:
            show_table(frame, key, **options)


def show_badge(judgement: str, word: str) -> None:
    st.badge(f"{SHAPES[judgement]} {word}", color=COLOURS[judgement])


def show_statement(judgement: str, word: str, text: str) -> None:
    with st.container(horizontal=True, wrap=False, gap="small"):
        show_badge(judgement, word)
        st.text(text, width="stretch")


def show_problem(problem: ProxyError | None) -> None:
    """Why a part of the page isn't current."""
    if problem is not None and problem.is_final:
        st.text(problem.what)
    elif problem is not None:
        show_statement(BAD, "not current", f"{problem.what} {problem.fix}")


@st.cache_resource(show_spinner=False, hash_funcs={Panel: repr})
def _template(panels: Sequence[Panel], dark: bool) -> dict[str, Any]:
    """A chart without its data, built once per process; without panels, the curve of the capacity.

    Altair takes a few hundred milliseconds to build one; filling this one takes almost none. Streamlit collects garbage
    after every run, a fragment's too: 0.2 s of CPU with all that pandas and Altair have made. Objects that exist by now
    stay, so collections skip them from here on.
    """
    template = themed((timeline_chart(panels) if panels else capacity_chart()).to_dict(), dark)
    gc.freeze()
    return template


def show_chart(name: str, label: str, data: Mapping[str, pd.DataFrame], panels: Sequence[Panel] = ()) -> None:
    """Show a chart. The browser changes its data in place, so what is zoomed stays zoomed."""
    specification = {**_template(panels, st.context.theme.type == "dark"), "datasets": dict(data)}
    st.vega_lite_chart(spec=specification, key=name, width="stretch", alt=label, theme=None)


def show_part(name: str, css: str, script: str, data: Any, **callbacks: Any) -> None:
    """Show a browser part; its messages are of one piece, so that what hasn't changed is the same."""
    part = st.components.v2.component(f"agent_infra_{name}", css=COLOURS_CSS + css, js=MAKE_JS + script)
    part(key=name, data=json.dumps(data).encode(), **callbacks)


def _nothing() -> None:
    """Streamlit reports a component's state only if it has a callback."""


def is_painted() -> bool:
    """Whether the browser shows the status. It is sent first, on its own, so it appears quickly."""
    reported = (st.session_state.get("phases") or {}).get("isPainted")
    st.session_state["painted"] = bool(reported or st.session_state.get("painted"))
    return bool(st.session_state["painted"])


def phase_bar(document: Mapping[str, Any]) -> None:
    """Where the time of recent turns went, as a bar."""
    known = {name: part(document, "pipeline", name).get("share") for name in PIPELINE_WORDS}
    parts = [[name, share, f"{PIPELINE_WORDS[name]} {percent(share)}"] for name, share in known.items() if share]
    label = "No turn has finished in the last 5 minutes."
    if parts:
        label = "Where the time of turns went, last 5 minutes: " + ", ".join(text for _, _, text in parts)
    flags = {"hasKeys": bool(st.session_state.get("keys")), "isFirst": not is_painted()}
    data = {"parts": parts, "label": label, **flags}
    show_part("phases", BAR_CSS, BAR_JS, data, on_isPainted_change=_nothing)


def status_view(source: Source, body: Callable[[Source], None] | None) -> None:
    """What is going on and where the time goes, on every tab; below it ``body``."""
    reading = source.read("/stats")
    document, age_s = reading.document or {}, None
    if is_painted() != st.session_state["was_painted"] or model_names(document) != st.session_state["models"]:
        st.rerun()  # with the rest of the page, and with the choice of models
    if document:
        read_s = 0.0 if source.is_paused else max(0.0, source.documents.clock() - reading.read_at)
        age_s = read_s + document["snapshot_age_ms"] / 1000
    statements = status_of(document, reading.problem, age_s, st.context.timezone)
    if source.is_paused:
        statements.insert(0, paused_status(document, st.context.timezone, time.time()))
    facts = [source.url, ", ".join(model_names(document)), document.get("strategy")]
    facts += [f"up {seconds(document['uptime_seconds'])}"] if document else []
    st.text(" · ".join(filter(None, facts)))
    with st.container(border=True, key="status", gap="xsmall"):
        for status in statements[:5]:
            show_statement(status.judgement, status.word, f"{status.sentence} {status.hint}".strip())
        phase_bar(document)
    if body is not None:
        body(source)


def model_names(document: Mapping[str, Any]) -> list[str]:
    return [row["name"] for row in listed(document, "models")]


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
    if document := source.stats():
        show_metrics(metrics_of_now(document), "metrics_now")


def course_view(source: Source) -> None:
    """What changes more slowly: the last minute, charts, and what needs attention."""
    if st.session_state.pop("is_moved", False):
        st.rerun()  # to another tab
    document = source.stats()
    if not document:
        return
    if not document["totals"]["requests"]:
        request = FIRST_REQUEST.format(url=source.url, model=next(iter(model_names(document)), "MODEL"))
        with st.container(border=True):
            st.markdown("**A first request**")
            st.code(request, language="bash", wrap_lines=True)
            st.markdown("**In an agent**: sessions, turns and think time")
            st.code(ATTACH.format(url=source.url), language="python", wrap_lines=True)
    show_metrics(metrics_of_minute(document), "metrics_minute")
    timeline_view(source, "overview", OVERVIEW_PANELS, CHARTS_EVERY_S)
    attention_view(document)


def attention_view(document: Mapping[str, Any]) -> None:
    """Runs, sessions that may need attention, and the latest failures."""
    runs = run_frame(document)
    if not runs.empty:
        st.markdown("**Runs**")
        show_table(runs, "runs")
    left, right = st.columns(2)
    with left:
        empty = "None: no session is silent, repeating, oversized or thrashing."
        options: dict[str, Any] = {"opens_session": True, "height": 260}
        show_card("**Sessions that may need attention**", watchdog_frame(document), "watchdog", empty, **options)
    with right:
        empty = f"None among the {things(len(document['recent_turns']), 'turn')} that finished last."
        show_card("**Latest turns that failed or were refused**", failure_frame(document), "failures", empty, **options)


def timeline_view(source: Source, name: str, panels: Sequence[Panel], every_s: float) -> None:
    """Charts over the chosen time."""
    now, chosen = source.stats().get("now"), str(st.session_state.get("range") or "1h")
    if not is_known(now):
        return
    model = st.session_state.get("model")
    reading = source.read(history_path(now, RANGES[chosen], model), every_s, name=f"history {chosen} {model}")
    show_problem(reading.problem)
    document = reading.document or {}
    frame = history_frame(document)
    if frame.empty:
        if reading.problem is None:
            st.text("Nothing has been recorded in this time.")
        return
    span = "All that is recorded" if chosen == "all" else f"Last {duration(1000 * RANGES[chosen])}"
    st.text(
        f"{span}{f' of {model}' if model else ''}, in steps of {seconds(document['step_s'])}. "
        "Gaps: no controller ran, or nothing was measured. "
        "Latency is the time from a turn's arrival to the last byte of its answer: queue and inference."
    )
    drawn = panels_of(panels, frame.columns)
    label = "Lines over time, on one axis: " + "; ".join(panel.title for panel in drawn)
    rows = frame[["at", *(line for panel in drawn for line in panel.lines)]]  # Vega copies all columns for each line
    show_chart(name, label, {"rows": rows, "steps": rows[::2], "runs": run_markers(document)}, drawn)


# --- Sessions ---------------------------------------------------------------------------------------------------------


def sessions_view(source: Source) -> None:
    name = st.query_params.get("session")
    trace_view(source, name) if name else list_view(source)


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
    before = LISTED_SESSIONS * (int(st.session_state.get(pages) or 1) - 1)
    path = sessions_path(before)
    reading = source.read(path, LIST_EVERY_S)
    show_problem(reading.problem)
    current, total = listed(reading.document, "sessions"), (reading.document or {}).get("total", 0)
    shown = st.session_state.get("listing")
    if shown is None or shown[0] != path or not shown[1]:
        shown = (path, current)
    rows, others = arranged(shown[1], current, gone="not current")
    st.session_state["listing"] = (path, rows)
    with st.container(horizontal=True, vertical_alignment="center"):
        has_pages = total > LISTED_SESSIONS
        span = f"Showing {count(before + 1)} to {count(before + len(rows))} of " if has_pages else ""
        order = st.session_state.get("order") or next(iter(ORDERS))
        st.text(f"{span}{things(total if has_pages else len(rows), 'session')}, {order} first.")
        label = f"{things(len(others), 'other session')} in this order now: refresh" if others else "Refresh order"
        kind: Any = "secondary" if others else "tertiary"
        st.button(label, key="reorder", type=kind, on_click=st.session_state.pop, args=("listing", None))
    if not rows:
        st.text("No session matches." if reading.document else "Loading sessions…")
        return
    show_table(session_frame(rows, source.stats().get("now")), "sessions", opens_session=True, height=640)
    if has_pages:
        st.pagination(math.ceil(total / LISTED_SESSIONS), key=pages)


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
    turns = listed(document, "turns")
    if not turns:
        if reading.problem is None:
            st.text("No finished turn yet." if document else "Loading turns…")
        return
    total = document["turns_total"]
    st.session_state["turns_total"] = total if page == 1 else turns_total
    st.text(session_facts(document["session"], document["now"]))
    number = (st.session_state.get("trace") or {}).get("turn")
    chosen = next((turn for turn in turns if turn["number"] == number), None)
    left, right = st.columns([3, 2] if chosen else [1, 0.001], gap="medium")
    with left:
        known = {phase for turn in turns for phase in phases_of(turn)}
        phases = [[phase, text] for phase, text in PHASE_MEANINGS.items() if phase in known]
        label = f"{things(len(turns), 'turn')}; Enter shows a turn's text"
        data = {**waterfall(turns, number), "phases": phases, "label": label}
        show_part("trace", TRACE_CSS, TRACE_JS, data, on_turn_change=_nothing)
        if total > LISTED_TURNS:
            st.text(f"Showing {LISTED_TURNS} of {count(total)} turns, the most recent ones on page 1.")
            st.pagination(math.ceil(total / LISTED_TURNS), key="turns_page")
    if chosen:
        with right:
            turn_view(chosen)


def turn_view(turn: Mapping[str, Any]) -> None:
    """A turn: what it was about, and what is known of it."""
    st.markdown(f"**Turn {int(turn['number'])}**")
    if turn["error"]:
        show_badge(BAD, "failed")
        st.code(turn["error"], language=None, wrap_lines=True)
    details = "\n".join(f"{name}: {text}" for name, text in turn_facts(turn).items())
    for title, text in (("prompt", turn["prompt"]), ("answer", turn["answer"]), ("details", details)):
        st.text(title)
        st.code(text or UNKNOWN, language=None, wrap_lines=True)


# --- Replicas ---------------------------------------------------------------------------------------------------------


def replicas_view(source: Source) -> None:
    """The replicas, the most urgent first, and all that is known of the chosen one."""
    document = source.stats()
    current = by_urgency(document)
    is_ticked = bool(part(st.session_state.get("replicas"), "selection").get("rows"))
    former = st.session_state.get("former replicas", ()) if is_ticked else ()  # Streamlit knows a row by its place
    rows, others = arranged(former, current, gone="gone")
    rows += others
    if not rows:
        st.text(f"There are no replicas; {START}" if document else "")
        return
    st.session_state["former replicas"] = rows
    total = sum(state_of(row) not in ("stopped", "gone") for row in rows)
    st.text(
        f"{_ready(document)} of {things(total, 'replica')} ready. Inference and first token: last {RECENT}. "
        "Turns and failures: since the proxy started."
    )
    frame = replica_frame(rows, document["now"])
    most = max([1.0, *(value for history in frame["in flight, 2 min"] for value in history)])
    states = st.column_config.MultiselectColumn(
        options=[state_label(state) for state in REPLICA_STATES],
        color=[COLOURS[judgement_of(state)] for state in REPLICA_STATES],
        width=110,
    )
    course = st.column_config.LineChartColumn(y_min=0, y_max=most, width=130)
    columns = {"state": states, "in flight, 2 min": course}
    options: dict[str, Any] = {"on_select": "rerun", "selection_mode": "single-row"}
    show_table(frame, "replicas", columns=columns, height=min(640, 40 + 32 * len(frame)), **options)
    ticked = st.session_state["replicas"]["selection"]["rows"]
    if ticked and ticked[0] < len(rows):
        replica_view(rows[ticked[0]])


def replica_view(row: Mapping[str, Any]) -> None:
    """Why a replica is as it is."""
    state, tunnel = state_of(row), part(row, "tunnel")
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            show_badge(judgement_of(state), state)
            st.code(row["id"], language=None, width="content")
        for text in filter(None, (reason_of(row), hint_of(row), tunnel.get("reason"))):
            st.text(text)
        if line := part(row, "failure").get("line"):
            st.text("The line of its log that decides it:")
            st.code(line, language=None, wrap_lines=True)
        facts = [
            f"port {row['port']}" if row.get("port") else "",
            things(row.get("sessions"), "session"),
            f"tunnel {tunnel['state']}, replaced {things(tunnel['reconnects'], 'time')}" if tunnel else "",
        ]
        st.text(" · ".join(filter(None, facts)))


# --- Analysis ---------------------------------------------------------------------------------------------------------


def analysis_view(source: Source) -> None:
    """What limits throughput, and what would help; below, where the time and the GPU time went."""
    document, chosen = source.stats(), st.session_state.get("model")
    shown = [entry for entry in listed(document, "analysis") if chosen is None or entry["model"] == chosen]
    for index, entry in enumerate(shown):
        with st.container(border=True):
            entry_view(entry, index, document["now"], idle_s(document) is not None)
    if not shown:
        st.text("There is no analysis yet: it needs turns.")
    left, right = st.columns(2)
    with left:
        empty = "No turn has finished in the last 5 minutes."
        show_card("**Where the time of turns goes**, last 5 minutes", pipeline_frame(document), "pipeline", empty)
    with right:
        hours = hours_frame(document)
        since_s = ago(document.get("now"), part(document, "accounting").get("since"))
        title = f"**{hours.columns[0]}**, last {seconds(since_s)}" if not hours.empty else "**GPU time**"
        show_card(title, hours, "hours", "No GPU time has been recorded yet.")
        show_card("**GPU time per turn, session and task**", cost_frame(document), "cost", "None is known yet.")


def entry_view(entry: Mapping[str, Any], index: int, now: Any, is_idle: bool) -> None:
    """The verdict on one model and GPU type: the last one, with its age, while ``is_idle`` or while there is none."""
    verdict, last = entry["verdict"], part(entry, "last_verdict")
    judgement, word = judgement_of(verdict["name"]), verdict["name"]
    texts, is_past = [verdict["sentence"] or verdict["reason"], advice_of(entry)], False
    if last and (is_idle or word == "NO DATA"):
        is_past = last["name"] != word
        judgement, word, texts = NEUTRAL, last_verdict(entry, now), [last["sentence"], last["suggestion"]]
    show_statement(judgement, word, entry_label(entry))
    for text in filter(None, texts):
        st.text(text)
    for flag in entry["flags"]:
        show_statement(judgement_of(flag["name"]), flag["name"], flag["sentence"])
    shares, curve = share_frame(entry), capacity_frame(entry)
    if shares.empty or is_past:  # what an idle fleet looks like
        return
    left, right = st.columns([3, 2])
    with left:
        show_table(shares, f"shares {index}")
        show_table(option_frame(entry), f"options {index}")
    with right:
        if curve.empty:
            st.text("No curve: too little is known to predict throughput.")
        else:
            label = "Predicted turns per hour by number of agents, with the current position and the limits."
            show_chart(f"capacity {index}", label, {"rows": curve})
    st.text(basis_of(entry))


# --- The page ---------------------------------------------------------------------------------------------------------


def controls_view(source: Source, models: Sequence[str]) -> None:
    """What the figures are of, and how they are refreshed."""
    bound: dict[str, Any] = {"label_visibility": "collapsed", "bind": "query-params"}
    with st.container(horizontal=True, vertical_alignment="center", key="controls"):
        st.markdown("#### Agent Infra", width="stretch")
        if len(models) > 1:
            st.pills("Model", models, key="model", **bound)
        st.segmented_control("Time", list(RANGES), default="1h", required=True, key="range", **bound)
        st.button("Resume" if source.is_paused else "Pause", key="pause", on_click=_pause)
        with st.popover("Settings"):
            st.segmented_control(
                "Refresh every", INTERVALS_S, default=1, format_func=lambda s: f"{s} s", key="interval", required=True
            )
            st.toggle("Keys", key="keys", help="q or Esc pauses; j and k move in tables")


def _pause() -> None:
    st.session_state["paused"] = not st.session_state.get("paused")


history_view = functools.partial(timeline_view, name="history", panels=HISTORY_PANELS, every_s=HISTORY_EVERY_S)
View: TypeAlias = "Callable[[Source], None] | None"
# Of each tab: what is shown with the status, at every refresh; what is refreshed less often; and how often, in s.
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
                source.refreshed(functools.partial(status_view, body=fast if is_painted() else None))
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
