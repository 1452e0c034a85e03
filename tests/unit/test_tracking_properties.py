"""Totals are exact for any interleaving, and nothing off the wire can raise or spoil the document."""

import dataclasses
import json
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agent_infra import (
    TURN_OUTCOMES,
    Backend,
    SessionEnded,
    Tracker,
    TurnAnswering,
    TurnEvent,
    TurnFinished,
    TurnSent,
    TurnStarted,
    event_from_json,
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
    ),
    st.builds(TurnSent, turn=turns, at=times, backend=names, queue_ms=durations),
    st.builds(TurnAnswering, turn=turns, at=times, ttft_ms=durations),
    st.builds(
        TurnFinished,
        turn=turns,
        at=times,
        outcome=st.sampled_from(TURN_OUTCOMES),
        status=st.just(200),
        backend=st.none() | names,
        queue_ms=durations,
        ttft_ms=st.none() | durations,
        inference_ms=st.none() | durations,
        retries=st.integers(min_value=0, max_value=3),
        prompt_tokens=tokens,
        completion_tokens=tokens,
        cached_tokens=tokens,
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


@given(events)
def test_an_event_survives_the_wire(event: TurnEvent) -> None:
    assert event_from_json(json.loads(json.dumps(dataclasses.asdict(event)))) == event


def test_unknown_kinds_and_fields_are_ignored() -> None:
    wire = {"kind": "sent", "turn": "t", "at": 1.0, "backend": "b", "queue_ms": 2, "colour": "blue"}
    assert event_from_json(wire) == TurnSent("t", 1.0, "b", 2)
    assert event_from_json({**wire, "kind": "teleported"}) is None


def test_an_event_without_what_it_needs_is_none() -> None:
    for wrong in ({"at": float("nan")}, {"at": "soon"}, {"turn": None}, {"queue_ms": -1}, {"backend": 3}):
        wire = {"kind": "sent", "turn": "t", "at": 1.0, "backend": "b", "queue_ms": 2.0, **wrong}
        assert event_from_json(wire) is None


def test_an_optional_figure_that_cannot_be_is_not_known() -> None:
    wire = {"kind": "finished", "turn": "t", "at": 1.0, "outcome": "melted", "status": 200}
    more = {"prompt_tokens": -5, "inference_ms": float("inf"), "retries": True, "gaps": {"x": 1}}
    assert event_from_json({**wire, **more}) == TurnFinished("t", 1.0, "error", 200)


def test_a_name_without_end_is_cut() -> None:
    event = event_from_json({"kind": "session_ended", "session": "x" * 10_000, "at": 1.0})
    assert isinstance(event, SessionEnded)
    assert len(event.session) == 512


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
event_keys = ["turn", "at", "model", "path", "session", "outcome", "status", "backend", "queue_ms", "ttft_ms", "gaps"]
gauge_keys = ["backends", "queue", "counters", "waiting", "b", "load", "gpus", "requests", "in_flight", "healthy"]
garbled_events = st.fixed_dictionaries(
    {"kind": junk | st.sampled_from(["started", "sent", "answering", "finished", "session_ended"])},
    optional={key: junk | st.just("x") | st.just(1.0) | st.just(200) for key in event_keys},
)
garbled_gauges = st.recursive(
    junk, lambda inner: st.dictionaries(st.sampled_from(gauge_keys), inner, max_size=5), max_leaves=12
).filter(lambda value: isinstance(value, dict))


@settings(deadline=None)
@given(st.lists(garbled_events, max_size=8), garbled_gauges)
def test_garbage_never_raises_nor_spoils_the_document(wires: list[dict[str, Any]], gauges: dict[str, Any]) -> None:
    tracker = Tracker(lambda: NOW)
    for wire in wires:
        event = event_from_json(wire)
        if event is not None:
            tracker.observe(event)
    tracker.sample(gauges)
    json.dumps(tracker.snapshot([], [Backend("b", "m", "127.0.0.1", 1)], "least_load"), allow_nan=False)


@given(junk)
def test_what_is_no_object_is_no_event(value: object) -> None:
    assert event_from_json(value) is None
