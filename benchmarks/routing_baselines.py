"""Routing policies of other systems, re-implemented from their descriptions and shipped defaults (2026), to compare
with. Each docstring names its source. None shares code with the policy of this program."""

# ruff: noqa: ARG002 (all policies take the same arguments)

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from agent_infra_core.routing.policies import Baseline, LeastInFlight, RoundRobin, StickySessions
from agent_infra_core.routing.simulator import Chain, Fleet, PrefixCache, Turn


class SmgCacheAware(Baseline):
    """lightseekorg/smg cache_aware: threshold 0.3, balance 64 and 1.5. A node belongs to its last writer alone."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        super().__init__(fleet, seed)
        self.tree = PrefixCache(2_000_000)
        self.tenants: dict[int, int] = {}
        self.processed = [0 for _ in self.numbers]

    def choose(self, turn: Turn, now: float) -> int:
        number = min(self.numbers, key=lambda number: (self.in_flight[number], self.processed[number], number))
        low, high = min(self.in_flight), max(self.in_flight)
        is_balanced = not (high - low > 64 and high > 1.5 * low)
        matched = self.tree.find(turn.chain)
        if is_balanced and matched / turn.prompt > 0.3:
            number = self.tenants[_last_segment(turn.chain, matched)]
        self.tree.add(turn.chain)
        self.tenants.update((key, number) for key, _ in turn.chain)
        self.processed[number] += 1
        return number


def _last_segment(chain: Chain, matched: int) -> int:
    """The segment in which a match of so many tokens ends."""
    for key, tokens in chain:
        if matched <= tokens:
            return key
        matched -= tokens
    return chain[-1][0]


class PrefixScored(Baseline):
    """What llm-d's two profiles share: a prefix index per replica, of the prompts that were sent there."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        super().__init__(fleet, seed)
        self.index = [PrefixCache(31_250 * 64) for _ in self.numbers]

    def believed(self, turn: Turn, number: int) -> int:
        return min(self.index[number].find(turn.chain), 131_072)

    def arrive(self, turn: Turn, now: float) -> int | None:
        number = super().arrive(turn, now)
        if number is not None:
            self.index[number].add(turn.chain)
        return number


class LlmdDefault(PrefixScored):
    """llm-d's default profile: 2 · queue + 2 · kv + 3 · prefix, from metrics up to 50 ms old; ties at random."""

    scraped_at = -math.inf
    scraped: list[tuple[int, float]]

    def choose(self, turn: Turn, now: float) -> int:
        if now >= self.scraped_at + 0.050:
            self.scraped_at = now
            self.scraped = [(len(replica.waiting), replica.kv_usage) for replica in self.fleet.replicas]
        low, high = min(self.scraped)[0], max(self.scraped)[0]

        def score(number: int) -> float:
            waiting, kv_usage = self.scraped[number]
            queue = 1.0 if low == high else (high - waiting) / (high - low)
            return -(2 * queue + 2 * (1 - kv_usage) + 3 * self.believed(turn, number) / turn.prompt)

        return self.lowest(score)


class LlmdOptimized(PrefixScored):
    """llm-d's optimized-baseline: stay among replicas with 80 % of the prefix unless their queue costs 18 s more, then
    the fewest uncached tokens in flight."""

    def choose(self, turn: Turn, now: float) -> int:
        found = [self.believed(turn, number) for number in self.numbers]
        sticky = [number for number in self.numbers if found[number] >= 0.8 * turn.prompt]
        others = [number for number in self.numbers if number not in sticky]
        among: Iterable[int] = self.numbers
        if sticky:
            penalty = min(self.uncached[n] for n in sticky) - min((self.uncached[n] for n in others), default=0)
            among = self.numbers if others and penalty / 15_928 > 18.0 else sticky
        return self.lowest(lambda number: self.uncached[number] + turn.prompt - found[number], among)


class Dynamo(Baseline):
    """Dynamo's KV router at temperature 0: prefill blocks less the overlap, plus decode blocks. KV events are exact."""

    BLOCK = 16

    def __init__(self, fleet: Fleet, seed: int) -> None:
        super().__init__(fleet, seed)
        self.decoding = [0 for _ in self.numbers]  # tokens of turns in flight

    def believed(self, turn: Turn, number: int) -> int:
        return self.fleet.replicas[number].cache.find(turn.chain)

    def choose(self, turn: Turn, now: float) -> int:
        def cost(number: int) -> float:
            prefill = max(0, self.uncached[number] + turn.prompt - self.believed(turn, number))
            return (prefill + self.decoding[number] + turn.prompt) / self.BLOCK

        number = self.lowest(cost)
        self.decoding[number] += turn.prompt
        return number

    def finish(self, turn: Turn, is_last: bool, now: float) -> None:
        super().finish(turn, is_last, now)
        self.decoding[turn.replica] -= turn.prompt


class LMetric(Baseline):
    """LMetric (arXiv 2603.15202): new prefill tokens, pending ones included, times the batch; 1 + batch here, for an
    idle replica would score 0 however cold it is."""

    def believed(self, turn: Turn, number: int) -> int:
        return self.fleet.replicas[number].cache.find(turn.chain)

    def choose(self, turn: Turn, now: float) -> int:
        return self.lowest(
            lambda number: (
                (self.uncached[number] + turn.prompt - self.believed(turn, number)) * (1 + self.in_flight[number])
            )
        )


