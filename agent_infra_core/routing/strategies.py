"""Which replica serves a turn: one row per strategy. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

RouteRank: TypeAlias = tuple[float, float, int]  # the lowest wins; the last item: the least recently chosen of equals
NO_RANK: RouteRank = (math.inf, 0.0, 0)  # of one that may not be chosen


class BackendView(Protocol):
    """What a strategy may know about a replica at the moment of choosing; the relay's live replicas are such views."""

    @property
    def id(self) -> str: ...
    @property
    def accepts_work(self) -> bool:
        """Ready, healthy, and neither draining nor asleep."""

    @property
    def busy_until(self) -> float:
        """It answered 429 or 503: no new work before this reading of the clock."""

    @property
    def capacity(self) -> int:
        """Turns that it may run at once; 0 = unknown, it never counts as full."""

    @property
    def in_flight(self) -> int:
        """Turns that this relay has there now."""

    @property
    def foreign_work(self) -> int:
        """Turns running or waiting there at its last report that are not this relay's."""

    @property
    def kv_usage(self) -> float:
        """0 to 1: as last reported, and what was promised to it since."""

    @property
    def gpu_utilization(self) -> float:
        """0 to 100, mean over its GPUs."""

    @property
    def latency_ms(self) -> float | None:
        """Decayed mean of its turns; None before the first."""

    @property
    def last_chosen(self) -> int:
        """Number of the choice that it won last; 0 = never."""

    rank: RouteRank | None
    """What choose_backend has made of all this but ``busy_until``, for the strategy in force.  Whoever changes any of
    it sets None: in most choices most views are as they were in the last."""


@dataclass(frozen=True)
class RouteRequest:
    """What routing knows about a turn: replicas that it must not be sent to (again)."""

    excluded: frozenset[str] = frozenset()


ANYWHERE = RouteRequest()


def _rank_round_robin(view: BackendView) -> RouteRank:
    """The least recently chosen."""
    return 0.0, 0.0, view.last_chosen


def _rank_least_connections(view: BackendView) -> RouteRank:
    """Fewest turns in flight from this relay."""
    return view.in_flight, 0.0, view.last_chosen


def _rank_least_latency(view: BackendView) -> RouteRank:
    """Lowest decayed mean latency; one that has no sample yet goes first."""
    return -1.0 if view.latency_ms is None else view.latency_ms, 0.0, view.last_chosen


def _rank_least_load(view: BackendView) -> RouteRank:
    """(own in flight + others' work) / capacity + 10 · max(0, KV usage − 0.9); then the lowest GPU utilisation.

    Own turns are counted as they come and go, so the figure does not age between two reports of the replica; only what
    others run there is as old as the last report.  A full KV cache weighs as much as a whole capacity of turns.
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
ViewT = TypeVar("ViewT", bound=BackendView)


def choose_backend(views: Iterable[ViewT], request: RouteRequest, strategy: str, now: float) -> ViewT | None:
    """The replica that takes the turn now, or None when none of them may or has a free slot."""
    excluded, best, lowest = request.excluded, None, NO_RANK
    for view in views:
        rank = view.rank
        if rank is None:
            is_open = view.accepts_work and (not view.capacity or view.in_flight < view.capacity)
            rank = view.rank = STRATEGIES[strategy](view) if is_open else NO_RANK
        if rank < lowest and view.busy_until <= now and not (excluded and view.id in excluded):
            best, lowest = view, rank
    return best
