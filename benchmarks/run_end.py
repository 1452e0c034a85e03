#!/usr/bin/env python3
"""Runs of 200 tasks: how well is their end foretold, and how well could it be?

    python benchmarks/run_end.py                              # every distribution of turns per task, 10 seeds

Agents of a simulated fleet (families.py) take one task after another until none is left. From a third of the run on,
the program's estimate of the time that is left is compared with the time that was, and with the estimate of an oracle
that uses the same method but knows the distribution of turns per task.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import closed_loop
import numpy as np
from closed_loop import Agent, Workload
from families import World, planted

from agent_infra_core.insight.runs import Announcement, Forecast, Run, RunBook, task_lengths
from agent_infra_core.insight.tracker import Tracker
from agent_infra_core.protocol import SessionEnded, TurnFinished

LONGEST = 10_000
LENGTHS: dict[str, Callable[[random.Random], float]] = {
    "fixed": lambda _: 15,
    "uniform": lambda dice: dice.uniform(5, 25),
    "geometric": lambda dice: 1 + dice.expovariate(1 / 14),
    "lognormal": lambda dice: dice.lognormvariate(math.log(10), 0.8),
    "pareto": lambda dice: 6 * dice.paretovariate(1.7),
}
HEAVY = ("lognormal", "pareto")
SHARES = (0.34, 0.5, 0.65, 0.8, 0.9)  # of the run's time at which its end is estimated


@dataclass
class FiniteWorld(World):
    """A world with so many tasks, each of which is one session."""

    tasks: int = 200
    length: Callable[[random.Random], float] = LENGTHS["fixed"]
    over: list[Agent] = field(default_factory=list)

    def _begin_session(self, agent: Agent) -> None:
        super()._begin_session(agent)
        self.tasks -= 1
        agent.turn = LONGEST - max(1, round(self.length(self._random)))

    def _close(self, agent: Agent, output: int) -> None:
        super()._close(agent, output)
        if self.tasks < 0 and agent.turn < LONGEST and agent.context == self.workload.base_tokens:
            self._withdraw(agent)
            self._agents.pop(agent.number, None)
            self.tasks = 0


def finite(name: str, seed: int, agents: int, replicas: int) -> FiniteWorld:
    workload = Workload(think_s=10.0, service_cv=0.1, turns=LONGEST)
    world = FiniteWorld(planted(replicas), 0, workload, seed, "m", length=LENGTHS[name])
    world.set_agents(agents)
    return world


def play(name: str, seed: int, agents: int, replicas: int) -> list[tuple[float, dict[str, Any], Any]]:
    """The time left, the document and the turns so far at SHARES of a run."""
    rehearsal = finite(name, seed, agents, replicas)
    while rehearsal._agents:
        rehearsal.run(1.0)
    end = rehearsal.now
    world, book, found = finite(name, seed, agents, replicas), RunBook(), []
    clock = closed_loop.START
    tracker = Tracker(lambda: clock)
    book.announce(Announcement("run", 200, clock))
    rng = np.random.default_rng(seed)
    for share in SHARES:
        world.run(share * end - world.now)
        for event in sorted(world.events, key=lambda event: event.at):
            clock = event.at
            tracker.observe(event)
            if isinstance(event, TurnFinished):
                for record in tracker.take_records()[0]:
                    book.add(record)
            elif isinstance(event, SessionEnded):
                book.end_session(event.session, event.at)
        world.events.clear()
        clock = closed_loop.START + world.now
        [row] = book.document(clock, lambda _: None, {}, lambda: rng, {})
        found.append((end - world.now, row, oracle(name, next(iter(book._runs.values())), rng)))
    return found


def oracle(name: str, run: Run, rng: Any) -> float:
    """The same estimate from the true distribution of turns."""
    dice = random.Random(0)
    true = np.array([max(1, round(LENGTHS[name](dice))) for _ in range(2000)], dtype=float)
    so_far = np.array([task.turns for task in run.seen.values() if not task.is_over], dtype=float)
    gap_s = float(np.mean(run.gaps))
    known = task_lengths(true, np.full(len(true), True), rng, draws=100)
    forecast = Forecast(so_far, run.tasks - len(run.seen), known, gap_s, float(np.std(run.gaps)) / gap_s)
    return float(np.median(forecast.finish_s(len(so_far), 1.0, np.ones(2), rng)))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--agents", type=int, default=24)
    parser.add_argument("--replicas", type=int, default=2)
    options = parser.parse_args(argv)
    print("| turns per task | median error | oracle | 90 % intervals hold | half-width, of the time left |")
    print("|----------------|-------------:|-------:|--------------------:|-----------------------------:|")
    for name in LENGTHS:
        errors, best, held, widths = [], [], [], []
        for seed in range(options.seeds):
            found = play(name, seed, options.agents, options.replicas)
            for left, row, known in found:
                told = row["remaining_s"]
                if told["value"] is None or known is None:
                    continue
                errors.append(abs(told["value"] - left) / left)
                best.append(abs(known - left) / left)
                held.append(told["low"] <= left <= told["high"])
                widths.append((told["high"] - told["low"]) / 2 / left)
        cells = [f"{100 * statistics.median(part):.0f} %" for part in (errors, best)]
        shown = [
            *cells,
            f"{100 * sum(held) / len(held):.0f} % of {len(held)}",
            f"{100 * statistics.median(widths):.0f} %",
        ]
        print(f"| {name:14} | {' | '.join(shown)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
