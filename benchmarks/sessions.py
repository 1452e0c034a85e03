#!/usr/bin/env python3
"""10,000 sessions of 20 turns through one proxy: is memory bounded, is /stats quick, does a stream notice?

    python benchmarks/sessions.py               # about four minutes
    python benchmarks/sessions.py --quick       # 500 sessions: does it work at all?

Needs Linux and two cores to itself.  The sessions run interleaved, turn after turn, at a fixed rate, so that all of
them are alive at once.  Beside them GET /stats is asked twice a second, and a stream of 50 events a second runs through
the proxy while a second one, straight from the same replica, tells which of its gaps are the machine's own.  In the end
the proxy's counters must equal what was sent, exactly; the exit code is 1 when they do not.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from os import sched_setaffinity
from pathlib import Path
from typing import Any

from bench_contenders import DEFAULT_VENV, OURS, PROGRAM, Contender, Place
from bench_load import RequestLoad, StreamLoad, chat_request
from bench_process import BenchmarkError, free_port, proxy_and_load_cores, wait_until
from proxy import Replicas

STREAM_INTERVAL_MS = 20
STATS_INTERVAL_S = 0.5
SAMPLES = 10  # rows of the table
FOREVER = 1_000_000
SETTLE_S = 15.0  # for the last events to reach the controller and its next snapshot


@dataclass
class Observed:
    """What one probe process saw: milliseconds, and the number of POSTs that it sent."""

    proxied_gaps_ms: list[float] = field(default_factory=list)
    direct_gaps_ms: list[float] = field(default_factory=list)
    stats_ms: list[float] = field(default_factory=list)
    stats_bytes: int = 0
    failed_stats: int = 0


def get_stats(port: int) -> tuple[dict[str, Any], float, int]:
    """The /stats document, how long it took to arrive (ms, on a new connection), and its bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    start = time.perf_counter()
    try:
        connection.request("GET", "/stats")
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    milliseconds = (time.perf_counter() - start) * 1000
    if response.status != 200:
        raise BenchmarkError(f"GET /stats answered {response.status}: {body[:200]!r}")
    document: dict[str, Any] = json.loads(body)
    return document, milliseconds, len(body)


def _watch_streams(port: int, replica_port: int, pipe: Pipe) -> None:
    """A process: gaps between the events of a stream through the proxy and of one without, until the pipe speaks."""
    observed = Observed()
    loads = [(StreamLoad(port), observed.proxied_gaps_ms), (StreamLoad(replica_port), observed.direct_gaps_ms)]
    for load, _ in loads:
        load.open(
            [chat_request(1_000, stream=True, session="probe", directive=f"probe 0 {FOREVER} {STREAM_INTERVAL_MS}")]
        )
        load.wait_for_first_events()
    last = [time.perf_counter()] * 2
    while not pipe.poll():
        for index, (load, gaps) in enumerate(loads):
            before = load.events
            load.pump(0.001, lambda load=load, before=before: load.events > before)  # type: ignore[misc]
            if load.events > before:
                now = time.perf_counter()
                gaps.append((now - last[index]) * 1000)
                last[index] = now
    for load, _ in loads:
        load.close()
    pipe.send(observed)


def _watch_stats(port: int, _: int, pipe: Pipe) -> None:
    """A process: how long /stats takes, until the pipe speaks."""
    observed = Observed()
    while not pipe.poll(STATS_INTERVAL_S):
        _ask_stats(port, observed)
    pipe.send(observed)


def _ask_stats(port: int, observed: Observed) -> None:
    try:
        _document, milliseconds, observed.stats_bytes = get_stats(port)
    except (BenchmarkError, OSError, http.client.HTTPException):
        observed.failed_stats += 1
    else:
        observed.stats_ms.append(milliseconds)


