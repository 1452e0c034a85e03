"""How many agents to run, and what a turn costs. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from agent_infra_core.insight.capacity import EPSILON, RESAMPLES, Array, Estimate, Outlook, estimate, percent
from agent_infra_core.insight.fit import ThinkFit
from agent_infra_core.insight.measure import ObservedTurn

GOOD_UTILISATION = 0.7
GOOD_KV_SHARE = 0.9


def turns_per_ended(
    turns: Sequence[ObservedTurn], name: str, think: ThinkFit, ended: Mapping[str, float], now: float
) -> tuple[float, float] | None:
    """``(turns per session or task, number that ended)``; None if fewer than five ended.

    Dividing turns by ends is right even while most are still running. The number that ended is an expected value,
    because a silent one has only probably ended.
    """
    last: dict[str, ObservedTurn] = {}
    named = 0
    for turn in turns:
        key = turn.session if name == "session" else turn.task
        if key is not None and turn.is_completed:
            last[key] = turn
            named += 1
    over = sum(1.0 if turn.session in ended else 1 - think.presence(now - turn.end) for turn in last.values())
    return (named / over, over) if over >= 5 else None


def suggest(outlook: Outlook) -> dict[str, Any]:
    """How many agents to run: the lowest of three limits.

    These are GOOD_UTILISATION of the GPUs, contexts that fit into the KV cache, and the range of the fit's predictions.
    """
    import numpy as np

    nothing = outlook.few or outlook.reason
    if nothing is None and outlook.fit is not None and outlook.fit.is_alone:
        nothing = outlook.beyond(math.inf)
    if nothing is not None:
        none = estimate("agents", outlook.basis, None, reason=nothing)
        return {"agents": none, "bound_by": None, "sentence": f"No suggestion: {nothing}."}
    model, draws = outlook.model, outlook.draws
    most, now = outlook.most_agents, round(outlook.agents)
    evicting = outlook.evicting
    busy = [
        np.minimum(
            m.agents_at_utilisation(GOOD_UTILISATION), m.agents_at(m.slots) if math.isfinite(m.slots) else math.inf
        )
        for m in (model, draws)
    ]
    limits: list[tuple[float, Array, str | None, str]] = [
        (float(busy[0]), busy[1], "utilisation", f"the GPUs would be {percent(GOOD_UTILISATION)} busy."),
        (most, np.full(RESAMPLES, most), None, "more would be beyond twice the load seen. Then look again."),
    ]
    if outlook.kv is not None:
        tokens = "beyond that their contexts do not fit into the KV cache, and are computed again."
        fitting = (GOOD_KV_SHARE * outlook.kv[0], GOOD_KV_SHARE * outlook.kv[1], "kv", tokens)
        limits = [fitting] if evicting else [*limits, fitting]
    value, _, bound_by, why = min(limits, key=lambda limit: limit[0])
    spread = np.maximum(1.0, np.round(np.min([limit[1] for limit in limits], axis=0)))
    agents = estimate("agents", outlook.basis, max(1.0, round(value)), spread)
    if agents.value is None and agents.low != agents.high:
        sentence = f"Run {agents.low:.0f} to {agents.high:.0f} agents (now {now}): {why}"
    else:
        sentence = f"Run {agents.low if agents.value is None else agents.value:.0f} agents (now {now}): {why}"
    return {"agents": agents, "bound_by": bound_by, "sentence": sentence}


def figures(outlook: Outlook) -> dict[str, Any]:
    """``fit``, ``operating`` and ``limits`` of an entry of ``analysis``."""
    model, draws, here = outlook.model, outlook.draws, outlook.here
    thinking = "no session had two turns"
    alone = outlook.beyond(math.inf) if outlook.fit and outlook.fit.is_alone else None
    blind = alone or outlook.evicting
    knee_flight = float(model.in_flight(model.knee)) if math.isfinite(model.knee) else math.inf
    far = None
    if outlook.fit is not None and knee_flight > outlook.most_in_flight:
        far = f"it lies beyond twice the load seen ({outlook.fit.most_in_flight:.1f} turns in flight on a replica)"
    good_flight = GOOD_UTILISATION / (1 - GOOD_UTILISATION) * model.base_s / max(model.per_request_s, EPSILON)
    good_far = far if good_flight > outlook.most_in_flight else None
    kv_value, kv_draws = outlook.kv if outlook.kv is not None else (None, None)
    return {
        "fit": {
            "base_latency_s": outlook.told("s", lambda m: m.base_s),
            "per_request_s": outlook.told("s", lambda m: m.per_request_s, alone),
            "think_s": outlook.measured("s", model.think_s if outlook.think else None, draws.think_s, thinking),
        },
        "operating": {
            "agents": outlook.measured(
                "agents",
                outlook.agents or None,
                outlook.agents if here.agents is None else here.agents_draws,
                "no agent is active",
            ),
            "in_flight_per_replica": outlook.measured(
                "turns", here.in_flight, here.in_flight, "no sample of the fleet"
            ),
            "turns_per_hour": outlook.measured("turns/h", 3600 * here.per_s, 3600 * here.per_s_draws, ""),
            "predicted_turns_per_hour": outlook.told("turns/h", lambda m: 3600 * m.throughput(outlook.agents)),
            "utilisation": outlook.told("fraction", lambda m: m.utilisation(outlook.agents), alone),
        },
        "limits": {
            "knee_agents": outlook.told("agents", lambda m: m.knee, blind or far),
            "kv_agents": outlook.measured(
                "agents", kv_value, kv_draws, "the KV capacity or the contexts are not known"
            ),
            "utilisation_agents": outlook.told(
                "agents", lambda m: m.agents_at_utilisation(GOOD_UTILISATION), blind or good_far
            ),
        },
    }


def cost(
    outlook: Outlook, gpus: int, turns: Sequence[ObservedTurn], ended: Mapping[str, float], rng: Any
) -> dict[str, Estimate]:
    """GPU-seconds per turn, session and task: in each second, ``gpus`` GPUs do X turns."""
    here, think = outlook.here, outlook.think
    each = {
        "gpu_seconds_per_turn": outlook.measured(
            "GPU-s",
            gpus / here.per_s if here.per_s else None,
            gpus / here.per_s_draws if here.per_s else None,
            "no turn ended",
        )
    }
    for name in ("session", "task"):
        counted = turns_per_ended(turns, name, think, ended, here.until) if think else None
        value = draws = None
        if counted is not None and here.per_s:
            value = counted[0] * gpus / here.per_s
            draws = value * counted[1] / rng.gamma(counted[1], size=RESAMPLES) * here.per_s / here.per_s_draws
        each[f"gpu_seconds_per_{name}"] = outlook.measured("GPU-s", value, draws, f"fewer than five {name}s have ended")
    return each
