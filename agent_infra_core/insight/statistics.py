"""Statistics that the capacity model needs: resampling in blocks, and changes of a mean. Pure."""

from __future__ import annotations

import math
from typing import Any

from agent_infra_core.insight.capacity import EPSILON, RESAMPLES, Array

STEP_RATIO = 1.3  # change of think time, agents or a replica's speed after which only later turns count, as a factor
LEAST_SIDE = 30  # values on each side of a change


def last_of_each(numbers: Array) -> Array:
    """Index of the last occurrence of each different number."""
    import numpy as np

    return len(numbers) - 1 - np.unique(numbers[::-1], return_index=True)[1]


def resample_counts(blocks: int, rng: Any, draws: int = RESAMPLES) -> Array:
    """How often each block counts in each resampling (Rubin 1981, "The Bayesian bootstrap")."""
    return rng.exponential(size=(draws, blocks))


def interval_widening(blocks: int, unknowns: int) -> float:
    """Factor that corrects resampled deviations, which are too small for few blocks (Student's t, not normal)."""
    free = max(1.0, blocks - unknowns)
    return math.sqrt(blocks / max(1.0, blocks - 1)) * (1 + 0.93 / free)


def change_point(values: Any, least: float) -> int | None:
    """Index at which the mean of a series changed by more than ``least``, or None (CUSUM, Page 1954).

    This is the most likely split with at least LEAST_SIDE values on both sides and a step of more than 6 standard
    errors.
    """
    import numpy as np

    series = np.asarray(values, dtype=float)
    if len(series) < 2 * LEAST_SIDE:
        return None
    before = np.arange(LEAST_SIDE, len(series) - LEAST_SIDE + 1)
    sums, squares = np.cumsum(series), np.cumsum(series**2)
    first, second = sums[before - 1] / before, (sums[-1] - sums[before - 1]) / (len(series) - before)
    within = squares[-1] - before * first**2 - (len(series) - before) * second**2
    deviation = np.sqrt(np.maximum(within, EPSILON) / len(series))
    error = deviation * np.sqrt(1 / before + 1 / (len(series) - before))
    best = int(np.argmax(np.abs(second - first) / error))
    step = abs(float(second[best] - first[best]))
    return int(before[best]) if step > max(least, 6 * float(error[best])) else None


def last_change(times: Array, values: Array, least: float) -> float:
    """When the mean of ``values`` at ``times`` last changed by more than ``least``; 0.0 if it never did."""
    at, start = 0.0, 0
    while (index := change_point(values[start:], least)) is not None:
        start += index
        at = float(times[start])
    return at
