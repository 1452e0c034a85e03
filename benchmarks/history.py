#!/usr/bin/env python3
"""What the history costs: CPU a turn, in the controller's loop and in the writer's thread, and bytes on the disk.

    python benchmarks/history.py                 # 100,000 turns of 2,000 sessions, a thousand a batch
    python benchmarks/history.py --questions     # what GET /history and /sessions cost over a million turns

The same turns are observed by a tracker alone and by one whose records go into a file, in turns; the difference is the
history's.  Excerpts are of 200 characters, as proxy.capture_text has it.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agent_infra_core.control.reader import Question, history_question, session_question, sessions_question
from agent_infra_core.insight.export import read_history
from agent_infra_core.insight.history import HistoryBatch, HistoryFile
from agent_infra_core.insight.metrics import TurnMetrics
from agent_infra_core.insight.tracker import Tracker
from agent_infra_core.insight.turns import TurnRecord
from agent_infra_core.protocol import TurnEvent, TurnFinished, TurnStarted

BATCH = 1000  # turns a second, and one batch a second
PROMPT = "The page shows 3 offers; which one has a blue lid and costs below 20 euro? " * 4
ANSWER = "I click on the second offer, since its picture shows a blue lid and it costs 17.99. " * 4


def events(first: int, count: int, sessions: int) -> Iterator[TurnEvent]:
    """Turns that are over within a batch, as most are."""
    for number in range(first, first + count):
        at = 1_800_000_000.0 + number / BATCH
        started = TurnStarted(
            *(f"5f0c2a7be913-{number:x}", at - 2.0, "qwen", "/v1/chat/completions"),
            *(f"webshop-run-{number % sessions:05}", f"task-{number % 97}", "agent-1 python agent.py", True),
            *(120.5, 80.25, PROMPT[number % 70 :][:200]),
        )
        yield TurnFinished(
            *(started.turn, at, "completed", 200, f"qwen-{number % 4}", 12.5, 210.75, 1890.5),
            *(0, 3000 + number % 977, 250, 2800),
            finish_reason="stop",
            answer=ANSWER[number % 70 :][:200],
            started=started,
        )


def run(turns: int, sessions: int, path: Path | None) -> tuple[float, float]:
    """CPU seconds of the loop (tracker, records taken) and of the writer."""
    tracker, metrics = Tracker(lambda: 1_900_000_000.0), TurnMetrics()
    file = HistoryFile(path) if path is not None else None
    loop_s = writer_s = 0.0
    for first in range(0, turns, BATCH):
        batch = list(events(first, BATCH, sessions))
        start = time.thread_time()
        tracker.observe(*batch)
        records, posts = tracker.take_records()
        if file is not None:
            metrics.add(*records)
            waiting = HistoryBatch()
            waiting.add(HistoryBatch(deque(records), posts, {"requests": len(records)}))
        middle = time.thread_time()
        if file is not None:
            file.write(waiting)
            file.trim(1 << 30, 1000)
        loop_s += middle - start
        writer_s += time.thread_time() - middle
    if file is not None:
        file.close()
    return loop_s, writer_s


def fill(path: Path, turns: int, span_s: float) -> tuple[float, float]:
    """A history of so many turns over ``span_s`` until now, 20 a session, with the gauges of two models.

    Returns the seconds that summarising them took, once they were there as an older version leaves them, and that the
    migration took.
    """
    file, now, rng = HistoryFile(path), time.time(), random.Random(1)
    for first in range(0, turns, 10 * BATCH):
        records = deque[TurnRecord]()
        for number in range(first, first + 10 * BATCH):
            at = now - span_s * (1 - number / turns)
            values: list[Any] = [
                *(f"5f0c2a7be913-{number:x}", at, "completed" if number % 50 else "error", 200),
                *(f"webshop-run-{number // 20:05}", f"task-{number % 97}", "agent-1 python agent.py"),
                *(f"qwen-{number % 2}", "/v1/chat/completions", True, f"qwen-{number % 8}", at - 2.0, 0, 120.5),
                *(120.5, 12.5, rng.lognormvariate(5, 0.6), rng.lognormvariate(7.5, 0.5), 80.25, None),
                *(3000 + number % 977, 250, 2800, 2900, None, False, "stop", None),
                *(PROMPT[number % 70 :][:200], ANSWER[number % 70 :][:200]),
            ]
            records.append(TurnRecord(*values))
        file.write(HistoryBatch(records))
    models, seconds = ("", "qwen-0", "qwen-1"), range(0, int(min(span_s, 2 * 86400)), 5)
    file.write(
        HistoryBatch(gauges=[(now - at, model, 5.0, 9.0, 1.0, 0.5, 0.8, 0) for at in seconds for model in models])
    )
    for statement in ("DELETE FROM steps", "DELETE FROM sessions", "DELETE FROM about WHERE name = 'summarised'"):
        file.query(statement)
    start = time.monotonic()
    while file.catch_up():
        pass
    summarised_s = time.monotonic() - start
    for statement in ("DROP INDEX turns_by_end", "DROP INDEX turns_by_session"):
        file.query(statement)
    start = time.monotonic()
    file.query("CREATE INDEX turns_by_end ON turns (finished_at)")
    file.query("CREATE INDEX turns_by_session ON turns (session)")
    indexed_s = time.monotonic() - start
    file.close()
    return summarised_s, indexed_s


def ask(path: Path, turns: int) -> None:
    """Time what the page asks for, and the longest that another thread, such as the controller's, waits meanwhile."""
    span_s = 7 * 86400.0
    summarised_s, indexed_s = fill(path, turns, span_s)
    print(f"{turns:,} turns over a week, {path.stat().st_size / 1e6:,.0f} MB, asked for by a thread beside a busy one:")
    print(
        f"  an older version's file: indices {indexed_s:.1f} s (at the start), summaries {summarised_s:.1f} s (beside)"
    )
    now = time.time()
    known = [
        ("idle", f"live-{n}", "qwen-0", "c", "t", "r", now, now, *[1] * 5, *[10] * 3, *[1.0] * 3) for n in range(2000)
    ]
    questions: dict[str, Callable[[], Question]] = {
        f"GET /history, {name}": functools.partial(history_question, {"from": since, "points": points}, now)
        for name, since, points in (
            ("5 minutes", now - 300, 300),
            ("1 hour, 2,000 points", now - 3600, 2000),
            ("30 hours, 2,000 points", now - 30 * 3600, 2000),
            ("all of it, 300 points", 0, 300),
            ("all of it, 2,000 points", 0, 2000),
        )
    }
    questions["GET /sessions, the latest"] = lambda: sessions_question({}, known)
    questions["GET /sessions, search, by wait"] = lambda: sessions_question(
        {"query": "run-012", "sort": "queued_s"}, known
    )
    questions["GET /stats/sessions/{id}"] = lambda: session_question({"session": "webshop-run-00123"}, (None, ()), now)
    for name, question in questions.items():
        with read_history(path) as file:
            took, cpu, stall = timed(lambda file=file, question=question: question()(file))  # type: ignore[misc]
        print(f"  {name:34} {took * 1000:6.0f} ms, CPU {cpu * 1000:6.0f} ms, longest stall {stall * 1000:4.0f} ms")


