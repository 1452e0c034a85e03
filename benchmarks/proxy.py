#!/usr/bin/env python3
"""What the proxy costs beside nginx and vllm-router, and what it does when things break: one run, one table.

    apt-get install nginx-light
    python benchmarks/proxy.py                  # five rounds, about a quarter of an hour
    python benchmarks/proxy.py --quick          # one short round: does it work at all?
    python benchmarks/proxy.py --contenders agent-infra,untracked --steps request_1kb,request_100kb,chunk_300
                                                # what tracking costs the relay: the same program without it
    python benchmarks/proxy.py --before PATH --contenders agent-infra --rounds 6
                                                # this version beside that of another checkout; an even number of rounds

Needs Linux and two cores to itself: the proxy under test has one of them, the load generator and three fake engines
have the rest.  All traffic stays on 127.0.0.1, everything is bounded, and whatever was started is ended again.
vllm-router is installed from PyPI into a virtual environment of its own (--venv).

How it measures.  In every round each contender gets the same offered load, step by step and one after the other, in an
order that rotates; a figure is the median over the rounds, and contenders are compared by the ratio within a round,
because a machine's speed drifts between rounds.  CPU is that of the proxy's whole process tree (Agent Infra: controller
and relay), over a counted number of requests or stream events.  Latency is measured with one request at a time, against
the same requests sent to a replica directly.  The last lines tell how busy the load generator and the engines were.
With --before, both versions run in every round, next to each other and in alternating order, each with its own modules;
"ours / before" is then this version by that one.  Contenders that are not installed are left out, unless asked for.
Use the Python that users have: one built without profile-guided optimisation (pyenv's default) is up to twice slower.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import http.client
import json
import math
import platform
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import sched_setaffinity
from pathlib import Path
from typing import Any

import bench_engine
from bench_contenders import BEFORE, DEFAULT_VENV, OURS, PROGRAM, STARTERS, Contender, Place, is_installed
from bench_load import LENGTH, RECEIVE_BYTES, RequestLoad, StreamLoad, chat_request
from bench_process import (
    BenchmarkError,
    Child,
    core_idle_seconds,
    cpu_seconds,
    free_port,
    program_at,
    proxy_and_load_cores,
    wait_until,
)

REPLICAS = 3
RELAY_ALONE = {name: f"{name}, relay alone" for name in (OURS, BEFORE, "untracked")}
ABORT_WITHIN_S = 0.5
REFUSE_WITHIN_S = 1.0
EVENT_INTERVAL_MS = 33  # of one stream
FOREVER = 1_000_000  # stream events: more than anyone waits for
STEPS = (
    *("memory", "request_1kb", "request_1kb_full", "request_100kb", "chunk_40", "chunk_300", "latency", "latency_16"),
    "faults",
)


@dataclass(frozen=True)
class Sizes:
    """How much is offered in one step of one round."""

    requests_1kb: int = 20_000
    requests_100kb: int = 4_000
    stream_s: float = 6.0
    open_streams: int = 1_000
    latency_requests: int = 2_000
    disconnects: int = 40  # of each kind
    cut_streams: int = 60
    killed_load_s: float = 5.0
    refusals: int = 20


QUICK = Sizes(2_000, 400, 2.0, 200, 300, 10, 15, 2.5, 5)
RATE_1KB, RATE_100KB, RATE_KILLED, RATE_16 = 4_000, 800, 2_400, 1_000  # requests a second
AS_FAST_AS_POSSIBLE = 0


@dataclass
class Samples:
    """Everything measured: a list of one value a round for every (metric, contender); sums for the fault table."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    faults: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    busy: list[tuple[str, float, float, float, float]] = field(default_factory=list)

    def add(self, metric: str, contender: str, value: float) -> None:
        self.values[metric][contender].append(value)

    def paired_ratios(self, metric: str, one: str, other: str) -> list[float]:
        """One's by the other's, round by round; a run that broke off may have one value more of either."""
        row = self.values[metric]
        return [ours / theirs for ours, theirs in zip(row[one], row[other], strict=False) if theirs > 0]


