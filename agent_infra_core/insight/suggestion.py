"""How many agents to run, and what a turn costs. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from agent_infra_core.insight.capacity import (
    EPSILON,
    FULL,
    RESAMPLES,
    Array,
    CapacityModel,
    Estimate,
    Figure,
    Outlook,
    change_in_words,
    estimate,
    percent,
)
from agent_infra_core.insight.fit import ThinkFit
from agent_infra_core.insight.statistics import last_of_each
from agent_infra_core.insight.waste import prefill_s

GOOD_UTILISATION = 0.7
GOOD_KV_SHARE = 0.9


def turns_per_ended(
    turns: Array, name: str, think: ThinkFit, ended: Mapping[int, float], now: float
) -> tuple[float, float] | None:
    """``(turns per session or task, number that ended)``; None if fewer than five ended.

    Dividing turns by ends is right even while most are still running. The number that ended is an expected value,
    because a silent one has only probably ended.
    """
    named = turns[(turns[name] != 0) & turns["is_completed"]]
    last = named[last_of_each(named[name])]
    over = sum(
        1.0 if session in ended else 1 - think.presence(now - end)
        for session, end in zip(last["session"].tolist(), last["end"].tolist(), strict=True)
    )
    return (len(named) / over, over) if over >= 5 else None


def _loads(outlook: Outlook, goal_s: float | None) -> list[tuple[str, Figure, Array]]:
    """``(name, N, its draws)`` of the loads worth knowing: good utilisation, knee, most efficient, latency goal.

    Most efficient is the N with the highest X / R ("power", Kleinrock 1979), which puts n = A/B turns on a replica. At
    the latency goal, 95 % of the turns wait no longer, if waits spread as they do now.
    """
    import numpy as np

    wait_s = (goal_s or 0.0) * outlook.here.wait_s / max(outlook.here.slow_wait_s, EPSILON)

    def loads(model: CapacityModel) -> dict[str, Figure]:
        slope = np.maximum(model.per_request_s, EPSILON)
        found = {
            "utilisation": model.agents_at_utilisation(GOOD_UTILISATION),
            "knee": model.knee,
            "efficient": model.agents_at(model.base_s / slope),
        }
        if goal_s is not None:
            found["latency_goal"] = model.agents_at(np.maximum((wait_s - model.base_s) / slope, 0.0))
        most = model.agents_at(model.slots) if math.isfinite(model.slots) else math.inf
        return {name: np.minimum(agents, most) for name, agents in found.items()}

    draws = loads(outlook.draws)
    return [(name, agents, draws[name]) for name, agents in loads(outlook.model).items()]


def _priced(outlook: Outlook, agents: float) -> dict[str, Estimate]:
    """What it is to run so many agents: throughput, the wait for an answer, and the change of throughput."""
    what = outlook.what_if("", agents)
    reason = what["change"].reason if what["change"].low is None else None
    return {
        "turns_per_hour": what["turns_per_hour"],
        "wait_s": outlook.told("s", lambda model: model.wait_s(agents), reason),
        "change": what["change"],
    }


def _price_in_words(now: Mapping[str, Estimate], then: Mapping[str, Estimate]) -> str:
    """`` +12 % turns/h; answers take 3.1 s instead of 2.4 s.``; empty if unknown."""
    change, waits = change_in_words(then["change"]), [row["wait_s"].value for row in (now, then)]
    if not change:
        return ""
    wait = f"; answers take {waits[1]:.3g} s instead of {waits[0]:.3g} s" if all(waits) else ""
    return f" {change} turns/h{wait}."


def _limits(
    outlook: Outlook, load: tuple[str, Figure, Array], goal_s: float | None
) -> list[tuple[float, Array, str | None, str]]:
    """``(N, its draws, name, why)`` of the limits on the number of agents, of which the lowest decides."""
    import numpy as np

    name, value, draws = load
    why = f"the GPUs would be {percent(GOOD_UTILISATION)} busy."
    if name == "latency_goal":
        why = f"95 % of the answers would take at most {goal_s:g} s."
    elif math.isfinite(outlook.model.slots) and outlook.here.full >= FULL:
        name, why = "slots", "that takes every slot; more would only wait for one."
        value, draws = (model.agents_at(model.slots) for model in (outlook.model, outlook.draws))
    most = outlook.most_agents
    limits: list[tuple[float, Array, str | None, str]] = [
        (float(value), draws, name, why),
        (most, np.full(RESAMPLES, most), None, "more would be beyond twice the load seen. Then look again."),
    ]
    if outlook.kv is not None:
        tokens = "beyond that their contexts do not fit into the KV cache, and are computed again."
        fitting = (GOOD_KV_SHARE * outlook.kv[0], GOOD_KV_SHARE * outlook.kv[1], "kv", tokens)
        limits = [fitting] if outlook.evicting else [*limits, fitting]
    return limits


def suggest(outlook: Outlook, goal_s: float | None) -> dict[str, Any]:
    """How many agents to run: the lowest of three limits, and what they and other loads cost and bring.

    The limits are GOOD_UTILISATION of the GPUs (or the latency goal, if there is one), contexts that fit into the KV
    cache, and the range of the fit's predictions.
    """
    import numpy as np

    nothing = outlook.few or outlook.reason
    if nothing is None and (outlook.crowding or (outlook.fit is not None and outlook.fit.is_alone)):
        nothing = outlook.beyond(math.inf)
    if nothing is not None:
        none = estimate("agents", outlook.basis, None, reason=nothing)
        sentence, unknown = f"No suggestion: {nothing}.", _priced(outlook, math.inf)
        return {"agents": none, "bound_by": None, "sentence": sentence, "now": unknown, "then": unknown, "options": []}
    loads = _loads(outlook, goal_s)
    limits = _limits(outlook, loads[-1 if goal_s is not None else 0], goal_s)
    value, _, bound_by, why = min(limits, key=lambda limit: limit[0])
    value = max(1.0, round(value))
    spread = np.maximum(1.0, np.round(np.min([limit[1] for limit in limits], axis=0)))
    agents = estimate("agents", outlook.basis, value, spread)
    is_sure = agents.value is not None or agents.low == agents.high
    told = f"{value:.0f}" if is_sure else f"{agents.low:.0f} to {agents.high:.0f}"
    prices = [_priced(outlook, number) for number in (outlook.agents, value)]
    most = min([limit[0] for limit in limits[1:]], default=value)
    options = [
        {"name": option, "agents": estimate("agents", outlook.basis, min(float(at), most), np.minimum(drawn, most))}
        | _priced(outlook, min(float(at), most))
        for option, at, drawn in loads
    ]
    return {
        "agents": agents,
        "bound_by": bound_by,
        "sentence": f"Run {told} agents (now {round(outlook.agents)}): {why}{_price_in_words(*prices)}",
        "now": prices[0],
        "then": prices[1],
        "options": options,
    }


def figures(outlook: Outlook) -> dict[str, Any]:
    """``fit``, ``operating`` and ``limits`` of an entry of ``analysis``."""
    model, draws, here = outlook.model, outlook.draws, outlook.here
    thinking, no_kv = "no session had two turns", "the KV capacity or the contexts are not known"
    alone = outlook.beyond(math.inf) if outlook.fit and outlook.fit.is_alone else None
    kv_value, kv_draws = outlook.kv if outlook.kv is not None else (None, None)
    utilised = model.agents_at_utilisation(GOOD_UTILISATION)
    return {
        "fit": {
            "base_latency_s": outlook.told("s", lambda m: m.base_s),
            "per_request_s": outlook.told("s", lambda m: m.per_request_s, alone),
            "think_s": outlook.measured("s", model.think_s if outlook.think else None, draws.think_s, thinking),
        },
        "operating": {
            "agents": outlook.measured("agents", outlook.agents or None, outlook.agents_draws, "no agent is active"),
            "in_flight_per_replica": outlook.measured("turns", here.in_flight, None, "no sample of the fleet"),
            "turns_per_hour": outlook.measured("turns/h", 3600 * here.per_s, 3600 * here.per_s_draws, ""),
            "predicted_turns_per_hour": outlook.told("turns/h", lambda m: 3600 * m.throughput(outlook.agents)),
            "utilisation": outlook.told("fraction", lambda m: m.utilisation(outlook.agents), alone),
        },
        "limits": {
            "knee_agents": outlook.told("agents", lambda m: m.knee, outlook.evicting or outlook.beyond(model.knee)),
            "kv_agents": outlook.measured("agents", kv_value, kv_draws, no_kv),
            "utilisation_agents": outlook.told(
                "agents",
                lambda m: m.agents_at_utilisation(GOOD_UTILISATION),
                outlook.evicting or outlook.beyond(utilised),
            ),
        },
    }


def missed_gpu_share(turns: Array, since: float, replicas: int, until: float) -> float | None:
    """Share of GPU time spent on tokens that should have been cached, by the TTFT per fresh token; None if unknown."""
    import numpy as np

    known = turns[(turns["end"] >= since) & (turns["ttft_s"] > 0) & (turns["cached"] >= 0)]
    token_s = prefill_s(np.column_stack([known["fresh"], known["ttft_s"]]))
    if token_s is None or until <= since:
        return None
    missed = float(np.nansum(np.maximum(0.0, known["expected"] - known["cached"])))
    return missed * token_s / (replicas * (until - since))


def cost(outlook: Outlook, gpus: int, turns: Array, ended: Mapping[int, float], rng: Any) -> dict[str, Estimate]:
    """GPU-seconds per turn, session and task: in each second, ``gpus`` GPUs do X turns. And the share of misses."""
    here, think = outlook.here, outlook.think
    missed = missed_gpu_share(turns, here.since, int(outlook.model.replicas), here.until)
    each = {
        "gpu_seconds_per_turn": outlook.measured(
            "GPU-s",
            gpus / here.per_s if here.per_s else None,
            gpus / here.per_s_draws if here.per_s else None,
            "no turn ended",
        ),
        "cache_miss_share": outlook.measured("fraction", missed, missed, "cached tokens or first tokens are not known"),
    }
    for name in ("session", "task"):
        counted = turns_per_ended(turns, name, think, ended, here.until) if think else None
        value = draws = None
        if counted is not None and here.per_s:
            value = counted[0] * gpus / here.per_s
            draws = value * counted[1] / rng.gamma(counted[1], size=RESAMPLES) * here.per_s / here.per_s_draws
        each[f"gpu_seconds_per_{name}"] = outlook.measured("GPU-s", value, draws, f"fewer than five {name}s have ended")
    return each
