"""The capacity model: throughput and waits of N agents on k replicas, with confidence intervals. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent_infra_core.insight.fit import ServiceFit, ThinkFit
    from agent_infra_core.insight.measure import Operating

LEAST_TURNS = 30  # with fewer turns, no figures are reported; below POINT_TURNS, only intervals
POINT_TURNS = 300
RESAMPLES = 300
CONFIDENCE = 0.9  # share of resampled fits needed for a verdict, and confidence level of intervals
_BOUNDS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)  # of intervals, as quantiles
FULL = 0.7  # share of samples with every slot taken above which slots are the limit
GROWTH_LIMIT = 2.0  # no predictions above this many times the highest number of turns in flight seen
MAX_CURVE_POINTS = 40
SHARED_TOOLS = "agents think longer the more of them think: they share tools, which the model doesn't have"
STRUCTURE = 0.06  # standard error of a predicted change, as a share of it: what the model leaves out
LEAST_MISFIT = 0.01  # relative error of X that every prediction allows for
EPSILON = 1e-9  # lower bound for denominators that may be zero
Figure = Any  # a float, or an array with one value per resampled fit
Array = Any  # a numpy array; naming the type would import numpy


@dataclass(frozen=True)
class CapacityModel:
    """A closed queueing network: N agents think for Z seconds, then wait for one of k replicas.

    A replica with n turns in flight answers each in R(n) = A + B·n seconds, because a step of continuous batching has
    a fixed cost and a cost per sequence. Turns beyond its slots queue. Together with the interactive response time law
    N = X·(Z + R) (Denning & Buzen 1978, "The Operational Analysis of Queueing Network Models"; Lazowska et al. 1984,
    "Quantitative System Performance", ch. 3) and Little's law n = X·R / k (Little 1961) this is a quadratic in n.
    The model replaces distributions by their means. n includes the turn itself. A turn that runs alone loses part of
    its own share B, so X is too high by at most B / (Z + A + B). An agent that sends p turns at once waits R / p for
    each. Any field but the slots may be an array of draws.
    """

    replicas: Figure  # k
    base_s: Figure  # A
    per_request_s: Figure  # B
    think_s: Figure  # Z, per turn
    parallel: Figure = 1.0  # p: turns in flight of an agent that waits
    slots: float = math.inf  # of one replica

    def in_flight(self, agents: Figure) -> Figure:
        """Turns in flight on each replica: n = [−q + √(q² + 4ABm)] / 2B with m = pN/k, q = pZ + A − mB."""
        import numpy as np

        crowd = self.parallel * agents / self.replicas
        slack = self.parallel * self.think_s + self.base_s - crowd * self.per_request_s
        root = (slack**2 + 4 * self.base_s * self.per_request_s * crowd) ** 0.5
        # Numerator and denominator are multiplied by (q + √…), which also works for B = 0.
        return np.minimum(2 * self.base_s * crowd / np.maximum(slack + root, EPSILON), self.slots)

    def answer_s(self, agents: Figure) -> Figure:
        """R(n): time a turn spends on its replica, in seconds."""
        return self.base_s + self.per_request_s * self.in_flight(agents)

    def throughput(self, agents: Figure) -> Figure:
        """X = k·n / (A + B·n), in turns per second."""
        return self.replicas * self.in_flight(agents) / self.answer_s(agents)

    def wait_s(self, agents: Figure) -> Figure:
        """W = p·(N/X − Z): time from a turn's arrival to its answer, with the wait for a slot, in seconds."""
        return self.parallel * (agents / self.throughput(agents) - self.think_s)

    def utilisation(self, agents: Figure) -> Figure:
        """ρ = B·X / k: throughput of a replica as a fraction of its maximum, 1 / B turns per second."""
        return self.per_request_s * self.throughput(agents) / self.replicas

    def shares(self, agents: Figure) -> tuple[Figure, Figure, Figure]:
        """Elasticities of X: ``(agent, base latency, contention)``, the rise of X in % for 1 % less of each.

        d ln X / d ln of Z, A and 1/k, from X = N / (Z + R/p) and R = A / (1 − ρ): with D = Z + (R + R·ρ/(1 − ρ))/p they
        are Z/D, (R/p)/D and the rest, and sum to 1.  When the slots are full, X depends only on the replicas.
        """
        import numpy as np

        answer, busy = self.answer_s(agents) / self.parallel, self.utilisation(agents)
        crowding = answer * busy / np.maximum(1 - busy, EPSILON)
        whole = self.think_s + answer + crowding
        is_full = self.in_flight(agents) >= self.slots
        agent, base = np.where(is_full, 0, self.think_s / whole), np.where(is_full, 0, answer / whole)
        return agent, base, np.maximum(1 - agent - base, 0)

    @property
    def knee(self) -> Figure:
        """N* = k·(Z + (A + B)/p) / B, where the asymptotes of X, N / (Z + (A + B)/p) and k / B, meet."""
        import numpy as np

        alone = (self.base_s + self.per_request_s) / self.parallel
        return self.replicas * (self.think_s + alone) / np.maximum(self.per_request_s, EPSILON)

    def agents_at(self, in_flight: Figure) -> Figure:
        """N that puts n turns in flight on each replica: k·n·(Z + R/p) / R with R = A + B·n."""
        answer = self.base_s + self.per_request_s * in_flight
        return self.replicas * in_flight * (self.think_s + answer / self.parallel) / answer

    def agents_at_utilisation(self, utilisation: float) -> Figure:
        """N at utilisation ρ, which n = ρ/(1 − ρ)·A/B turns in flight make."""
        import numpy as np

        return self.agents_at(utilisation / (1 - utilisation) * self.base_s / np.maximum(self.per_request_s, EPSILON))

    def with_replica(self) -> CapacityModel:
        """The fleet with one more replica."""
        return replace(self, replicas=self.replicas + 1)

    def thinking(self, share: float) -> CapacityModel:
        """The fleet with a share of the think time."""
        return replace(self, think_s=share * self.think_s)


