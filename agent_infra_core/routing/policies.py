"""Routing policies on the simulated fleet: this program's, through the functions that the relay calls, and simple ones.
Pure."""

# ruff: noqa: ARG002, S311 (all policies take the same arguments; random numbers break ties)

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from agent_infra_core.routing.affinity import Placement, SessionRouter, SessionTurn
from agent_infra_core.routing.beliefs import ReplicaBelief
from agent_infra_core.routing.simulator import FIRST_SESSION, Fleet, Turn


@dataclass(slots=True)
class View:
    """A simulated replica as the relay sees its own: turns in flight, and no report newer than that."""

    id: str
    number: int
    accepts_work: bool = True
    busy_until: float = 0.0
    capacity: int = 256
    in_flight: int = 0
    foreign_work: int = 0
    kv_usage: float = 0.0
    gpu_utilization: float = 0.0
    latency_ms: float | None = None
    last_chosen: int = 0
    kv_tokens: float = 0.0
    ends_at: float = math.inf
    belief: ReplicaBelief = field(default_factory=ReplicaBelief)


class Ours:
    """least_load with session_affinity."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.router = SessionRouter(random.Random(seed))
        slots, kv_tokens = fleet.physics.slots, fleet.physics.kv_tokens
        self.views = [
            View(f"r{number}", number, capacity=slots, kv_tokens=kv_tokens) for number in range(len(fleet.replicas))
        ]
        self.held: list[Turn] = []
        self.placements: dict[int, Placement] = {}

    def arrive(self, turn: Turn, now: float) -> int | None:
        number = self._place(turn, now)
        if number is None:
            self.held.append(turn)
        return number

    def _place(self, turn: Turn, now: float) -> int | None:
        session = turn.session
        parent = session.parent if session.script.inherits else None
        key, tokens = session.script.shared[0] if session.script.shared else (None, 0)
        asked = SessionTurn(str(session.id), turn.prompt, prefix=key, prefix_tokens=tokens)
        if parent is not None:
            asked.parent, asked.parent_tokens = str(parent.id), parent.context
        view = self.router.choose(self.views, asked, now, now - turn.arrived)
        if view is None:
            return None
        self.placements[id(turn)] = self.router.place(view, asked, now, turn.arrived)
        view.in_flight += 1
        return view.number

    def first_token(self, turn: Turn, now: float) -> None:
        pass

    def finish(self, turn: Turn, is_last: bool, now: float) -> None:
        view = self.views[turn.replica]
        view.in_flight -= 1
        self.router.finish(self.placements.pop(id(turn)), now, turn.prompt, turn.cached, turn.output)
        if is_last:
            self.router.end(str(turn.session.id))

    def release(self, now: float) -> Iterable[tuple[Turn, int]]:
        for turn in list(self.held):
            number = self._place(turn, now)
            if number is not None:
                self.held.remove(turn)
                yield turn, number


class Baseline:
    """What all of them can do: count the turns in flight on each replica. Subclasses implement ``choose``."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.fleet, self.random = fleet, random.Random(seed)
        self.numbers = range(len(fleet.replicas))
        self.in_flight = [0 for _ in self.numbers]
        self.uncached = [0 for _ in self.numbers]  # tokens to prefill of turns without their first token
        self.sent_uncached: dict[int, int] = {}  # turn → its share of ``uncached``

    def choose(self, turn: Turn, now: float) -> int:
        raise NotImplementedError

    def believed(self, turn: Turn, number: int) -> int:
        """Tokens of the turn's prompt that the policy believes to be cached on a replica."""
        return 0

    def arrive(self, turn: Turn, now: float) -> int | None:
        number = self.choose(turn, now)
        self.in_flight[number] += 1
        self.sent_uncached[id(turn)] = new = turn.prompt - self.believed(turn, number)
        self.uncached[number] += new
        return number

    def first_token(self, turn: Turn, now: float) -> None:
        self.uncached[turn.replica] -= self.sent_uncached.pop(id(turn))

    def finish(self, turn: Turn, is_last: bool, now: float) -> None:
        self.in_flight[turn.replica] -= 1

    def release(self, now: float) -> Iterable[tuple[Turn, int]]:
        return ()

    def lowest(self, score: Callable[[int], float], among: Iterable[int] | None = None) -> int:
        """The replica with the lowest score; ties at random."""
        rows = [(score(number), number) for number in (self.numbers if among is None else among)]
        least = min(rows)[0]
        return self.random.choice([number for value, number in rows if value == least])


class RoundRobin(Baseline):
    """One after the other."""

    count = 0

    def choose(self, turn: Turn, now: float) -> int:
        self.count += 1
        return self.count % len(self.numbers)


class LeastInFlight(Baseline):
    """Fewest turns in flight; ties at random."""

    def choose(self, turn: Turn, now: float) -> int:
        return self.lowest(self.in_flight.__getitem__)


class StickySessions(Baseline):
    """vllm-router's sticky_least_loaded: a session stays; a new one goes where the fewest live."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        super().__init__(fleet, seed)
        self.homes: dict[int, int] = {}
        self.sessions = [0 for _ in self.numbers]

    def choose(self, turn: Turn, now: float) -> int:
        home = self.homes.get(turn.session.id)
        if home is None:
            home = self.homes[turn.session.id] = self.lowest(self.sessions.__getitem__)
            self.sessions[home] += 1
        return home

    def finish(self, turn: Turn, is_last: bool, now: float) -> None:
        super().finish(turn, is_last, now)
        if is_last:
            self.sessions[self.homes.pop(turn.session.id)] -= 1


class Recorded(Baseline):
    """Where each turn of a recorded run went."""

    def __init__(self, fleet: Fleet, places: Sequence[Sequence[int]]) -> None:
        """``places``: of each script, in their order, the replicas of its turns."""
        super().__init__(fleet, 0)
        self.places = places

    def choose(self, turn: Turn, now: float) -> int:
        return self.places[turn.session.id - FIRST_SESSION][turn.session.step]
