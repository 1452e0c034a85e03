"""Totals are exact for any interleaving, and nothing off the wire can raise or spoil the document."""

import dataclasses
import json
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_infra_core.insight.tracker import TOTAL_OF_OUTCOME, Tracker
from agent_infra_core.protocol import (
    Backend,
    EventBatch,
    SessionEnded,
    TurnAnswering,
    TurnEvent,
    TurnFinished,
    TurnSent,
    TurnStarted,
    decode_events,
)

NOW = 1_800_000_000.0
turns = st.sampled_from([f"t{number}" for number in range(12)])
names = st.sampled_from(["a", "b", "c"])
times = st.floats(min_value=NOW - 100, max_value=NOW)
tokens = st.none() | st.integers(min_value=0, max_value=10_000)
durations = st.floats(min_value=0, max_value=1e6)

events: st.SearchStrategy[TurnEvent] = st.one_of(
    st.builds(
        TurnStarted,
        turn=turns,
        at=times,
        model=names,
        path=st.just("/v1/chat/completions"),
        session=st.none() | names,
        pre_ms=st.none() | durations,
        post_ms=st.none() | durations,
        prints=st.binary(max_size=5).map(lambda some: some * 4),
        follows=st.sampled_from([None, "", "k1", "k2"]),
    ),
    st.builds(TurnSent, turn=turns, at=times, backend=names, queue_ms=durations),
    st.builds(TurnAnswering, turn=turns, at=times, ttft_ms=durations),
    st.builds(
        TurnFinished,
        turn=turns,
        at=times,
        outcome=st.sampled_from(sorted(TOTAL_OF_OUTCOME)),
        status=st.just(200),
        backend=st.none() | names,
        queue_ms=durations,
        ttft_ms=st.none() | durations,
        inference_ms=st.none() | durations,
        retries=st.integers(min_value=0, max_value=3),
        prompt_tokens=tokens,
        completion_tokens=tokens,
        cached_tokens=tokens,
        key=st.sampled_from([None, "k1", "k2"]),
        gaps=st.dictionaries(st.integers(min_value=-54, max_value=240).map(str), st.integers(0, 9), max_size=3),
    ),
    st.builds(SessionEnded, session=names, at=times),
)
RESTART = "the relay restarts"


class NaiveModel:
    """Remembers everything: the first finish of each turn, and which turns are open."""

    def __init__(self) -> None:
        self.open: set[str] = set()
        self.finished: dict[str, TurnFinished] = {}

    def take(self, step: TurnEvent | str) -> None:
        if step == RESTART:
            for turn in self.open:
                self.finished[turn] = TurnFinished(turn, NOW, "cut", 0)
            self.open.clear()
        elif isinstance(step, TurnStarted) and step.turn not in self.finished:
            self.open.add(step.turn)
        elif isinstance(step, TurnFinished):
            self.finished.setdefault(step.turn, step)
            self.open.discard(step.turn)

    def totals(self) -> dict[str, int]:
        finished = self.finished.values()
        outcomes = Counter(event.outcome for event in finished)
        return {
            "requests": len(finished),
            "completed": outcomes["completed"],
            "errors": outcomes["error"] + outcomes["cut"],
            "aborted": outcomes["aborted"],
            "rejected": outcomes["rejected"],
            "retries": sum(event.retries for event in finished),
            "tokens_in": sum(event.prompt_tokens or 0 for event in finished),
            "tokens_out": sum(event.completion_tokens or 0 for event in finished),
            "cached_tokens": sum(event.cached_tokens or 0 for event in finished),
        }


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(events, events, events, st.just(RESTART)), max_size=60))
def test_totals_are_exact_and_never_fall_for_any_interleaving(steps: list[TurnEvent | str]) -> None:
    tracker, model = Tracker(lambda: NOW), NaiveModel()
    before: dict[str, int] = {}
    for step in steps:
        model.take(step)
        if isinstance(step, str):
            tracker.relay_restarted()
        else:
            tracker.observe(step)
        document = tracker.snapshot([], [], "least_load")
        assert document["totals"] == model.totals()
        assert all(count >= before.get(name, 0) for name, count in document["totals"].items())
        before = document["totals"]
    json.dumps(document if steps else {}, allow_nan=False)
    rows = [row for client in tracker.snapshot([], [], "")["clients"] for row in client["sessions"]]
    assert all(row["unaccounted_ms"] is None or row["unaccounted_ms"] >= 0 for row in rows)
    if not model.open:
        assert all(row["state"] in ("idle", "ended") for row in rows)
    records, _ = tracker.take_records()
    assert sorted(record.turn for record in records) == sorted(model.finished)
    again = Tracker(lambda: NOW)
    again.restore(records, tracker.totals)
    assert again.totals == tracker.totals