@dataclass
class Program:
    """ThunderAgent's view of a session."""

    tokens: int = 0
    backend: int = -1  # -1: paused or new
    is_acting: bool = False
    is_marked: bool = False
    held: Turn | None = None
    paused_at: float = 0.0
    steps: int = 0


class ThunderAgent(Baseline):
    """ThunderAgent's mode "tr": programs pause when a backend's programs exceed its KV cache. Every 5 s it pauses the
    smallest, and resumes what fits, on the backend with most room."""

    EVERY_S, COUNT_TOKENS, LONGEST_S = 5.0, 100, 1800.0

    def __init__(self, fleet: Fleet, seed: int) -> None:
        super().__init__(fleet, seed)
        self.programs: dict[int, Program] = {}
        self.next_tick = 0.0

    def remaining(self, number: int) -> float:
        tokens = [program.tokens + self.COUNT_TOKENS for program in self._on(number)]
        return self.fleet.physics.kv_tokens + self._shared(number) - sum(tokens)

    def _on(self, number: int) -> list[Program]:
        return [program for program in self.programs.values() if program.backend == number]

    def _shared(self, number: int) -> float:
        """Tokens that running programs share: theirs, less what the engine uses for them."""
        cache = self.fleet.replicas[number].cache
        reasoning = sum(program.tokens for program in self._on(number) if not program.is_acting)
        return max(0, reasoning - (cache.used - cache.idle_tokens))

    def arrive(self, turn: Turn, now: float) -> int | None:
        program = self.programs.setdefault(turn.session.id, Program())
        program.tokens, program.is_acting, program.steps = turn.prompt, False, program.steps + 1
        if program.backend < 0 and program.steps == 1 and not any(p.held for p in self.programs.values()):
            fits = [n for n in self.numbers if self.remaining(n) >= turn.prompt + self.COUNT_TOKENS]
            if fits:
                program.backend = self.lowest(lambda n: sum(p.tokens for p in self._on(n)), fits)
        if program.backend < 0:
            program.held = turn
            program.paused_at = now if program.steps == 1 else program.paused_at
            return None
        self.in_flight[program.backend] += 1
        return program.backend

    def first_token(self, turn: Turn, now: float) -> None:
        pass

    def finish(self, turn: Turn, is_last: bool, now: float) -> None:
        super().finish(turn, is_last, now)
        program = self.programs[turn.session.id]
        program.tokens, program.is_acting = turn.prompt + turn.output, True
        if is_last:
            del self.programs[turn.session.id]
        elif program.is_marked:
            program.backend, program.is_marked, program.paused_at = -1, False, now

    def release(self, now: float) -> Iterable[tuple[Turn, int]]:
        if now < self.next_tick:
            return
        self.next_tick = now + self.EVERY_S
        self._resume(now)
        for number in self.numbers:
            self._pause(number, now)
        for program in self.programs.values():
            if program.held is not None and program.backend >= 0:
                turn, program.held = program.held, None
                self.in_flight[program.backend] += 1
                yield turn, program.backend

    def _resume(self, now: float) -> None:
        room = {number: self.remaining(number) for number in self.numbers if self.remaining(number) > self.COUNT_TOKENS}
        paused = [program for program in self.programs.values() if program.backend < 0]
        paused.sort(key=lambda program: (program.held is None, program.steps == 1, program.tokens))
        chosen, total = [], 0
        for program in paused:
            if now - program.paused_at > self.LONGEST_S:
                program.backend = self.lowest(lambda number: -self.remaining(number))
            elif total + program.tokens + self.COUNT_TOKENS <= sum(room.values()):
                total += program.tokens + self.COUNT_TOKENS
                chosen.append(program)
        for program in sorted(chosen, key=lambda program: -program.tokens):
            number = max(room, key=room.__getitem__)
            if room[number] >= program.tokens + self.COUNT_TOKENS:
                program.backend = number
                room[number] -= program.tokens + self.COUNT_TOKENS

    def _pause(self, number: int, now: float) -> None:
        remaining = self.remaining(number)
        for program in sorted(self._on(number), key=lambda program: (not program.is_acting, program.tokens)):
            if remaining >= 0:
                return
            if program.is_acting:
                program.backend, program.paused_at = -1, now
                remaining += program.tokens + self.COUNT_TOKENS
            else:  # as shipped: what is marked doesn't count as freed, so all that run are
                program.is_marked = True


BASELINES: Mapping[str, Callable[[Fleet, int], Baseline]] = {
    "round robin": RoundRobin,
    "least in flight": LeastInFlight,
    "sticky sessions": StickySessions,
    "smg cache_aware": SmgCacheAware,
    "llm-d default": LlmdDefault,
    "llm-d optimized": LlmdOptimized,
    "Dynamo": Dynamo,
    "LMetric": LMetric,
    "ThunderAgent": ThunderAgent,
}
