"""The parameters of the capacity model, fitted to measured turns. Pure."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent_infra_core.insight.capacity import EPSILON, FULL, RESAMPLES, Array
from agent_infra_core.insight.statistics import (
    STEP_RATIO,
    change_point,
    interval_widening,
    last_of_each,
    resample_counts,
)

if TYPE_CHECKING:
    from agent_infra_core.insight.measure import Beginnings, Measured, Operating

MAX_SILENCES = 8000  # think times used to fit Z; with more, only every second, third, … session is used
THINK_RESAMPLES = 40  # of which the deviation is taken, on a logarithmic scale
SLOW_FACTOR = 1.2  # a replica is as fast as the others unless it differs by more, and by SURE_ERRORS standard errors
SURE_ERRORS = 6.0
LEAST_SPEED_TURNS = 20  # of a replica before its speed is judged
ABANDONED = 0.01  # share of silences that never end where sessions report their end: agents that die
LEAST_CROWDING = 0.25  # exponent that shows shared tools, if it is CROWDING_ERRORS standard errors from 0 as well
CROWDING_ERRORS = 4.0
QUIET_S = 60.0  # a session silent for longer may have been abandoned
BINS = 65  # of durations, in which the cure model is fitted
ONE_KIND, TWO_KINDS = (1.0,), (0.5, 4.0)  # of think times, with the means to begin with
LIKELIER = 5.0  # difference of logarithms from which there are two kinds
CURE_ERROR = 0.06  # standard error of its mean think time beside that of resampling, as a share
REPORTING = 0.1  # reported ends, as a share of the quiet sessions, which show that clients report them


@dataclass
class ServiceFit:
    """R(n) = A + B·n of the fleet as it is: the estimates of A and B and their resampled draws, in seconds."""

    base_s: float
    per_request_s: float
    base_draws: Array
    per_request_draws: Array
    most_in_flight: float  # 99th percentile of the turns in flight
    is_alone: bool  # no replica ever served two turns at once, so B is unknown
    factors: tuple[float, float]  # by which A and B of the fleet exceed those of a replica of speed 1
    lately: Mapping[str, tuple[float, float, float]]  # replica → its speed factor, share of the turns, mean answer in s
    changes: Mapping[str, float]  # replica → when its speed changed, if it did
    reason: str | None = None  # why B can't be determined

    def at_full_slots(self, here: Operating, replicas: int, slots: int | None) -> ServiceFit:
        """The fit if B can't be determined but isn't needed: with every slot taken, R follows from X = k·c / R."""
        if self.reason is None or not slots or here.full < FULL:
            return self
        answer, answers = (slots * replicas / per_s for per_s in (here.per_s, here.per_s_draws))
        return dataclasses.replace(
            self, base_s=answer, base_draws=answers, per_request_s=0.0, per_request_draws=0 * answers, reason=None
        )


@dataclass
class Regression:
    """The weighted regression of ``seconds / speed`` on ``design``."""

    design: Array
    weight: Array
    found: Array  # coefficients
    speed: Array  # factor of each turn's replica
    off: Array  # relative error of each turn


def _design(rows: Measured) -> Array:
    """The regressors: 1, answer length, in flight x length, turns that began, excess context x length."""
    import numpy as np

    size = rows.size
    return np.stack([np.ones(len(size)), size - 1, size * rows.in_flight, rows.began, size * rows.excess], axis=1)


def _solve(design: Array, seconds: Array, weight: Array) -> Array:
    import numpy as np

    scaled = design * weight[:, None]
    return np.linalg.pinv(scaled.T @ design, rcond=1e-9, hermitian=True) @ (scaled.T @ seconds)


def _speeds(design: Array, seconds: Array, weight: Array, base: Array, deviation: float, replica: Array) -> Array:
    """The speed factor of each replica relative to the lower median; 1 unless it differs for sure.

    One Gauss-Newton step of R = f·(A + B·n + …) from f = 1: a regressor ``base`` for each replica but the one with most
    turns is eliminated from the normal equations. Fitting A, B and f together tells a slow replica from one with more
    turns in flight.
    """
    import numpy as np

    count = int(replica.max()) + 1
    number = np.bincount(replica)
    own = np.maximum(np.bincount(replica, weight * base**2), EPSILON)
    cross = np.stack([np.bincount(replica, weight * base * column) for column in design.T], axis=1)
    total = np.bincount(replica, weight * base * seconds)
    cross[number.argmax()] = total[number.argmax()] = 0.0
    scaled = design * weight[:, None]
    inverse = np.linalg.pinv(scaled.T @ design - (cross / own[:, None]).T @ cross, rcond=1e-9, hermitian=True)
    found = inverse @ (scaled.T @ seconds - cross.T @ (total / own))
    gain = (total - cross @ found) / own
    error = deviation * np.sqrt(1 / own + np.einsum("ri,ij,rj->r", cross, inverse, cross) / own**2)
    known = number >= LEAST_SPEED_TURNS
    if known.sum() < 2:
        return np.ones(count)
    factor = np.maximum(1 + gain, 0.1)
    factor = factor / np.sort(factor[known])[(known.sum() - 1) // 2]
    is_sure = np.abs(np.log(factor)) > np.maximum(math.log(SLOW_FACTOR), SURE_ERRORS * error)
    return np.where(known & is_sure, factor, 1.0)


def regress(rows: Measured, beginnings: list[Beginnings], replica: Array) -> Regression:
    """The last of four passes; each pass needs the result of the one before.

    Weights are 1/R², because errors are proportional to R. Rows off by more than five deviations (1.48 times the
    median absolute deviation) are dropped. Turns that began are counted over the time that the turn should have taken,
    since the time it did take would count a turn's own bad luck as its cause. ``replica`` numbers the first rows; the
    rows after them are remembered ones, which don't change and were divided by their replica's speed.
    """
    import numpy as np

    now, typical = len(replica), np.median(rows.seconds)
    expected, weight, speed = rows.seconds * 0 + typical, np.ones(len(rows.seconds)), np.ones(len(rows.seconds))
    for _ in range(4):
        last = rows.begin[:now] + expected[:now]
        for index, began in enumerate(beginnings):
            here = np.flatnonzero(replica == index)
            rows.began[here] = began.between(rows.begin[here], last[here])
        design, seconds = _design(rows), rows.seconds / speed
        found = _solve(design, seconds, weight)
        base = np.maximum(design @ found, 0.05 * typical)
        off = (seconds - base) / base
        deviation = 1.4826 * np.median(np.abs(off - np.median(off)))
        if len(beginnings) > 1 and now:
            factors = _speeds(design[:now], rows.seconds[:now], weight[:now], base[:now], deviation * typical, replica)
            speed[:now] = factors[replica]
        expected = base * speed
        off = (rows.seconds - expected) / expected
        weight = (np.abs(off) <= 5 * deviation + 1e-6) * (typical / base) ** 2
    return Regression(design, weight, _solve(design, rows.seconds / speed, weight), speed, off)


def _speed_changes(rows: Measured, off: Array, replica: Array, names: Sequence[str]) -> dict[str, float]:
    """When each replica last became faster or slower, where it did."""
    import numpy as np

    found = {}
    for index, name in enumerate(names):
        here = np.flatnonzero(replica == index)[-500:]
        if (at := change_point(np.log(np.maximum(1 + off[here], 0.05)), math.log(STEP_RATIO))) is not None:
            found[name] = float(rows.begin[here[at]])
    return found


def _resampled(fit: Regression, rows: Measured, rng: Any) -> tuple[Array, Array]:
    """The coefficients, and the mean duration, of each resampling of the blocks."""
    import numpy as np

    _, block = np.unique(rows.block, return_inverse=True)
    blocks, design = int(block.max()) + 1, fit.design
    moments, totals = np.zeros((blocks, 5, 5)), np.zeros((blocks, 5))
    np.add.at(moments, block, fit.weight[:, None, None] * design[:, :, None] * design[:, None, :])
    np.add.at(totals, block, (fit.weight * rows.seconds / fit.speed)[:, None] * design)
    counts = resample_counts(blocks, rng)
    left = np.tensordot(counts, moments, 1)
    drawn = (np.linalg.pinv(left, rcond=1e-9, hermitian=True) @ (counts @ totals)[:, :, None])[:, :, 0]
    drawn = fit.found + interval_widening(blocks, 5) * (drawn - fit.found)
    return drawn, (counts @ np.bincount(block, rows.seconds)) / (counts @ np.bincount(block))


def fit_service(
    rows: Measured, beginnings: list[Beginnings], replica: Array, names: Sequence[str], since: float, rng: Any
) -> ServiceFit:
    """Regress the turns' durations on the turns in flight; draws come from resampled blocks of turns.

    Blocks are used because turns are correlated: Künsch 1989, "The jackknife and the bootstrap for general stationary
    observations"; Cameron, Gelbach & Miller 2008 for clusters. B is the cost of a turn's presence (the in-flight
    regressor) plus the cost of its beginning (on average, each turn in flight sees as many begin as are in flight).
    These differ: one is decoding, the other prefilling. The excess-context regressor absorbs the cost of long
    neighbours. Without it, this cost would look like an effect of many neighbours, because slow turns pile up.

    A and B of the fleet are those of a replica of speed 1, times the mean speed factor of the turns since ``since``,
    for B weighted by the turns in flight: so they hold for the way in which turns are routed now.
    """
    import numpy as np

    low, high = np.quantile(rows.in_flight, [0.05, 0.95])
    fit = regress(rows, beginnings, replica)
    drawn, means = _resampled(fit, rows, rng)
    is_alone = bool(high <= 1.2)
    reason = None
    if not is_alone and high - low < 0.25 + 0.05 * high:
        reason = (
            f"the load hardly varied ({low:.1f} to {high:.1f} turns in flight on a replica), so it cannot be told how "
            "one slows down under more; run half the agents for a minute"
        )
    now = len(replica)
    recent = np.flatnonzero(rows.begin[:now] >= since)
    recent = recent if len(recent) else np.arange(now)
    speed, crowd = fit.speed[recent], rows.in_flight[recent]
    base_factor, slope_factor = (speed.mean(), speed @ crowd / crowd.sum()) if now else (1.0, 1.0)
    seconds, own = rows.seconds[recent], [(name, replica[recent] == index) for index, name in enumerate(names)]
    slope, slopes, mean = fit.found[2] + fit.found[3], drawn[:, 2] + drawn[:, 3], rows.seconds.mean()
    return ServiceFit(
        base_s=mean if is_alone else max(base_factor * fit.found[0], mean / 100),
        per_request_s=0.0 if is_alone else max(slope_factor * slope, 0.0),
        base_draws=means if is_alone else np.maximum(base_factor * drawn[:, 0], mean / 100),
        per_request_draws=np.zeros(RESAMPLES) if is_alone else np.maximum(slope_factor * slopes, 0.0),
        most_in_flight=float(np.quantile(rows.in_flight, 0.99)),
        is_alone=is_alone,
        factors=(float(base_factor), float(slope_factor)),
        lately={name: (speed[here][-1], here.mean(), seconds[here].mean()) for name, here in own if here.any()},
        changes=_speed_changes(rows, fit.off, replica, names),
        reason=reason,
    )


@dataclass
class ThinkFit:
    """Z: mean think time per turn and its resampled draws, in seconds, and what to expect of a silent session."""

    mean_s: float
    error: float  # standard error, as a share
    draws: Array
    observing_share: float  # share of ``pre`` in the think time
    crowding: float  # how think time grows with the agents that think, as an exponent; 0 unless it does for sure
    ends_reported: bool
    is_guessed: bool  # which silent sessions were abandoned: ends aren't reported, and some think times are long
    left: float  # share of silences that never end because the session was abandoned
    durations: Sequence[float]  # ascending
    surviving: Sequence[float]  # share of the other silences that last longer than each duration

    def presence(self, silent_s: float) -> float:
        """Probability that a session silent for this long is thinking and hasn't been abandoned."""
        index = bisect.bisect_right(self.durations, silent_s) - 1
        lasting = self.surviving[index] if index >= 0 else 1.0
        if index == len(self.durations) - 1:  # longer than any: as rare as one more than was seen, and rarer
            lasting = max(lasting, (self.durations[-1] / silent_s) ** 2 / (len(self.durations) + 1))
        lasting *= 1 - self.left
        return lasting / (lasting + self.left)


