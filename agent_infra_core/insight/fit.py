"""The parameters of the capacity model, fitted to measured turns. Pure."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent_infra_core.insight.capacity import EPSILON, RESAMPLES, Array

if TYPE_CHECKING:
    from agent_infra_core.insight.measure import Beginnings, Measured, ObservedTurn

MAX_SILENCES = 1200  # think times used to fit Z; with more, only every second, third, … session is used


@dataclass
class ServiceFit:
    """R(n) = A + B·n: the estimates of A and B and their resampled draws, in seconds."""

    base_s: float
    per_request_s: float
    base_draws: Array
    per_request_draws: Array
    turns: int
    most_in_flight: float  # 99th percentile of the turns in flight
    is_alone: bool  # no replica ever served two turns at once, so B is unknown
    reason: str | None = None  # why B can't be determined


def _solve(design: Array, seconds: Array, weight: Array) -> Array:
    import numpy as np

    scale = np.sqrt(weight)
    return np.linalg.lstsq(design * scale[:, None], seconds * scale, rcond=1e-9)[0]


def _design(rows: Measured, in_flight: Array) -> Array:
    """The regressors: 1, answer length, in flight x length, turns that began, excess context x length."""
    import numpy as np

    size = rows.size
    return np.stack([np.ones(len(size)), size - 1, size * in_flight, rows.began, size * rows.excess], axis=1)


def regress(rows: Measured, beginnings: list[Beginnings], replica: Array) -> tuple[Array, Array, Array]:
    """``(design, weights, coefficients)`` of the last of four passes; each pass needs the result of the one before.

    Weights are 1/R², because errors are proportional to R. Rows off by more than five deviations (1.48 times the
    median absolute deviation) are dropped. Two regressors depend on the fit. The in-flight count is weighted by the
    speed at which the turn progressed (to second order). Turns that began are counted over the time that the turn
    should have taken, since the time it did take would count a turn's own bad luck as its cause. ``replica`` numbers
    the first rows; the rows after them are remembered ones, which don't change.
    """
    import numpy as np

    now = len(replica)
    typical = np.median(rows.seconds)
    expected, weight, in_flight = rows.seconds * 0 + typical, np.ones(len(rows.seconds)), rows.in_flight
    for _ in range(4):
        last = rows.begin[:now] + expected[:now]
        for index, began in enumerate(beginnings):
            here = np.flatnonzero(replica == index)
            rows.began[here] = began.between(rows.begin[here], last[here])
        design = _design(rows, in_flight)
        found = _solve(design, rows.seconds, weight)
        expected = np.maximum(design @ found, 0.05 * typical)
        off = (rows.seconds - expected) / expected
        deviation = 1.4826 * np.median(np.abs(off - np.median(off)))
        weight = (np.abs(off) <= 5 * deviation + 1e-6) * (typical / expected) ** 2
        slope = max(0.0, found[2])
        in_flight = rows.in_flight - slope * rows.variance / np.maximum(found[0] + slope * rows.in_flight, typical / 10)
    return design, weight, found


def resample_counts(blocks: int, rng: Any) -> Array:
    """How often each block is drawn in each of RESAMPLES resamplings."""
    import numpy as np

    return rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=RESAMPLES).astype(float)


def interval_widening(blocks: int, unknowns: int) -> float:
    """Factor that corrects resampled deviations, which are too small for few blocks (Student's t, not normal)."""
    free = max(1.0, blocks - unknowns)
    return math.sqrt(blocks / max(1.0, blocks - 1)) * (1 + 0.93 / free)


def fit_service(rows: Measured, beginnings: list[Beginnings], replica: Array, rng: Any) -> ServiceFit:
    """Regress the turns' durations on the turns in flight; draws come from resampled blocks of turns.

    Blocks are used because turns are correlated: Künsch 1989, "The jackknife and the bootstrap for general stationary
    observations"; Cameron, Gelbach & Miller 2008 for clusters. B is the cost of a turn's presence (the in-flight
    regressor) plus the cost of its beginning (on average, each turn in flight sees as many begin as are in flight).
    These differ: one is decoding, the other prefilling. The excess-context regressor absorbs the cost of long
    neighbours. Without it, this cost would look like an effect of many neighbours, because slow turns pile up.
    """
    import numpy as np

    low, high = np.quantile(rows.in_flight, [0.05, 0.95])
    design, weight, found = regress(rows, beginnings, replica)
    _, block = np.unique(rows.block, return_inverse=True)
    blocks = int(block.max()) + 1
    moments = np.zeros((blocks, 5, 5))
    totals = np.zeros((blocks, 5))
    np.add.at(moments, block, weight[:, None, None] * design[:, :, None] * design[:, None, :])
    np.add.at(totals, block, (weight * rows.seconds)[:, None] * design)
    counts = resample_counts(blocks, rng)
    sums = counts @ np.stack([np.bincount(block), np.bincount(block, rows.seconds)], axis=1)
    left = np.tensordot(counts, moments, 1)
    drawn = (np.linalg.pinv(left, rcond=1e-9, hermitian=True) @ (counts @ totals)[:, :, None])[:, :, 0]
    drawn = found + interval_widening(blocks, 5) * (drawn - found)
    is_alone = bool(high <= 1.2)
    reason = None
    if not is_alone and high - low < 0.25 + 0.05 * high:
        reason = (
            f"the load hardly varied ({low:.1f} to {high:.1f} turns in flight on a replica), so it cannot be told how "
            "one slows down under more; run half the agents for a minute"
        )
    slope, slopes = found[2] + found[3], drawn[:, 2] + drawn[:, 3]
    mean = rows.seconds.mean()
    return ServiceFit(
        base_s=mean if is_alone else max(found[0], mean / 100),
        per_request_s=0.0 if is_alone else max(slope, 0.0),
        base_draws=sums[:, 1] / sums[:, 0] if is_alone else np.maximum(drawn[:, 0], mean / 100),
        per_request_draws=np.zeros(RESAMPLES) if is_alone else np.maximum(slopes, 0.0),
        turns=len(rows.seconds),
        most_in_flight=float(np.quantile(rows.in_flight, 0.99)),
        is_alone=is_alone,
        reason=reason,
    )


@dataclass
class ThinkFit:
    """Z: mean think time and its resampled draws, in seconds, and what to expect of a silent session."""

    mean_s: float
    draws: Array
    turns: int
    observing_share: float  # share of ``pre`` in the think time
    left: float  # share of silences that never end because the session was abandoned
    durations: Sequence[float]  # ascending
    surviving: Sequence[float]  # share of the other silences that last longer than each duration

    def presence(self, silent_s: float) -> float:
        """Probability that a session silent for this long is thinking and hasn't been abandoned."""
        index = bisect.bisect_right(self.durations, silent_s) - 1
        lasting = (1 - self.left) * (self.surviving[index] if index >= 0 else 1.0)
        return lasting / (lasting + self.left)


def every_nth(turns: Sequence[ObservedTurn]) -> Iterable[str]:
    """Names of every n-th session; together they have about MAX_SILENCES turns."""
    names = sorted({turn.session for turn in turns if turn.session is not None})
    return names[:: math.ceil(len(turns) / MAX_SILENCES) or 1]


def silences(
    turns: Sequence[ObservedTurn], since: float, until: float, ended: Mapping[str, float]
) -> tuple[list[float], list[bool], list[str]]:
    """``(seconds, is over, session)`` lists of think times that began in [since, until].

    Think times that aren't over count up to ``until``. Without them, a short window would have only short think times.
    """
    seconds, is_over, sessions = [], [], []
    last: dict[str, tuple[float, float]] = {}  # session → end of its latest turn, arrival of the one after
    chosen = set(every_nth(turns))
    for turn in turns:
        if turn.session is None or turn.session not in chosen:
            continue
        if turn.think_s is not None and since <= turn.arrived - turn.think_s and turn.arrived <= until:
            seconds.append(turn.think_s)
            is_over.append(True)
            sessions.append(turn.session)
        if turn.arrived <= until:
            last[turn.session] = turn.begin, turn.end
    for session, (_, end) in last.items():
        if since <= end <= until and session not in ended:
            seconds.append(until - end)
            is_over.append(False)
            sessions.append(session)
    return seconds, is_over, sessions


def _returning(durations: Array, over: Array, counts: Array) -> tuple[Array, float]:
    """Probability that each silence will end, for each row of ``counts``, and the share of silences that won't.

    A cure model (Berkson & Gage 1952) with exponential think times, fitted by expectation maximisation. ``counts`` has
    a column for each silence.
    """
    import numpy as np

    going = np.flatnonzero(over == 0)
    weight, lasting = counts[:, going], durations[going]
    ended = np.maximum(counts @ over, 1.0)
    total = counts @ (durations * over)
    mean, left = np.maximum(total / ended, EPSILON), np.full(len(counts), 0.05)
    alive = np.ones(weight.shape)
    for _ in range(20):
        alive = (1 - left)[:, None] * np.exp(-lasting / mean[:, None])
        alive /= alive + left[:, None]
        mean = np.maximum((total + (weight * alive) @ lasting) / ended, EPSILON)
        left = np.clip((weight * (1 - alive)).sum(axis=1) / counts.sum(axis=1), 1e-3, 0.5)
    returning = np.ones(counts.shape)
    returning[:, going] = alive
    return returning, float(left[0])


def fit_think(
    turns: Sequence[ObservedTurn], since: float, until: float, ended: Mapping[str, float], rng: Any
) -> ThinkFit | None:
    """Mean think time after Kaplan & Meier (1958, "Nonparametric estimation from incomplete observations").

    A silence that lasts to the end of the data may never end; it is weighted by the probability that it does.
    Resampling is by session, since an agent's think times are similar; with fewer than 20 sessions, by stretches of
    ten think times. None with fewer than two complete think times.
    """
    import numpy as np

    seconds, is_over, sessions = silences(turns, since, until, ended)
    if sum(is_over) < 2:
        return None
    order = np.argsort(seconds, kind="stable")
    durations, over = np.array(seconds)[order], np.array(is_over, dtype=float)[order]
    seen: dict[str, int] = {}
    clusters: dict[tuple[str, int], int] = {}
    length = 10 if len(set(sessions)) < 20 else len(sessions)
    block = []
    for session in sessions:
        seen[session] = seen.get(session, 0) + 1
        block.append(clusters.setdefault((session, (seen[session] - 1) // length), len(clusters)))
    counts = np.vstack([np.ones(len(clusters)), resample_counts(len(clusters), rng)])
    weight = counts[:, np.array(block)[order]]
    returning, left = _returning(durations, over, weight)
    weight = weight * returning
    at_risk = np.cumsum(weight[:, ::-1], axis=1)[:, ::-1]
    ending = np.where(at_risk > 0, weight * over / np.maximum(at_risk, EPSILON), 0.0)
    surviving = np.cumprod(1 - ending, axis=1)
    drop = np.hstack([np.ones((len(counts), 1)), surviving[:, :-1]]) * ending
    exposure = (weight @ durations) / np.maximum(weight @ over, 1.0)
    # Beyond the longest duration observed, think times are assumed to be exponential with the mean.
    means = drop @ durations + surviving[:, -1] * (durations[-1] + exposure)
    known = [(turn.pre_s, turn.think_s) for turn in turns if turn.pre_s is not None and turn.think_s]
    observing = sum(min(pre, think) for pre, think in known) / max(EPSILON, sum(think for _, think in known))
    return ThinkFit(
        mean_s=float(means[0]),
        draws=means[0] + interval_widening(len(clusters), 1) * (means[1:] - means[0]),
        turns=int(sum(is_over)),
        observing_share=observing if known else 1.0,
        left=left,
        durations=durations.tolist(),
        surviving=surviving[0].tolist(),
    )