class Probes:
    """The two probe processes; owns them."""

    def __init__(self, port: int, replica_port: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._probes: list[tuple[Any, Pipe]] = []
        targets: Sequence[Callable[[int, int, Pipe], None]] = (_watch_streams, _watch_stats)
        for target in targets:
            ours, theirs = context.Pipe()
            process = context.Process(target=target, args=(port, replica_port, theirs), daemon=True)
            process.start()
            self._probes.append((process, ours))

    def finish(self) -> list[Observed]:
        """What they saw."""
        seen: list[Observed] = []
        for _, pipe in self._probes:
            pipe.send("end")
            if not pipe.poll(10):
                raise BenchmarkError("a probe does not answer")
            seen.append(pipe.recv())
        return seen

    def stop(self) -> None:
        for process, _ in self._probes:
            process.kill()
            process.join()


@dataclass(frozen=True)
class Plan:
    """What is offered."""

    sessions: int
    turns: int
    rate: int
    implicit: bool

    @property
    def total(self) -> int:
        return self.sessions * self.turns


def run(plan: Plan, program: Path, folder: Path) -> bool:
    """One run; prints the report; whether every turn was answered and counted."""
    proxy_cores, load_cores = proxy_and_load_cores()
    sched_setaffinity(0, load_cores)
    with contextlib.ExitStack() as stack:
        replicas = Replicas(load_cores, folder)
        stack.callback(replicas.stop)
        replicas.start()
        contender = Contender(OURS, Place(folder, free_port(), proxy_cores, replicas.ports, DEFAULT_VENV, program))
        stack.callback(contender.stop)
        contender.wait_until_ready()
        wait_until(lambda: _has_stats(contender.port), "the first snapshot")
        return _measure(plan, contender, replicas.ports[0], stack)


def _has_stats(port: int) -> bool:
    try:
        return bool(get_stats(port))
    except BenchmarkError:
        return False


def _measure(plan: Plan, contender: Contender, replica_port: int, stack: contextlib.ExitStack) -> bool:
    counted_before = _settled_count(contender.port, None)
    probes = Probes(contender.port, replica_port)
    stack.callback(probes.stop)
    rows: list[list[str]] = []
    start = time.monotonic()

    def sample() -> None:
        usage, seconds = contender.usage(), time.monotonic() - start
        done = min(1.0, seconds * plan.rate / plan.total)
        rows.append(
            [f"{seconds:.0f}", f"{done:.0%}", f"{usage.part_rss_mb:.1f}", f"{usage.rss_mb - usage.part_rss_mb:.1f}"]
        )

    actions = [(plan.total / plan.rate * number / SAMPLES, sample) for number in range(SAMPLES)]
    load = RequestLoad(contender.port, _requests(plan), plan.total, plan.rate, connections=64, actions=actions)
    result = load.run()
    sample()
    streams, stats = probes.finish()
    sent = plan.total + 1  # and the probe's stream
    counted = _settled_count(contender.port, counted_before + sent) - counted_before
    print(_report(rows, streams, stats, result.errors, sent, counted))
    print(f"\n{plan.sessions:,} sessions × {plan.turns} turns in {result.wall_s:.0f} s")
    return counted == sent and not result.errors


def _requests(plan: Plan) -> Callable[[int], bytes]:
    """Turn after turn of all sessions; implicit ones send no session header, and so every turn opens a new session."""
    body = chat_request(1_000, session=None if plan.implicit else "SESSION-NUMBER")
    if plan.implicit:
        return lambda _: body
    head, _, tail = body.partition(b"SESSION-NUMBER")
    return lambda index: b"%b%014d%b" % (head, index % plan.sessions, tail)


def _settled_count(port: int, expected: int | None) -> int:
    """totals.requests once it is what is expected (None: once it rests), or after SETTLE_S."""
    deadline, last = time.monotonic() + SETTLE_S, -1
    while True:
        count: int = get_stats(port)[0]["totals"]["requests"]
        if count == (last if expected is None else expected) or time.monotonic() > deadline:
            return count
        last = count
        time.sleep(2.5 if expected is None else 0.25)  # rests: longer than the controller's snapshots are apart


def _report(
    rows: Sequence[Sequence[str]], streams: Observed, stats: Observed, errors: Any, sent: int, counted: int
) -> str:
    table = [["s", "sent", "relay RSS (MB)", "controller RSS (MB)"], ["---"] * 4, *rows]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines += ["", f"errors: {dict(errors) or 'none'}; counted by the proxy: {counted:,} of {sent:,} sent"]
    lines.append(
        f"/stats: {_spread(stats.stats_ms)} ms, {stats.stats_bytes / 1000:.0f} KB, {stats.failed_stats} failed"
    )
    lines.append(
        f"gaps of a stream of {STREAM_INTERVAL_MS} ms: {_spread(streams.proxied_gaps_ms)} ms through the proxy"
    )
    lines.append(f"the same straight from the replica: {_spread(streams.direct_gaps_ms)} ms")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "too few"
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return f"p50 {cuts[49]:.1f}, p99 {cuts[98]:.1f}, highest {max(values):.1f}"


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=None, help="default 10,000; 500 with --quick")
    parser.add_argument("--turns", type=int, default=20, help="of each session (%(default)s)")
    parser.add_argument("--rate", type=int, default=1_000, help="turns a second, all together (%(default)s)")
    parser.add_argument("--implicit", action="store_true", help="without session headers: every turn is a session")
    parser.add_argument("--quick", action="store_true", help="shows that it works")
    parser.add_argument("--program", type=Path, default=PROGRAM, help="the agent_infra.py to measure (%(default)s)")
    options = parser.parse_args()
    sessions = options.sessions or (500 if options.quick else 10_000)
    plan = Plan(sessions, options.turns, options.rate, options.implicit)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="agent-infra-bench-") as folder:
        try:
            exact = run(plan, options.program.resolve(), Path(folder))
        except (BenchmarkError, KeyboardInterrupt) as error:
            sys.exit(f"sessions.py: {str(error) or 'interrupted'}")
    sys.exit(0 if exact else 1)


if __name__ == "__main__":
    main()
