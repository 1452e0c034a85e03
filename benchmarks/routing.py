#!/usr/bin/env python3
"""Which routing policy serves multi-turn agents best? Ours and nine others, on the same simulated work.

    python benchmarks/routing.py                         # all workloads, 5 seeds: at most 15 minutes of one core
    python benchmarks/routing.py --quick                 # three workloads, 2 seeds
    python benchmarks/routing.py --workloads swe kv-1.6 --policies ours "sticky sessions" --seeds 3
    python benchmarks/routing.py --workloads swe-64      # larger fleets: swe-16, swe-64, swe-256
    python benchmarks/routing.py --choice                # what a choice costs, with 10,000 sessions

Agents form a closed loop: a fixed number of sessions run at a time, each returns with a longer prompt after its tool or
its human, and each that ends is followed by the next. Every policy serves the same scripts. The presets swe, coding and
fanout follow what was measured of agents in 2026 (TraceLab, arXiv 2606.30560, and the data sets it names): context,
appended and generated tokens per step, tool times with their tail, human waits. The simulator is
agent_infra_core/routing/simulator.py, the other policies are in routing_baselines.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from routing_baselines import BASELINES

from agent_infra_core.routing.affinity import SessionRouter, SessionTurn
from agent_infra_core.routing.policies import Ours, View
from agent_infra_core.routing.simulator import Fleet, Physics, Policy, Script, Step

LONGEST_TOOL_S, LONGEST_HUMAN_S = 600.0, 1800.0


@dataclass(frozen=True)
class Workload:
    """What agents do, and where. Pairs are a log-normal's median and its sigma."""

    replicas: int = 4
    agents: int = 96  # sessions that run at a time
    sessions: int = 176  # in all
    steps: tuple[float, float] = (50, 0.4)
    system_tokens: int = 3000
    systems: int = 2  # different system prompts
    task_tokens: tuple[float, float] = (3000, 0.5)
    appended: tuple[float, float] = (120, 1.3)
    output: tuple[float, float] = (150, 0.9)
    tool_s: tuple[float, float] = (0.3, 2.97)  # p50 0.3 s, p90 13.6 s, mean 17 s within LONGEST_TOOL_S
    human_share: float = 0.0  # of the steps are followed by a human
    human_s: tuple[float, float] = (86.0, 2.08)
    forks_per_session: float = 0.0  # times that a session starts three sub-agents of eight steps; half of these inherit
    whales: float = 0.0  # share of sessions with five times the tokens and a fifth of the think time
    kv_pressure: float = 0.6  # mean context of all agents, over all KV caches
    slow: float = 1.0  # speed of the last replica
    flush: float = 0.0  # the first replica's cache is lost after so many seconds
    ramp_s: float = 60.0


SWE = Workload()
CODING = Workload(
    agents=40, sessions=64, steps=(80, 0.3), system_tokens=15_000, systems=3, task_tokens=(25_000, 0.5),
    appended=(600, 1.5), output=(252, 1.2), human_share=0.11, kv_pressure=0.8,
)  # fmt: skip
WORKLOADS: Mapping[str, Workload] = {
    "swe": SWE,
    "coding": CODING,
    "fanout": Workload(
        agents=56, sessions=96, steps=(40, 0.3), system_tokens=12_000, systems=1, task_tokens=(8000, 0.8),
        appended=(300, 1.4), output=(184, 1.0), forks_per_session=0.53, kv_pressure=0.8,
    ),
    "steady": dataclasses.replace(SWE, tool_s=(0.3, 1.0)),  # no long tools: the engines are the limit
    "skewed": dataclasses.replace(SWE, whales=0.15, kv_pressure=0.8),
    "kv-1.0": dataclasses.replace(SWE, kv_pressure=1.0),
    "kv-1.6": dataclasses.replace(SWE, kv_pressure=1.6),
    "paced": dataclasses.replace(SWE, tool_s=(10.0, 0.5), kv_pressure=1.6),  # no long pauses: LRU thrashes
    "no-reuse": dataclasses.replace(
        SWE, sessions=6000, steps=(1, 0), system_tokens=0, task_tokens=(6000, 1.0), tool_s=(0.3, 1)
    ),
    "shared-prompt": dataclasses.replace(SWE, sessions=800, steps=(8, 0.5), system_tokens=12_000, systems=1),
    "slow-replica": dataclasses.replace(SWE, slow=0.5),
    "flushed": dataclasses.replace(SWE, flush=600.0),
    "burst": dataclasses.replace(SWE, agents=160, sessions=160, ramp_s=0.0),
    "swe-16": dataclasses.replace(SWE, replicas=16, agents=384, sessions=600, steps=(20, 0.4)),
    "swe-64": dataclasses.replace(SWE, replicas=64, agents=1536, sessions=2400, steps=(20, 0.4)),
    "swe-256": dataclasses.replace(SWE, replicas=256, agents=6144, sessions=9600, steps=(20, 0.4)),
}  # fmt: skip
GRID = [name for name in WORKLOADS if name not in ("swe-64", "swe-256")]
QUICK = ["swe", "kv-1.6", "no-reuse"]
POLICIES: Mapping[str, Callable[[Fleet, int], Policy]] = {"ours": Ours, **BASELINES}


