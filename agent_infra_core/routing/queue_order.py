"""The order of waiting turns: fair by client, then by session, with a bounded preference for cached prefixes. Pure."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

AGING = 4.0  # one second of waiting counts as much as this many seconds of service received
SERVICE_HALF_LIFE_S = 60.0
MOST_SKIPS = 15  # waiting turns of its client that a turn may skip because its prefix is cached
MOST_SKIPPED = 4  # times that a turn may be skipped so
MOST_OFFERS = 64  # waiting turns of a client that are offered one free slot, which they may have to refuse
TurnT = TypeVar("TurnT")


class AttainedService:
    """Recent seconds of service per session, with a half-life; forgets the sessions unseen for longest."""

    def __init__(self, limit: int = 20_000) -> None:
        self._limit = limit
        self._sessions: OrderedDict[str, tuple[float, float]] = OrderedDict()  # session → (seconds, as of)

    def charge(self, session: str, seconds: float, now: float) -> float:
        """Add ``seconds`` (negative: refund) to a session's service. Returns its service before that, as of ``now``."""
        had, at = self._sessions.pop(session, (0.0, now))
        had *= 0.5 ** ((now - at) / SERVICE_HALF_LIFE_S)
        self._sessions[session] = (max(0.0, had + seconds), now)
        if len(self._sessions) > self._limit:
            self._sessions.popitem(last=False)
        return float(had)


def queue_key(attained_s: float, arrived: float, queue_timeout_s: float) -> float:
    """Return a turn's sort key in its client's queue, lowest first: least attained service, reduced by waiting time.

    All waiting turns age at the same rate, so the order of two turns never changes and the key needs no clock:
    attained − AGING · (now − arrived) sorts like attained + AGING · arrived.  The attained service is capped at the
    aging of half the queue timeout, so no turn starves.
    """
    return min(attained_s, AGING * queue_timeout_s / 2) + AGING * arrived


@dataclass(slots=True, eq=False)
class Waiting(Generic[TurnT]):
    """A turn in the queue."""

    turn: TurnT
    client: str
    key: float  # see queue_key
    number: int  # of its arrival
    skipped: int = 0

    def __lt__(self, other: Waiting[TurnT]) -> bool:
        return (self.key, self.number) < (other.key, other.number)


class FairQueue(Generic[TurnT]):
    """The turns that wait for a slot of one model.

    A free slot goes to the client with the fewest turns in flight, of several to the one whose turn is first by its
    key: so however many turns a client sends, and under however many sessions, another one's turn takes the next slot.
    Within a client the order is that of the keys, but for turns whose prefix is cached on a replica with a free slot:
    they may skip up to MOST_SKIPS others, of which the first is skipped MOST_SKIPPED times at most.
    """

    def __init__(self) -> None:
        self._clients: dict[str, list[Waiting[TurnT]]] = {}  # heaps
        self._in_flight: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._clients)

    def __iter__(self) -> Iterator[Waiting[TurnT]]:
        return (waiting for heap in self._clients.values() for waiting in heap)

    def add(self, waiting: Waiting[TurnT]) -> None:
        heapq.heappush(self._clients.setdefault(waiting.client, []), waiting)

    def remove(self, waiting: Waiting[TurnT]) -> bool:
        """Take a turn out of the queue; False if it isn't there."""
        heap = self._clients.get(waiting.client, [])
        if waiting not in heap:
            return False
        heap.remove(waiting)
        heapq.heapify(heap)
        if not heap:
            del self._clients[waiting.client]
        return True

    def start(self, client: str) -> None:
        """A turn of this client got a slot, with or without waiting."""
        self._in_flight[client] = self._in_flight.get(client, 0) + 1

    def end(self, client: str) -> None:
        """A turn of this client gave its slot back."""
        left = self._in_flight[client] - 1
        if left:
            self._in_flight[client] = left
        else:
            del self._in_flight[client]

    def give(self, accept: Callable[[TurnT], bool], is_warm: Callable[[TurnT], bool]) -> Waiting[TurnT] | None:
        """Offer a free slot to the waiting turns in their order. Returns the turn that accepts it, taken out.

        ``is_warm``: whether a turn's prefix is cached on a replica with a free slot.
        """
        in_flight = self._in_flight
        for client in sorted(self._clients, key=lambda name: (in_flight.get(name, 0), self._clients[name][0])):
            ordered = heapq.nsmallest(MOST_OFFERS, self._clients[client])
            offered = ordered
            if len(ordered) > 1 and ordered[0].skipped < MOST_SKIPPED:
                warm = [waiting for waiting in ordered[: MOST_SKIPS + 1] if is_warm(waiting.turn)]
                offered = [*warm, *(waiting for waiting in ordered if waiting not in warm)]
            for waiting in offered:
                if accept(waiting.turn):
                    ordered[0].skipped += waiting is not ordered[0]
                    self.remove(waiting)
                    return waiting
        return None
