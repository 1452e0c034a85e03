"""Turns that wait for a replica's slot."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from typing import TYPE_CHECKING

from agent_infra_core.http.errors import RequestError
from agent_infra_core.relay.book import Turn
from agent_infra_core.relay.replicas import LiveReplica, explain_absence
from agent_infra_core.relay.sessions import SessionRoutes
from agent_infra_core.routing.queue_order import AGING, AttainedService, FairQueue, Waiting, queue_key
from agent_infra_core.routing.strategies import ANYWHERE, RouteRequest, choose_backend

if TYPE_CHECKING:
    from agent_infra_core.relay.connection import ClientConnection
    from agent_infra_core.relay.server import Relay

PROXY_STOPPED = "the proxy was stopped"
PATIENCE_WITH_BUSY_S = 5.0  # for replicas that answer 429 or 503; then the client learns it


class Admission:
    """Assigns replicas' slots to turns. Owns each model's queue and the service that sessions received lately."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self.sessions = SessionRoutes(relay, random.Random())  # noqa: S311 - it breaks ties, and hides nothing
        self._queues: dict[str, FairQueue[Turn]] = {}
        self._attained = AttainedService()
        self._mean_service_s = 1.0
        self._choices = 0
        self.pending = 0

    def acquire(self, turn: Turn, client: ClientConnection) -> LiveReplica:
        """Return a replica with a slot for ``turn``, after waiting where that may help; ``release`` is then due. Raises
        RequestError, ClientGone."""
        turn.sharer = client.identity
        is_first = not self._queue(turn.model)  # otherwise it would overtake the turns that wait
        if is_first and self._choose(turn) and turn.replica is not None:
            return turn.replica
        if turn.session is not None and not turn.charged_s:
            turn.charged_s = self._mean_service_s
            turn.charged_from_s = self._attained.charge(turn.session, turn.charged_s, turn.arrived)
        key = queue_key(turn.charged_from_s, turn.arrived, self._relay.settings.proxy.queue_timeout)
        return self._wait(turn, client, key)

    def release(self, turn: Turn) -> None:
        """The turn's slot is free again."""
        replica, turn.replica = turn.replica, None
        if replica is not None:
            replica.release()
            if turn.placement is not None:
                turn.placement.leave()
            self._queue(turn.model).end(turn.sharer)
            self.dispatch(turn.model)

    def charge(self, turn: Turn) -> None:
        """Charge the session of a turn that is over for the service that the turn really received."""
        took_s = max(0.0, turn.ended - turn.sent) if turn.sent else 0.0
        if took_s:
            self._mean_service_s += 0.05 * (took_s - self._mean_service_s)
        if turn.session is not None and took_s != turn.charged_s:
            self._attained.charge(turn.session, took_s - turn.charged_s, turn.over)

    def priority(self, turn: Turn) -> int:
        """Return a turn's priority for an engine that schedules by it, the lowest first: its order in our queue, in ms
        of attained service less its wait. It stays near 0, which requests without a priority have."""
        attained_s = turn.charged_from_s
        if turn.session is not None and not turn.charged_s:
            attained_s = self._attained.charge(turn.session, 0.0, turn.arrived)
        key = queue_key(attained_s, turn.arrived, self._relay.settings.proxy.queue_timeout)
        return round(1000 * (key - AGING * time.monotonic()))

    def outlook(self, model: str, route: RouteRequest = ANYWHERE) -> str:
        """What waiting may bring: ``slot`` (all are busy), ``loading`` (one is on its way), ``nothing``, or ``refusal``
        (those that serve asked to be left alone for long).

        The controller knows what is on its way. Without a controller, the wait stays bounded.
        """
        soonest = self._soonest(model, route)
        if soonest is not None:
            return "slot" if soonest <= time.monotonic() + PATIENCE_WITH_BUSY_S else "refusal"
        if model not in self._relay.loading and not self._may_wake(model):
            return "nothing"
        return "loading" if self._relay.control.is_connected else "slot"

    def _may_wake(self, model: str) -> bool:
        """Whether the controller may wake the model once it notices that its last replica has left."""
        return model in self._relay.wakes and any(r.is_leaving for r in self._relay.pools.get(model, ()))

    def is_served_by(self, turn: Turn, moment: float) -> bool:
        """Whether a replica that may serve ``turn`` takes work by then."""
        soonest = self._soonest(turn.model, turn.route)
        return soonest is not None and soonest <= moment

    def _soonest(self, model: str, route: RouteRequest) -> float | None:
        """When the first of the model's replicas takes work again, or took it already; None: none serves."""
        pool = route.among(self._relay.pools.get(model, ()))
        serving = (r.busy_until for r in pool if r.accepts_work and r.id not in route.excluded)
        return min(serving, default=None)

    def dispatch(self, model: str) -> None:
        """Give free slots to the waiting turns, in queue order."""
        queue = self._queue(model)
        while queue:
            now = time.monotonic()
            if not any(replica.has_room and replica.busy_until <= now for replica in self._relay.pools.get(model, ())):
                return
            given = queue.give(self._choose, self.sessions.is_warm)
            if given is None:  # the free ones are those that they were at already, or their turns are held
                return
            self.pending -= 1
            self._relay.reactor.loop.run_callback(given.turn.wake)

    def sweep(self) -> None:
        """Check all queues again: a busy replica may take work again, or the last replica may be gone."""
        for model, queue in self._queues.items():
            if queue:
                self.dispatch(model)
                general = self.outlook(model)  # the same for most turns
                for waiting in queue:
                    route = waiting.turn.route
                    if (general if route is ANYWHERE else self.outlook(model, route)) in ("nothing", "refusal"):
                        self._relay.reactor.loop.run_callback(waiting.turn.wake)

    def waiting(self) -> list[Turn]:
        """Return all waiting turns, the longest wait first."""
        turns = [waiting.turn for queue in self._queues.values() for waiting in queue]
        return sorted(turns, key=lambda turn: turn.arrived)

    def _queue(self, model: str) -> FairQueue[Turn]:
        queue = self._queues.get(model)
        if queue is None:
            queue = self._queues[model] = FairQueue()
        return queue

    def _choose(self, turn: Turn) -> bool:
        """Choose a replica for a turn and reserve its slot; False if the turn must wait."""
        relay, now = self._relay, time.monotonic()
        pool = turn.route.among(relay.pools.get(turn.model, ()))
        if turn.routed is None or not relay.keeps_sessions:
            replica = choose_backend(pool, turn.route, relay.strategy, now)
        else:
            replica = self.sessions.choose(turn, turn.routed, pool, now)
            if turn.routed.is_held or turn.held_since:
                turn.note_held(turn.routed.is_held, now)
        if replica is None:
            return False
        self._choices += 1
        replica.reserve(self._choices, turn.tokens)
        self._queue(turn.model).start(turn.sharer)
        turn.replica = replica
        return True

    def _wait(self, turn: Turn, client: ClientConnection, key: float) -> LiveReplica:
        settings = self._relay.settings.proxy
        if self.outlook(turn.model, turn.route) != "nothing" and self.pending >= settings.max_queue and not turn.sent:
            self._make_room(turn)
        self._choices += 1
        turn.wake = client.wake
        waiting, queue = Waiting(turn, turn.sharer, key, self._choices), self._queue(turn.model)
        queue.add(waiting)
        self.pending += 1
        try:
            self.dispatch(turn.model)  # turns ahead may wait for replicas that this one may not use
            return self._wait_for_slot(turn, client, settings.queue_timeout)
        except BaseException:
            self.release(turn)  # it may have got a slot just before it gave up
            raise
        finally:
            self.pending -= queue.remove(waiting)

    def _make_room(self, turn: Turn) -> None:
        """The queue is full: the last turn of the client with the most waiting turns gives way to one with fewer.
        Raises RequestError 429 if no other client has more."""
        waiting = [each for queue in self._queues.values() for each in queue]
        counts = Counter(each.client for each in waiting)
        greediest, most = max(counts.items(), key=lambda item: item[1], default=("", 0))
        if most <= counts[turn.sharer] + 1:
            raise self._full()
        last = max((each for each in waiting if each.client == greediest), key=lambda each: each.turn.arrived)
        self.pending -= self._queue(last.turn.model).remove(last)
        last.turn.gives_way = True
        self._relay.reactor.loop.run_callback(last.turn.wake)

    def _full(self) -> RequestError:
        return RequestError(429, f"{self.pending} requests wait already; try again later", retry_after_s=1)

    def _wait_for_slot(self, turn: Turn, client: ClientConnection, timeout_s: float) -> LiveReplica:
        since, was_loading = turn.arrived, False
        try:
            while turn.replica is None:
                if self._relay.is_over:
                    raise RequestError(503, PROXY_STOPPED, closes=True)
                if turn.gives_way:
                    raise self._full()
                outlook, now = self.outlook(turn.model, turn.route), time.monotonic()
                if outlook == "nothing":
                    why = explain_absence(self._relay.pools.get(turn.model, ())) + self._relay.control.remedy
                    raise RequestError(503, f"no replica of {turn.model} is there to answer: {why}", retry_after_s=1)
                if outlook == "refusal":
                    wait_s = math.ceil((self._soonest(turn.model, turn.route) or now) - now)
                    message = f"the replicas of {turn.model} are overloaded, and ask for {wait_s} s without requests"
                    raise RequestError(429, message, retry_after_s=max(1, wait_s))
                is_held = self.sessions.is_held(turn, now)  # that wait has a bound of its own
                if outlook == "loading" or was_loading or is_held:
                    since, was_loading = now, outlook == "loading"
                if now >= since + timeout_s:
                    raise RequestError(503, f"no slot came free within {timeout_s:g} s", retry_after_s=1)
                client.deadline = since + timeout_s
                client.park()
            return turn.replica
        finally:
            now = time.monotonic()
            turn.queue_ms = (now - turn.arrived) * 1000.0
            turn.note_held(False, now)
            client.deadline = math.inf
