#!/usr/bin/env python3
"""What the history costs: CPU a turn, in the controller's loop and in the writer's thread, and bytes on the disk.

    python benchmarks/history.py                 # 100,000 turns of 2,000 sessions, a thousand a batch

The same turns are observed by a tracker alone and by one whose records go into a file, in turns; the difference is the
history's.  Excerpts are of 200 characters, as proxy.capture_text has it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agent_infra_core.insight.history import HistoryBatch, HistoryFile
from agent_infra_core.insight.metrics import TurnMetrics
from agent_infra_core.insight.tracker import Tracker
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


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=100_000)
    parser.add_argument("--sessions", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
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
