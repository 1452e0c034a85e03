"""How fast replicas prefill and decode, fitted online from their turns. Pure."""

from __future__ import annotations

from collections.abc import Sequence

# Until turns have been measured: 10,000 tokens prefilled per second, 10 ms per decoded token and 0.1 ms more for every
# 1,000 tokens of the contexts that it reads. They weigh as much as PRIOR_TURNS turns.
DEFAULT_PREFILL_S, DEFAULT_STEP_S, DEFAULT_CONTEXT_S = 1e-4, 0.010, 1e-7
PRIOR_TURNS = 8.0
WINDOW_TURNS = 500.0  # older turns fade
REFIT_TURNS = 16
MOST_PREFILLED = 1000  # tokens in the time of a decoding step; engines manage 200 to 600, so a lower cost is an error


class ServiceRates:
    """Fits a turn's seconds: prefill_s · uncached tokens + (step_s + context_s · contexts) · output tokens.

    An engine decodes one token of all running turns at a time. That takes as long as reading the model's weights and
    the contexts of these turns: ``contexts`` is their tokens, the turn's own included.

    Weighted least squares over all replicas of a model, with each turn's error relative to its length, older turns
    fading. A replica's speed is the sum of its turns' seconds over the sum of what the fit predicts for them.
    """

    def __init__(self) -> None:
        self.prefill_s, self.step_s, self.context_s = DEFAULT_PREFILL_S, DEFAULT_STEP_S, DEFAULT_CONTEXT_S
        self._turns = 0
        self._products = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3
        for prompt, output, contexts in ((8000.0, 10.0, 0.0), (100.0, 200.0, 0.0), (100.0, 200.0, 100_000.0)):
            self._add((prompt, output, output * contexts), self.seconds(prompt, output, contexts), PRIOR_TURNS / 3)

    @property
    def is_fitted(self) -> bool:
        """Whether turns have been measured."""
        return self._turns >= REFIT_TURNS

    def seconds(self, uncached: float, output: float, contexts: float) -> float:
        """Expected seconds of a turn on a replica of average speed."""
        return self.prefill_s * uncached + (self.step_s + self.context_s * contexts) * output

    def add(self, uncached: float, output: float, contexts: float, seconds: float) -> None:
        """Learn from a finished turn: its prefilled and generated tokens, the contexts that ran, and its time."""
        self._add((uncached, output, output * contexts), seconds, 1.0)
        self._turns += 1
        if self._turns % REFIT_TURNS == 0:
            self._refit()

    def _add(self, features: Sequence[float], seconds: float, weight: float) -> None:
        weight /= seconds * seconds + 1e-6
        fade = 1.0 - 1.0 / WINDOW_TURNS
        for row, value in zip(self._products, features, strict=True):
            scaled = value * weight
            for column, other in enumerate(features):
                row[column] = row[column] * fade + scaled * other
        self._targets = [
            target * fade + value * weight * seconds for target, value in zip(self._targets, features, strict=True)
        ]

    def _refit(self) -> None:
        solution = solve_three(self._products, self._targets)
        if solution is not None:
            prefill_s, step_s, context_s = solution
            self.step_s = max(step_s, 1e-5)
            self.prefill_s = max(prefill_s, self.step_s / MOST_PREFILLED)
            self.context_s = max(context_s, 1e-12)


def solve_three(matrix: Sequence[Sequence[float]], target: Sequence[float]) -> tuple[float, float, float] | None:
    """Solve three linear equations with a symmetric matrix; None if they are (nearly) dependent."""
    (a, b, c), (_, d, e), (_, _, f) = matrix
    minors = (d * f - e * e, c * e - b * f, b * e - c * d)
    determinant = a * minors[0] + b * minors[1] + c * minors[2]
    if determinant <= 1e-12 * abs(a * d * f):
        return None
    x, y, z = target
    return (
        (minors[0] * x + minors[1] * y + minors[2] * z) / determinant,
        (minors[1] * x + (a * f - c * c) * y + (b * c - a * e) * z) / determinant,
        (minors[2] * x + (b * c - a * e) * y + (a * d - b * b) * z) / determinant,
    )