@dataclass(frozen=True)
class UnequalFleet:
    """Replicas that differ in speed: what a change brings depends on which of them become crowded.

    Where turns go to any replica, each keeps its share of them, and R is the mean of A_i / (1 − B_i·X_i). Where
    sessions stay, each replica is a closed system of its own with a share of the agents. In between, X is interpolated.
    ``speeds``, ``shares`` and ``homes`` are columns with a row per replica; the rest is as in CapacityModel.
    """

    model: CapacityModel  # if every replica had speed 1
    speeds: Array  # factor of A and B
    shares: Array  # of the turns; they needn't sum to 1
    homes: Array  # of the agents, likewise
    moves: float  # share of turns that go to any replica

    def throughput(self, agents: Figure) -> Figure:
        """X in turns per second."""
        import numpy as np

        model, shares, homes = self.model, self.shares / self.shares.sum(), self.homes / self.homes.sum()
        base, slope = self.speeds * model.base_s, self.speeds * model.per_request_s
        one = replace(model, replicas=1, base_s=base, per_request_s=slope)
        full = (1 / np.maximum(base / model.slots + slope, EPSILON) / shares).min(axis=0)  # all slots of a replica
        alone, load = shares * base / model.parallel, shares * slope
        low: Figure = 0.0
        high = np.minimum(full, agents / (model.think_s + alone.sum(axis=0)))
        for _ in range(12 if self.moves else 0):  # to within 1/2¹³
            rate = (low + high) / 2
            is_less = rate * (model.think_s + (alone / np.maximum(1 - load * rate, EPSILON)).sum(axis=0)) < agents
            low, high = np.where(is_less, rate, low), np.where(is_less, high, rate)
        return self.moves * (low + high) / 2 + (1 - self.moves) * one.throughput(homes * agents).sum(axis=0)

    def with_replica(self) -> UnequalFleet:
        """The fleet with one more replica that is as fast as most."""
        import numpy as np

        added = ((self.speeds, 1.0), (self.shares, np.median(self.shares)), (self.homes, self.homes.mean()))
        speeds, shares, homes = (np.vstack([part, [[own]]]) for part, own in added)
        return replace(self, speeds=speeds, shares=shares, homes=homes)

    def thinking(self, share: float) -> UnequalFleet:
        """The fleet with a share of the think time."""
        return replace(self, model=self.model.thinking(share))

    def healed(self, number: int) -> UnequalFleet:
        """The fleet with a replica as fast as most in the place of one."""
        import numpy as np

        is_other = np.arange(len(self.speeds))[:, None] != number
        shares = np.where(is_other, self.shares, np.median(self.shares))
        return replace(self, speeds=np.where(is_other, self.speeds, 1.0), shares=shares)


