"""Documents of GET /stats as the page may meet them, and a small proxy's API that serves them."""

from __future__ import annotations

import copy
import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from patience import PATIENCE_S
from testbed.ports import free_port

GOLDEN = Path(__file__).parent / "golden"
NOW = 1_795_365_000.0
HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>",
    "**bold** _it_ `code` $x^2$ :smile: :red[red] [a](javascript:window.hacked=1)",
    "\u202eright to left\u202c اختبار עברית",
    "x" * 200,
    "日本語 🚀 \u0000\u0007 tab\tnew\nline",
    "' \" & < > ${1} {{1}} %s",
)
MISS = "the prompt changed at message 3 of 9"


def analysis(*names: str) -> list[dict[str, Any]]:
    """The golden entries whose verdicts are ``names``; all of them without any."""
    entries: list[dict[str, Any]] = json.loads((GOLDEN / "analysis.json").read_text())
    return [entry for entry in entries if not names or entry["verdict"]["name"] in names]


def last_verdict(name: str) -> dict[str, Any]:
    """The field of an entry of the analysis, of a second ago."""
    return {"last_verdict": {**analysis("GPU-BOUND")[0]["last_verdict"], "name": name, "at": NOW - 1}}


def percentiles(p50: float | None) -> dict[str, float | None]:
    return {"p50": p50, "p95": p50 and p50 * 2.4, "p99": p50 and p50 * 3.1}


def backend(number: int, **changes: Any) -> dict[str, Any]:
    """A replica on a GPU node, ready, at work."""
    return {
        "id": f"qwen-{number}",
        "model": "qwen",
        "node": f"gpu{number // 4:02d}",
        "partition": "gpu",
        "port": 5900 + number,
        "state": "ready",
        "healthy": True,
        "reason": None,
        "failure": None,
        "progress": None,
        "restarts": 0,
        "started_at": NOW - 5000,
        "ready_at": NOW - 4900,
        "ends_at": NOW + 3600 + 60 * number,
        "inflight": 30 + number % 9,
        "inflight_history": [20 + (number * 7 + step * 3) % 25 for step in range(60)],
        "slots": 64,
        "gpu": {
            "count": 1,
            "name": "NVIDIA H100 80GB HBM3",
            "utilization": 71.0 + number % 24,
            "memory_used": 70 * 2**30 + number * 2**26,
            "memory_total": 80 * 2**30,
            "power_w": 512.0,
            "temperature_c": 61.0,
        },
        "engine": {
            "name": "vllm",
            "state": "ready",
            "running": 30,
            "waiting": 2,
            "kv_usage": 0.42 + number % 40 / 100,
            "kv_capacity_tokens": 430_000,
            "prefix_queries": 100_000,
            "prefix_hits": 81_000,
            "preemptions": 0,
            "prompt_tokens": 1_000_000,
            "generation_tokens": 200_000,
            "at": NOW,
        },
        "tunnel": {"state": "up", "reconnects": 0, "reason": None, "driver": "sshtunnel", "mode": "login"},
        "requests": 460 + number,
        "errors": 0,
        "latency_ms": percentiles(7400.0 + number % 5 * 40),
        "ttft_ms": percentiles(640.0),
        "gap_ms": percentiles(31.0),
        "sessions": 60,
        **changes,
    }


def session(number: int, name: str | None = None, **changes: Any) -> dict[str, Any]:
    turns = 3 + number % 17
    return {
        "id": name or f"task-{number:04d}",
        "task": f"webshop-{number % 9}",
        "model": "qwen",
        "backend": f"qwen-{1 + number % 4}",
        "state": ("decoding", "idle", "prefill", "waiting", "idle")[number % 5],
        "turns": turns,
        "errors": int(number % 41 == 7),
        "last_seen": NOW - number % 60,
        "idle_since": None,
        "pre_ms": 2100.0 * turns,
        "wait_ms": 130.0 * (1 + number % 7) * turns,
        "inference_ms": 7300.0 * turns,
        "post_ms": 1900.0 * turns,
        "unaccounted_ms": 420.0 * turns if number % 3 else None,
        "context_tokens": 900 * turns,
        "prompt_tokens": 800 * turns,
        "cached_tokens": 780 * turns,
        "tokens_in": 12_000,
        "tokens_out": 2_400,
        "cache_misses": int(number % 6 == 2),
        "last_miss": MISS if number % 6 == 2 else None,
        "alerts": ["repeating"] if number % 47 == 12 else [],
        "moves": 0,
        **changes,
    }


