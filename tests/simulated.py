"""/stats documents of a simulated fleet, made by the program's own Tracker and CapacityAnalysis from its turns."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import closed_loop

from agent_infra_core.insight.tracker import Tracker
from agent_infra_core.insight.turns import TurnRecord
from agent_infra_core.protocol import Backend, SessionEnded, TurnAnswering, TurnFinished, TurnSent, TurnStarted

HISTORY = {"path": None, "state": "off", "reason": None, "turns": 0}
TEXTS = (
    ("The page lists 12 articles. Which one do you open?", "I open the third one: it is the cheapest that fits."),
    ("3 of 41 tests fail. What do you look at next?", "At the failing assertion in test_urls, line 88."),
    ("The form wants a date of delivery.", "I fill in the 24th and go on to the payment."),
)


def events_of(record: TurnRecord, number: int, post_ms: float | None) -> Iterator[tuple[float, Any]]:
    """What the relay would have said of a turn."""
    prompt, answer = TEXTS[number % len(TEXTS)]
    client = f"me@login1:{4100 + number % 3} python agents.py --env webshop"
    started = TurnStarted(
        record.turn, record.started_at or 0.0, record.model or "", "/v1/chat/completions", record.session, record.task,
        client, True, record.pre_ms, post_ms, prompt,
    )  # fmt: skip
    yield started.at, started
    sent = TurnSent(
        record.turn, started.at + (record.queue_ms or 0.0) / 1000, record.backend or "", record.queue_ms or 0.0
    )
    yield sent.at, sent
    if record.ttft_ms is not None:
        answering = TurnAnswering(record.turn, sent.at + record.ttft_ms / 1000, record.ttft_ms)
        yield answering.at, answering
    yield (
        record.finished_at,
        TurnFinished(
            record.turn, record.finished_at, "completed", 200, record.backend, record.queue_ms or 0.0, record.ttft_ms,
            record.inference_ms, 0, record.prompt_tokens, record.completion_tokens, record.cached_tokens,
            finish_reason="stop", answer=answer,
        ),
    )  # fmt: skip


@functools.cache
def document(agents: int, replicas: int, think_s: float, seconds: float = 700.0) -> dict[str, Any]:
    """The last moment of a run."""
    workload = closed_loop.Workload(think_s=think_s)
    loop = closed_loop.ClosedLoop(closed_loop.engine_fleet(replicas), agents, workload, model="llama-8b")
    loop.run(seconds)
    end, live = closed_loop.START + loop.now, {f"session-{agent.session}" for agent in loop.at_work()}
    records, samples = list(loop.records), list(loop.samples)
    analysis = closed_loop.judge(loop, closed_loop.Physics.kv_tokens, closed_loop.Physics.slots).document()
    last = {record.session: record.finished_at for record in records if record.session}
    loop.run(300.0)  # until what is under way at the end is finished, and so recorded
    records += [record for record in loop.records if (record.started_at or 0.0) <= end]
    moments: list[tuple[float, Any]] = []
    for record in records:
        told = None if record.think_ms is None or record.pre_ms is None else record.think_ms - record.pre_ms
        moments += events_of(record, int((record.session or "-0").rpartition("-")[2]), told)
    over = [(at, name) for name, at in last.items() if name not in live]
    moments += [(at, SessionEnded(name, at)) for at, name in over]
    moments += [(sample.at, sample) for sample in samples]
    requests: Counter[str] = Counter()
    now = closed_loop.START
    tracker = Tracker(lambda: now)
    for at, moment in sorted((each for each in moments if each[0] <= end), key=lambda each: each[0]):
        now = at
        if not isinstance(moment, closed_loop.Sample):
            tracker.observe(moment)
            if isinstance(moment, TurnFinished):
                requests[str(moment.backend)] += 1
            continue
        backends = {
            name: {
                "healthy": True,
                "in_flight": count,
                "requests": requests[name],
                "errors": 0,
                "load": {"kv_usage": moment.kv_usage[name], "kv_capacity_tokens": closed_loop.Physics.kv_tokens},
            }
            for name, count in moment.in_flight.items()
        }
        queue = {"pending": moment.queued, "in_flight": sum(moment.in_flight.values()), "waiting": []}
        queue["oldest_ms"] = round(1000 * moment.oldest_s)
        tracker.sample({"at": at, "backends": backends, "queue": queue})
    names = [replica.name for replica in loop.replicas]
    table = [Backend(name, "llama-8b", "127.0.0.1", 5900, slots=closed_loop.Physics.slots) for name in names]
    snapshot = dict(tracker.snapshot([], table, "least_load"))
    return {
        **snapshot,
        "analysis": analysis,
        "accounting": None,
        "history": {"path": None, "state": "off", "reason": None, "turns": 0},
        "snapshot_age_ms": 80,
    }
