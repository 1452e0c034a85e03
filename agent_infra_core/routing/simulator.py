"""A fleet of simulated engines with prefix caches, and agents that return with longer prompts. Pure; one seed, one run.

Engines work in steps, like vLLM's scheduler: a step decodes one token of every running turn and prefills what its
budget leaves, and takes step + sequence · batch + context · tokens read + prefill · tokens computed seconds, with
attention's quadratic part.  Steps in which nothing else happens are summed in closed form.  A prompt is a chain of
segments, each a key and a number of tokens: a shared system prompt, a parent's context up to a fork, the session's own
words.  Segments stay cached until the least recently used is evicted, tail first.  A prefix that one turn is still
computing counts as cached for the next one.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol, TypeAlias

FIRST_SESSION = 1_000_000  # number of the first session; those of shared segments are lower
TICK_S = 0.5  # how often a policy may release held turns without an event
Chain: TypeAlias = tuple[tuple[int, int], ...]  # (segment, tokens) from the prompt's start on


@dataclass(frozen=True)
class Physics:
    """Costs of a replica: Llama 3.1 8B in bfloat16 on one H100; see Physics in closed_loop.py for the sources."""

    step_s: float = 7.5e-3
    sequence_s: float = 0.06e-3
    context_token_s: float = 0.08e-6
    prefill_token_s: float = 38e-6
    attention_s: float = 1.2e-9  # per prefilled token and token before it: 4 · 32 layers · 4096 operations
    kv_tokens: int = 430_000
    slots: int = 256
    step_tokens: int = 8192
    block_tokens: int = 1  # of a cached prefix, only whole blocks are found


@dataclass(frozen=True)
class Step:
    """One model call of a session, and what happens until the next one."""

    appended: int  # tokens that its prompt adds to the context: the task or a tool's result
    output: int
    think_s: float  # after its answer
    replaces: bool = False  # its prompt doesn't continue the context, but the shared segments: it was compacted
    forks: tuple[Script, ...] = ()  # sub-agents that run before the next step


@dataclass(frozen=True)
class Script:
    """What a session will do, drawn before the run, so every policy serves the same work."""

    shared: tuple[tuple[int, int], ...]  # segments that it shares from the start: system prompts
    steps: tuple[Step, ...]
    inherits: bool = False  # a fork that continues its parent's context


@dataclass(slots=True)
class Session:
    """A running session."""

    id: int
    script: Script
    chain: Chain
    parent: Session | None = None
    step: int = 0
    waits_for: int = 0  # sub-agents that still run
    replica: int = -1  # of its last turn

    @property
    def context(self) -> int:
        return sum(tokens for _, tokens in self.chain)


@dataclass(slots=True)
class Turn:
    """One model call on its way."""

    session: Session
    chain: Chain
    prompt: int
    output: int
    arrived: float
    replica: int = -1
    admitted: float = math.nan
    first: float = math.nan
    finished: float = math.nan
    cached: int = -1
    known: int = 0  # tokens that some replica has computed before: a perfect cache's hit
    lacks: int = 0  # tokens still to prefill
    made: int = 0


class PrefixCache:
    """Segments of prompts within a number of tokens; pinned ones stay, of the others the longest unused goes first."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.used = 0
        self.idle_tokens = 0
        self._held: dict[int, int] = {}
        self._pins: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    def find(self, chain: Chain) -> int:
        """Tokens of the longest cached prefix."""
        found = 0
        for key, tokens in chain:
            held = self._held.get(key, 0)
            if held < tokens:
                return found + held
            found += tokens
        return found

    def pin(self, chain: Chain) -> bool:
        """Hold the whole chain; False if what is pinned leaves no room for it."""
        for key, _ in chain:
            self._pins[key] = self._pins.get(key, 0) + 1
            if key in self._idle:
                del self._idle[key]
                self.idle_tokens -= self._held[key]
        new = sum(max(0, tokens - self._held.get(key, 0)) for key, tokens in chain)
        if not self.make_room(new):
            self.unpin(chain)
            return False
        for key, tokens in chain:
            self._held[key] = max(tokens, self._held.get(key, 0))
        self.used += new
        return True

    def unpin(self, chain: Chain) -> None:
        """Let go of a chain, its end first."""
        for key, _ in reversed(chain):
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]
                if self._held.setdefault(key, 0):
                    self._idle[key] = None
                    self.idle_tokens += self._held[key]

    def grow(self, key: int, tokens: int) -> None:
        """Add tokens to a pinned segment; ``make_room`` comes first."""
        self._held[key] += tokens
        self.used += tokens

    def make_room(self, tokens: int) -> bool:
        """Evict until so many tokens fit; False, and nothing is done, if pinned segments prevent it."""
        excess = self.used + tokens - self.capacity
        if excess > self.idle_tokens:
            return False
        while excess > 0:
            key = next(iter(self._idle))
            drop = int(min(self._held[key], math.ceil(excess)))
            excess -= drop
            self.used -= drop
            self.idle_tokens -= drop
            self._held[key] -= drop
            if not self._held[key]:
                del self._held[key], self._idle[key]
        return True

    def add(self, chain: Chain) -> None:
        """Cache a chain that nothing pins."""
        if self.pin(chain):
            self.unpin(chain)

    def clear(self) -> None:
        """Forget everything that isn't pinned."""
        while self._idle:
            key, _ = self._idle.popitem()
            self.used -= self._held.pop(key)
        self.idle_tokens = 0


