#!/usr/bin/env python3
"""Kinds of runs that real agents and clusters make: does the analysis say what is true of each?

    python benchmarks/families.py                             # all families, 3 seeds: one line each
    python benchmarks/families.py --families tests timeouts --seeds 5 --documents

A simulated fleet (closed_loop.py) is watched by the program's own tracker and analysis, as the controller does it. What
is true comes from the simulation alone: the same family is run with one more replica, other agents or other think
times, far longer than the analysis has seen. The verdict is right if it names the largest elasticity of throughput;
where the two largest differ by less than 0.1, as far as that is known, any is.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import heapq
import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import closed_loop
from closed_loop import Agent, ClosedLoop, Job, Physics, PlantedReplica, Workload, engine_fleet

from agent_infra_core.insight.analysis import CapacityAnalysis
from agent_infra_core.insight.measure import fleet_samples
from agent_infra_core.insight.tracker import Tracker
from agent_infra_core.protocol import Backend, SessionEnded, TurnEvent, TurnFinished, TurnStarted

A_S, B_S = 1.875, 0.269  # of planted replicas
DOCUMENT_S = 10.0  # between documents
SETTLE_S = 60.0  # after a change or the beginning, a document may still be wrong
FIRST_TURNS = 45  # by this turn the first verdict is due
MARGIN = 0.1
TRUTH_ERROR = 0.02  # of a share: throughputs are known to about 0.5 %
EDGE = 0.1  # an error of a what-if that is larger than this, outside its interval, is a confident error


@dataclass(frozen=True)
class Habits:
    """What agents do beside a Workload."""

    fan_out: int = 1  # turns of a step, sent at once
    long_share: float = 0.0  # of the think times, which have the mean long_s instead
    long_s: float = 0.0
    tools: int = 0  # machines that agents think on, first come, first served; 0: each has its own
    timeout_s: float = math.inf  # a client gives up, thinks, and sends its next turn
    batch: bool = False  # nobody begins a session before all have ended theirs (synchronous RL)
    pause_s: float | None = None  # between sessions; None: a think time
    reports_end: bool = True
    together: bool = False  # all begin their first session when the run begins


class StoppableReplica(PlantedReplica):
    """A planted replica that drops a turn when its client leaves."""

    def cancel(self, turn: str, now: float) -> Job | None:
        """Stop a turn; None if it only waited."""
        self._move(now)
        stopped = next((job for _, _, job in self._serving if job.turn == turn), None)
        self._serving = [entry for entry in self._serving if entry[2].turn != turn]
        heapq.heapify(self._serving)
        self._waiting = type(self._waiting)(job for job in self._waiting if job.turn != turn)
        self._admit(now)
        return stopped

    def slow_down(self, factor: float, now: float) -> None:
        """Take ``factor`` times as long from now on."""
        self._move(now)
        self._base_s, self._per_request_s = factor * self._base_s, factor * self._per_request_s
        self._admit(now)


@dataclass
class World(ClosedLoop):
    """A closed loop whose agents have habits, and whose turns are told as they begin and end."""

    habits: Habits = field(default_factory=Habits)
    events: list[TurnEvent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._open: dict[int, int] = {}  # agent → its turns in flight
        self._free_at = [0.0] * self.habits.tools
        self._waiting: list[Agent] = []
        self._timers: list[tuple[float, int, str]] = []
        super().__post_init__()

    def set_agents(self, wanted: int, spread: bool = False) -> None:
        super().set_agents(wanted, spread and not self.habits.together)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._timers and self._timers[0][0] < until:
            at, _, turn = heapq.heappop(self._timers)
            super().run(at - self.now)
            self._give_up(turn)
        super().run(until - self.now)

    def kill(self, agents: int) -> None:
        """The latest agents die while they think or wait for an answer, and end no session."""
        for _ in range(agents):
            agent = self._agents.popitem()[1]
            agent.is_leaving = True
            self._withdraw(agent)
        self.agents -= agents

    def _arrive(self, agent: Agent) -> None:
        home = agent.replica
        self._open[agent.number] = self.habits.fan_out
        for branch in range(self.habits.fan_out):
            known = set(self._flying)
            agent.replica = home
            super()._arrive(agent)
            [turn] = self._flying.keys() - known
            name = f"session-{agent.session}"
            at = closed_loop.START + self.now
            started = TurnStarted(turn, at, self.model, "/v1/chat/completions", name, f"task-{agent.session}")
            if agent.think_s is not None and not branch:
                started.pre_ms, started.post_ms = 700 * agent.think_s, 300 * agent.think_s
            self.events.append(started)
            if self.habits.timeout_s < math.inf:
                heapq.heappush(self._timers, (self.now + self.habits.timeout_s, len(self.events), turn))

    def _give_up(self, turn: str) -> None:
        agent, arrived, number = self._flying.get(turn, (None, 0.0, 0))
        if agent is None:
            return
        del self._flying[turn]
        served = self.replicas[number].cancel(turn, self.now)  # type: ignore[attr-defined]
        waited_ms = 1000 * ((served.admitted if served else self.now) - arrived)
        took_ms = 1000 * (self.now - served.admitted) if served else None
        backend = self.replicas[number].name if served else None
        at = closed_loop.START + self.now
        self.events.append(TurnFinished(turn, at, "aborted", 0, backend, waited_ms, None, took_ms))
        self._close(agent, 1)

    def _think(self, agent: Agent, output: int) -> None:
        """A turn is over; the last of a step makes the agent think."""
        record = self.records.pop()
        at = closed_loop.START + self.now
        self.events.append(
            TurnFinished(
                record.turn, at, "completed", 200, record.backend, record.queue_ms or 0.0, record.ttft_ms,
                record.inference_ms, 0, record.prompt_tokens, record.completion_tokens, record.cached_tokens,
            )
        )  # fmt: skip
        self._close(agent, output)

    def _close(self, agent: Agent, output: int) -> None:
        self._open[agent.number] -= 1
        if self._open[agent.number] or agent.is_leaving:
            return
        session = agent.session
        super()._think(agent, output)
        if agent.session != session:  # it went on to a new one
            if self.habits.pause_s is not None:
                self._withdraw(agent)
                at = self.now + super()._gamma(self.habits.pause_s, 1.0)
                heapq.heappush(self._arrivals, (at, agent.number, agent))
            if self.habits.reports_end:
                self.events.append(SessionEnded(f"session-{session}", closed_loop.START + self.now))
            if self.habits.batch:
                self._hold_back(agent)

    def _withdraw(self, agent: Agent) -> None:
        self._arrivals = [entry for entry in self._arrivals if entry[2] is not agent]
        heapq.heapify(self._arrivals)

    def _hold_back(self, agent: Agent) -> None:
        self._withdraw(agent)
        self._waiting.append(agent)
        if len(self._waiting) == len(self._agents):
            for ready in self._waiting:
                delay = self._random.uniform(0, 2.0)
                heapq.heappush(self._arrivals, (self.now + 20.0 + delay, ready.number, ready))
            self._waiting.clear()

    def _gamma(self, mean: float, cv: float) -> float:
        """Draws think times too: the only ones with this mean."""
        drawn = super()._gamma(mean, cv)
        habits = self.habits
        if mean != self.workload.think_s:
            return drawn
        if habits.long_share and self._random.random() < habits.long_share:
            drawn *= habits.long_s / mean
        if habits.tools:
            begins = max(self.now, heapq.heappop(self._free_at))
            heapq.heappush(self._free_at, begins + drawn)
            return begins + drawn - self.now
        return drawn


def planted(replicas: int, slots: int = 256, slow: float = 1.0) -> list[Any]:
    """Replicas that obey R(n) = A + B·n; the last is ``slow`` times as slow."""
    factors = [1.0] * (replicas - 1) + [slow]
    return [
        StoppableReplica(f"replica-{number}", factor * A_S, factor * B_S, slots)
        for number, factor in enumerate(factors)
    ]


Change = Callable[[World], None]


@dataclass(frozen=True)
class Family:
    """A kind of run. ``change`` happens at ``change_s``; what is judged then is what is true after it."""

    name: str
    agents: int
    replicas: int = 4
    workload: Workload = field(default_factory=lambda: Workload(service_cv=0.1))
    habits: Habits = field(default_factory=Habits)
    routing: str = "least_load"
    slots: int = 256
    slow: float = 1.0  # factor of the last replica
    physics: Physics | None = None  # simulated engines; otherwise planted replicas
    change: Change | None = None
    change_s: float = 300.0
    after: dict[str, Any] = field(default_factory=dict)  # fields of the family that holds after the change
    seconds: float = 780.0
    settle_s: float = SETTLE_S  # until the fleet does what is true of it in the end
    flags: tuple[str, ...] = ()  # that the documents should have
    verdict: str | None = None  # where the elasticities don't tell

    @property
    def settled(self) -> Family:
        """The family that holds at the end."""
        return replace(self, change=None, after={}, **self.after)

    def world(self, seed: int) -> World:
        fleet = (
            engine_fleet(self.replicas, self.physics) if self.physics else planted(self.replicas, self.slots, self.slow)
        )
        return World(fleet, self.agents, self.workload, seed, "m", self.routing, habits=self.habits)


def thinking(seconds: float, **other: Any) -> Workload:
    return Workload(think_s=seconds, service_cv=0.1, **other)


def slow_now(world: World) -> None:
    world.replicas[-1].slow_down(2.0, world.now)  # type: ignore[attr-defined]


def think_less(world: World) -> None:
    world.workload = replace(world.workload, think_s=0.5)


LONG = Habits(long_share=0.1, long_s=120.0)
SILENT = replace(LONG, reports_end=False)
A_SESSION_S = 240.0  # after which those are over that began with a context that no replica had cached
ENGINE = Physics()
GROWING = Workload(turns=400, base_tokens=1000, turn_tokens=300)
FAMILIES = [
    Family("plain", 100),
    Family("light", 32, workload=thinking(20.0)),
    Family("heavy", 260),
    Family("few", 8, workload=thinking(0.5)),
    Family("fan_out", 24, habits=Habits(fan_out=4)),
    Family("short", 92, workload=thinking(10.0, turns=3)),
    Family("tests", 152, workload=thinking(5.0), habits=LONG, settle_s=3 * LONG.long_s),
    Family("tests_silent", 152, workload=thinking(5.0), habits=SILENT, settle_s=3 * LONG.long_s),
    Family("slow_load", 152, slow=2.0, flags=("SLOW",)),
    Family("slow_robin", 120, slow=2.0, routing="round_robin", flags=("SLOW",)),
    Family("slow_affinity", 152, slow=2.0, routing="affinity", flags=("SLOW",)),
    Family("slots", 88, 2, slots=8),
    Family("timeouts", 220, habits=Habits(timeout_s=9.0), verdict="any"),
    Family("timeouts_rare", 120, habits=Habits(timeout_s=14.0)),
    Family("tools", 88, habits=Habits(tools=40), verdict="AGENT-BOUND"),
    Family("growth", 40, 2, GROWING, Habits(together=True), routing="affinity", physics=ENGINE, verdict="any"),
    Family("batch", 64, 2, Workload(turns=8, think_s=4.0), Habits(batch=True), physics=ENGINE, routing="affinity"),
    Family("engine", 120, 4, Workload(), physics=Physics(kv_tokens=10**9), routing="affinity"),
    Family("copies", 100, 4, Workload(), physics=Physics(kv_tokens=10**9), settle_s=A_SESSION_S),
    Family("copies_full", 100, 4, Workload(), physics=Physics(kv_tokens=250_000), flags=("KV-BOUND",)),
    Family("think", 60, workload=thinking(6.0), change=think_less, after={"workload": thinking(0.5)}),
    Family("doubled", 60, change=lambda world: world.set_agents(240), after={"agents": 240}),
    Family("killed", 240, change=lambda world: world.kill(200), after={"agents": 40}),
    Family("slowed", 152, change=slow_now, after={"slow": 2.0}, flags=("SLOW",)),
]  # fmt: skip


# --- What is true. ----------------------------------------------------------------------------------------------------


def rate(family: Family, seeds: int = 3) -> float:
    """Completed turns per second of a settled family, to within about 0.5 %."""
    turns, seconds = 0, 0.0
    enough = 30_000 if family.habits.batch else 8000  # turns of a batch depend on each other
    for seed in range(seeds):
        world = family.world(1000 + seed)
        world.run(420.0 if family.habits.together else 300.0)
        world.events.clear()
        begun, done = world.now, 0
        # Contexts that grow never settle: look where the analysis does.
        while world.now < (family.seconds if family.habits.together else begun + 6000.0) and done < enough:
            world.run(60.0)
            done += sum(isinstance(event, TurnFinished) and event.outcome == "completed" for event in world.events)
            world.events.clear()
        turns, seconds = turns + done, seconds + world.now - begun
    return turns / seconds


def scaled(family: Family, factor: float) -> Family:
    """All think times within sessions times ``factor``."""
    habits, workload = family.habits, family.workload
    pause_s = habits.pause_s or workload.think_s + habits.long_share * (habits.long_s - workload.think_s)
    return replace(
        family,
        workload=replace(workload, think_s=factor * workload.think_s),
        habits=replace(habits, long_s=factor * habits.long_s, pause_s=None if habits.batch else pause_s),
    )


def truth(family: Family) -> dict[str, Any]:
    """Throughput, its elasticities, and the gains of every what-if."""
    family = family.settled
    now = rate(family)
    rates = {
        "+1 replica": rate(replace(family, replicas=family.replicas + 1)),
        "half the observation time": rate(scaled(family, 0.65)),  # observing is 0.7 of the think time
        "+25 % agents": rate(replace(family, agents=round(1.25 * family.agents))),
        "−25 % agents": rate(replace(family, agents=round(0.75 * family.agents))),
    }
    agent = math.log(rate(scaled(family, 0.8)) / rate(scaled(family, 1.25))) / math.log(1.25 / 0.8)
    span = round(1.25 * family.agents) / round(0.75 * family.agents)
    more = math.log(rates["+25 % agents"] / rates["−25 % agents"]) / math.log(span)
    shares = {"AGENT-BOUND": agent, "GPU-BOUND": 1 - more, "LATENCY-BOUND": more - agent}
    ordered = sorted(shares.values())
    name = max(shares, key=lambda key: shares[key]) if ordered[-1] - ordered[-2] >= MARGIN + TRUTH_ERROR else "any"
    return {
        "per_s": now,
        "shares": shares,
        "verdict": family.verdict or name,
        "changes": {what: value / now - 1 for what, value in rates.items()},
    }


# --- What the program says. -------------------------------------------------------------------------------------------


class Watched:
    """A world with the program's tracker and analysis beside it, as the controller has them."""

    def __init__(self, family: Family, seed: int) -> None:
        self.family, self.world = family, family.world(seed)
        self.turns = 0
        self._clock = closed_loop.START
        self.tracker = Tracker(lambda: self._clock)
        self.analysis = CapacityAnalysis(lambda: self._clock, random.Random(seed))

    def run(self, seconds: float) -> None:
        """Let time go on, looked at once a second."""
        for _ in range(round(seconds)):
            self.world.run(1.0)
            self._look()

    def _look(self) -> None:
        world, physics = self.world, self.family.physics
        for event in sorted(world.events, key=lambda event: event.at):
            self._clock = event.at
            self.tracker.observe(event)
            self.turns += isinstance(event, TurnFinished)
            if isinstance(event, SessionEnded):
                self.analysis.end(event.session, event.at)
        world.events.clear()
        world.samples.clear()
        self._clock = closed_loop.START + world.now
        load = {"kv_capacity_tokens": physics.kv_tokens} if physics else None
        gauges = {
            replica.name: {"healthy": True, "in_flight": replica.in_flight, "load": load} for replica in world.replicas
        }
        self.tracker.sample({"at": self._clock, "backends": gauges, "queue": {"pending": 0}})
        slots = physics.slots if physics else self.family.slots
        table = [Backend(replica.name, "m", "127.0.0.1", 5900, slots=slots) for replica in world.replicas]
        for sample in fleet_samples(
            self._clock, self.tracker.replicas([], table), self.tracker.silences(), self.analysis.presence
        ):
            self.analysis.sample(sample)
        records, _ = self.tracker.take_records()
        for record in records:
            self.analysis.add(record)

    def documents(self) -> Iterator[dict[str, Any]]:
        """One every DOCUMENT_S."""
        family, is_changed = self.family, self.family.change is None
        while self.world.now < family.seconds:
            self.run(1.0 if self.turns < 2 * FIRST_TURNS else DOCUMENT_S)
            if not is_changed and family.change is not None and self.world.now >= family.change_s:
                family.change(self.world)
                is_changed = True
            entries = self.analysis.document()
            if entries and is_changed:
                yield entries[0]


