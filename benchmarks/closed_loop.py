#!/usr/bin/env python3
"""N agents that think, k replicas that serve: does the capacity model say what a simulated fleet then does?

    python benchmarks/closed_loop.py                          # the table: agents → simulated and predicted throughput
    python benchmarks/closed_loop.py --planted 1.875 0.269    # replicas that obey R(n) = A + B·n exactly
    python benchmarks/closed_loop.py --agents 32 128 --replicas 2 --kv-tokens 100000

A closed system: an agent sends a turn, waits for the answer, thinks, and sends the next one; after its last turn it
begins a new session.  Replicas are simulated step by step, like vLLM's scheduler: one step decodes a token of every
running sequence and prefills what its budget leaves (chunked prefill), and takes a + b·batch + κ·context + c·prefill
seconds.  Contexts of thinking sessions stay in the KV cache until the least recently used one is evicted; a sequence
that finds no room is preempted and computed again.  Between two arrivals or completions nothing but the contexts
changes, so such runs of steps are summed in closed form: exact, and some 0.2 ms of CPU a turn.

The simulation shares no code with what it judges; only the table asks both.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agent_infra_core.insight.analysis import CapacityAnalysis
from agent_infra_core.insight.capacity import CapacityModel
from agent_infra_core.insight.measure import FleetSample
from agent_infra_core.insight.turns import TurnRecord

START = 1_700_000_000.0  # s since the epoch, when every simulation begins; inside, time counts from 0


@dataclass(frozen=True)
class Physics:
    """What a replica costs: Llama 3.1 8B in bfloat16 on one H100 SXM, of which every constant follows.

    The model (its config.json): 8.03e9 parameters, 32 layers, 8 key-value heads of 128, so 131 KB of KV a token.
    The GPU (NVIDIA's data sheet): 3.35 TB/s, 989 TFLOPS dense, 80 GB.  The shape of a step's cost is that of
    Agrawal et al., "Vidur" (MLSys 2024, arXiv:2405.05465) and "Sarathi-Serve" (OSDI 2024, arXiv:2403.02310); paging
    and eviction are those of Kwon et al., "PagedAttention" (SOSP 2023, arXiv:2309.06180) and of vLLM's prefix cache.
    """

    step_s: float = 7.5e-3  # a: 16.1 GB of weights are read at 64 % of the bandwidth
    sequence_s: float = 0.06e-3  # b: scheduling and sampling of one sequence
    context_token_s: float = 0.08e-6  # κ: 131 KB are read at 49 % of the bandwidth
    prefill_token_s: float = 38e-6  # c: 2 x 8.03e9 operations at 43 % of the peak
    kv_tokens: int = 430_000  # 72 GB (90 %) less the weights, over 131 KB a token
    slots: int = 256  # vLLM's --max-num-seqs
    step_tokens: int = 8192  # vLLM's --max-num-batched-tokens
    block_tokens: int = 16  # vLLM's block_size: whole blocks are found again


@dataclass(frozen=True)
class Workload:
    """What agents do.  Coefficients of variation are those of gamma distributions; 0 is constant, 1 exponential."""

    think_s: float = 10.0
    think_cv: float = 1.0
    observing_share: float = 0.7  # of the think time, reported as pre; the rest is post
    turns: int = 15  # of a session
    base_tokens: int = 3000  # system prompt and task
    turn_tokens: int = 1000  # that the context grows by in a turn, the answer included
    output_tokens: int = 250
    size_cv: float = 0.3  # of turn_tokens and output_tokens
    service_cv: float = 0.0  # noise on a planted service time that no token count explains

    def __post_init__(self) -> None:
        if self.turn_tokens < self.output_tokens:
            raise ValueError("a turn's answer is part of what the context grows by")


@dataclass
class Job:
    """A turn on its way through a replica."""

    session: int
    turn: str
    arrived: float
    prompt: int
    held: int  # tokens of it that the session's last turn left in a cache
    output: int
    work: float  # for a planted replica: service time in units of R(n)
    first: float | None = None  # when its first token came
    admitted: float = 0.0
    cached: int = -1  # tokens found in the prefix cache; -1: not looked up yet
    computed: int = 0  # tokens of prompt and answer that the replica holds
    made: int = 0  # tokens of the answer


@dataclass(frozen=True)
class Sample:
    """What somebody who looks at the fleet once a second sees."""

    at: float
    in_flight: dict[str, int]
    queued: int
    agents: int  # amid a session
    oldest_s: float = 0.0  # how long the turn that has waited longest has
    kv_usage: dict[str, float] = field(default_factory=dict)  # 0 to 1, of replicas that have a KV cache


class Replica(Protocol):
    """Something that serves: jobs go in at a time, and come out finished when their time has come."""

    name: str
    due: float  # when to call advance() at the latest; infinity while idle

    @property
    def in_flight(self) -> int: ...
    @property
    def queued(self) -> int: ...
    @property
    def waits_since(self) -> float: ...  # when the first of the queue came; infinity while it is empty
    @property
    def kv_usage(self) -> float | None: ...
    def submit(self, job: Job, now: float) -> None: ...
    def advance(self, now: float) -> list[Job]: ...


class PlantedReplica:
    """Obeys R(n) = A + B·n exactly: with n jobs in service, each makes 1 / (A + B·n) of its work a second.

    Processor sharing in virtual time, which runs at that speed: a job ends when it has gone on by the job's work.
    """

    def __init__(self, name: str, base_s: float, per_request_s: float, slots: int = 256) -> None:
        self.name, self.due = name, math.inf
        self._base_s, self._per_request_s, self._slots = base_s, per_request_s, slots
        self._virtual = self._at = 0.0
        self._serving: list[tuple[float, int, Job]] = []
        self._waiting: deque[Job] = deque()
        self._numbers = count()

    @property
    def in_flight(self) -> int:
        return len(self._serving)

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def waits_since(self) -> float:
        return self._waiting[0].arrived if self._waiting else math.inf

    @property
    def kv_usage(self) -> float | None:
        return None

    @property
    def _turn_s(self) -> float:
        return self._base_s + self._per_request_s * len(self._serving)

    def submit(self, job: Job, now: float) -> None:
        self._move(now)
        self._waiting.append(job)
        self._admit(now)

    def advance(self, now: float) -> list[Job]:
        self._move(now)
        done = []
        while self._serving and self._serving[0][0] <= self._virtual + 1e-9:
            job = heapq.heappop(self._serving)[2]
            job.made = job.output
            done.append(job)
        self._admit(now)
        return done

    def _move(self, now: float) -> None:
        if self._serving:
            self._virtual += (now - self._at) / self._turn_s
        self._at = now

    def _admit(self, now: float) -> None:
        while self._waiting and len(self._serving) < self._slots:
            job = self._waiting.popleft()
            job.admitted, job.cached = now, job.held
            heapq.heappush(self._serving, (self._virtual + job.work, next(self._numbers), job))
        self.due = now + (self._serving[0][0] - self._virtual) * self._turn_s if self._serving else math.inf


class EngineReplica:
    """A vLLM-like replica: steps, slots, chunked prefill, a prefix cache over the KV memory, preemption.

    A *run* is a number of steps in which nothing happens but that every decoding sequence gets a token a step: from
    ``_began`` on, ``_steps`` of them.  A step that prefills is a run of its own.  Turns that arrive join at the end of
    the step that is under way, so their arrival cuts the run there.
    """

    def __init__(self, name: str, physics: Physics) -> None:
        self.name, self.due = name, math.inf
        self._physics = physics
        self._running: list[Job] = []  # in order of admission; prefilling ones have made == 0 and lack tokens
        self._waiting: deque[Job] = deque()
        self._cached: OrderedDict[int, int] = OrderedDict()  # thinking or ended session → tokens, next to go first
        self._cached_tokens = 0
        self._began, self._steps = 0.0, 0
        self._prefill: list[tuple[Job, int]] = []  # of this step
        self._decoding: list[Job] = []
        self.preemptions = 0
        self.prefilled_tokens = 0

    @property
    def in_flight(self) -> int:
        return len(self._running)

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def waits_since(self) -> float:
        return self._waiting[0].arrived if self._waiting else math.inf

    @property
    def kv_usage(self) -> float | None:
        """As vLLM tells it: what runs counts; what is only cached, and would go for it, does not."""
        return min(1.0, sum(job.computed for job in self._running) / self._physics.kv_tokens)

    def submit(self, job: Job, now: float) -> None:
        self._waiting.append(job)
        if not self._running:
            self._plan(now)
        elif not self._prefill and len(self._running) < self._physics.slots:
            self._steps = min(self._steps, self._steps_until(now))
            self.due = self._began + self._run_s(self._steps)

    def advance(self, now: float) -> list[Job]:
        """Finish the run that ends now; what is done leaves."""
        for job, tokens in self._prefill:
            job.computed += tokens
            self.prefilled_tokens += tokens
            if job.computed == job.prompt + job.made:
                job.made += 1
                job.computed += 1
                job.first = job.first if job.first is not None else now
        for job in self._decoding:
            job.made += self._steps
            job.computed += self._steps
        done = [job for job in self._running if job.made >= job.output]
        self._running = [job for job in self._running if job.made < job.output]
        for job in done:
            self._keep(job.session, job.computed)
        self._plan(now)
        return done

    def _keep(self, session: int, tokens: int) -> None:
        """A context that nobody computes on any more stays until its room is needed."""
        self._cached_tokens += tokens - self._cached.pop(session, 0)
        self._cached[session] = tokens

    def _make_room(self, tokens: int) -> bool:
        """Whether so many tokens fit beside what runs; evicts the least recently used contexts, from their ends."""
        free = self._physics.kv_tokens - sum(job.computed for job in self._running)
        if free < tokens:
            return False
        while self._cached_tokens > free - tokens:
            session, held = next(iter(self._cached.items()))
            dropped = min(held, self._cached_tokens - (free - tokens))
            self._cached_tokens -= dropped
            if dropped == held:
                del self._cached[session]
            else:
                self._cached[session] = held - dropped
        return True

    def _admit(self, now: float) -> None:
        while self._waiting and len(self._running) < self._physics.slots:
            job = self._waiting[0]
            target = job.prompt + job.made
            held = self._cached.pop(job.session, 0)
            self._cached_tokens -= held
            block = self._physics.block_tokens
            found = min(held // block * block, (target - 1) // block * block)
            if not self._make_room(target):  # all of it, as vLLM asks for before it begins
                self._keep(job.session, held)
                return
            self._waiting.popleft()
            job.computed = found
            if job.cached < 0:
                job.cached, job.admitted = found, now
            self._running.append(job)

    def _plan(self, now: float) -> None:
        """Decide on the next run, which begins now."""
        self._admit(now)
        self._began = now
        budget = self._physics.step_tokens
        self._decoding = [job for job in self._running if job.computed == job.prompt + job.made and job.made]
        while self._decoding and not self._make_room(len(self._decoding) + self._reserved()):
            self._preempt()
        budget -= len(self._decoding)
        self._prefill = []
        for job in self._running:
            lacks = job.prompt + job.made - job.computed
            if lacks and budget > 0:
                self._prefill.append((job, min(lacks, budget)))
                budget -= min(lacks, budget)
        if self._prefill:
            self._steps = 1
        elif self._decoding:
            free = self._physics.kv_tokens - sum(job.computed for job in self._running)
            least = min(job.output - job.made for job in self._decoding)
            self._steps = max(1, min(least, free // len(self._decoding)))
            self._make_room(self._steps * len(self._decoding))
        else:
            self.due = math.inf
            return
        self.due = now + self._run_s(self._steps)

    def _reserved(self) -> int:
        """Tokens that the sequences being prefilled still need room for."""
        return sum(job.prompt + job.made - job.computed for job in self._running)

    def _preempt(self) -> None:
        """The sequence that was admitted last goes back to the head of the queue; its blocks stay until evicted."""
        job = self._running.pop()
        self._keep(job.session, job.computed)
        self._waiting.appendleft(job)
        self._decoding = [other for other in self._decoding if other is not job]
        self.preemptions += 1

    def _coefficients(self) -> tuple[float, float]:
        """``(first, growth)``: s of the run's first step, and by how much each further one is longer."""
        physics = self._physics
        sequences = len(self._decoding) + len(self._prefill)
        context = sum(job.computed for job in self._decoding) + sum(job.computed + new for job, new in self._prefill)
        prefill = sum(new for _, new in self._prefill)
        first = physics.step_s + physics.sequence_s * sequences + physics.context_token_s * context
        return first + physics.prefill_token_s * prefill, physics.context_token_s * len(self._decoding)

    def _run_s(self, steps: int) -> float:
        first, growth = self._coefficients()
        return steps * first + growth * steps * (steps - 1) / 2

    def _steps_until(self, now: float) -> int:
        """How many steps of the run there are up to the first boundary that is not before ``now``."""
        first, growth = self._coefficients()
        elapsed, linear = max(0.0, now - self._began), first - growth / 2
        steps = elapsed / linear if growth == 0 else (math.sqrt(linear**2 + 2 * growth * elapsed) - linear) / growth
        return max(1, math.ceil(steps - 1e-9))


@dataclass
class Agent:
    """One that sends turns, one after the other, session after session."""

    number: int
    session: int = -1
    turn: int = 0
    context: int = 0
    held: int = 0  # tokens that the last turn of the session left in a cache
    think_s: float | None = None  # before the turn that is under way; None: first of its session, or not known
    replica: int = 0
    is_leaving: bool = False


@dataclass
class ClosedLoop:
    """N agents and k replicas; deterministic by seed.  ``run`` it, change what it is made of, run it on.

    What it saw lies in ``records`` (every finished turn, as the proxy would tell of it) and ``samples``.
    """

    replicas: list[Replica]
    agents: int
    workload: Workload = field(default_factory=Workload)
    seed: int = 0
    model: str = "simulated"
    routing: str = "affinity"  # a session stays where its context is; or a strategy of the proxy without affinity
    now: float = 0.0
    records: list[TurnRecord] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._sessions, self._turns, self._numbers = count(), count(), count()
        self._arrivals: list[tuple[float, int, Agent]] = []
        self._agents: dict[int, Agent] = {}
        self._flying: dict[str, tuple[Agent, float, int]] = {}  # turn → agent, arrival, number of its replica
        self._chosen: Counter[str] = Counter()  # replica → number of its latest turn
        self._next_sample = self.now
        wanted, self.agents = self.agents, 0
        self.set_agents(wanted, spread=True)

    def set_agents(self, wanted: int, spread: bool = False) -> None:
        """Add agents, or let the latest leave at the end of their turn.  ``spread``: amid their sessions, not at 0."""
        while len(self._agents) > wanted:
            self._agents.popitem()[1].is_leaving = True
        while len(self._agents) < wanted:
            agent = Agent(next(self._numbers))
            self._agents[agent.number] = agent
            self._begin_session(agent)
            if spread:
                agent.turn = self._random.randrange(self.workload.turns)
                agent.context += sum(self._tokens(self.workload.turn_tokens) for _ in range(agent.turn))
            delay = self._random.uniform(0, self.workload.think_s)
            heapq.heappush(self._arrivals, (self.now + delay, agent.number, agent))
        self.agents = wanted

    def at_work(self) -> list[Agent]:
        """The agents, each in a session that is not over."""
        return list(self._agents.values())

    def run(self, seconds: float) -> None:
        """Let time go on."""
        until = self.now + seconds
        while True:
            replica = min(self.replicas, key=lambda replica: replica.due)
            arrival = self._arrivals[0][0] if self._arrivals else math.inf
            at = min(replica.due, arrival)
            while self._next_sample <= min(at, until):
                self._sample()
            if at > until:
                break
            self.now = at
            if replica.due <= arrival:
                for job in replica.advance(at):
                    self._finish(job, replica)
            else:
                self._arrive(heapq.heappop(self._arrivals)[2])
        self.now = until

    def run_turns(self, turns: int) -> None:
        """Let time go on until so many more turns are finished."""
        wanted = len(self.records) + turns
        while len(self.records) < wanted:
            self.run(1.0)

    def remove_replica(self) -> None:
        """Take the last replica away: what it serves is sent to the others anew."""
        gone = self.replicas.pop()
        for turn, (agent, _, number) in list(self._flying.items()):
            if number == len(self.replicas):
                del self._flying[turn]
                heapq.heappush(self._arrivals, (self.now, agent.number, agent))
        gone.due = math.inf

    def _begin_session(self, agent: Agent) -> None:
        agent.session, agent.turn, agent.context = next(self._sessions), 0, self.workload.base_tokens
        agent.held = 0
        agent.think_s = None
        agent.replica = min(range(len(self.replicas)), key=self._residents)

    def _residents(self, number: int) -> tuple[int, int]:
        """A new session goes where the fewest live."""
        return sum(1 for agent in self._agents.values() if agent.replica == number), number

    def _gamma(self, mean: float, cv: float) -> float:
        return mean if cv == 0 else self._random.gammavariate(cv**-2, mean * cv**2)

    def _tokens(self, mean: int) -> int:
        return max(1, round(self._gamma(mean, self.workload.size_cv)))

    def _route(self, agent: Agent) -> int:
        """Number of the replica for a turn. Without affinity as routing/strategies.py ranks them, all of equal size."""
        if self.routing == "affinity" and agent.replica < len(self.replicas):
            return agent.replica
        numbers, latest = range(len(self.replicas)), self._chosen
        if self.routing == "affinity":
            return min(numbers, key=self._residents)
        if self.routing == "round_robin":
            return min(numbers, key=lambda number: latest[self.replicas[number].name])
        loads = [replica.in_flight + replica.queued for replica in self.replicas]
        return min(numbers, key=lambda number: (loads[number], latest[self.replicas[number].name]))

    def _arrive(self, agent: Agent) -> None:
        agent.replica = self._route(agent)
        output = self._tokens(self.workload.output_tokens)
        work = output / self.workload.output_tokens * self._gamma(1.0, self.workload.service_cv)
        number = next(self._turns)
        turn = f"turn-{number}"
        self._chosen[self.replicas[agent.replica].name] = number + 1
        self._flying[turn] = agent, self.now, agent.replica
        job = Job(agent.session, turn, self.now, agent.context, agent.held, output, work)
        self.replicas[agent.replica].submit(job, self.now)

    def _finish(self, job: Job, replica: Replica) -> None:
        agent, _, _ = self._flying.pop(job.turn)
        think_ms = None if agent.think_s is None else agent.think_s * 1000
        observing = self.workload.observing_share
        self.records.append(
            TurnRecord(
                turn=job.turn,
                finished_at=START + self.now,
                outcome="completed",
                status=200,
                session=f"session-{job.session}",
                task=f"task-{job.session}",
                model=self.model,
                backend=replica.name,
                started_at=START + job.arrived,
                think_ms=think_ms,
                pre_ms=None if think_ms is None else observing * think_ms,
                queue_ms=(job.admitted - job.arrived) * 1000,
                ttft_ms=None if job.first is None else (job.first - job.admitted) * 1000,
                inference_ms=(self.now - job.admitted) * 1000,
                prompt_tokens=job.prompt,
                completion_tokens=job.output,
                cached_tokens=max(0, job.cached),
                expected_cached_tokens=job.held or None,
            )
        )
        agent.held = job.prompt + job.output - 1
        self._think(agent, job.output)

    def _think(self, agent: Agent, output: int) -> None:
        """The agent acts on its answer, and observes; after its last turn it does so for a new session."""
        if agent.is_leaving:
            return
        agent.think_s = self._gamma(self.workload.think_s, self.workload.think_cv)
        at = self.now + agent.think_s
        agent.turn += 1
        agent.context += max(output, self._tokens(self.workload.turn_tokens))
        if agent.turn >= self.workload.turns:
            self._begin_session(agent)
        heapq.heappush(self._arrivals, (at, agent.number, agent))

    def _sample(self) -> None:
        in_flight = {replica.name: replica.in_flight for replica in self.replicas}
        queued = sum(replica.queued for replica in self.replicas)
        oldest_s = max(0.0, *(self._next_sample - replica.waits_since for replica in self.replicas))
        kv_usage = {replica.name: replica.kv_usage for replica in self.replicas}
        known = {name: usage for name, usage in kv_usage.items() if usage is not None}
        at = START + self._next_sample
        waiting = {agent.number for agent, _, _ in self._flying.values()}
        agents = sum(agent.turn > 0 or agent.number in waiting for agent in self._agents.values())
        self.samples.append(Sample(at, in_flight, queued, agents, oldest_s, known))
        self._next_sample += 1.0


def engine_fleet(replicas: int, physics: Physics | None = None) -> list[Replica]:
    return [EngineReplica(f"replica-{number}", physics or Physics()) for number in range(replicas)]


def planted_fleet(replicas: int, base_s: float, per_request_s: float, slots: int = 256) -> list[Replica]:
    return [PlantedReplica(f"replica-{number}", base_s, per_request_s, slots) for number in range(replicas)]


def service_law(physics: Physics, workload: Workload) -> tuple[float, float]:
    """A and B of R(n) = A + B·n, in seconds, as they follow from the constants while every context stays cached.

    Alone, a turn takes its answer's tokens times a step. Each turn in flight adds to every step its sequence and its
    context, and in the time of a turn as many others begin as are in flight: each adds what it prefills.
    """
    turns = workload.turns
    context = workload.base_tokens + workload.turn_tokens * (turns - 1) / 2 + workload.output_tokens / 2
    fresh = workload.turn_tokens - workload.output_tokens
    prefilled = (workload.base_tokens + (turns - 1) * fresh) / turns
    step_s = physics.sequence_s + physics.context_token_s * context
    return (
        workload.output_tokens * physics.step_s,
        workload.output_tokens * step_s + physics.prefill_token_s * prefilled,
    )


def judge(loop: ClosedLoop, kv_tokens: int | None = None, slots: int | None = None) -> CapacityAnalysis:
    """A fresh analysis that has seen all that the simulated fleet has."""
    analysis = CapacityAnalysis(lambda: START + loop.now, random.Random(loop.seed))
    show(analysis, loop, kv_tokens, slots)
    return analysis


def show(analysis: CapacityAnalysis, loop: ClosedLoop, kv_tokens: int | None = None, slots: int | None = None) -> None:
    """Give what the fleet did since it was shown last, and forget it here."""
    for sample in loop.samples:
        in_flight, agents, turns = sample.in_flight, sample.agents, sum(sample.in_flight.values()) + sample.queued
        analysis.sample(
            FleetSample(
                sample.at,
                loop.model,
                "simulated",
                in_flight,
                agents,
                slots,
                kv_tokens,
                waiting_agents=turns,
                open_turns=turns,
            )
        )
    for record in loop.records:
        analysis.add(record)
    loop.samples.clear()
    loop.records.clear()


def told(estimate: dict[str, Any], scale: float = 1.0) -> str:
    """An estimate in a cell of the table."""
    low, high, value = (estimate[name] for name in ("low", "high", "value"))
    if low is None or high is None:
        return "—"
    span = f"[{scale * low:.4g}, {scale * high:.4g}]"
    return span if value is None else f"{scale * value:.4g} {span}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--agents", type=int, nargs="+", default=[8, 16, 32, 64, 96, 128, 160, 192])
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--think", type=float, default=10.0, metavar="S", help="mean think time")
    parser.add_argument("--kv-tokens", type=int, default=Physics.kv_tokens, help="of one replica")
    parser.add_argument("--planted", type=float, nargs=2, metavar=("A", "B"), help="replicas that obey A + B·n")
    parser.add_argument("--seconds", type=float, default=600.0, help="simulated, after 120 to settle")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    workload, physics = Workload(think_s=options.think), Physics(kv_tokens=options.kv_tokens)
    base_s, per_request_s = options.planted or service_law(physics, workload)
    model = CapacityModel(options.replicas, base_s, per_request_s, workload.think_s)
    busy = float(model.agents_at_utilisation(0.7))
    print(f"R(n) = {base_s:.4g} s + {per_request_s:.4g} s·n   N* = {float(model.knee):.0f}   N(0.7) = {busy:.0f}\n")
    print("|   N | X/h simulated | closed form |   off | R s | form |  ρ  | form | estimated N* | verdict |")
    print("|----:|--------------:|------------:|------:|----:|-----:|----:|-----:|:-------------|:--------|")
    for agents in options.agents:
        fleet = planted_fleet(options.replicas, *options.planted) if options.planted else None
        loop = ClosedLoop(fleet or engine_fleet(options.replicas, physics), agents, workload, options.seed)
        loop.run(120)
        loop.records.clear()
        loop.run(options.seconds)
        per_s = len(loop.records) / options.seconds
        answer_s = sum(record.inference_ms or 0.0 for record in loop.records) / len(loop.records) / 1000
        entry = judge(loop, options.kv_tokens).document()[0]
        form = float(model.throughput(agents))
        print(
            f"| {agents:3} | {3600 * per_s:13.0f} | {3600 * form:11.0f} | {100 * (per_s / form - 1):+4.1f}% | "
            f"{answer_s:.2f} | {float(model.answer_s(agents)):.2f} | {per_request_s * per_s / options.replicas:.2f} | "
            f"{float(model.utilisation(agents)):.2f} | {told(entry['limits']['knee_agents'])} | "
            f"{entry['verdict']['sentence']} {entry['suggestion']['sentence']} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