def silences(turns: Array, since: float, until: float, ended: Array) -> tuple[Array, Array, Array]:
    """``(seconds, is over, session)`` of think times that began in [since, until].

    Think times that aren't over count up to ``until``. Without them, a short window would have only short think times.
    """
    import numpy as np

    names = np.unique(turns["session"][turns["session"] != 0])
    named = turns[np.isin(turns["session"], names[:: math.ceil(len(turns) / MAX_SILENCES) or 1])]
    named = named[named["arrived"] <= until]
    over = named[named["arrived"] - named["think_s"] >= since]
    last = named[last_of_each(named["session"])] if len(named) else named
    going = last[(last["end"] >= since) & (last["end"] <= until) & ~np.isin(last["session"], ended)]
    return (
        np.concatenate([over["think_s"], until - going["end"]]),
        np.repeat([1.0, 0.0], [len(over), len(going)]),
        np.concatenate([over["session"], going["session"]]),
    )


def _mixture(time: Array, ended: Array, going: Array, parts: Sequence[float]) -> tuple[Array, Array, float]:
    """``(weights, means, log-likelihood of the first row)`` of as many exponential distributions as ``parts``, by
    expectation maximisation; the silences that never end have the rest of the weight.

    ``ended`` and ``going`` are the numbers of silences of each ``time``, a row per resampling. ``parts`` are the means
    to begin with, as factors of the mean silence.
    """
    import numpy as np

    mean = np.maximum(ended @ time / np.maximum(ended.sum(axis=2), EPSILON), 1e-3)
    scale, number = mean[:, :, None] * np.array(parts)[:, None], (ended + going).sum(axis=2, keepdims=True)
    weight = np.full(scale.shape, 0.95 / len(parts))
    for _ in range(100):
        lasting = weight * np.exp(-time / scale)
        ending, staying = (part.sum(axis=1, keepdims=True) for part in (lasting / scale, lasting))
        staying = staying + 1 - weight.sum(axis=1, keepdims=True)
        done = ended * lasting / scale / np.maximum(ending, 1e-300)
        whole = done + going * lasting / staying
        weight = whole.sum(axis=2, keepdims=True) / number
        weight = weight / np.maximum(weight.sum(axis=1, keepdims=True) / 0.999, 1.0)
        scale = np.maximum((whole @ time)[:, :, None] / np.maximum(done.sum(axis=2, keepdims=True), EPSILON), 1e-3)
    return weight, scale, float((ended * np.log(np.maximum(ending, 1e-300)) + going * np.log(staying))[0].sum())