@dataclass(frozen=True)
class Basis:
    """The data behind an estimate."""

    turns: int
    window_s: float


@dataclass(frozen=True)
class Estimate:
    """A value with its 90 % confidence interval and the data behind it, or the reason why it is missing.

    With a reason, ``value`` is None; ``low`` and ``high`` are set as far as they are known.
    """

    value: float | None
    low: float | None
    high: float | None
    unit: str
    basis: Basis
    reason: str | None = None


def significant(value: Any) -> float | None:
    """Round to four significant digits, for display and JSON; None if not finite."""
    number = float(value)
    return float(f"{number:.4g}") if math.isfinite(number) else None


def estimate(unit: str, basis: Basis, value: Figure, draws: Figure = None, reason: str | None = None) -> Estimate:
    """Make an estimate from a value and its resampled values, as far as the number of turns allows."""
    import numpy as np

    if reason is None and basis.turns < LEAST_TURNS:
        reason = f"{basis.turns} of {LEAST_TURNS} turns: too few for any number"
    if reason is not None or value is None:
        return Estimate(None, None, None, unit, basis, reason or "not known")
    spread = np.sort(np.atleast_1d(value if draws is None else draws))
    at = np.array(_BOUNDS) * (len(spread) - 1)
    # As np.quantile, in a tenth of its time.
    low, high = map(significant, np.interp(at, np.arange(len(spread)), spread))
    if high is None or not math.isfinite(value) or abs(high) > 1e6 * (1 + abs(low or 0)):
        return Estimate(
            None, low, None, unit, basis, "the load was too light to tell how a replica slows down under more"
        )
    if basis.turns < POINT_TURNS:
        return Estimate(None, low, high, unit, basis, f"{basis.turns} of {POINT_TURNS} turns: a range, no point yet")
    return Estimate(significant(value), low, high, unit, basis)