def timed(work: Callable[[], object]) -> tuple[float, float, float]:
    """Seconds that ``work`` takes in a thread, of them CPU, and the longest pause of a thread that runs beside it."""
    took: list[float] = []

    def run() -> None:
        start, cpu = time.monotonic(), time.thread_time()
        work()
        took[:] = time.monotonic() - start, time.thread_time() - cpu

    thread, longest = threading.Thread(target=run), 0.0
    thread.start()
    while thread.is_alive():
        before = time.monotonic()
        time.sleep(0.001)  # as a loop that waits for frames
        longest = max(longest, time.monotonic() - before - 0.001)
    return took[0], took[1], longest


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=100_000)
    parser.add_argument("--sessions", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", action="store_true", help="time questions, over ten times as many turns")
    options = parser.parse_args()
    if options.questions:
        with tempfile.TemporaryDirectory(prefix="agent-infra-bench-") as folder:
            ask(Path(folder) / "history.db", 10 * options.turns)
        return
    without, taken, written, sizes = [], [], [], []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="agent-infra-bench-") as folder:
            path = Path(folder) / "history.db"
            without.append(run(options.turns, options.sessions, None)[0])
            loop_s, writer_s = run(options.turns, options.sessions, path)
            taken.append(loop_s - without[-1])
            written.append(writer_s)
            sizes.append(path.stat().st_size)
    each = 1e6 / options.turns
    print(f"CPU µs a turn, median of {options.rounds} rounds of {options.turns:,} turns:")
    print(f"  the tracker alone                          {statistics.median(without) * each:6.1f}")
    print(f"  taking records and counting for /metrics   {statistics.median(taken) * each:6.1f}")
    print(f"  writing them, in a thread of its own       {statistics.median(written) * each:6.1f}")
    print(f"KB a 1,000 turns: {statistics.median(sizes) / options.turns:,.0f}")


if __name__ == "__main__":
    main()