class Replicas:
    """The fake engines; owns their processes, and starts a killed one again on its port."""

    def __init__(self, cores: set[int], folder: Path) -> None:
        self._cores, self._folder = cores, folder
        self.ports = [free_port() for _ in range(REPLICAS)]
        self._children: list[Child] = []

    def start(self) -> None:
        for index in range(REPLICAS):
            self._children.append(self._spawn(index))

    def kill(self, index: int) -> None:
        self._children[index].kill()

    def restart(self, index: int) -> None:
        self._children[index].stop()
        self._children[index] = self._spawn(index)

    def stop(self) -> None:
        for child in self._children:
            child.stop()

    def cpu_seconds(self) -> list[float]:
        return [cpu_seconds([child.pid]) for child in self._children]

    def faults(self, index: int) -> dict[str, Any]:
        """What the replica tells about running and aborted turns; empty when it is dead."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[index], timeout=5)
        try:
            connection.request("GET", "/faults")
            document: dict[str, Any] = json.loads(connection.getresponse().read())
            return document
        except OSError:
            return {}
        finally:
            connection.close()

    def _spawn(self, index: int) -> Child:
        command = [sys.executable, bench_engine.__file__, str(self.ports[index])]
        child = Child(command, self._cores, self._folder / f"engine-{index}.log")
        try:
            wait_until(lambda: bool(self.faults(index)), f"fake engine {index}: the first answer", 10)
        except BaseException:
            child.stop()
            raise
        return child


class Bench:
    """One run: the replicas, the contenders of the current round, and what was measured."""

    def __init__(
        self, sizes: Sizes, contenders: Sequence[str], folder: Path, venv: Path, programs: Mapping[str, Path]
    ) -> None:
        self.sizes, self.names, self.folder, self.venv, self.programs = sizes, contenders, folder, venv, programs
        self.proxy_cores, self.load_cores = proxy_and_load_cores()
        self.replicas = Replicas(self.load_cores, folder)
        self.samples = Samples()
        self._turn = 0

    def run(self, rounds: int, steps: Sequence[str]) -> None:
        sched_setaffinity(0, self.load_cores)
        self.replicas.start()
        for number in range(rounds):
            order = self._order(number)
            with self._contenders(order) as running:
                for step in steps:
                    _progress(f"round {number + 1} of {rounds}: {step}")
                    if step == "latency":
                        self._latency(running)
                    elif step != "faults":
                        for contender in running:
                            self._step(step, contender)
            if "faults" in steps:
                for name in order:
                    with self._contenders([name]) as alone:
                        _progress(f"round {number + 1} of {rounds}: faults, {name}")
                        self._faults(alone[0])

    def _order(self, number: int) -> list[str]:
        """Of one round: it rotates, and the version before comes right after ours and right before it in turns."""
        names = [name for name in self.names if name != BEFORE]
        order = names[number % len(names) :] + names[: number % len(names)]
        if BEFORE in self.names:
            order.insert(order.index(OURS) + (number + 1) % 2, BEFORE)
        return order

    # -- Contenders --

    @contextlib.contextmanager
    def _contenders(self, names: Sequence[str]) -> Iterator[list[Contender]]:
        """Fresh proxies, warmed up; ended in the end."""
        running: list[Contender] = []
        try:
            for name in names:
                folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))
                program = self.programs.get(name, self.programs[OURS])
                place = Place(folder, free_port(), self.proxy_cores, self.replicas.ports, self.venv, program)
                running.append(Contender(name, place))
            for contender in running:
                contender.wait_until_ready()
            for contender in running:
                usage = contender.usage()
                self._add("rss_start", contender.name, usage.rss_mb, usage.part_rss_mb)
                self._warm_up(contender)
            yield running
        finally:
            for contender in running:
                contender.stop()

    def _warm_up(self, contender: Contender) -> None:
        for size in (1_000, 100_000):
            RequestLoad(contender.port, self._requests(size), 300, 1_000).run()
        load = StreamLoad(contender.port)
        load.open([self._stream(10, 20) for _ in range(20)])
        load.pump(0.5)
        load.close()

    def _add(self, metric: str, name: str, whole: float, relay: float) -> None:
        self.samples.add(metric, name, whole)
        if name in RELAY_ALONE:
            self.samples.add(metric, RELAY_ALONE[name], relay)

    # -- Requests --

    def _requests(self, size_bytes: int, directive: str | None = None) -> Callable[[int], bytes]:
        """Turns of 64 sessions that take turns."""
        variants = [
            chat_request(size_bytes, session=f"session-{number}", salt=f"{number:04d}", directive=directive)
            for number in range(64)
        ]
        return lambda index: variants[index % 64]

    def _stream(self, chunks: int, interval_ms: int) -> bytes:
        return chat_request(
            1_000, session=f"stream-{self._next_turn()}", stream=True, directive=self._directive(chunks, interval_ms)
        )

    def _directive(self, chunks: int, interval_ms: int, delay_ms: int = 0) -> str:
        return f"turn{self._next_turn()} {delay_ms} {chunks} {interval_ms}"

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn

    # -- Cost --

    def _step(self, step: str, contender: Contender) -> None:
        if step == "memory":
            self._memory(contender)
        elif step == "request_1kb":
            self._request_cost(step, contender, 1_000, self.sizes.requests_1kb, RATE_1KB)
        elif step == "request_1kb_full":
            self._request_cost(step, contender, 1_000, self.sizes.requests_1kb, AS_FAST_AS_POSSIBLE, connections=16)
        elif step == "latency_16":
            self._latency_of_many(contender)
        elif step == "request_100kb":
            self._request_cost(step, contender, 100_000, self.sizes.requests_100kb, RATE_100KB)
        else:
            self._chunk_cost(step, contender, int(step.removeprefix("chunk_")))

    def _memory(self, contender: Contender) -> None:
        before = contender.usage()
        load = StreamLoad(contender.port)
        try:
            load.open([self._stream(FOREVER, 1_000) for _ in range(self.sizes.open_streams)])
            if not load.wait_for_first_events():
                raise BenchmarkError(f"{contender.name} does not hold {self.sizes.open_streams} streams open")
            after = contender.usage()
        finally:
            load.close()
        per_thousand = 1_000 / self.sizes.open_streams
        whole, relay = after.rss_mb - before.rss_mb, after.part_rss_mb - before.part_rss_mb
        self._add("rss_per_1000", contender.name, whole * per_thousand, relay * per_thousand)

    def _request_cost(
        self, metric: str, contender: Contender, size_bytes: int, count: int, rate: int, connections: int = 32
    ) -> None:
        load = RequestLoad(contender.port, self._requests(size_bytes), count, rate, connections)
        before = contender.usage()
        with self._watched(metric) as achieved:
            result = load.run()
            achieved.append(count / rate / result.wall_s if rate else 1.0)
        after = contender.usage()
        if result.errors:
            raise BenchmarkError(f"{contender.name}: {metric}: {dict(result.errors)} of {count} requests failed")
        per_request = 1e6 / count
        whole, relay = after.cpu_s - before.cpu_s, after.part_cpu_s - before.part_cpu_s
        self._add(metric, contender.name, whole * per_request, relay * per_request)

    def _chunk_cost(self, metric: str, contender: Contender, streams: int) -> None:
        load = StreamLoad(contender.port)
        try:
            load.open([self._stream(FOREVER, EVENT_INTERVAL_MS) for _ in range(streams)])
            if not load.wait_for_first_events(5):
                raise BenchmarkError(f"{contender.name}: {streams} streams did not begin")
            seconds = self.sizes.stream_s
            before, first = contender.usage(), load.events
            load.delays_ms.clear()
            with self._watched(metric) as achieved:
                load.pump(seconds)
                events = load.events - first
                achieved.append(events / (seconds * streams * 1000 / EVENT_INTERVAL_MS))
            after = contender.usage()
        finally:
            load.close()
        whole, relay = after.cpu_s - before.cpu_s, after.part_cpu_s - before.part_cpu_s
        self._add(metric, contender.name, whole * 1e6 / events, relay * 1e6 / events)
        self.samples.add(f"{metric}_p99", contender.name, _percentile(load.delays_ms, 99))

    @contextlib.contextmanager
    def _watched(self, metric: str) -> Iterator[list[float]]:
        """Record how busy the load generator and the engines were; the body appends the achieved share of the offer."""
        achieved: list[float] = []
        start, own, engines = time.monotonic(), time.process_time(), self.replicas.cpu_seconds()
        idle = core_idle_seconds(self.load_cores)
        yield achieved
        wall = time.monotonic() - start
        busiest = max(after - before for after, before in zip(self.replicas.cpu_seconds(), engines, strict=True))
        idle_share = (core_idle_seconds(self.load_cores) - idle) / wall / len(self.load_cores)
        load_share = (time.process_time() - own) / wall
        self.samples.busy.append((metric, load_share, busiest / wall, idle_share, achieved[0]))

    def _latency(self, running: Sequence[Contender]) -> None:
        """One request at a time, in turns of 100 for each contender and for a replica itself."""
        ports = {"direct": self.replicas.ports[0]} | {contender.name: contender.port for contender in running}
        times: dict[str, list[float]] = {name: [] for name in ports}
        request = chat_request(1_000, session="latency")
        with contextlib.ExitStack() as stack:
            sockets = {
                name: stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
                for name, port in ports.items()
            }
            for sock in sockets.values():
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(self.sizes.latency_requests // 100):
                for name, sock in sockets.items():
                    times[name] += [_round_trip_us(sock, request) for _ in range(100)]
        for percent in (50, 99):
            direct = _percentile(times["direct"], percent)
            self.samples.add(f"latency_p{percent}", "direct", direct)
            for contender in running:
                self.samples.add(
                    f"latency_p{percent}", contender.name, _percentile(times[contender.name], percent) - direct
                )

    def _latency_of_many(self, contender: Contender) -> None:
        """16 clients that send 1,000 requests a second in all: what one of them waits for an answer."""
        count = 2 * self.sizes.latency_requests
        result = RequestLoad(contender.port, self._requests(1_000), count, RATE_16, connections=16).run()
        if result.errors:
            raise BenchmarkError(f"{contender.name}: latency_16: {dict(result.errors)} of {count} requests failed")
        self.samples.add("latency_16", contender.name, _percentile(result.latencies_ms, 99))

    # -- Faults --

    def _faults(self, contender: Contender) -> None:
        record = self.samples.faults[contender.name]
        for stream in (True, False):
            self._disconnects(contender, record, stream)
        self._killed_streams(contender, record)
        self._killed_under_load(contender, record)
        self._all_killed(contender, record)

    def _disconnects(self, contender: Contender, record: Counter[str], stream: bool) -> None:
        """Clients go away mid-answer; the replica should see each turn aborted within half a second."""
        kind = "stream" if stream else "plain"
        load = StreamLoad(contender.port)
        closed_at: dict[str, float] = {}
        try:
            directives = [
                self._directive(300, 33, delay_ms=0 if stream else 10_000) for _ in range(self.sizes.disconnects)
            ]
            load.open([chat_request(1_000, session=text, stream=stream, directive=text) for text in directives])
            turns = [text.split(" ")[0] for text in directives]
            wait_until(lambda: set(turns) <= self._active(), f"{contender.name}: turns reaching the replicas")
            if stream:
                load.wait_for_first_events()
            for turn, connection in zip(turns, load.streams, strict=True):
                closed_at[turn] = load.abandon(connection)
                time.sleep(0.01)
            time.sleep(ABORT_WITHIN_S + 0.2)
        finally:
            load.close()
        aborted: dict[str, float] = {}
        for index in range(REPLICAS):
            aborted |= self.replicas.faults(index)["aborted"]
        record[f"{kind} disconnects"] += len(turns)
        record[f"{kind} aborted"] += sum(aborted.get(turn, 1e18) - closed_at[turn] <= ABORT_WITHIN_S for turn in turns)

    def _active(self) -> set[str]:
        active: set[str] = set()
        for index in range(REPLICAS):
            active |= set(self.replicas.faults(index)["active"])
        return active

    def _killed_streams(self, contender: Contender, record: Counter[str]) -> None:
        """A replica dies while it streams; what do its clients see?"""
        load = StreamLoad(contender.port)
        try:
            directives = [self._directive(FOREVER, 33) for _ in range(self.sizes.cut_streams)]
            load.open([chat_request(1_000, session=text, stream=True, directive=text) for text in directives])
            if not load.wait_for_first_events():
                raise BenchmarkError(f"{contender.name}: streams did not begin")
            on_replica = set(self.replicas.faults(0)["active"])
            affected = [
                stream
                for text, stream in zip(directives, load.streams, strict=True)
                if text.split(" ")[0] in on_replica
            ]
            self.replicas.kill(0)
            load.pump(10, lambda: all(stream.outcome for stream in affected))
        finally:
            load.close()
            self.replicas.restart(0)
        record["cut streams"] += len(affected)
        for stream in affected:
            record[f"cut: {stream.outcome or 'nothing'}"] += 1

    def _killed_under_load(self, contender: Contender, record: Counter[str]) -> None:
        """A replica dies and comes back under plain requests of 5 ms each."""
        seconds = self.sizes.killed_load_s
        count = int(RATE_KILLED * seconds)
        actions = [
            (seconds * 0.3, lambda: self.replicas.kill(1)),
            (seconds * 0.6, lambda: self.replicas.restart(1)),
        ]
        request = self._requests(1_000, "load 5 0 0")
        result = RequestLoad(contender.port, request, count, RATE_KILLED, connections=128, actions=actions).run()
        record["killed: requests"] += count
        record["killed: errors"] += result.errors.total()
        for why, number in result.errors.items():
            record[f"killed because {why}"] += number

    def _all_killed(self, contender: Contender, record: Counter[str]) -> None:
        """No replica is left; how soon, and in what words, are clients told?"""
        request = chat_request(1_000, session="refused")
        try:
            for index in range(REPLICAS):
                self.replicas.kill(index)
            for _ in range(self.sizes.refusals):
                took_ms, is_told = _refusal(contender.port, request)
                record["refused: requests"] += 1
                record["refused: in time"] += is_told and took_ms <= REFUSE_WITHIN_S * 1000
                record["refused: slowest ms"] = max(record["refused: slowest ms"], math.ceil(took_ms))
        finally:
            for index in range(REPLICAS):
                self.replicas.restart(index)


def _round_trip_us(sock: socket.socket, request: bytes) -> float:
    start = time.perf_counter()
    sock.sendall(request)
    answer = b""
    while True:
        data = sock.recv(RECEIVE_BYTES)
        if not data:
            raise BenchmarkError("a connection was closed during the latency measurement")
        answer += data
        head_end = answer.find(b"\r\n\r\n") + 4
        length = LENGTH.search(answer, 0, head_end) if head_end >= 4 else None
        if answer.endswith(b"0\r\n\r\n") if length is None else len(answer) >= head_end + int(length[1]):
            return (time.perf_counter() - start) * 1e6


def _refusal(port: int, request: bytes) -> tuple[float, bool]:
    """How many ms the answer to ``request`` took, on a new connection, and whether it is a 503 in OpenAI's shape."""
    head, body = request.split(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    start = time.perf_counter()
    try:
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        text = answer.read()
        took_ms = (time.perf_counter() - start) * 1000
        return took_ms, answer.status == 503 and isinstance(json.loads(text)["error"]["message"], str)
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return (time.perf_counter() - start) * 1000, False
    finally:
        connection.close()


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# -- Tables --

COST_COLUMNS = {
    "request_1kb": "request, 1 KB, 4,000/s (µs)",
    "request_1kb_full": "the same, saturated (µs)",
    "request_100kb": "request, 100 KB, 800/s (µs)",
    "chunk_40": "chunk, 40 streams (µs)",
    "chunk_300": "chunk, 300 streams (µs)",
    "chunk_40_p99": "chunk's delay, 40 streams, p99 (ms)",
    "chunk_300_p99": "300 streams, p99 (ms)",
    "latency_p50": "added latency p50 (µs)",
    "latency_p99": "p99 (µs)",
    "latency_16": "16 clients, 1,000/s, p99 (ms)",
    "rss_start": "RSS at start (MB)",
    "rss_per_1000": "per 1,000 streams (MB)",
}


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cost_table(samples: Samples, names: Sequence[str], metrics: Sequence[str]) -> str:
    rows = []
    for name in [*names, *(RELAY_ALONE[name] for name in names if name in RELAY_ALONE)]:
        columns = [samples.values[metric][name] for metric in metrics]
        medians = [statistics.median(values) if values else math.nan for values in columns]
        rows.append([name, *("" if math.isnan(m) else f"{m:.2f}" if abs(m) < 10 else f"{m:.1f}" for m in medians)])
    return _markdown(["cost", *(COST_COLUMNS[metric] for metric in metrics)], rows)


def _ratio_table(samples: Samples, names: Sequence[str], metrics: Sequence[str]) -> str:
    rows = []
    for other in names:
        if other == OURS:
            continue
        rows.append([f"ours / {other}", *_ratio_cells(samples, OURS, other, metrics)])
        if other in RELAY_ALONE:
            cells = _ratio_cells(samples, RELAY_ALONE[OURS], RELAY_ALONE[other], metrics)
            rows.append([f"ours / {other}, relay alone", *cells])
    return _markdown(["paired ratios", *(COST_COLUMNS[metric] for metric in metrics)], rows)


def _ratio_cells(samples: Samples, one: str, other: str, metrics: Sequence[str]) -> list[str]:
    ratios = [samples.paired_ratios(metric, one, other) for metric in metrics]
    return [f"**{statistics.median(each):.2f}** ({min(each):.2f}–{max(each):.2f})" if each else "" for each in ratios]


def _fault_table(samples: Samples, names: Sequence[str]) -> str:
    header = ["fault", *names]
    rows = [
        ["client gone mid-stream: aborted within 0.5 s"],
        ["client gone before a plain answer: aborted within 0.5 s"],
        ["replica killed mid-stream: error event / cut connection / looks complete / nothing in 10 s"],
        ["replica killed under plain load: errors that clients saw"],
        ["all replicas killed: 503 in OpenAI's shape within 1 s (slowest answer)"],
    ]
    for name in names:
        seen = samples.faults[name]
        rows[0].append(f"{seen['stream aborted']} of {seen['stream disconnects']}")
        rows[1].append(f"{seen['plain aborted']} of {seen['plain disconnects']}")
        outcomes = " / ".join(str(seen[f"cut: {how}"]) for how in ("error event", "cut", "complete", "nothing"))
        rows[2].append(f"{outcomes} of {seen['cut streams']}")
        rows[3].append(f"{seen['killed: errors']} of {seen['killed: requests']:,}")
        refused, slowest = f"{seen['refused: in time']} of {seen['refused: requests']}", seen["refused: slowest ms"]
        rows[4].append(f"{refused} ({slowest} ms)")
    return _markdown(header, rows)


def _busy_lines(samples: Samples) -> str:
    lines = []
    for step in dict.fromkeys(entry[0] for entry in samples.busy):
        entries = [entry for entry in samples.busy if entry[0] == step]
        lines.append(
            f"{step}: load generator at most {max(entry[1] for entry in entries):.0%} of its core, "
            f"busiest engine {max(entry[2] for entry in entries):.0%}, "
            f"their core (with all else that runs there) idle at least {min(entry[3] for entry in entries):.0%}, "
            f"offered load achieved {min(entry[4] for entry in entries):.1%} or more"
        )
    return "\n".join(lines)


def report(samples: Samples, names: Sequence[str], rounds: int, sizes: Sizes) -> str:
    """The tables of a run, as Markdown."""
    metrics = [metric for metric in COST_COLUMNS if samples.values[metric]]
    parts = [
        f"{rounds} rounds, {REPLICAS} replicas, one worker on one core; "
        f"Python {platform.python_version()} ({sys.executable})\n{sizes}",
        _cost_table(samples, names, metrics),
    ]
    if OURS in names and len(names) > 1:
        parts.append(
            "Median of the ratios within a round (lowest–highest):\n\n" + _ratio_table(samples, names, metrics)
        )
    if samples.faults:
        parts.append(_fault_table(samples, names))
    if samples.busy:
        parts.append("Was the load generator the bottleneck?\n" + _busy_lines(samples))
    return "\n\n".join(parts)


def _cache_bytecode(program: Path) -> None:
    """So that no version compiles itself in its first round: a relay that does stays larger."""
    for path in (program, *program.parent.glob("agent_infra_*/**/*.py")):
        compileall.compile_file(path, quiet=1)


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=None, help="default 5; 1 with --quick")
    known, usual = [name for name in STARTERS if name != BEFORE], ["nginx", "vllm-router", OURS]
    parser.add_argument("--contenders", help=f"of {', '.join(known)}; default: {','.join(usual)}")
    parser.add_argument(
        "--before", type=program_at, metavar="PATH", help="compare with this checkout or agent_infra.py, too"
    )
    parser.add_argument("--steps", default=",".join(STEPS), help="default: %(default)s")
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the load: shows that it works, measures little"
    )
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    parser.add_argument("--venv", type=Path, default=DEFAULT_VENV, help="vllm-router's environment (%(default)s)")
    parser.add_argument(
        "--program", type=program_at, default=PROGRAM, help="the agent_infra.py to measure (%(default)s)"
    )
    options = parser.parse_args()
    names, steps = options.contenders.split(",") if options.contenders else usual, options.steps.split(",")
    if unknown := [name for name in names if name not in known] + [step for step in steps if step not in STEPS]:
        parser.error(f"unknown: {', '.join(unknown)}")
    programs = {OURS: options.program}
    if options.before:
        if OURS not in names:
            parser.error(f"--before is compared with {OURS}, which --contenders leaves out")
        names = [name for name in names if options.contenders or is_installed(name, options.venv)] + [BEFORE]
        programs[BEFORE] = options.before
        for program in programs.values():
            _cache_bytecode(program)
    rounds = options.rounds or (1 if options.quick else 5)
    sizes = QUICK if options.quick else Sizes()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="agent-infra-bench-") as folder:
        bench = Bench(sizes, names, Path(folder), options.venv, programs)
        failure = None
        try:
            bench.run(rounds, steps)
        except (BenchmarkError, KeyboardInterrupt) as error:
            failure = f"proxy.py: broken off: {str(error) or 'interrupted'}"
        finally:
            bench.replicas.stop()
            if options.json:
                options.json.write_text(json.dumps(vars(bench.samples), indent=1))
    print("\n".join(f"{name}: {program}" for name, program in programs.items()))
    print(report(bench.samples, names, rounds, sizes))
    sys.exit(failure)


if __name__ == "__main__":
    main()