class Replica:
    """A vLLM-like engine. A *run* is a number of steps in which nothing happens but that tokens are decoded; a step
    that prefills is a run of its own. An arriving turn joins at the end of the step under way, so it cuts the run."""

    def __init__(self, physics: Physics, speed: float = 1.0) -> None:
        self.due = math.inf
        self.cache = PrefixCache(physics.kv_tokens)
        self.running: list[Turn] = []
        self.waiting: deque[Turn] = deque()
        self.preemptions = 0
        self._physics, self._speed = physics, speed
        self._began, self._steps = 0.0, 0
        self._first_s = self._growth_s = 0.0
        self._prefill: list[tuple[Turn, int]] = []
        self._decoding: list[Turn] = []

    @property
    def kv_usage(self) -> float:
        """Share of the cache that running turns hold, as vLLM reports it."""
        return (self.cache.used - self.cache.idle_tokens) / self._physics.kv_tokens

    def submit(self, turn: Turn, now: float) -> None:
        self.waiting.append(turn)
        if not self.running:
            self._plan(now)
        elif not self._prefill and len(self.running) < self._physics.slots:
            self._steps = min(self._steps, self._steps_until(now))
            self.due = self._began + self._run_s(self._steps)

    def advance(self, now: float) -> list[Turn]:
        """Finish the run that ends now. Returns the turns that are done."""
        for turn, tokens in self._prefill:
            turn.lacks -= tokens
            if not turn.lacks:
                self._decode(turn, 1)
                turn.first = now if math.isnan(turn.first) else turn.first
        for turn in self._decoding:
            self._decode(turn, self._steps)
        done = [turn for turn in self.running if turn.made >= turn.output]
        if done:
            self.running = [turn for turn in self.running if turn.made < turn.output]
            for turn in done:
                self.cache.unpin(turn.chain)
        self._plan(now)
        return done

    def _decode(self, turn: Turn, tokens: int) -> None:
        turn.made += tokens
        self.cache.grow(turn.chain[-1][0], tokens)

    def _admit(self, now: float) -> None:
        while self.waiting and len(self.running) < self._physics.slots:
            turn = self.waiting[0]
            found = min(self.cache.find(turn.chain), turn.prompt - 1)
            found -= found % self._physics.block_tokens
            if not self.cache.pin(turn.chain):
                if self.running:
                    return
                raise ValueError(f"a prompt of {turn.prompt} tokens exceeds the KV cache")
            self.waiting.popleft()
            turn.lacks = turn.prompt + turn.made - found
            if turn.cached < 0:
                turn.cached, turn.admitted = found, now
            self.running.append(turn)

    def _plan(self, now: float) -> None:
        """Decide on the next run, which begins now."""
        self._admit(now)
        self._began, budget = now, self._physics.step_tokens
        while True:
            self._decoding = [turn for turn in self.running if not turn.lacks]
            if not self._decoding or self.cache.make_room(len(self.running)):
                break
            turn = self.running.pop()  # preempted: the one admitted last goes back to the queue's head
            self.cache.unpin(turn.chain)
            self.waiting.appendleft(turn)
            self.preemptions += 1
        budget -= len(self._decoding)
        self._prefill = []
        for turn in self.running:
            if turn.lacks and budget > 0:
                tokens = min(turn.lacks, budget)
                self._prefill.append((turn, tokens))
                budget -= tokens
        if not self.running:
            self.due = math.inf
            return
        self._set_costs()
        self._steps = 1
        if not self._prefill:
            free = int(self.cache.capacity - self.cache.used + self.cache.idle_tokens)
            least = min(turn.output - turn.made for turn in self._decoding)
            self._steps = max(1, min(least, free // len(self._decoding)))
            self.cache.make_room(self._steps * len(self._decoding))
        self.due = now + self._run_s(self._steps)

    def _set_costs(self) -> None:
        """Seconds of the run's first step, and by how much each further one is longer."""
        physics = self._physics
        context = sum(turn.prompt + turn.made for turn in self._decoding)
        step_s = physics.step_s + physics.sequence_s * (len(self._decoding) + len(self._prefill))
        for turn, tokens in self._prefill:
            before = turn.prompt + turn.made - turn.lacks
            context += before
            step_s += tokens * (physics.prefill_token_s + physics.attention_s * (before + tokens / 2))
        self._first_s = (step_s + physics.context_token_s * context) / self._speed
        self._growth_s = physics.context_token_s * len(self._decoding) / self._speed

    def _run_s(self, steps: int) -> float:
        return steps * self._first_s + self._growth_s * steps * (steps - 1) / 2

    def _steps_until(self, now: float) -> int:
        """Steps of the run up to the first boundary that isn't before ``now``."""
        elapsed, linear, growth = max(0.0, now - self._began), self._first_s - self._growth_s / 2, self._growth_s
        return max(1, math.ceil((math.sqrt(linear**2 + 2 * growth * elapsed) - linear) / growth - 1e-9))


class Policy(Protocol):
    """Chooses replicas for turns. A turn that ``arrive`` doesn't place is held until ``release`` returns it."""

    def arrive(self, turn: Turn, now: float) -> int | None: ...
    def first_token(self, turn: Turn, now: float) -> None: ...
    def finish(self, turn: Turn, is_last: bool, now: float) -> None: ...
    def release(self, now: float) -> Iterable[tuple[Turn, int]]:
        """Held turns that go now, each with its replica; called after every event and every TICK_S."""


@dataclass
class Fleet:
    """Replicas and agents under one policy. ``run`` it; what it did lies in ``turns``, ``ended`` and ``skew``.

    ``agents`` sessions run at a time, the first of them started within ``ramp_s``; each that ends is followed by the
    next script. ``flush`` is a replica that loses its cache when so many seconds have passed.
    """

    physics: Physics
    scripts: Sequence[Script]
    speeds: Sequence[float]
    agents: int
    ramp_s: float = 30.0
    flush: tuple[int, float] | None = None
    starts: Sequence[float] = ()  # when each script starts, in place of ``agents`` at a time
    now: float = 0.0
    turns: list[Turn] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)  # when each top-level session was over
    moves: int = 0
    skew: list[float] = field(default_factory=list)  # tokens of live sessions on the fullest replica, over the mean
    longest_wait_s: float = 0.0

    def __post_init__(self) -> None:
        self.replicas = [Replica(self.physics, speed) for speed in self.speeds]
        self._scripts = iter(self.scripts)
        self._numbers = count(FIRST_SESSION)  # of sessions and their own segments
        self._events: list[tuple[float, int, Session]] = []
        self._dues: list[tuple[float, int]] = []
        self._order = count()
        self._live: dict[int, Session] = {}
        self._known = PrefixCache(math.inf)
        self._prefilling: dict[int, list[Turn]] = {number: [] for number in range(len(self.replicas))}
        for at in self.starts or [self.ramp_s * number / self.agents for number in range(self.agents)]:
            self._start_next(at)

    def run(self, policy: Policy) -> None:
        """Serve all scripts. ValueError if turns are held for ever."""
        tick = silence = 0.0
        while self._live:
            due = self._dues[0][0] if self._dues else math.inf
            event = self._events[0][0] if self._events else math.inf
            self.now = min(due, event, tick)
            if self.flush is not None and self.now >= self.flush[1]:
                self.replicas[self.flush[0]].cache.clear()
                self.flush = None
            if self.now == tick:
                tick += TICK_S
                silence = 0.0 if min(due, event) < math.inf else silence + TICK_S
                if silence > 3600.0:
                    raise ValueError("turns are held for ever")
            elif self.now == due:
                number = heapq.heappop(self._dues)[1]
                if self.replicas[number].due == due:
                    self._advance(number, policy)
            else:
                self._arrive(heapq.heappop(self._events)[2], policy)
            for turn, number in policy.release(self.now):
                self._send(turn, number)

    def _start_next(self, at: float) -> None:
        script = next(self._scripts, None)
        if script is not None:
            self._start(script, at, None)

    def _start(self, script: Script, at: float, parent: Session | None) -> None:
        number = next(self._numbers)
        chain = parent.chain if parent is not None and script.inherits else script.shared
        session = Session(number, script, (*chain, (number, 0)), parent)
        self._live[number] = session
        heapq.heappush(self._events, (at, next(self._order), session))

    def _arrive(self, session: Session, policy: Policy) -> None:
        step = session.script.steps[session.step]
        key, own = session.chain[-1]
        if step.replaces:
            session.chain = (*session.script.shared, (next(self._numbers), step.appended))
        else:
            session.chain = (*session.chain[:-1], (key, own + step.appended))
        turn = Turn(session, session.chain, session.context, step.output, self.now)
        turn.known = self._known.find(turn.chain)
        number = policy.arrive(turn, self.now)
        if number is not None:
            self._send(turn, number)

    def _send(self, turn: Turn, number: int) -> None:
        turn.replica = number
        session = turn.session
        self.moves += session.replica not in (-1, number)
        session.replica = number
        replica = self.replicas[number]
        before = replica.due
        replica.submit(turn, self.now)
        self._prefilling[number].append(turn)
        if replica.due != before:
            heapq.heappush(self._dues, (replica.due, number))

    def _advance(self, number: int, policy: Policy) -> None:
        replica = self.replicas[number]
        done = replica.advance(self.now)
        prefilling = self._prefilling[number]
        if prefilling:
            for turn in [turn for turn in prefilling if not math.isnan(turn.first)]:
                prefilling.remove(turn)
                policy.first_token(turn, self.now)
        if not math.isinf(replica.due):
            heapq.heappush(self._dues, (replica.due, number))
        for turn in done:
            self._finish(turn, policy)

    def _finish(self, turn: Turn, policy: Policy) -> None:
        turn.finished = self.now
        self.longest_wait_s = max(self.longest_wait_s, turn.admitted - turn.arrived)
        session, step = turn.session, turn.session.script.steps[turn.session.step]
        key, own = session.chain[-1]
        session.chain = (*session.chain[:-1], (key, own + turn.output))
        self._known.add(session.chain)
        self.turns.append(turn)
        session.step += 1
        is_last = session.step == len(session.script.steps)
        policy.finish(turn, is_last, self.now)
        if len(self.turns) % 64 == 0:
            self._measure_skew()
        for script in step.forks:
            session.waits_for += 1
            self._start(script, self.now, session)
        if is_last and not step.forks:
            self._end(session)
        elif not step.forks:
            heapq.heappush(self._events, (self.now + step.think_s, next(self._order), session))

    def _end(self, session: Session) -> None:
        del self._live[session.id]
        parent = session.parent
        if parent is None:
            self.ended.append(self.now)
            return self._start_next(self.now)
        parent.waits_for -= 1
        if not parent.waits_for:
            if parent.step == len(parent.script.steps):
                return self._end(parent)
            heapq.heappush(self._events, (self.now, next(self._order), parent))
        return None

    def _measure_skew(self) -> None:
        held = [0] * len(self.replicas)
        for session in self._live.values():
            if session.replica >= 0:
                held[session.replica] += session.context
        if sum(held):
            self.skew.append(max(held) * len(held) / sum(held))
