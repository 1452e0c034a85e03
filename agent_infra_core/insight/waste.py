"""GPU time of a run, in all and per task, and what of it was wasted. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agent_infra_core.insight.gpu_hours import ReplicaUse
from agent_infra_core.insight.turns import TurnRecord

LEAST_PREFILLS = 30  # turns that the time to prefill a token is fitted to
KEPT_PREFILLS = 2000  # of the latest turns


def prefill_s(prefills: Any) -> float | None:
    """Seconds to prefill a token, from rows of (tokens prefilled, TTFT in s), one per turn; None for too few turns.

    The slope of the medians of tenths of the turns: some turns also waited for what was prefilled beside them.
    """
    import numpy as np

    known = np.array(prefills, dtype=float).reshape(-1, 2)
    if len(known) < LEAST_PREFILLS:
        return None
    tenths = np.array_split(known[np.argsort(known[:, 0], kind="stable")], 10)
    fresh, ttft = np.array([np.median(part, axis=0) for part in tenths]).T
    return max(0.0, float(np.polyfit(fresh, ttft, 1)[0])) if fresh[-1] > fresh[0] else 0.0


@dataclass
class TurnTime:
    """What turns did with the time of the replicas that served them."""

    served_s: float = 0.0  # on turns, since they were last sent
    aborted_s: float = 0.0  # of that, on turns without an answer
    retried_s: float = 0.0  # before that, on tries that were repeated
    missed_tokens: int = 0  # prefilled again
    prefills: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=KEPT_PREFILLS))

    def add(self, record: TurnRecord) -> None:
        """Add a finished turn."""
        served_s, is_answered = (record.inference_ms or 0.0) / 1000, record.outcome == "completed"
        self.served_s += served_s
        self.aborted_s += 0.0 if is_answered else served_s
        self.retried_s += (record.retry_ms or 0.0) / 1000
        if record.cached_tokens is not None and is_answered:
            if record.cache_miss is not None:
                self.missed_tokens += max(0, (record.expected_cached_tokens or 0) - record.cached_tokens)
            if record.prompt_tokens and record.ttft_ms:
                self.prefills.append((max(1, record.prompt_tokens - record.cached_tokens), record.ttft_ms / 1000))


def gpu_time(turns: TurnTime, held: Mapping[ReplicaUse, float], tasks: int) -> dict[str, Any]:
    """GPU-seconds that replicas were ``held``, those wasted, and both per task; replica-seconds where none has a GPU.

    - ``idle``: of ready replicas without a turn in flight.
    - ``failed``: of busy replicas, times the share of the turns' time that went to turns without an answer and to tries
      that were repeated.
    - ``prefilled_again``: tokens that should have been cached, times the time to prefill one, times the GPUs of a
      replica. At most the rest of the busy time.

    ``wasted`` is their sum, without what is unknown (None). ``held`` is the time of loading and ready replicas, whoever
    sent the turns.
    """
    seconds = {use: spent for use, spent in held.items() if use.state != "pending"}
    gpu_s, replica_s = sum(spent * use.gpus for use, spent in seconds.items()), sum(seconds.values())
    size = gpu_s / replica_s if gpu_s else 1.0  # mean GPUs of a replica

    def of(state: str) -> float:
        return sum(spent * (use.gpus if gpu_s else 1) for use, spent in seconds.items() if use.state == state)

    busy, sent_s = of("ready_busy"), turns.served_s + turns.retried_s
    failed = busy * (turns.aborted_s + turns.retried_s) / sent_s if sent_s else None
    token_s = prefill_s(turns.prefills)
    again = None if token_s is None else min(turns.missed_tokens * token_s * size, busy - (failed or 0.0))
    parts = {"prefilled_again": again, "failed": failed, "idle": of("ready_idle")}
    whole = {"held": gpu_s or replica_s, "wasted": sum(part or 0.0 for part in parts.values())}
    figures = {**whole, **{f"{name}_per_task": value / tasks if tasks else None for name, value in whole.items()}}
    is_known = replica_s > 0
    return {
        "unit": "GPU-s" if gpu_s else "replica-s",
        **{
            name: round(value, 2) if is_known and value is not None else None
            for name, value in (figures | parts).items()
        },
    }