class Scripts:
    """Draws a workload's sessions; the same seed draws the same ones."""

    def __init__(self, workload: Workload, seed: int) -> None:
        self._workload, self._random = workload, random.Random(seed)
        self._segments = count(1)
        self._systems = [(next(self._segments), workload.system_tokens) for _ in range(workload.systems)]

    def draw(self) -> list[Script]:
        return [self._session() for _ in range(self._workload.sessions)]

    def _lognormal(self, median_sigma: tuple[float, float], most: float = math.inf) -> float:
        median, sigma = median_sigma
        return min(most, median * math.exp(sigma * self._random.gauss(0, 1)))

    def _session(self) -> Script:
        workload, rng = self._workload, self._random
        scale = 5.0 if rng.random() < workload.whales else 1.0
        length = max(1, round(self._lognormal(workload.steps)))
        steps = [self._step(index, scale) for index in range(length)]
        if workload.forks_per_session and length > 2 and rng.random() < workload.forks_per_session:
            index = rng.randrange(1, length - 1)
            steps[index] = dataclasses.replace(steps[index], forks=tuple(self._fork() for _ in range(3)))
        shared = (rng.choice(self._systems),) if workload.system_tokens else ()
        return Script(shared, tuple(steps))

    def _step(self, index: int, scale: float) -> Step:
        workload = self._workload
        appended = self._lognormal(workload.appended if index else workload.task_tokens, 50_000) * scale
        is_human = self._random.random() < workload.human_share
        think_s = self._lognormal(workload.human_s, LONGEST_HUMAN_S) if is_human else 0.0
        think_s += self._lognormal(workload.tool_s, LONGEST_TOOL_S)
        output = min(4000.0, self._lognormal(workload.output))
        return Step(max(1, round(appended)), max(2, round(output)), think_s / scale)

    def _fork(self) -> Script:
        steps = tuple(self._step(1, 1.0) for _ in range(8))
        return Script((self._systems[0],), steps, inherits=self._random.random() < 0.5)


def mean_context(scripts: Sequence[Script]) -> float:
    """Mean tokens of a session's context over its time, thinking included but for sub-agents and queues."""
    weighted = seconds = 0.0
    for script in scripts:
        context = float(sum(tokens for _, tokens in script.shared))
        for step in script.steps:
            context += step.appended + step.output
            duration = step.think_s + step.output * 0.012
            weighted += context * duration
            seconds += duration
    return weighted / seconds


def build_fleet(workload: Workload, seed: int) -> Fleet:
    """The fleet for a workload; its KV cache is as large as the workload's pressure asks for."""
    scripts = Scripts(workload, seed).draw()
    largest = max(sum(s.appended + s.output for s in script.steps) for script in scripts) + 4 * workload.system_tokens
    fair = workload.agents * mean_context(scripts) / (workload.replicas * workload.kv_pressure)
    physics = dataclasses.replace(Physics(), kv_tokens=round(max(fair, 1.5 * largest)))
    speeds = [1.0] * (workload.replicas - 1) + [workload.slow]
    flush = (0, workload.flush) if workload.flush else None
    return Fleet(physics, scripts, speeds, workload.agents, workload.ramp_s, flush)


@dataclass(frozen=True)
class Result:
    """What one run showed."""

    wall_s: float
    most_s: float  # until 90 % of the sessions were over
    mean_s: float  # of the turns, like the next
    p50_s: float
    p95_s: float
    replayed: float  # prefilled tokens that some replica had computed before, per turn
    hit_rate: float  # cached tokens over prompt tokens
    ceiling: float  # the same for a perfect cache
    skew: float
    moves: float  # per session
    longest_wait_s: float
    preemptions: int