def over_the_wire(batch: EventBatch) -> list[TurnEvent]:
    return decode_events(msgspec.json.encode(batch))


@given(st.lists(events, max_size=20))
def test_events_survive_the_wire(steps: list[TurnEvent]) -> None:
    batch = EventBatch(
        started=[event for event in steps if isinstance(event, TurnStarted)],
        sent=[event for event in steps if isinstance(event, TurnSent)],
        answering=[event for event in steps if isinstance(event, TurnAnswering)],
        finished=[event for event in steps if isinstance(event, TurnFinished)],
        session_ended=[event for event in steps if isinstance(event, SessionEnded)],
    )
    found = over_the_wire(batch)
    assert Counter(map(repr, found)) == Counter(map(repr, steps))
    assert [event.at for event in found] == sorted(event.at for event in steps)


def test_a_finish_that_tells_all_counts_like_the_events_of_its_turn() -> None:
    steps: list[TurnEvent] = [
        TurnStarted("t", NOW - 3, "m", "/v1/chat/completions", "s", pre_ms=5.0),
        TurnSent("t", NOW - 2, "b", 1000.0),
        TurnAnswering("t", NOW - 1, 1000.0),
        TurnFinished("t", NOW, "completed", 200, "b", 1000.0, 1000.0, 2000.0, prompt_tokens=7, completion_tokens=3),
    ]
    apart, together = Tracker(lambda: NOW), Tracker(lambda: NOW)
    for step in steps:
        apart.observe(step)
    started, *_, finished = steps
    assert isinstance(started, TurnStarted)
    assert isinstance(finished, TurnFinished)
    [whole] = over_the_wire(EventBatch(finished=[dataclasses.replace(finished, started=started)]))
    together.observe(whole)
    assert together.snapshot([], [], "") == apart.snapshot([], [], "")


def test_what_is_not_known_in_a_batch_is_left_out() -> None:
    assert decode_events(b'{"colours":[1],"sent":[{"turn":"t","at":1.0,"backend":"b","queue_ms":2,"hue":3}]}') == [
        TurnSent("t", 1.0, "b", 2)
    ]


@pytest.mark.parametrize(
    "payload", [b"", b"[]", b'{"sent":[{"turn":"t"}]}', b'{"sent":[{"turn":3,"at":1.0}]}', b"\xff"]
)
def test_what_is_no_batch_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="."):  # whatever msgspec calls it
        decode_events(payload)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
gauge_keys = ["backends", "queue", "counters", "waiting", "b", "load", "gpus", "requests", "in_flight", "healthy"]
garbled_gauges = st.recursive(
    junk, lambda inner: st.dictionaries(st.sampled_from(gauge_keys), inner, max_size=5), max_leaves=12
).filter(lambda value: isinstance(value, dict))


@settings(deadline=None)
@given(garbled_gauges)
def test_garbled_gauges_never_raise_nor_spoil_the_document(gauges: dict[str, Any]) -> None:
    tracker = Tracker(lambda: NOW)
    tracker.sample(gauges)
    json.dumps(tracker.snapshot([], [Backend("b", "m", "127.0.0.1", 1)], "least_load"), allow_nan=False)
