#!/usr/bin/env python3
"""Twenty minutes, a fault every 20 s: do agents see only what the docs promise, and does the history agree with them?

    python benchmarks/soak.py                  # twenty minutes
    python benchmarks/soak.py --seconds 380    # every fault once

Eight agents talk through ``agent_infra.py proxy`` to two engines. The proxy may open 256 files, and its state is on a
file system of its own, so that its disk can be full. Needs root (for that mount) and util-linux's prlimit.

Each agent's log is compared with history.db, turn by turn: session, outcome, status, text. Only turns that ended just
before a kill may be missing. The exit code is 1 if any of this fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_process import BenchmarkError, proxy_and_load_cores
from endurance import MODEL, Agent, Asked, RunningProxy, ScriptedEngine, ask, main, table, totals, tracebacks
from relay_harness import Client, request

AGENTS = 8
DESCRIPTORS = 256
DISK_MB = 256
INTERVAL_S = 20.0
LOST_S = 2.5  # before a kill: the history is written once a second, and the relay's last batch takes a moment
CAPTURED = 200  # characters of an answer in the history
OUTCOMES = {  # as the agent sees it → as the history has it
    "completed": {"completed"},
    "cut": {"cut", "error"},
    "refused": {"error", "rejected"},
    "broken": {
        "aborted",
        "cut",
        "error",
        "rejected",
        "completed",
    },  # the relay died: the controller knows what it heard
    "left": {"aborted", "completed"},
}


@dataclass
class Bed:
    """What faults strike."""

    proxy: RunningProxy
    engines: list[ScriptedEngine]
    chance: random.Random
    left: list[Asked] = field(default_factory=list)  # turns of agents that left
    kills: list[tuple[float, float]] = field(default_factory=list)  # since when turns may be lost, and until when

    def engine(self) -> ScriptedEngine:
        """The one that is asked more at the moment."""
        before = [engine.requests() for engine in self.engines]
        time.sleep(0.5)
        news = [engine.requests() - count for engine, count in zip(self.engines, before, strict=True)]
        return self.engines[news.index(max(news))]

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """Nothing can be written meanwhile."""
        filling = self.proxy.state / "filling"
        with filling.open("wb") as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * (1 << 16))
                    file.flush()
            with contextlib.suppress(OSError):
                while True:
                    os.write(file.fileno(), b"x")
        try:
            yield
        finally:
            filling.unlink()

    @contextlib.contextmanager
    def kill(self, since: float | None = None) -> Iterator[None]:
        """The last turns before what is killed in the block may be lost; ``since``: those from then on."""
        began = time.time() - LOST_S if since is None else since
        yield
        self.kills.append((began, time.time() + 0.5))


def misbehave(bed: Bed, seconds: float, **behaviour: Any) -> None:
    """One engine does this for a while."""
    engine = bed.engine()
    engine.behave(**behaviour)
    time.sleep(seconds)
    engine.behave()


# The faults.


def engine_killed(bed: Bed) -> None:
    engine = bed.engine()
    engine.signal(signal.SIGKILL)
    time.sleep(3.0)
    engine.start()


def engine_restarted_at_once(bed: Bed) -> None:
    bed.engine().start()


def engine_hangs(bed: Bed) -> None:
    engine = bed.engine()
    engine.signal(signal.SIGSTOP)
    time.sleep(8.0)
    engine.signal(signal.SIGCONT)


def engine_answers_500(bed: Bed) -> None:
    misbehave(bed, 5.0, status=500)


def engine_answers_429(bed: Bed) -> None:
    misbehave(bed, 5.0, status=429, retry_after=1)


def engine_cuts_streams(bed: Bed) -> None:
    misbehave(bed, 3.0, cut=1)


def engine_breaks_off(bed: Bed) -> None:
    misbehave(bed, 3.0, cut="before")


def relay_killed(bed: Bed) -> None:
    with bed.kill():
        bed.proxy.kill_relay()


def controller_killed(bed: Bed) -> None:
    with bed.kill():
        bed.proxy.kill_controller()
    time.sleep(3.0)
    bed.proxy.start()


def both_killed(bed: Bed) -> None:
    with bed.kill():
        bed.proxy.kill_controller()
        bed.proxy.kill_relay()
    bed.proxy.start()


def proxy_stopped(bed: Bed) -> None:
    bed.proxy.ask_to_end()
    bed.proxy.end()
    bed.proxy.start()


def proxy_stopped_at_once(bed: Bed) -> None:
    bed.proxy.ask_to_end()
    time.sleep(0.2)
    with contextlib.suppress(ProcessLookupError):
        bed.proxy.ask_to_end()
    bed.proxy.end()
    bed.proxy.start()


def disk_full(bed: Bed) -> None:
    with bed.full_disk():
        time.sleep(10.0)


def disk_full_relay_killed(bed: Bed) -> None:
    with bed.full_disk():
        time.sleep(2.0)
        with bed.kill():
            bed.proxy.kill_relay()
        time.sleep(5.0)


def disk_full_controller_killed(bed: Bed) -> None:
    since = time.time() - LOST_S
    with bed.full_disk():
        time.sleep(3.0)
        with bed.kill(since):  # what waits in memory is lost with it
            bed.proxy.kill_controller()
        time.sleep(2.0)
    bed.proxy.start()


def agents_leave(bed: Bed) -> None:
    for number in range(20):
        session, began = f"left-{time.time()}-{number}", time.time()
        with Client(bed.proxy.port) as client:
            data = request(stream=True, fake={"tokens": 100, "gap": 0.05})
            client.sock.sendall(data.replace(b"Host: t", b"Host: t\r\nX-Session-ID: %b" % session.encode()))
            head = client.sock.recv(65536).decode("latin-1").lower()
        turn = head.partition("x-request-id: ")[2].partition("\r\n")[0]
        bed.left.append(Asked(session, turn, began, time.time(), "left", 200, ""))


def replica_drained(bed: Bed) -> None:
    for verb in ("drain", "undrain"):
        ask(bed.proxy.port, "POST", f"/admin/backends/{MODEL}-1/{verb}")
        time.sleep(5.0)


def strangers(bed: Bed) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(socket.create_connection(("127.0.0.1", bed.proxy.port), timeout=10))
        time.sleep(10.0)


def history_locked(bed: Bed) -> None:
    with contextlib.closing(sqlite3.connect(bed.proxy.history, isolation_level=None, timeout=30)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        time.sleep(8.0)


# Each with what agents may see of it, besides complete answers (docs/operations.md).
FAULTS: Sequence[tuple[Callable[[Bed], None], frozenset[str]]] = [
    (engine_killed, frozenset({"cut"})),
    (engine_restarted_at_once, frozenset({"cut"})),
    (engine_hangs, frozenset()),
    (engine_answers_500, frozenset({"refused"})),
    (engine_answers_429, frozenset()),
    (engine_cuts_streams, frozenset({"cut"})),
    (engine_breaks_off, frozenset({"refused"})),
    (relay_killed, frozenset({"broken"})),
    (controller_killed, frozenset()),
    (both_killed, frozenset({"broken"})),
    (proxy_stopped, frozenset({"broken"})),  # nobody listens until it is started again
    (proxy_stopped_at_once, frozenset({"broken", "cut", "refused"})),
    (disk_full, frozenset()),
    (disk_full_relay_killed, frozenset({"broken"})),
    (disk_full_controller_killed, frozenset()),
    (agents_leave, frozenset()),
    (replica_drained, frozenset()),
    (strangers, frozenset()),
    (history_locked, frozenset()),
]


@dataclass(frozen=True)
class Strike:
    """A fault that happened: its name, when, and what agents may see of it."""

    name: str
    began: float
    ended: float  # when the next one began
    allowed: frozenset[str]


def strike_all(bed: Bed, seconds: float) -> list[Strike]:
    """One fault each INTERVAL_S, in rounds of all, each round in an order of its own."""
    strikes, end, order = list[Strike](), time.monotonic() + seconds, list[Any]()
    while (start := time.monotonic()) < end:
        order = order or bed.chance.sample(FAULTS, len(FAULTS))
        (fault, allowed), began = order.pop(), time.time()
        print(f"{time.strftime('%H:%M:%S')} {fault.__name__}", file=sys.stderr, flush=True)
        fault(bed)
        time.sleep(max(0.0, start + INTERVAL_S - time.monotonic()))
        strikes.append(Strike(fault.__name__, began, time.time(), allowed))
    return strikes


def compare(asked: Sequence[Asked], rows: Sequence[dict[str, Any]], kills: Sequence[tuple[float, float]]) -> list[str]:
    """Compare the agents' turns with the history's, turn by turn. Returns what doesn't agree."""
    problems, known = list[str](), {row["turn"]: row for row in rows}
    nameless = [each for each in asked if each.turn is None and each.outcome == "broken"]
    for each in asked:
        row = known.pop(each.turn or "", None)
        is_turn = each.turn is not None and "-r" not in each.turn  # others were refused before they were one
        if row is None:
            if is_turn and not _is_lost(each, kills):
                problems.append(f"not in the history: {each}")
            continue
        if row["outcome"] == "cut" and _is_lost(each, kills):
            continue  # the controller knew of it, and not of its end
        wanted = {"session": each.session, "status": each.status}
        wanted |= {"answer": each.said[:CAPTURED]} if each.outcome == "completed" else {}
        wanted = {} if each.outcome == "broken" else wanted
        found = {name: row[name] for name in wanted}
        if found != wanted or row["outcome"] not in OUTCOMES.get(each.outcome, ()):
            problems.append(f"the history has {row['outcome']} {found}: {each}")
    for row in known.values():  # the agents had no answer to these, whose id they would know
        match = next((each for each in nameless if _may_be(each, row)), None)
        if match is None:
            problems.append(f"no agent knows of {row}")
        else:
            nameless.remove(match)
    return problems