@dataclass(frozen=True)
class Outlook:
    """All data on one model on one GPU type at one moment, from which its ``analysis`` entry is made."""

    model: CapacityModel
    draws: CapacityModel
    fit: ServiceFit | None
    think: ThinkFit | None
    here: Operating
    agents: float  # N, sampled or computed
    agents_draws: Array
    basis: Basis
    reason: str | None  # why figures that depend on the fit are withheld
    few: str | None  # why all figures are withheld
    kv: tuple[float, Array] | None
    doubt: Array  # factors on the draws of a change
    fleets: tuple[Any, Any]  # what changes are predicted with: model and draws, or an UnequalFleet of each

    def told(self, unit: str, figure: Callable[[CapacityModel], Figure], reason: str | None = None) -> Estimate:
        """Estimate a figure that depends on the fit. A ``reason`` withholds it."""
        reason = self.few or self.reason or reason
        if reason is not None:
            return estimate(unit, self.basis, None, reason=reason)
        return estimate(unit, self.basis, float(figure(self.model)), figure(self.draws))

    def measured(self, unit: str, value: float | None, draws: Figure, reason: str) -> Estimate:
        """Estimate a figure that doesn't depend on the fit. ``reason`` explains a missing ``value``."""
        why = self.few or (reason if value is None else None)
        return estimate(unit, self.basis, value, draws, why)

    @property
    def most_in_flight(self) -> float:
        """Highest number of turns in flight on a replica for which predictions are made."""
        return GROWTH_LIMIT * self.fit.most_in_flight if self.fit else 0.0

    @property
    def most_agents(self) -> float:
        """Highest N for which predictions are made."""
        return max(self.agents, float(self.model.agents_at(self.most_in_flight)))

    def beyond(self, agents: float) -> str | None:
        """Why no prediction is made for this many agents; None if one is."""
        if self.crowding and agents != self.agents:
            return SHARED_TOOLS
        if self.fit is not None and self.fit.is_alone and agents > self.agents:
            return "no replica ever served two turns at once, so it cannot be told how one slows down"
        if agents > self.most_agents * 1.0001:
            return f"that is beyond twice the load seen; run more than {self.agents:.0f} agents to know"
        return None

    @property
    def crowding(self) -> float:
        """The exponent by which think time grows with the agents that think."""
        return self.think.crowding if self.think else 0.0

    @property
    def evicting(self) -> str | None:
        """Why no prediction is made for any other load; None if contexts fit into the KV cache."""
        if self.kv is None or self.agents <= self.kv[0]:
            return None
        return "contexts are evicted at this load, and how replicas do when others fit, the fit cannot tell"

    def what_if(
        self, name: str, agents: float, think: float = 1.0, change: Callable[[Any], Any] = lambda fleet: fleet
    ) -> dict[str, Any]:
        """Throughput with so many agents, a share ``think`` of the think time and a changed fleet, and the gain."""
        import numpy as np

        reason = self.few or self.reason or self.evicting or self.beyond(agents)
        if self.crowding and think != 1:
            reason = SHARED_TOOLS
        if reason is None and self.kv is not None and self.agents < agents and agents > self.kv[0]:
            reason = f"the contexts of {agents:.0f} agents would not fit into the KV cache"
        if reason is not None or agents == 0:
            rate, share = (estimate(unit, self.basis, None, reason=reason) for unit in ("turns/h", "fraction"))
            return {"name": name, "turns_per_hour": rate, "change": share}
        gain, gains = (
            np.squeeze(change(fleet).thinking(think).throughput(agents) / fleet.throughput(self.agents))
            for fleet in self.fleets
        )
        rate, rates = (3600 * model.throughput(self.agents) for model in (self.model, self.draws))
        rate = estimate("turns/h", self.basis, float(rate * gain), rates * gains)
        share = estimate("fraction", self.basis, float(gain) - 1, (gains - 1) * self.doubt)
        return {"name": name, "turns_per_hour": rate, "change": share}

    def what_ifs(self) -> list[dict[str, Any]]:
        half = 1 - 0.5 * (self.think.observing_share if self.think else 0.0)
        return [
            self.what_if("+1 replica", self.agents, change=lambda fleet: fleet.with_replica()),
            self.what_if("half the observation time", self.agents, half),
            self.what_if("+25 % agents", 1.25 * self.agents),
            self.what_if("−25 % agents", 0.75 * self.agents),
        ]

    def curve(self) -> list[dict[str, Any]]:
        """Points of X(N), up to the highest N that can be predicted and is of interest."""
        import numpy as np

        base = self.told("s", lambda model: model.base_s, self.evicting)
        if base.value is None or self.fit is None or self.fit.is_alone:
            return []
        most = min(self.most_agents, max(2 * self.agents, 1.5 * float(self.model.knee)))
        points = np.unique(np.round(np.linspace(1, max(1.0, most), MAX_CURVE_POINTS)))
        rates = self.model.throughput(points), *np.quantile(self.draws.throughput(points[:, None]), _BOUNDS, axis=1)
        rows = zip(points, *(3600 * rate for rate in rates), strict=True)
        return [
            dict(zip(("agents", "turns_per_hour", "low", "high"), (int(at), *map(significant, row)), strict=True))
            for at, *row in rows
        ]


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _signed(share: float) -> str:
    return f"{100 * share:+.0f}".replace("-", "−")


