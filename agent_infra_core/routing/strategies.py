"""Strategies to choose the replica for a turn, one row each. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

RouteRank: TypeAlias = tuple[float, float, int]  # lowest wins; the last item prefers the least recently chosen
NO_RANK: RouteRank = (math.inf, 0.0, 0)  # for a replica that can't be chosen


class BackendView(Protocol):
    """The view of a replica that strategies use to choose; the relay's live replicas implement it."""

    @property
    def id(self) -> str: ...
    @property
    def accepts_work(self) -> bool:
        """Whether it is ready and healthy, and neither draining nor asleep."""

    @property
    def busy_until(self) -> float:
        """Clock time until which it gets no new work, because it answered 429 or 503."""

    @property
    def capacity(self) -> int:
        """Turns that it may run at once; 0 = unknown, never full."""

    @property
    def in_flight(self) -> int:
        """Turns that this relay is running there now."""

    @property
    def foreign_work(self) -> int:
        """Turns from others that were running or waiting there at its last report."""

    @property
    def kv_usage(self) -> float:
        """0 to 1: the last report, plus an estimate for turns sent since."""

    @property
    def gpu_utilization(self) -> float:
        """0 to 100: mean over its GPUs."""

    @property
    def latency_ms(self) -> float | None:
        """Decayed mean latency of its turns; None before the first."""

    @property
    def last_chosen(self) -> int:
        """Sequence number of the last choice that it won; 0 = never."""


ViewT = TypeVar("ViewT", bound=BackendView)


@dataclass(frozen=True)
class RouteRequest:
    """The constraints of a turn: replicas that must not get it (again), some only until a moment."""

    excluded: frozenset[str] = frozenset()
    until: tuple[tuple[str, float], ...] = ()  # (replica, clock time): it couldn't be reached, so it got nothing
    # Replica that holds the answer which the turn continues by its id; empty: unknown. None: it has its whole context.
    holder: str | None = None

    def excluded_at(self, now: float) -> frozenset[str]:
        """Return the replicas that must not get the turn now."""
        if not self.until:
            return self.excluded
        return self.excluded | {replica for replica, end in self.until if end > now}

    def among(self, views: Sequence[ViewT]) -> Sequence[ViewT]:
        """Return the replicas that the turn may go to: the holder alone for as long as it takes work."""
        if not self.holder:
            return views
        held = [view for view in views if view.id == self.holder and view.accepts_work]
        return views if not held or self.holder in self.excluded else held


ANYWHERE = RouteRequest()


def _rank_round_robin(view: BackendView) -> RouteRank:
    """Least recently chosen."""
    return 0.0, 0.0, view.last_chosen


def _rank_least_connections(view: BackendView) -> RouteRank:
    """Fewest turns in flight from this relay."""
    return view.in_flight, 0.0, view.last_chosen


def _rank_least_latency(view: BackendView) -> RouteRank:
    """Lowest decayed mean latency; a replica without a sample comes first with one turn, then last until it answers."""
    if view.latency_ms is None:
        return (1e12 if view.in_flight else -1.0), view.in_flight, view.last_chosen
    return view.latency_ms, 0.0, view.last_chosen


def _rank_least_load(view: BackendView) -> RouteRank:
    """(own in flight + others' work) / capacity + 10 · max(0, KV usage − 0.9); then the lowest GPU utilisation.

    Our own turns are counted live, so the load stays current between a replica's reports; only the work of others is
    as old as the last report.  A full KV cache weighs as much as a full capacity of turns.
    """
    load = (view.in_flight + view.foreign_work) / (view.capacity or 1)
    if view.kv_usage > 0.9:
        load += 10 * (view.kv_usage - 0.9)
    return load, view.gpu_utilization, view.last_chosen


STRATEGIES: Mapping[str, Callable[[BackendView], RouteRank]] = {
    "least_load": _rank_least_load,
    "round_robin": _rank_round_robin,
    "least_connections": _rank_least_connections,
    "least_latency": _rank_least_latency,
}


def choose_backend(views: Iterable[ViewT], request: RouteRequest, strategy: str, now: float) -> ViewT | None:
    """Return the replica for a turn, or None if no replica may take it or has a free slot."""
    excluded, rank_of, best, lowest = request.excluded_at(now), STRATEGIES[strategy], None, NO_RANK
    for view in views:
        is_open = view.accepts_work and (not view.capacity or view.in_flight < view.capacity)
        if is_open and view.busy_until <= now and view.id not in excluded and (rank := rank_of(view)) < lowest:
            best, lowest = view, rank
    return best