def _is_lost(asked: Asked, kills: Sequence[tuple[float, float]]) -> bool:
    """Whether a turn ended so shortly before a kill that its end may be lost."""
    return any(asked.ended >= since and asked.began <= until for since, until in kills)


def _may_be(asked: Asked, row: dict[str, Any]) -> bool:
    """Whether a row may be a turn whose agent saw no head of an answer."""
    started = row["started_at"] or row["finished_at"]
    return bool(row["session"] == asked.session and asked.began - 1.0 <= started <= asked.ended + 1.0)


def unexpected(asked: Sequence[Asked], strikes: Sequence[Strike]) -> list[str]:
    """What agents saw and no fault explains."""
    problems = []
    for each in asked:
        near = [strike for strike in strikes if strike.began <= each.ended and each.began <= strike.ended]
        allowed = frozenset({"completed", "left"}).union(*(strike.allowed for strike in near))
        if each.outcome not in allowed:
            problems.append(f"during {[strike.name for strike in near]}: {each}")
    return problems


def read_history(path: Path) -> list[dict[str, Any]]:
    """Its turns."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.row_factory = sqlite3.Row
        if (check := database.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
            raise BenchmarkError(f"the history is damaged: {check}")
        return [dict(row) for row in database.execute("SELECT * FROM turns")]


def run(seconds: float, seed: int, folder: Path) -> list[str]:
    """One run; prints the report. Returns what went wrong."""
    proxy_cores, load_cores = proxy_and_load_cores()
    with contextlib.ExitStack() as stack:
        _mount(folder / "state", stack)
        engines = [ScriptedEngine(folder, load_cores) for _ in range(2)]
        for engine in engines:
            stack.callback(engine.stop)
        proxy = RunningProxy(folder, proxy_cores, {MODEL: [engine.port for engine in engines]}, DESCRIPTORS)
        stack.callback(proxy.stop)
        proxy.start()
        bed, over = Bed(proxy, engines, random.Random(seed)), threading.Event()
        stack.callback(over.set)
        agents = [Agent(proxy.port, f"agent-{number}", seed + number, over) for number in range(AGENTS)]
        before = proxy.usage()
        strikes = strike_all(bed, seconds)
        over.set()
        for agent in agents:
            agent.join()
        in_flight = json.loads(ask(proxy.port, "GET", "/queue/status"))["in_flight"]
        after = proxy.usage()
        proxy.ask_to_end()
        proxy.end()
        asked = [each for agent in agents for each in agent.log] + bed.left
        rows = read_history(proxy.history)
        bugs = tracebacks(proxy.relay_log)
    problems = unexpected(asked, strikes) + compare(asked, rows, bed.kills) + bugs
    problems += [f"{in_flight} turns are still in flight"] if in_flight else []
    print(_report(asked, rows, strikes))
    print(f"\nturns of the agents: {dict(totals(agents))}; in the history: {len(rows)}; before {before}, after {after}")
    return problems


def _mount(state: Path, stack: contextlib.ExitStack) -> None:
    """A file system for the state alone."""
    state.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(state)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"a file system to fill can't be mounted: {done.stderr.strip()}; run this as root")
    stack.callback(subprocess.run, ["umount", "--lazy", str(state)], check=False)


def _report(asked: Sequence[Asked], rows: Sequence[dict[str, Any]], strikes: Sequence[Strike]) -> str:
    """A row for each fault: what agents saw while it lasted, and which of their turns the history lacks."""
    known = {row["turn"] for row in rows}
    lines = []
    for name in sorted({strike.name for strike in strikes}):
        mine = [strike for strike in strikes if strike.name == name]
        seen = [each for each in asked if any(strike.began <= each.ended < strike.ended for strike in mine)]
        counts = Counter(each.outcome for each in seen)
        late = [each for each in asked if any(s.began - LOST_S <= each.ended < s.ended - LOST_S for s in mine)]
        missing = sum(each.turn is not None and "-r" not in each.turn and each.turn not in known for each in late)
        others = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()) if outcome != "completed")
        lines.append([name.replace("_", " "), len(mine), counts["completed"], others or "none", missing])
    return table(["fault", "times", "whole answers", "other ends", "turns that the history lacks"], lines)


if __name__ == "__main__":
    main(__doc__, 1200.0, run, "the agents saw what the docs promise, and the history agrees with them")