def change_in_words(change: Estimate) -> str:
    """``+38 %``, without a point ``+31 to +44 %``; empty if unknown."""
    if change.low is None or change.high is None:
        return ""
    low, high = _signed(change.low), _signed(change.high)
    if change.value is not None:
        return f"{_signed(change.value)} %"
    return f"{low} %" if low == high else f"{low} to {high} %"


def in_words(what: Mapping[str, Any], with_range: bool = False) -> str:
    """``+1 replica → +38 % turns/h [31, 44]``; empty if the change is unknown."""
    change: Estimate = what["change"]
    if not (words := change_in_words(change)):
        return ""
    words = f"{what['name']} → {words}"
    if change.value is None or change.low is None or change.high is None:
        return f"{words} turns/h"
    low, high = (_signed(bound).lstrip("+") for bound in (change.low, change.high))
    return f"{words} turns/h [{low}, {high}]" if with_range else words


def capacity_models(
    replicas: int, fit: ServiceFit | None, think: ThinkFit | None, parallel: float, slots: int | None
) -> tuple[CapacityModel, CapacityModel]:
    """The models of the estimates and of their draws. Without a fit, A and B are placeholders: don't use them."""
    import numpy as np

    zeros, limit = np.zeros(RESAMPLES), float(slots) if slots else math.inf
    base, slope = (fit.base_s, fit.per_request_s) if fit else (1.0, 0.0)
    bases, slopes = (fit.base_draws, fit.per_request_draws) if fit else (zeros + 1, zeros)
    point = CapacityModel(replicas, base, slope, think.mean_s if think else 0.0, parallel, limit)
    return point, CapacityModel(replicas, bases, slopes, think.draws if think else zeros, parallel, limit)


def fleets(model: CapacityModel, draws: CapacityModel, fit: ServiceFit | None, moves: float) -> tuple[Any, Any]:
    """What changes are predicted with: ``model`` and ``draws``, or an UnequalFleet of each if replicas differ.

    ``moves`` is the share of turns that go to another replica than the session's last.
    """
    import numpy as np

    if fit is None or not any(factor != 1 for factor, _, _ in fit.lately.values()):
        return model, draws
    speeds, shares, answers = np.array([*fit.lately.values()]).T[:, :, None]
    homes = shares * (model.think_s + answers / model.parallel)
    moves = min(1.0, moves * len(speeds) / max(1, len(speeds) - 1))  # a turn that goes to any may stay, too
    base, slope = fit.factors
    point, drawn = (
        replace(fleet, base_s=fleet.base_s / base, per_request_s=fleet.per_request_s / slope)
        for fleet in (model, draws)
    )
    return UnequalFleet(point, speeds, shares, homes, moves), UnequalFleet(drawn, speeds, shares, homes, moves)


def misfit(predicted: Array, turns: Array) -> float:
    """Relative error of the turns predicted for earlier windows, beyond what counting explains: at least LEAST_MISFIT.

    A few windows don't count if they are far off: a run that has just begun isn't settled.
    """
    import numpy as np

    squares = np.log(predicted / np.maximum(turns, 1.0)) ** 2
    typical = min(np.mean(squares), np.median(squares) / 0.455)  # the median of χ² with one degree of freedom
    return max(LEAST_MISFIT, math.sqrt(max(typical - np.mean(0.5 / np.maximum(turns, 1.0)), 0.0)))


def widened(model: CapacityModel, draws: CapacityModel, agents: float, error: float) -> CapacityModel:
    """Draws of A, B and Z spread so that those of X are off by ``error`` besides what resampling explains.

    Resampled fits differ by what turns happened; they agree on what the model leaves out.
    """
    import numpy as np

    rate = draws.throughput(agents)
    spread = max(float(np.std(rate) / np.mean(rate)), EPSILON)
    factor = min(math.hypot(spread, error) / spread, 10.0)
    names = ("base_s", "per_request_s", "think_s")
    both = [(getattr(model, name), getattr(draws, name)) for name in names]
    spread_out = [np.maximum(value + factor * (drawn - value), 0.1 * value) for value, drawn in both]
    return replace(draws, **dict(zip(names, spread_out, strict=True)))
