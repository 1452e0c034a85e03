"""This program's policy on the simulated fleet, through the functions that the relay calls."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from routing_simulator import Fleet, Turn

from agent_infra_core.routing.affinity import Placement, SessionRouter, SessionTurn
from agent_infra_core.routing.beliefs import ReplicaBelief


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
        self.views = [
            View(f"r{number}", number, kv_tokens=fleet.physics.kv_tokens) for number in range(len(fleet.replicas))
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
        parent = str(session.parent.id) if session.parent is not None and session.script.inherits else None
        key, tokens = session.script.shared[0] if session.script.shared else (None, 0)
        asked = SessionTurn(str(session.id), turn.prompt, parent, key, tokens)
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
        self.router.finish(self.placements.pop(id(turn)), now, view.in_flight, turn.prompt, turn.cached, turn.output)
        if is_last:
            self.router.end(str(turn.session.id))

    def release(self, now: float) -> Iterable[tuple[Turn, int]]:
        for turn in list(self.held):
            number = self._place(turn, now)
            if number is not None:
                self.held.remove(turn)
                yield turn, number