def _cure_model(durations: Array, over: Array, counts: Array) -> tuple[Array, float, Array, bool]:
    """The mean of think times that end, for each row of ``counts``; the share of silences that never end, because the
    session was abandoned; the share of the others that last longer than each duration; whether there are long ones.

    A cure model (Berkson & Gage 1952) with exponential think times. They are a mixture of short and long ones where
    that is much more likely, so that long tool calls aren't taken for abandoned sessions. ``durations`` ascend;
    ``counts`` has a column for each.
    """
    import numpy as np

    edges = np.geomspace(max(durations[0], 1e-3), durations[-1], BINS)
    starts = np.unique(np.searchsorted(durations, edges))[:-1] if durations[-1] > durations[0] else np.zeros(1, int)
    number = np.diff(np.append(starts, len(durations)))
    time = np.maximum(np.add.reduceat(durations, starts) / number, 1e-3)
    ended, going = (np.add.reduceat(counts * part, starts, axis=1)[:, None] for part in (over, 1 - over))
    single, double = (_mixture(time, ended[:1], going[:1], parts) for parts in (ONE_KIND, TWO_KINDS))
    has_long = double[2] > single[2] + LIKELIER
    weight, scale, _ = _mixture(time, ended, going, TWO_KINDS if has_long else ONE_KIND)
    alive = weight.sum(axis=1)
    surviving = (weight[0] * np.exp(-durations / scale[0])).sum(axis=0) / alive[0, 0]
    return ((weight * scale).sum(axis=1) / alive)[:, 0], float(1 - alive[0, 0]), surviving, has_long