def measure(fleet: Fleet) -> Result:
    turns = fleet.turns
    latencies = sorted(turn.finished - turn.arrived for turn in turns)
    prompts = sum(turn.prompt for turn in turns)
    known = sum(min(turn.known, turn.prompt - 1) for turn in turns)
    cached = sum(turn.cached for turn in turns)
    return Result(
        wall_s=fleet.now,
        most_s=sorted(fleet.ended)[math.ceil(0.9 * len(fleet.ended)) - 1],
        mean_s=statistics.fmean(latencies),
        p50_s=latencies[len(latencies) // 2],
        p95_s=latencies[int(0.95 * len(latencies))],
        replayed=max(0, known - cached) / len(turns),
        hit_rate=cached / prompts,
        ceiling=known / prompts,
        skew=statistics.fmean(fleet.skew) if fleet.skew else 1.0,
        moves=fleet.moves / len(fleet.ended),
        longest_wait_s=fleet.longest_wait_s,
        preemptions=sum(replica.preemptions for replica in fleet.replicas),
    )


def run(workload: Workload, policy: Callable[[Fleet, int], Policy], seed: int) -> Result:
    fleet = build_fleet(workload, seed)
    fleet.run(policy(fleet, seed))
    return measure(fleet)


HEADS = "policy | to 90 % | mean turn | wall s | p50 s | p95 s | replayed | hits | fullest | moves | wait s | preempted"


def rows(results: Mapping[str, Sequence[Result]], reference: str) -> Iterator[list[str]]:
    """A row per policy; the first two figures are over the reference's, seed by seed: the time to 90 % of the sessions,
    and the mean turn."""
    for name, runs in results.items():

        def ratio(field: str, runs: Sequence[Result] = runs) -> str:
            ratios = [getattr(a, field) / getattr(b, field) for a, b in zip(runs, results[reference], strict=True)]
            return f"{statistics.fmean(ratios):.3f} ({min(ratios):.2f}-{max(ratios):.2f})"

        def mean(field: str, runs: Sequence[Result] = runs) -> float:
            return statistics.fmean(getattr(run, field) for run in runs)

        yield [
            name, ratio("most_s"), ratio("mean_s"), f"{mean('wall_s'):.0f}", f"{mean('p50_s'):.2f}",
            f"{mean('p95_s'):.2f}", f"{mean('replayed'):.0f}", f"{mean('hit_rate'):.3f} of {mean('ceiling'):.3f}",
            f"{mean('skew'):.2f}", f"{mean('moves'):.2f}", f"{mean('longest_wait_s'):.0f}",
            f"{mean('preemptions'):.0f}",
        ]  # fmt: skip


def choice_costs(replicas: int, sessions: int = 10_000, rounds: int = 5) -> list[float]:
    """Median microseconds to choose a replica for a session that returns, to place its turn, and to learn from its
    answer. The KV caches are full, so most turns evict another session."""
    router = SessionRouter(random.Random(1), holds=False)
    views = [View(f"r{number}", number, kv_tokens=1000.0 * sessions / replicas) for number in range(replicas)]
    now, costs = 0.0, []
    for round_ in range(rounds):
        for number in range(sessions):
            turn = SessionTurn(f"s{number}", 1000 + 100 * round_)
            moments = [time.perf_counter()]
            view = router.choose(views, turn, now)
            moments.append(time.perf_counter())
            assert view is not None
            placement = router.place(view, turn, now, now)
            moments.append(time.perf_counter())
            now += 0.001
            router.finish(placement, now, turn.prompt, placement.expected, 50)
            moments.append(time.perf_counter())
            if round_:
                costs.append([1e6 * (after - before) for before, after in itertools.pairwise(moments)])
    return [statistics.median(column) for column in zip(*costs, strict=True)]


def print_choice_costs() -> None:
    print("| replicas | choose µs | place µs | learn µs |\n|---|---|---|---|")
    for replicas in (4, 64, 256):
        chosen, placed, learned = choice_costs(replicas)
        print(f"| {replicas} | {chosen:.1f} | {placed:.1f} | {learned:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=GRID, metavar="NAME")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="three workloads, 2 seeds")
    parser.add_argument("--choice", action="store_true", help="what a choice costs, and nothing else")
    args = parser.parse_args()
    if args.choice:
        return print_choice_costs()
    names, seeds = (QUICK, 2) if args.quick else (args.workloads, args.seeds)
    for name in names:
        began = time.process_time()
        results = {
            policy: [run(WORKLOADS[name], POLICIES[policy], seed) for seed in range(seeds)] for policy in args.policies
        }
        print(f"\n{name} ({seeds} seeds, {time.process_time() - began:.0f} s of CPU)\n")
        print(f"| {HEADS} |\n|" + "---|" * (HEADS.count("|") + 1))
        for row in rows(results, args.policies[0]):
            print("| " + " | ".join(row) + " |", flush=True)
    return None


if __name__ == "__main__":
    main()