@dataclass
class Score:
    """What was counted in the documents of one run, or of several."""

    documents: int = 0
    judged: int = 0  # with a verdict
    right: int = 0
    refused: int = 0
    intervals: int = 0  # of what-ifs
    held: int = 0
    confident_errors: int = 0
    widths: list[float] = field(default_factory=list)  # half-widths of the intervals of what-ifs
    errors: list[float] = field(default_factory=list)
    flips: int = 0  # changes of the verdict in ten minutes, the most of any run
    first: float = 0.0  # turns to the first right verdict, the most of any run
    flags: int = 0  # documents that had the flags they should have, and no others
    wrong_flags: set[str] = field(default_factory=set)
    words: list[str] = field(default_factory=list)

    def add(self, entry: dict[str, Any], true: dict[str, Any], flags: Sequence[str], is_passing: bool) -> None:
        """``is_passing``: the fleet's state doesn't last, so what a change would bring in the end isn't asked."""
        self.documents += 1
        name = entry["verdict"]["name"]
        self.words.append(entry["verdict"]["sentence"])
        found = {flag["name"] for flag in entry["flags"]}
        self.flags += set(flags) <= found
        self.wrong_flags |= found - set(flags)
        self.refused += name == "NO DATA"
        if name == "NO DATA":
            return
        self.judged += 1
        self.right += is_right(name, true)
        for what in entry["what_ifs"]:
            change = what["change"]
            if change["low"] is None or change["high"] is None or is_passing:
                continue
            actual = true["changes"][what["name"]]
            self.intervals += 1
            slack = 0.01  # the truth is a simulation too
            off = max(change["low"] - actual, actual - change["high"], 0.0)
            self.held += off <= slack
            self.confident_errors += off > EDGE
            self.widths.append((change["high"] - change["low"]) / 2)
            if change["value"] is not None:
                self.errors.append(abs(change["value"] - actual))

    def merge(self, other: Score) -> None:
        for name in ("documents", "judged", "right", "refused", "intervals", "held", "confident_errors", "flags"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.widths += other.widths
        self.errors += other.errors
        self.flips, self.first = max(self.flips, other.flips), max(self.first, other.first)
        self.wrong_flags |= other.wrong_flags
        self.words += other.words


def is_right(name: str, true: dict[str, Any]) -> bool:
    """BALANCED is right only where no share leads by MARGIN."""
    return true["verdict"] in ("any", name)


def score(family: Family, seed: int, true: dict[str, Any]) -> Score:
    """What the analysis of one run is worth."""
    watched, found = Watched(family, seed), Score()
    names, first, before = [], math.inf, 0
    for entry in watched.documents():
        name = entry["verdict"]["name"]
        before = before or (watched.turns if family.change else 0)  # the turns until the change
        if watched.turns >= 30 and first == math.inf and is_right(name, true) and name != "NO DATA":
            first = watched.turns - before
        if watched.world.now < (family.change_s if family.change else 0.0) + family.settle_s:
            continue
        found.add(entry, true, family.flags, family.habits.together)
        names.append(name)
    found.flips = sum(now != before for before, now in itertools.pairwise(names))
    found.first = first
    return found


# --- The command. -----------------------------------------------------------------------------------------------------


def run_one(task: tuple[str, int, dict[str, Any]]) -> tuple[str, Score]:
    name, seed, true = task
    return name, score(next(family for family in FAMILIES if family.name == name), seed, true)


def known_truth(name: str) -> dict[str, Any]:
    return truth(next(family for family in FAMILIES if family.name == name))


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "—"


def row(name: str, found: Score, true: dict[str, Any] | None) -> str:
    widths, errors = sorted(found.widths), sorted(found.errors)
    middle = f"{100 * widths[len(widths) // 2]:.1f}" if widths else "—"
    typical = f"{100 * errors[len(errors) // 2]:.1f}" if errors else "—"
    verdict = true["verdict"] if true else ""
    cells = [
        f"{name:13}",
        f"{verdict:13}",
        f"{percent(found.right, found.judged):>5}",
        f"{found.refused:3}/{found.documents:<4}",
        f"{percent(found.held, found.intervals):>5}",
        f"{middle:>5}",
        f"{typical:>5}",
        f"{found.confident_errors:4}",
        f"{found.flips:5}",
        f"{found.first:5.0f}",
        f"{percent(found.flags, found.documents):>5} {' '.join(sorted(found.wrong_flags))}",
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--families", nargs="+", choices=[family.name for family in FAMILIES], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--truth", type=Path, help="JSON file that keeps what is true between calls")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--documents", action="store_true", help="print every verdict")
    options = parser.parse_args(argv)
    names = options.families or [family.name for family in FAMILIES]
    true = json.loads(options.truth.read_text()) if options.truth and options.truth.exists() else {}
    with concurrent.futures.ProcessPoolExecutor(options.processes) as pool:
        missing = [name for name in names if name not in true]
        true.update(zip(missing, pool.map(known_truth, missing), strict=True))
        if options.truth:
            options.truth.write_text(json.dumps(true, indent=1, ensure_ascii=False))
        tasks = [(name, seed, true[name]) for name in names for seed in range(options.seeds)]
        scores: dict[str, Score] = {name: Score() for name in names}
        print(
            "| family        | true verdict  | right | refused | holds | ± pts | error | >10  | flips | first | flags |"
        )
        print(
            "|---------------|---------------|------:|--------:|------:|------:|------:|-----:|------:|------:|-------|"
        )
        total = Score()
        for number, (name, found) in enumerate(pool.map(run_one, tasks), 1):
            scores[name].merge(found)
            total.merge(found)
            if number % options.seeds == 0:
                print(row(name, scores[name], true[name]), flush=True)
                if options.documents:
                    print("\n".join(scores[name].words))
    print(row("all", total, None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