def _crowding(known: Array) -> float:
    """The exponent by which think time grows with the agents that think at its beginning; 0 unless it does for sure.

    Agents that don't share anything give 0, those that queue for the same machines up to 1. ``known`` are turns with a
    think time. Those that began lately are left out: of them, only the short ones are over, while the crowd grows.
    """
    import numpy as np

    end, seconds = known["arrived"], known["think_s"]
    begin = end - seconds
    crowd = np.searchsorted(np.sort(begin), begin) - np.searchsorted(np.sort(end), begin)
    settled = begin <= end.max(initial=0.0) - np.quantile(seconds, 0.9) if len(known) else begin > 0
    if settled.sum() < 100:
        return 0.0
    x, y = np.log(np.maximum(crowd, 1.0))[settled], np.log(np.maximum(seconds, 1e-3))[settled]
    x, y = x - x.mean(), y - y.mean()
    slope = float(x @ y / max(float(x @ x), EPSILON))
    error = float(np.std(y - slope * x)) / math.sqrt(max(float(x @ x), EPSILON))
    return min(slope, 1.0) if slope > max(LEAST_CROWDING, CROWDING_ERRORS * error) else 0.0


def _thinking_share(turns: Array, since: float, until: float, ends: float) -> float:
    """Share of turns that have a think time, once as many sessions begin as end: steps per turn, less ends per step.

    Early in a run most turns are the first of their session, which says nothing of how many will be.
    """
    import numpy as np

    own = turns[(turns["session"] != 0) & (turns["begin"] >= since) & (turns["begin"] <= until)]
    is_first = np.isnan(own["think_s"])
    steps = (~is_first).sum() + len(np.unique(own["session"][is_first]))
    return float(min(1.0, steps / max(1, len(own))) * (1 - min(0.95, ends / max(1, steps))))


