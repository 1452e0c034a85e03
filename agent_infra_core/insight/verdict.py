"""The verdict on what limits a run: GPUs, latency or the agents. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from agent_infra_core.insight.capacity import (
    CONFIDENCE,
    FULL,
    LEAST_TURNS,
    RESAMPLES,
    Outlook,
    UnequalFleet,
    estimate,
    in_words,
    percent,
)
from agent_infra_core.insight.measure import MOST_ABORTED, FleetSample
from agent_infra_core.insight.suggestion import GOOD_KV_SHARE

VERDICTS = ("AGENT-BOUND", "LATENCY-BOUND", "GPU-BOUND")
KEPT = 0.6  # share of the resampled fits that keeps a verdict


def judge(outlook: Outlook, what_ifs: Sequence[Mapping[str, Any]], before: str | None) -> dict[str, Any]:
    """The verdict: the largest share, if it leads in at least CONFIDENCE of the resampled fits; otherwise BALANCED.

    The verdict ``before`` stays while it leads in KEPT of them and no other one is sure. Where every slot is taken and
    turns wait, that is measured and decides, with or without a fit.
    """
    import numpy as np

    here = outlook.here
    is_full = here.full >= FULL and here.turns >= LEAST_TURNS and here.aborted <= MOST_ABORTED
    reason = None if is_full else outlook.few or outlook.reason
    point = [0.0, 0.0, 1.0] if is_full else [float(share) for share in outlook.model.shares(outlook.agents)]
    shared = [np.full(RESAMPLES, share) for share in point] if is_full else outlook.draws.shares(outlook.agents_draws)
    drawn = np.stack(np.broadcast_arrays(*shared))
    told = (estimate("fraction", outlook.basis, *share, reason) for share in zip(point, drawn, strict=True))
    shares = dict(zip(("agent", "base_latency", "contention"), told, strict=True))  # in the order of VERDICTS
    if reason is not None:
        sentence = f"No verdict: {reason}."
        return {"name": "NO DATA", "confidence": None, "sentence": sentence, "reason": reason, "shares": shares}
    counts = np.bincount(np.argmax(drawn, axis=0), minlength=3) / RESAMPLES
    largest = VERDICTS.index(before) if before in VERDICTS and max(counts) < CONFIDENCE else int(np.argmax(counts))
    confidence = float(counts[largest])
    name = VERDICTS[largest] if confidence >= (KEPT if VERDICTS[largest] == before else CONFIDENCE) else "BALANCED"
    sentence = verdict_sentence(name, confidence, point, outlook, what_ifs)
    return {"name": name, "confidence": round(confidence, 3), "sentence": sentence, "reason": None, "shares": shares}


def sure_in_words(confidence: float) -> str:
    return "over 99 % sure" if confidence > 0.99 else f"{math.floor(100 * confidence)} % sure"


def verdict_sentence(
    name: str, confidence: float, shares: Sequence[float], outlook: Outlook, what_ifs: Sequence[Mapping[str, Any]]
) -> str:
    """The verdict as text for researchers: what limits the run, and the effect of each change."""
    sure = sure_in_words(confidence)
    replica, observing, more, _ = what_ifs
    model, agents = outlook.model, outlook.agents
    if name == "GPU-BOUND":
        said = f"GPU-bound ({sure}): throughput follows GPU capacity with elasticity {shares[2]:.2f}."
        if shares[2] == 1:
            said = f"GPU-bound ({sure}): all {model.slots:.0f} slots of each replica are taken, turns queue."
        effects = [in_words(replica, True), in_words(more)]
    elif name == "AGENT-BOUND":
        said = f"Agent-bound ({sure}): agents think for {model.think_s:.3g} s a turn, "
        said += f"the GPUs answer in {float(model.answer_s(agents)):.3g} s."
        effects = [in_words(observing, True), in_words(more), in_words(replica)]
    elif name == "LATENCY-BOUND":
        said = f"Latency-bound ({sure}): even an idle replica takes {model.base_s:.3g} s for a turn, "
        said += f"agents think for {model.think_s:.3g} s. Shorter answers or a faster GPU would help."
        effects = [in_words(more, True), in_words(replica)]
    else:
        agent, base, crowding = (percent(share) for share in shares)
        said = (
            f"Balanced: throughput follows the agents' think time ({agent}), the latency of an idle replica ({base}) "
        )
        said += f"and GPU capacity ({crowding}); no one is the largest for sure."
        effects = [in_words(replica, True), in_words(observing), in_words(more)]
    known = "; ".join(effect for effect in effects if effect)
    return f"{said} {known[0].upper()}{known[1:]}." if known else said


def _slow_replicas(outlook: Outlook) -> list[str]:
    """A sentence for each replica that is slower than the others."""
    found = []
    lately = outlook.fit.lately if outlook.fit and not outlook.few else {}
    for number, (name, (factor, _, _)) in enumerate(lately.items()):
        if factor > 1:
            healed = partial(UnequalFleet.healed, number=number)
            gain = in_words(outlook.what_if("A replica as fast as the others", outlook.agents, change=healed), True)
            sentence = f"{name} takes {factor:.1f} times as long as the others for the same turns."
            found.append(f"{sentence} {gain}." if gain else sentence)
    return found


def find_flags(outlook: Outlook, samples: Sequence[FleetSample]) -> dict[str, str]:
    """Further problems: flag → sentence."""
    found = {}
    looks = [sample for sample in samples if sample.at >= outlook.here.since]
    if outlook.kv is not None and outlook.few is None and outlook.agents > outlook.kv[0]:
        found["KV-BOUND"] = (
            f"The contexts of {outlook.agents:.0f} agents do not fit into the KV cache, those of {outlook.kv[0]:.0f} "
            f"do: thinking sessions are evicted and computed again. Run {GOOD_KV_SHARE * outlook.kv[0]:.0f} agents, or "
            "add a replica."
        )
    if slow_ones := _slow_replicas(outlook):
        found["SLOW"] = " ".join(slow_ones)
    if outlook.crowding and not outlook.few:
        found["TOOLS"] = (
            f"Agents think longer the more of them think (by a power of {outlook.crowding:.1f}): they queue for the "
            "tools that they act with, so more agents bring little."
        )
    preemptions = [sample.preemptions for sample in looks if sample.preemptions is not None]
    if "KV-BOUND" not in found and len(preemptions) > 1 and preemptions[-1] > preemptions[0]:
        found["KV-BOUND"] = (
            f"Replicas ran out of KV cache and put off {preemptions[-1] - preemptions[0]} running turns, which are "
            "computed again. Run fewer agents, or add a replica."
        )
    flights: dict[str, list[int]] = {}
    for sample in looks[-60:]:
        for replica, number in sample.in_flight.items():
            flights.setdefault(replica, []).append(number)
    means = {replica: sum(numbers) / len(numbers) for replica, numbers in flights.items() if len(numbers) >= 30}
    if len(means) > 1:
        most, least = max(means, key=lambda name: means[name]), min(means, key=lambda name: means[name])
        typical = sum(means.values()) / len(means)
        if means[most] - means[least] > max(2.0, 0.6 * typical):
            found["IMBALANCED"] = (
                f"{most} has {means[most]:.1f} turns in flight, {least} {means[least]:.1f}, in the mean of a minute: "
                "the busiest replica makes its agents wait while others have room."
            )
    if samples and samples[-1].unhealthy:
        names = ", ".join(samples[-1].unhealthy)
        found["UNHEALTHY"] = f"{names}: not healthy. What the rest does is measured, what all could do is not."
    return found