def turn(number: int, session_id: str, **changes: Any) -> dict[str, Any]:
    inference = 4000.0 + number * 731 % 6000
    return {
        "turn": f"turn-{number}",
        "key": None,
        "session": session_id,
        "task": "webshop-1",
        "client": "host:4711 python agent.py",
        "model": "qwen",
        "path": "/v1/chat/completions",
        "stream": True,
        "backend": f"qwen-{1 + number % 4}",
        "started_at": NOW - number * 2 - inference / 1000,
        "finished_at": NOW - number * 2,
        "outcome": ("completed", "completed", "completed", "completed", "error", "aborted")[number % 19 % 6],
        "status": 200,
        "retries": int(number % 23 == 3),
        "pre_ms": 800.0 + number * 97 % 2600,
        "queue_ms": number * 53 % 900,
        **dict.fromkeys(("held_ms", "retry_ms"), 0.0),
        "ttft_ms": 420.0 + number * 31 % 500,
        "inference_ms": inference,
        "post_ms": 900.0 if number % 4 else None,
        "unaccounted_ms": 350.0 if number % 3 else None,
        "think_ms": 3000.0,
        "prompt_tokens": 2100 + 310 * number % 5000,
        "completion_tokens": 120 + number % 90,
        "cached_tokens": 1800,
        "expected_cached_tokens": 2000,
        "cache_miss": MISS if number % 7 == 3 else None,
        "tokens_estimated": number % 11 == 5,
        "finish_reason": "stop",
        "error": "the replica died during this turn" if number % 19 % 6 == 4 else None,
        "prompt": f"Observation {number}: the page lists 12 articles. Which one do you open?",
        "answer": "I open the third article, because it is the cheapest one that fits.",
        **changes,
    }


def outcomes(completed: int, errors: int = 0, aborted: int = 0) -> dict[str, float]:
    """Of the last five minutes."""
    return {"window_s": 300.0, "completed": completed, "errors": errors, "aborted": aborted, "rejected": 0}


def session_row(number: int, state: str | None = None, name: str | None = None) -> dict[str, Any]:
    """A row of GET /sessions."""
    row, turns = session(number, name), 3 + number % 17
    return {
        **{key: row[key] for key in ("id", "task", "model", "state", "turns", "errors", "tokens_in", "tokens_out")},
        "state": state or ("ended" if number >= LIVE_SESSIONS else row["state"]),
        "client": f"host{number % 6}:{4000 + number % 6}",
        "started_at": NOW - 60.0 * turns - number,
        "last_at": NOW - number % 60 - (number >= LIVE_SESSIONS) * number,
        "cached_tokens": 9000 + number,
        "queued_s": number * 7919 % 1000 / 10,
        "inference_s": 7.3 * turns,
        "think_s": 4.0 * turns,
        "replica": row["backend"],
        **dict.fromkeys(("completed", "aborted", "rejected"), 1),
    }


LIVE_SESSIONS = 320


def traced_turn(number: int, session_id: str) -> dict[str, Any]:
    """A turn of GET /stats/sessions/{id}: turn 7 was sent twice and missed the cache, turn 9 failed."""
    row = turn(number, session_id, outcome="error" if number == 9 else "completed")
    inference = row["inference_ms"]
    prefill = row["ttft_ms"] - (200.0 if number == 7 else 0.0)
    started = NOW - 200 + 14 * number
    return {
        **row,
        "number": number,
        "started_at": started,
        "finished_at": started + (row["queue_ms"] + inference) / 1000,
        "replica": row["backend"],
        "tokens_in": row["prompt_tokens"],
        "tokens_out": row["completion_tokens"],
        "miss_reason": MISS if number == 7 else None,
        "error": "the replica died during this turn" if number == 9 else None,
        "think_ms": 3000.0 if number > 1 else None,
        "idle_ms": 1000.0 if number % 3 == 0 else None,
        "queued_ms": row["queue_ms"],
        "held_ms": 700.0 if number == 5 else 0.0,
        "retry_ms": 900.0 if number == 7 else 0.0,
        "replayed_prefill_ms": 200.0 if number == 7 else 0.0,
        "prefill_ms": prefill,
        "decode_ms": inference - row["ttft_ms"],
    }