def _observing_share(turns: Array) -> float:
    """Share of ``pre`` in the think time; 1 if no client split it."""
    import numpy as np

    known = turns[np.isfinite(turns["pre_s"]) & (turns["think_s"] > 0)]
    return float(np.minimum(known["pre_s"], known["think_s"]).sum() / known["think_s"].sum()) if len(known) else 1.0


def _kaplan_meier(durations: Array, over: Array, weight: Array) -> tuple[Array, Array]:
    """The mean for each row of ``weight``, and the share that lasts longer than each duration for the first.

    Kaplan & Meier 1958, "Nonparametric estimation from incomplete observations".
    """
    import numpy as np

    at_risk = np.cumsum(weight[:, ::-1], axis=1)[:, ::-1]
    ending = np.where(at_risk > 0, weight * over / np.maximum(at_risk, EPSILON), 0.0)
    surviving = np.cumprod(1 - ending, axis=1)
    drop = np.hstack([np.ones((len(weight), 1)), surviving[:, :-1]]) * ending
    # Beyond the longest duration observed, think times are assumed to end at the rate of the longer half.
    half = durations[-1] / 2
    beyond = (weight @ np.maximum(durations - half, 0.0)) / np.maximum(weight @ (over * (durations > half)), 1.0)
    return drop @ durations + surviving[:, -1] * (durations[-1] + beyond), surviving[0]


def fit_think(
    turns: Array, since: float, until: float, ended: Mapping[int, float], presence: Callable[[float], float], rng: Any
) -> ThinkFit | None:
    """Mean think time per turn, from the mean think time and _thinking_share; None with fewer than two think times.

    A silence that lasts to the end of the data may never end. Where sessions report their end, it counts with the
    probability ``presence(seconds)`` that it does, in Kaplan & Meier's mean; otherwise a cure model says.
    """
    import numpy as np

    known_ends = np.fromiter(ended, dtype=int, count=len(ended))
    seconds, over, sessions = silences(turns, since, until, known_ends)
    if over.sum() < 2:
        return None
    order = np.argsort(seconds, kind="stable")
    durations, over, block = seconds[order], over[order], np.unique(sessions, return_inverse=True)[1][order]
    named = np.unique(turns["session"][turns["session"] != 0])
    reported = named[np.isin(named, known_ends)].tolist()
    quiet = ((over == 0) & (durations > QUIET_S)).sum()
    weight = resample_counts(int(block.max()) + 1, rng, THINK_RESAMPLES)
    weight = np.vstack([np.ones(weight.shape[1]), weight])[:, block]
    left, is_guessed, error = ABANDONED, False, 0.0
    if ends_reported := len(reported) >= max(1, REPORTING * quiet):
        alive = np.array([1.0 if done else presence(s) for s, done in zip(durations, over, strict=True)])
        means, surviving = _kaplan_meier(durations, over, weight * alive)
        ends = float(sum(since <= ended[name] <= until for name in reported))
    else:
        means, left, surviving, is_guessed = _cure_model(durations, over, weight)
        ends, error = left * len(seconds) * len(named) / len(np.unique(sessions)), CURE_ERROR
    mean = float(means[0]) * _thinking_share(turns, since, until, ends)
    error = math.hypot(error, interval_widening(block.max() + 1, 1) * float(np.std(np.log(means[1:] / means[0]))))
    return ThinkFit(
        mean_s=mean,
        error=error,
        draws=mean * np.exp(error * rng.standard_normal(RESAMPLES)),
        observing_share=_observing_share(turns),
        crowding=_crowding(turns[turns["arrived"] - turns["think_s"] >= since]),
        ends_reported=bool(ends_reported),
        is_guessed=is_guessed,
        left=left,
        durations=durations.tolist(),
        surviving=surviving.tolist(),
    )
