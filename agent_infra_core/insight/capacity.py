"""The capacity model: throughput and waits of N agents on k replicas, with their confidence. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent_infra_core.insight.fit import ServiceFit, ThinkFit
    from agent_infra_core.insight.measure import Operating

LEAST_TURNS = 30  # below: no number; from POINT_TURNS on a point with its interval, between them the interval alone
POINT_TURNS = 300
RESAMPLES = 300
SURE = 0.9  # share of the resampled fits that a verdict needs, and the probability that an interval holds
GROWTH_LIMIT = 2.0  # nothing is told of more in flight than so many times what was seen
MAX_CURVE_POINTS = 60
FAINT = 1e-9  # for a denominator that may be zero
Figure = Any  # a float, or an array with one for each resampled fit
Array = Any  # a numpy array: naming the type would load numpy


@dataclass(frozen=True)
class CapacityModel:
    """A closed queueing network: N agents think for Z seconds, then wait for one of k replicas.

    A replica with n turns in flight answers each in R(n) = A + B·n seconds: continuous batching, where a step costs a
    fixed part and a part per sequence; beyond its slots turns queue.  With the interactive response time law
    N = X·(Z + R) (Denning & Buzen 1978, "The Operational Analysis of Queueing Network Models"; Lazowska et al. 1984,
    "Quantitative System Performance", ch. 3) and Little's law n = X·R / k (Little 1961) this is a quadratic in n.
    Means stand for distributions; n counts the turn itself, whose own share B is lost when it runs alone: X is too
    high by B / (Z + A + B) at most.  Any of the figures may be an array of draws.
    """

    replicas: Figure  # k
    base_s: Figure  # A
    per_request_s: Figure  # B
    think_s: Figure  # Z
    slots: float = math.inf  # of one replica

    def in_flight(self, agents: Figure) -> Figure:
        """Turns in flight on each replica: n = [−q + √(q² + 4ABm)] / 2B with m = N/k, q = Z + A − mB."""
        import numpy as np

        crowd = agents / self.replicas
        slack = self.think_s + self.base_s - crowd * self.per_request_s
        root = (slack**2 + 4 * self.base_s * self.per_request_s * crowd) ** 0.5
        # The same, times (q + √…) above and below: holds for B = 0 too.
        return np.minimum(2 * self.base_s * crowd / np.maximum(slack + root, FAINT), self.slots)

    def answer_s(self, agents: Figure) -> Figure:
        """R(n): seconds that a turn spends on its replica."""
        return self.base_s + self.per_request_s * self.in_flight(agents)

    def throughput(self, agents: Figure) -> Figure:
        """X in turns a second: k·n / (A + B·n)."""
        return self.replicas * self.in_flight(agents) / self.answer_s(agents)

    def utilisation(self, agents: Figure) -> Figure:
        """ρ = B·X / k: how far a replica is from the most turns a second that it could ever do, 1 / B."""
        return self.per_request_s * self.throughput(agents) / self.replicas

    def shares(self, agents: Figure) -> tuple[Figure, Figure, Figure]:
        """Elasticities of X: ``(agent, base latency, contention)``, by which percentage X rises for 1 % less of each.

        d ln X / d ln of Z, A and 1/k, from X = N / (Z + R) and R = A / (1 − ρ): with D = Z + R + R·ρ/(1 − ρ) they are
        Z/D, R/D and the rest, and sum to 1.  When the slots are full, X follows the replicas alone.
        """
        import numpy as np

        answer, busy = self.answer_s(agents), self.utilisation(agents)
        crowding = answer * busy / np.maximum(1 - busy, FAINT)
        whole = self.think_s + answer + crowding
        is_full = self.in_flight(agents) >= self.slots
        agent, base = np.where(is_full, 0, self.think_s / whole), np.where(is_full, 0, answer / whole)
        return agent, base, np.maximum(1 - agent - base, 0)

    @property
    def knee(self) -> Figure:
        """N* = k·(Z + A + B) / B, where the asymptotes N / (Z + A + B) and k / B of X meet."""
        import numpy as np

        return self.replicas * (self.think_s + self.base_s + self.per_request_s) / np.maximum(self.per_request_s, FAINT)

    def agents_at(self, in_flight: Figure) -> Figure:
        """N with so many in flight on each replica: k·n·(Z + A + B·n) / (A + B·n)."""
        answer = self.base_s + self.per_request_s * in_flight
        return self.replicas * in_flight * (self.think_s + answer) / answer

    def agents_at_utilisation(self, utilisation: float) -> Figure:
        """N(ρ) = (kρ/B)·(Z + A/(1 − ρ))."""
        import numpy as np

        rate = self.replicas * utilisation / np.maximum(self.per_request_s, FAINT)
        return rate * (self.think_s + self.base_s / (1 - utilisation))


@dataclass(frozen=True)
class Basis:
    """What an estimate rests on."""

    turns: int
    window_s: float


@dataclass(frozen=True)
class Estimate:
    """A figure, the interval that holds it with 90 % probability, what both rest on; or why there is none.

    With a reason: no value, and an interval only where as much is known.
    """

    value: float | None
    low: float | None
    high: float | None
    unit: str
    basis: Basis
    reason: str | None = None


def significant(value: Any) -> float | None:
    """To four digits, for people and for JSON; None for what is not finite."""
    number = float(value)
    return float(f"{number:.4g}") if math.isfinite(number) else None


def estimate(unit: str, basis: Basis, value: Figure, draws: Figure = None, reason: str | None = None) -> Estimate:
    """An estimate from its value and its resampled values; the rules of how many turns allow what are here."""
    import numpy as np

    if reason is None and basis.turns < LEAST_TURNS:
        reason = f"{basis.turns} of {LEAST_TURNS} turns: too few for any number"
    if reason is not None or value is None:
        return Estimate(None, None, None, unit, basis, reason or "not known")
    spread = np.atleast_1d(value if draws is None else draws)
    low, high = (significant(bound) for bound in np.quantile(spread, [(1 - SURE) / 2, (1 + SURE) / 2]))
    if high is None or not math.isfinite(value) or abs(high) > 1e6 * (1 + abs(low or 0)):
        few = "the load was too light to tell how a replica slows down under more"
        return Estimate(None, low, None, unit, basis, few)
    if basis.turns < POINT_TURNS:
        few = f"{basis.turns} of {POINT_TURNS} turns: a range, no point yet"
        return Estimate(None, low, high, unit, basis, few)
    return Estimate(significant(value), low, high, unit, basis)


@dataclass(frozen=True)
class Outlook:
    """What is known of one model on one GPU type at one moment; all that the document's entry is made of."""

    model: CapacityModel
    draws: CapacityModel
    fit: ServiceFit | None
    think: ThinkFit | None
    here: Operating
    agents: float  # N, sampled or computed
    basis: Basis
    reason: str | None  # why nothing may be told that rests on the fit
    few: str | None  # why nothing may be told at all
    kv: tuple[float, Array] | None

    def told(self, unit: str, figure: Callable[[CapacityModel], Figure], reason: str | None = None) -> Estimate:
        """A figure of the model."""
        reason = self.few or self.reason or reason
        if reason is not None:
            return estimate(unit, self.basis, None, reason=reason)
        return estimate(unit, self.basis, float(figure(self.model)), figure(self.draws))

    def measured(self, unit: str, value: float | None, draws: Figure, reason: str) -> Estimate:
        """A figure that does not rest on the fit; ``reason`` is why there is none, where there is none."""
        why = self.few or (reason if value is None else None)
        return estimate(unit, self.basis, value, draws, why)

    @property
    def most_in_flight(self) -> float:
        """On a replica, of which anything may be told."""
        return GROWTH_LIMIT * self.fit.most_in_flight if self.fit else 0.0

    @property
    def most_agents(self) -> float:
        """N of which anything may be told."""
        return max(self.agents, float(self.model.agents_at(self.most_in_flight)))

    def beyond(self, agents: float) -> str | None:
        """Why nothing is told of so many agents; None where it may."""
        if self.fit is not None and self.fit.is_alone and agents > self.agents:
            return "no replica ever served two turns at once, so it cannot be told how one slows down"
        if agents > self.most_agents * 1.0001:
            return f"{agents:.0f} agents are beyond twice the load seen; run more than {self.agents:.0f} to know"
        return None

    @property
    def evicting(self) -> str | None:
        """Why nothing is told of any other load; None where contexts fit into the KV cache."""
        if self.kv is None or self.agents <= self.kv[0]:
            return None
        return "contexts are evicted at this load, and how replicas do when others fit, the fit cannot tell"

    def what_if(self, name: str, change: Callable[[CapacityModel], CapacityModel], agents: float) -> dict[str, Any]:
        """Throughput when the system changes, and by how much that is more (as a fraction)."""
        reason = self.evicting or self.beyond(agents)
        if reason is None and self.kv is not None and self.agents < agents and agents > self.kv[0]:
            reason = f"the contexts of {agents:.0f} agents would not fit into the KV cache"
        return {
            "name": name,
            "turns_per_hour": self.told("turns/h", lambda model: 3600 * change(model).throughput(agents), reason),
            "change": self.told(
                "fraction",
                lambda model: change(model).throughput(agents) / model.throughput(self.agents) - 1,
                reason,
            ),
        }

    def what_ifs(self) -> list[dict[str, Any]]:
        half = 1 - 0.5 * (self.think.observing_share if self.think else 0.0)
        return [
            self.what_if(
                "+1 replica", lambda model: dataclasses.replace(model, replicas=model.replicas + 1), self.agents
            ),
            self.what_if(
                "half the observation time",
                lambda model: dataclasses.replace(model, think_s=half * model.think_s),
                self.agents,
            ),
            self.what_if("+25 % agents", lambda model: model, 1.25 * self.agents),
            self.what_if("−25 % agents", lambda model: model, 0.75 * self.agents),
        ]

    def curve(self) -> list[dict[str, Any]]:
        """X(N), as far as may be told, and no further than is of use."""
        import numpy as np

        if (
            self.few
            or self.reason
            or self.evicting
            or self.fit is None
            or self.fit.is_alone
            or self.basis.turns < POINT_TURNS
        ):
            return []
        most = min(self.most_agents, max(2 * self.agents, 1.5 * float(self.model.knee)))
        points = np.unique(np.round(np.linspace(1, max(1.0, most), MAX_CURVE_POINTS)))
        rows = [(int(at), self.told("turns/h", lambda model, at=at: 3600 * model.throughput(at))) for at in points]  # type: ignore[misc]
        return [
            {"agents": agents, "turns_per_hour": row.value, "low": row.low, "high": row.high} for agents, row in rows
        ]


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def in_words(what: Mapping[str, Any], with_range: bool = False) -> str:
    """``+1 replica → +38 % turns/h [31, 44]``; empty where nothing is known of it."""
    change: Estimate = what["change"]
    if change.low is None or change.high is None:
        return ""
    low, high = (f"{100 * bound:+.0f}".replace("-", "−") for bound in (change.low, change.high))
    if change.value is None and low == high:
        return f"{what['name']} → {low} % turns/h"
    if change.value is None:
        return f"{what['name']} → {low} to {high} % turns/h"
    words = f"{what['name']} → {100 * change.value:+.0f} %".replace("-", "−")
    return f"{words} turns/h [{low.lstrip('+')}, {high.lstrip('+')}]" if with_range else words


def capacity_models(
    replicas: int, fit: ServiceFit | None, think: ThinkFit | None, slots: int | None
) -> tuple[CapacityModel, CapacityModel]:
    """The model of the estimates, and the one of their draws; without a fit, one that nobody may ask."""
    import numpy as np

    zeros = np.zeros(RESAMPLES)
    limit = float(slots) if slots else math.inf
    point = CapacityModel(replicas, 1.0, 0.0, think.mean_s if think else 0.0, limit)
    draws = CapacityModel(replicas, zeros + 1, zeros, think.draws if think else zeros, limit)
    if fit is None:
        return point, draws
    return (
        dataclasses.replace(point, base_s=fit.base_s, per_request_s=fit.per_request_s),
        dataclasses.replace(draws, base_s=fit.base_draws, per_request_s=fit.per_request_draws),
    )