def over_time(begin: float, end: float, points: int) -> dict[str, Any]:
    """GET /history: a run with a gap of the controller after its first third."""
    begin = max(begin, end - 86_400)
    step = max(1.0, float(math.ceil((end - begin) / points)))
    at = [begin + step * index for index in range(int((end - begin) / step))]

    def series(level: float, swing: float, length: int) -> list[float | None]:
        gap = range(len(at) // 3, len(at) // 3 + len(at) // 20)
        return [
            None if index in gap else round(level + swing * math.sin(index / length), 4) for index in range(len(at))
        ]

    return {
        "from": begin,
        "to": end,
        "step_s": step,
        "now": end,
        "model": None,
        "series": {
            "at": at,
            "turns_per_minute": series(700, 40, 17),
            "tokens_per_second": series(1500, 100, 23),
            "errors_per_minute": series(4, 4, 40),
            "rejected_per_minute": series(0, 0, 1),
            "aborted_per_minute": series(2, 2, 30),
            "ttft_ms_p50": series(640, 50, 15),
            "ttft_ms_p95": series(1400, 200, 12),
            "itl_ms_p50": series(31, 3, 21),
            "latency_ms_p50": series(7000, 600, 19),
            "latency_ms_p95": series(12_500, 900, 13),
            "queued_ms_p95": series(800, 100, 11),
            "in_flight": series(136, 11, 9),
            "queue": series(10, 10, 31),
            "kv_usage": series(0.6, 0.1, 33),
            "hit_rate": series(0.9, 0.05, 14),
            "gpu_utilization": series(0.85, 0.1, 25),
            "preemptions": series(1, 1, 50),
            "finish_reasons.stop": series(150, 10, 17),
            "finish_reasons.tool_calls": series(550, 30, 17),
        },
        "runs": [{"name": "night", "from": begin + (end - begin) / 2, "to": None}],
    }


def recorded(document: dict[str, Any]) -> dict[str, Any]:
    """GET /history of a document alone: its last minutes."""
    points = document["throughput"]["history"]
    at = [point["at"] for point in points]
    names = {"turns_per_minute": "turns_per_minute", "tokens_per_second": "tokens_per_second"}
    names.update({"in_flight": "in_flight", "queue": "pending"})
    series = {name: [point[key] for point in points] for name, key in names.items()}
    for rank in ("p50", "p95"):
        series[f"latency_ms_{rank}"] = [point["latency_ms"][rank] for point in points]
    return {"from": at[0], "to": at[-1], "step_s": 2, "now": at[-1], "series": {"at": at, **series}, "runs": []}


def history(points: int = 300) -> list[dict[str, Any]]:
    return [
        {
            "at": NOW - 2 * (points - step),
            "turns_per_minute": 700 + 40 * math.sin(step / 17) + step % 7,
            "tokens_per_second": 1500 + 100 * math.sin(step / 23),
            "in_flight": 130 + step % 11,
            "pending": max(0, round(20 * math.sin(step / 31))),
            "active_sessions": 240 + step // 15,
            "latency_ms": {"p50": 7000 + 600 * math.sin(step / 19), "p95": 12_500 + 900 * math.sin(step / 13)},
        }
        for step in range(points)
    ]


def pipeline(scale: float = 1.0) -> dict[str, Any]:
    parts = {"pre": 2100.0, "queue": 700.0, "inference": 7300.0 * scale, "post": 1900.0, "unaccounted": 300.0}
    total = sum(parts.values())
    rows: dict[str, Any] = {
        name: {"mean_ms": ms, "p50_ms": ms * 0.9, "p95_ms": ms * 2.2, "share": ms / total} for name, ms in parts.items()
    }
    rows["ttft"] = {"mean_ms": 640.0, "p50_ms": 600.0, "p95_ms": 1300.0, "share": None}
    return rows


def busy(replicas: int = 4, clients: int = 6, sessions: int = 40, **changes: Any) -> dict[str, Any]:
    """A fleet at work."""
    rows = [session(number) for number in range(sessions)]
    hours = {"pending": 1.4, "loading": 2.25, "ready_busy": 61.2, "ready_idle": 9.8}
    model = {"model": "qwen", "gpu_hours": hours, "replica_hours": hours}
    replica = {"replica": "qwen-1", **model}
    return {
        "snapshot_age_ms": 120,
        "schema_version": 2,
        "now": NOW,
        "uptime_seconds": 7384.2,
        "strategy": "least_load",
        "totals": {
            **dict.fromkeys(("requests", "completed"), 8421),
            **dict.fromkeys(("errors", "aborted", "rejected", "retries"), 12),
            **dict.fromkeys(("tokens_in", "tokens_out", "cached_tokens"), 31_000_000),
        },
        "throughput": {"turns_per_minute": 729.8, "tokens_per_second": 1612.0, "history": history()},
        "models": [{"name": "qwen", "replicas": replicas, "ready": replicas, "slots": 64 * replicas, "inflight": 136}],
        "backends": [backend(number) for number in range(1, replicas + 1)],
        "queue": {
            "pending": 3,
            "held": 0,
            "in_flight": 136,
            "oldest_ms": 840,
            "waiting": [
                {"turn": f"w{n}", "session": f"task-{n:04d}", "model": "qwen", "waited_ms": 840 - 100 * n}
                for n in range(3)
            ],
        },
        "sessions": {"live": sessions * 8, "alive": 258, "active": 271, "listed": sessions, "ended": 431, "evicted": 0},
        "clients": [
            {"id": f"host{n}:{4000 + n}", "command": "python agent.py --env webshop", "sessions": rows[n::clients]}
            for n in range(clients)
        ],
        "recent_outcomes": outcomes(2464, errors=576, aborted=560) if rows else outcomes(0),
        "recent_turns": [turn(number, rows[number % len(rows)]["id"]) for number in range(100)] if rows else [],
        "pipeline": pipeline(),
        "relay": {
            **dict.fromkeys(("errors", "retries", "aborted", "rejected", "events_dropped", "restarts"), 0),
            **dict.fromkeys(("requests", "rss_bytes", "connections"), 8421),
            "sampled_at": NOW,
        },
        "analysis": analysis("GPU-BOUND"),
        "runs": [],
        "watchdog": [
            {
                "kind": "repeating",
                "session": "task-0012",
                "client": "host0:4000",
                "model": "qwen",
                "since": NOW - 95,
                "sentence": "gave the same answer five times in a row.",
            }
        ],
        "accounting": {
            "since": NOW - 7384,
            "gpu_hours": hours,
            "replica_hours": hours,
            "by_model": [model],
            "by_replica": [replica],
        },
        "history": {"path": "/tmp/history.db", "state": "on", "reason": None, "turns": 8421},
        **changes,
    }


def empty(**changes: Any) -> dict[str, Any]:
    """A proxy with one replica of the embedded engine that nobody has spoken to."""
    nothing = dict.fromkeys(("mean_ms", "p50_ms", "p95_ms", "share"))
    lone = backend(
        1,
        id="smollm2-1",
        model="smollm2",
        partition=None,
        ends_at=None,
        gpu=None,
        tunnel=None,
        inflight=0,
        inflight_history=[0, 0, 0],
        slots=4,
        requests=0,
        engine={**dict.fromkeys(backend(1)["engine"]), "name": "llama_cpp"},
        latency_ms=percentiles(None),
        ttft_ms=percentiles(None),
        gap_ms=percentiles(None),
    )
    document = busy(
        backends=[lone],
        clients=1,
        sessions=0,
        **{
            "models": [{"name": "smollm2", "replicas": 1, "ready": 1, "slots": 4, "inflight": 0}],
            "totals": dict.fromkeys(busy()["totals"], 0),
            "throughput": {"turns_per_minute": None, "tokens_per_second": None, "history": []},
            "queue": {"pending": 0, "held": 0, "in_flight": 0, "oldest_ms": 0, "waiting": []},
            "recent_turns": [],
            "pipeline": dict.fromkeys(("pre", "queue", "ttft", "inference", "post", "unaccounted"), nothing),
            "analysis": analysis("NO DATA"),
            "watchdog": [],
            "accounting": None,
            **changes,
        },
    )
    document["sessions"] = dict.fromkeys(document["sessions"], 0)
    return document


def extreme() -> dict[str, Any]:
    """64 replicas, 2,000 live sessions (the API lists 200), ids and prompts that try to be something else."""
    document = busy(replicas=64, clients=25, sessions=200)
    document["sessions"].update(live=2000, alive=1460, active=1493, listed=200)
    document["backends"][5].update(state="failed", reason="CUDA out of memory. Tried to allocate 2.00 GiB " * 4)
    document["backends"][6].update(healthy=False, reason="3 requests in a row were refused")
    document["backends"][7].update(state="loading", progress="5/9", latency_ms=percentiles(None))
    document["backends"][8]["latency_ms"] = percentiles(19_000.0)
    document["backends"][9]["tunnel"].update(state="down", reason="no answer for 15 s")
    document["backends"][10].update(ends_at=NOW + 400)
    document["backends"][11]["engine"]["kv_usage"] = 0.985
    for row, text in zip(document["recent_turns"], HOSTILE, strict=False):
        row.update(prompt=text, answer=text, session=text)
    first = document["clients"][0]
    first.update(id=HOSTILE[0], command=HOSTILE[1])
    for row, text in zip(first["sessions"], HOSTILE, strict=False):
        row.update(id=text, task=text, last_miss=text, cache_misses=2)
    document["watchdog"][0].update(session=HOSTILE[0], sentence=HOSTILE[1])
    return document


def all_down() -> dict[str, Any]:
    document = busy()
    for row in document["backends"]:
        row.update(state="failed", healthy=False, reason="CUDA error: device-side assert", inflight=0)
    document["models"][0].update(ready=0)
    return document


def sessions_of(document: Any) -> list[dict[str, Any]]:
    """The sessions behind a document: 2,000, or none where there was no traffic."""
    listed = [row["id"] for client in document["clients"] for row in client["sessions"]]
    names = [*listed, *(f"task-{number:04d}" for number in range(len(listed), 2000))]
    return [session_row(number, name=name) for number, name in enumerate(names)] if listed else []


class StatsServer:
    """A proxy's API over documents that the test sets; owns the server's thread."""

    def __init__(self, document: Any = None, port: int | None = None) -> None:
        self.document = document
        self.status = 200
        self.token: str | None = None
        self.asked: list[str] = []
        self.sessions: list[dict[str, Any]] = [] if document is None else sessions_of(document)
        self.history: dict[str, Any] | None = None  # in place of one made up
        self.turns = 12  # of each session
        self.said: str | None = None  # instead of the usual prompts, answers and errors
        self.port = port or free_port()
        self.open()
        self.url = f"http://127.0.0.1:{self.port}"

    def show(self, document: Any) -> None:
        """Serve ``document``, with the sessions behind it."""
        self.document, self.sessions = document, sessions_of(document)

    def open(self) -> None:
        """Listen, after ``close`` on the same port again."""
        self.is_closed = False
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def answer(self, path: str, authorization: str | None) -> tuple[int, Any]:
        self.asked.append(path)
        if self.token is not None and authorization != f"Bearer {self.token}":
            return 401, {"error": {"message": "no key"}}
        if self.status != 200:
            return self.status, {"error": {"message": "as the test said"}}
        url = urlsplit(path)
        options = {name: values[0] for name, values in parse_qs(url.query).items()}
        if url.path == "/stats":
            return 200, self.document
        if url.path == "/history" and self.history is not None:
            return 200, self.history
        if url.path == "/history":
            now = self.document["now"]
            begin = float(options.get("from", now - 3600)) if self.sessions else now  # without traffic: nothing
            return 200, over_time(begin, now, int(options["points"]))
        if url.path == "/sessions":
            return 200, self.list(options)
        name = unquote(url.path.removeprefix("/stats/sessions/"))
        rows = [row for row in self.sessions if row["id"] == name]
        if not rows:
            return 404, {"error": {"message": "no such session"}}
        turns = [traced_turn(number, name) for number in range(self.turns, 0, -1)]
        if self.said is not None:
            for row in turns:
                row.update(prompt=self.said, answer=self.said, error=row["error"] and self.said)
        found = {
            "schema_version": 2,
            "now": self.document["now"],
            "session": session(1, name, turns=self.turns, **{key: rows[0][key] for key in ("task", "model", "state")}),
            "turns_total": self.turns,
        }
        return 200, {**found, "turns": turns}

    def list(self, options: dict[str, str]) -> dict[str, Any]:
        """GET /sessions, as docs/proxy-api.md describes it."""
        text, state, sort = (
            options.get("query", "").lower(),
            options.get("state", "all"),
            options.get("sort", "last_at"),
        )
        rows = [
            row
            for row in self.sessions
            if any(text in str(row[key]).lower() for key in ("id", "task", "client", "model"))
            and (state == "all" or (row["state"] == "ended") == (state == "ended"))
            and (options.get("outcome") != "error" or row["errors"])
            and options.get("model", row["model"]) == row["model"]
        ]
        rows.sort(key=lambda row: row["id"])
        rows.sort(key=lambda row: row[sort], reverse=options.get("descending", "1") == "1")
        begin = int(options.get("offset", 0))
        return {"total": len(rows), "sessions": rows[begin : begin + int(options.get("limit", 100))]}

    def close(self) -> None:
        self.is_closed = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=PATIENCE_S)


class _Handler(BaseHTTPRequestHandler):
    owner: StatsServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.owner.is_closed:  # over a connection that was kept: a server that is gone keeps none
            self.close_connection = True
            return
        status, document = self.owner.answer(self.path, self.headers.get("Authorization"))
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_details: Any) -> None:
        return


@contextmanager
def serving(document: Any, port: int | None = None) -> Iterator[StatsServer]:
    server = StatsServer(copy.deepcopy(document), port)
    try:
        yield server
    finally:
        server.close()
