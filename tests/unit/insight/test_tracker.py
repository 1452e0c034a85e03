"""What the tracker says of turns and sessions, event by event."""

import dataclasses
import json
from typing import Any

import pytest
from clock import Clock
from stats_schema import check_stats

from agent_infra_core.control.reader import session_question
from agent_infra_core.insight.tracker import Tracker, encode_stats
from agent_infra_core.insight.turns import MAX_TURN_S
from agent_infra_core.protocol import (
    STATS_PREFIX,
    Backend,
    GpuSample,
    ReplicaFailure,
    ReplicaRecord,
    SessionEnded,
    TurnAnswering,
    TurnFinished,
    TurnSent,
    TurnStarted,
)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tracker(clock: Clock) -> Tracker:
    return Tracker(clock)


def start(tracker: Tracker, clock: Clock, turn: str, session: str | None = "s", **more: Any) -> None:
    tracker.observe(TurnStarted(turn, clock.now, "m", "/v1/chat/completions", session, **more))


def finish(tracker: Tracker, clock: Clock, turn: str, outcome: str = "completed", **more: Any) -> None:
    tracker.observe(TurnFinished(turn, clock.now, outcome, more.pop("status", 200), **more))


def take_turn(tracker: Tracker, clock: Clock, turn: str, session: str | None = "s", **more: Any) -> None:
    """A turn of two seconds on backend b."""
    start(tracker, clock, turn, session, **more)
    tracker.observe(TurnSent(turn, clock.now, "b", 5.0))
    clock.now += 2
    finish(tracker, clock, turn, backend="b", queue_ms=5.0, ttft_ms=100.0, inference_ms=1995.0)


def stats(tracker: Tracker) -> dict[str, Any]:
    return tracker.snapshot([], [], "least_load")


def sessions(tracker: Tracker) -> dict[str, dict[str, Any]]:
    return {session["id"]: session for client in stats(tracker)["clients"] for session in client["sessions"]}


def gauges(**more: Any) -> dict[str, Any]:
    queue: dict[str, Any] = {"pending": 0, "in_flight": 0, "oldest_ms": None, "waiting": []}
    return {"at": 1.0, "backends": {}, "queue": queue, "counters": {}, "rss_bytes": 1, "connections": 1, **more}


# --- sessions and their time


def test_a_session_is_followed_through_the_states_of_its_turn(tracker: Tracker, clock: Clock) -> None:
    start(tracker, clock, "t")
    states = [sessions(tracker)["s"]["state"]]
    tracker.observe(TurnSent("t", clock.now, "b", 0.0))
    states.append(sessions(tracker)["s"]["state"])
    tracker.observe(TurnAnswering("t", clock.now, 20.0))
    states.append(sessions(tracker)["s"]["state"])
    finish(tracker, clock, "t", backend="b")
    states.append(sessions(tracker)["s"]["state"])
    assert states == ["waiting", "prefill", "decoding", "idle"]


def test_a_session_with_two_turns_in_flight_shows_the_furthest(tracker: Tracker, clock: Clock) -> None:
    start(tracker, clock, "t1")
    start(tracker, clock, "t2")
    tracker.observe(TurnSent("t1", clock.now, "b", 0.0))
    tracker.observe(TurnAnswering("t1", clock.now, 20.0))
    assert sessions(tracker)["s"]["state"] == "decoding"
    finish(tracker, clock, "t1")
    assert sessions(tracker)["s"]["state"] == "waiting"


def test_a_session_tells_its_turns_tokens_and_context(tracker: Tracker, clock: Clock) -> None:
    for turn, prompt in (("t1", 100), ("t2", 150)):
        start(tracker, clock, turn, task="fix-bug")
        finish(tracker, clock, turn, backend="b", prompt_tokens=prompt, completion_tokens=20, cached_tokens=prompt - 50)
    session = sessions(tracker)["s"]
    assert (session["turns"], session["tokens_in"], session["tokens_out"]) == (2, 250, 40)
    assert (session["context_tokens"], session["prompt_tokens"], session["cached_tokens"]) == (170, 150, 100)
    assert (session["task"], session["model"], session["backend"]) == ("fix-bug", "m", "b")
    assert session["idle_since"] == clock.now


def test_a_session_without_reported_tokens_has_no_sum_of_them(tracker: Tracker, clock: Clock) -> None:
    counts: dict[str, Any] = {"prompt_tokens": 7, "completion_tokens": 0}
    for turn, reported in (("t1", {}), ("t2", counts), ("t3", {})):
        start(tracker, clock, turn)
        finish(tracker, clock, turn, **reported)
        session = sessions(tracker)["s"]
        assert (session["tokens_in"], session["tokens_out"]) == ((None, None) if turn == "t1" else (7, 0))


def test_post_belongs_to_the_turn_before_the_one_that_it_comes_with(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t1", pre_ms=1.0)
    take_turn(tracker, clock, "other", session="another")
    take_turn(tracker, clock, "t2", pre_ms=2.0, post_ms=30.0)
    rows = {row["turn"]: row for row in stats(tracker)["recent_turns"]}
    assert [rows[turn]["post_ms"] for turn in ("t1", "other", "t2")] == [30.0, None, None]
    assert [rows[turn]["pre_ms"] for turn in ("t1", "t2")] == [1.0, 2.0]


def test_think_time_that_the_client_does_not_explain_is_unaccounted_for(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t1", pre_ms=100.0)
    clock.now += 5
    take_turn(tracker, clock, "t2", pre_ms=1500.0, post_ms=2500.0)
    session = sessions(tracker)["s"]
    assert (session["pre_ms"], session["post_ms"], session["unaccounted_ms"]) == (1600.0, 2500.0, 1000.0)


def test_think_time_is_never_negative(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t1")
    clock.now += 1
    take_turn(tracker, clock, "t2", pre_ms=60_000.0)
    assert sessions(tracker)["s"]["unaccounted_ms"] == 0.0
    clock.now -= 0.004
    take_turn(tracker, clock, "t3")
    assert stats(tracker)["recent_turns"][0]["pre_ms"] == 0.0


def test_a_gap_that_the_client_does_not_split_is_pre(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t1")
    clock.now += 5
    take_turn(tracker, clock, "t2")
    first, second = reversed(stats(tracker)["recent_turns"])
    assert (first["pre_ms"], second["pre_ms"], second["unaccounted_ms"]) == (None, 5000.0, None)


def test_a_turn_beside_another_of_its_session_has_no_think_time(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t1")
    start(tracker, clock, "t2")
    clock.now += 3
    start(tracker, clock, "t3")
    finish(tracker, clock, "t3")
    assert stats(tracker)["recent_turns"][0]["pre_ms"] is None


def test_turns_beside_each_other_that_are_told_in_one_batch_expect_nothing_of_each_other(
    tracker: Tracker, clock: Clock
) -> None:
    at = clock.now - 1
    for turn in ("t1", "t2", "t3"):
        started = TurnStarted(turn, at, "m", "/v1/chat/completions", "s")
        told: dict[str, Any] = {"prompt_tokens": 1000, "completion_tokens": 10, "cached_tokens": 0}
        at += 0.02
        finished = TurnFinished(turn, at + 0.05, "completed", 200, "b", 0.0, 10.0, 50.0, started=started, **told)
        tracker.observe(finished)
    rows = stats(tracker)["recent_turns"]
    assert [(row["think_ms"], row["expected_cached_tokens"], row["cache_miss"]) for row in rows] == [(None,) * 3] * 3


def test_a_session_ends_when_its_agent_says_so(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t")
    tracker.observe(SessionEnded("s", clock.now))
    tracker.observe(SessionEnded("s", clock.now))
    assert stats(tracker)["sessions"] == {"live": 0, "alive": 0, "active": 0, "listed": 0, "ended": 1, "evicted": 0}


def test_a_session_ends_after_half_an_hour_of_silence_and_not_before(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t")
    clock.now += 1799
    tracker.sample(gauges())
    assert stats(tracker)["sessions"]["live"] == 1
    clock.now += 1
    tracker.sample(gauges())
    assert stats(tracker)["sessions"] == {"live": 0, "alive": 0, "active": 0, "listed": 0, "ended": 1, "evicted": 0}


def test_a_session_is_alive_while_its_silence_is_one_of_thinking(tracker: Tracker, clock: Clock) -> None:
    for session, think_s in (("slow", 20.0), ("quick", 1.0)):
        for number in range(3):
            take_turn(tracker, clock, f"{session}-{number}", session)
            clock.now += think_s
    start(tracker, clock, "running", "slow to answer")
    for silent_s, alive in ((0, 3), (40, 2), (60, 1), (600, 1)):  # the one with an open turn stays
        clock.now += silent_s
        assert stats(tracker)["sessions"]["alive"] == alive


def test_outcomes_are_those_of_the_last_five_minutes(tracker: Tracker, clock: Clock) -> None:
    none = {"window_s": 300.0, **dict.fromkeys(("completed", "errors", "aborted", "rejected"), 0)}
    assert stats(tracker)["recent_outcomes"] == none
    for number, outcome in enumerate(("completed", "error", "cut", "aborted", "rejected")):
        start(tracker, clock, str(number))
        finish(tracker, clock, str(number), outcome)
    some = {**none, "completed": 1, "errors": 2, "aborted": 1, "rejected": 1}
    assert stats(tracker)["recent_outcomes"] == some
    records, _ = tracker.take_records()
    clock.now += 240
    assert stats(tracker)["recent_outcomes"] == some
    later = Tracker(clock)
    later.restore(records, {})
    assert stats(later)["recent_outcomes"] == some
    clock.now += 90
    assert stats(tracker)["recent_outcomes"] == stats(later)["recent_outcomes"] == none
    later.restore(records, {})
    assert stats(later)["recent_outcomes"] == none


def test_a_session_whose_turn_is_running_does_not_end_by_idleness(tracker: Tracker, clock: Clock) -> None:
    start(tracker, clock, "t")
    clock.now += 3600
    tracker.sample(gauges())
    assert stats(tracker)["sessions"]["active"] == 1


def test_a_turn_that_outlives_its_session_is_counted(tracker: Tracker, clock: Clock) -> None:
    start(tracker, clock, "t")
    tracker.observe(SessionEnded("s", clock.now))
    finish(tracker, clock, "t")
    assert stats(tracker)["totals"]["requests"] == 1
    assert {name: row["state"] for name, row in sessions(tracker).items()} == {"s": "ended"}


def test_an_ended_session_stays_to_be_looked_at_and_goes_on_where_it_was(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t")
    tracker.observe(SessionEnded("s", clock.now))
    assert stats(tracker)["sessions"]["live"] == 0
    assert (sessions(tracker)["s"]["state"], sessions(tracker)["s"]["turns"]) == ("ended", 1)
    take_turn(tracker, clock, "u")
    assert (sessions(tracker)["s"]["state"], sessions(tracker)["s"]["turns"]) == ("idle", 2)


def test_of_the_ended_sessions_only_the_latest_are_kept(tracker: Tracker, clock: Clock) -> None:
    for number in range(60):
        take_turn(tracker, clock, f"t{number}", session=f"s{number}")
        tracker.observe(SessionEnded(f"s{number}", clock.now))
    assert list(sessions(tracker)) == [f"s{number}" for number in range(59, 9, -1)]


def test_a_turn_without_session_is_counted_but_makes_no_session(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t", session=None)
    document = stats(tracker)
    assert (document["totals"]["requests"], document["sessions"]["live"], document["clients"]) == (1, 0, [])
    assert document["recent_turns"][0]["session"] is None


def test_sessions_beyond_the_limit_push_out_the_one_silent_for_longest(clock: Clock) -> None:
    tracker = Tracker(clock, max_sessions=2)
    take_turn(tracker, clock, "t1", "a")
    take_turn(tracker, clock, "t2", "b")
    take_turn(tracker, clock, "t3", "a")
    take_turn(tracker, clock, "t4", "c")
    assert list(sessions(tracker)) == ["c", "a"]
    assert stats(tracker)["sessions"]["evicted"] == 1


def test_only_the_sessions_heard_of_last_are_listed_and_all_are_counted(tracker: Tracker, clock: Clock) -> None:
    for number in range(300):
        take_turn(tracker, clock, f"t{number}", f"s{number}")
    assert list(sessions(tracker)) == [f"s{number}" for number in range(299, 99, -1)]
    counts = stats(tracker)["sessions"]
    assert (counts["live"], counts["listed"], counts["active"]) == (300, 200, 150)


def test_sessions_are_grouped_by_client_and_a_client_may_name_its_command(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t1", "a", client="host:41 python agent.py")
    take_turn(tracker, clock, "t2", "b", client="host:41 python agent.py")
    take_turn(tracker, clock, "t3", "c", client="me")
    take_turn(tracker, clock, "t4", "d")
    clients = stats(tracker)["clients"]
    assert [(client["id"], client["command"], len(client["sessions"])) for client in clients] == [
        (None, None, 1),
        ("me", None, 1),
        ("host:41", "python agent.py", 2),
    ]


def test_a_retried_turn_is_on_the_backend_that_it_was_sent_to_last(tracker: Tracker, clock: Clock) -> None:
    start(tracker, clock, "t")
    tracker.observe(TurnSent("t", clock.now, "dead", 1.0))
    tracker.observe(TurnAnswering("t", clock.now, 1.0))
    tracker.observe(TurnSent("t", clock.now, "alive", 3.0))
    session = sessions(tracker)["s"]
    assert (session["backend"], session["state"]) == ("alive", "prefill")


# --- what the whole says


def test_before_any_traffic_nothing_is_made_up(tracker: Tracker) -> None:
    document = stats(tracker)
    assert set(document["totals"].values()) == {0}
    assert document["throughput"] == {"turns_per_minute": None, "tokens_per_second": None, "history": []}
    assert document["queue"] == {"pending": None, "held": None, "in_flight": None, "oldest_ms": None, "waiting": []}
    assert {figure for part in document["pipeline"].values() for figure in part.values()} == {None}


def test_the_age_is_the_first_key_and_the_document_is_plain_json(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t")
    tracker.sample(gauges(backends={"b": {"load": {"kv_usage": float("nan"), "running": float("inf")}}}))
    document = tracker.snapshot([], [Backend("b", "m", "127.0.0.1", 1)], "round_robin")
    text = json.dumps(document, allow_nan=False)
    assert text.startswith('{"snapshot_age_ms": 0, "schema_version": 2, ')
    assert document["backends"][0]["engine"]["kv_usage"] is None


def test_shares_say_where_the_time_went_and_sum_to_one(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t1", pre_ms=1000.0)
    clock.now += 3
    take_turn(tracker, clock, "t2", pre_ms=1000.0, post_ms=1000.0)
    pipeline = stats(tracker)["pipeline"]
    shares = {part: figures["share"] for part, figures in pipeline.items()}
    assert shares == {
        "pre": pytest.approx(0.25, abs=1e-3),
        "queue": pytest.approx(10 / 8000, abs=1e-3),
        "ttft": None,
        "inference": pytest.approx(3990 / 8000, abs=1e-3),
        "post": pytest.approx(0.125, abs=1e-3),
        "unaccounted": pytest.approx(0.125, abs=1e-3),
    }
    assert pipeline["inference"]["mean_ms"] == 1995.0
    assert pipeline["inference"]["p95_ms"] == pytest.approx(1995.0, rel=0.045)


def test_the_page_shows_recent_figures_and_totals_of_all_time(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t")
    clock.now += 600
    document = stats(tracker)
    assert document["pipeline"]["inference"]["p50_ms"] is None
    assert document["totals"]["requests"] == 1


def test_rates_are_taken_over_the_last_minute(tracker: Tracker, clock: Clock) -> None:
    for second in range(180):
        tracker.sample(gauges())
        if second >= 120:
            start(tracker, clock, f"t{second}")
            finish(tracker, clock, f"t{second}", completion_tokens=30)
        clock.now += 1
    throughput = stats(tracker)["throughput"]
    assert throughput["turns_per_minute"] == pytest.approx(60, rel=0.02)
    assert throughput["tokens_per_second"] == pytest.approx(30, rel=0.02)


def test_rates_are_not_told_when_nothing_was_sampled_for_long(tracker: Tracker, clock: Clock) -> None:
    for _ in range(20):
        tracker.sample(gauges())
        clock.now += 1
    clock.now += 300
    assert stats(tracker)["throughput"]["turns_per_minute"] is None


def test_history_has_a_point_each_two_seconds_and_ten_minutes_at_most(tracker: Tracker, clock: Clock) -> None:
    for _ in range(700):
        tracker.sample(gauges(queue={"pending": 2, "in_flight": 7, "waiting": []}))
        clock.now += 1.003
    history = stats(tracker)["throughput"]["history"]
    assert len(history) == 300
    assert history[-1]["at"] - history[0]["at"] == pytest.approx(600, abs=3)
    assert (history[-1]["in_flight"], history[-1]["pending"], history[-1]["active_sessions"]) == (7, 2, 0)
    assert history[-1]["latency_ms"] == {"p50": None, "p95": None}


def test_every_outcome_is_counted_under_its_name(tracker: Tracker, clock: Clock) -> None:
    for number, outcome in enumerate(("completed", "completed", "error", "cut", "aborted", "rejected")):
        start(tracker, clock, str(number))
        finish(tracker, clock, str(number), outcome, retries=number)
    totals = stats(tracker)["totals"]
    names = ("requests", "completed", "errors", "aborted", "rejected", "retries")
    assert [totals[name] for name in names] == [6, 2, 2, 1, 1, 15]


def test_latencies_of_a_backend_are_those_of_completed_turns(tracker: Tracker, clock: Clock) -> None:
    finish(tracker, clock, "t1", backend="b", inference_ms=1000.0, ttft_ms=100.0, gaps={"32": 10})
    finish(tracker, clock, "t2", "cut", backend="b", inference_ms=1.0)
    [row] = tracker.snapshot([], [Backend("b", "m", "127.0.0.1", 1)], "least_load")["backends"]
    assert row["latency_ms"]["p50"] == pytest.approx(1000, rel=0.045)
    assert row["ttft_ms"]["p99"] == pytest.approx(100, rel=0.045)
    assert row["gap_ms"]["p50"] == pytest.approx(16.7, rel=0.01)


def test_a_replica_is_told_from_its_record_the_table_and_the_gauges(tracker: Tracker, clock: Clock) -> None:
    gpu = GpuSample("H100", 80.0, 60, 80, 300.0, 50.0)
    record = ReplicaRecord(
        *("m-0", "m", "ready", "vllm", "gpu07", 1, "boot:1"), port=5901, slots=8, restarts=1, gpus=(gpu,), ends_at=9.0
    )
    load = {"running": 3, "waiting": 0, "kv_usage": 0.5, "gpus": [dataclasses.asdict(gpu)] * 2}
    gauge = {"healthy": True, "reason": None, "in_flight": 3, "requests": 10, "errors": 1, "load": load}
    take_turn(tracker, clock, "t")
    tracker.sample(gauges(backends={"m-0": gauge}))
    document = tracker.snapshot([dataclasses.asdict(record)], [Backend("m-0", "m", "127.0.0.1", 5901)], "least_load")
    [row] = document["backends"]
    expected = {"id": "m-0", "model": "m", "node": "gpu07", "partition": None, "port": 5901, "state": "ready"}
    expected |= {"healthy": True, "reason": None, "inflight": 3, "slots": 8, "requests": 10, "errors": 1, "restarts": 1}
    assert {key: row[key] for key in expected} == expected
    assert row["gpu"] == {
        "count": 2,
        "name": "H100",
        "utilization": 80.0,
        "memory_used": 120,
        "memory_total": 160,
        "power_w": 600.0,
        "temperature_c": 50.0,
    }
    assert (row["engine"]["name"], row["engine"]["running"], row["engine"]["preemptions"]) == ("vllm", 3, None)
    assert document["models"] == [{"name": "m", "replicas": 1, "ready": 1, "slots": 8, "inflight": 3}]


def test_a_failed_replica_says_why_and_a_draining_one_that_it_drains(tracker: Tracker) -> None:
    failure = ReplicaFailure("out_of_memory", "CUDA out of memory", "lower gpu_memory_utilization")
    failed = ReplicaRecord("m-0", "m", "failed", "vllm", "n", 1, "p", failure=failure)
    loading = ReplicaRecord("m-1", "m", "loading", "vllm", "n", 1, "p", progress="5/9")
    ready = ReplicaRecord("m-2", "m", "ready", "vllm", "n", 1, "p")
    records = [dataclasses.asdict(record) for record in (failed, loading, ready)]
    document = tracker.snapshot(records, [Backend("m-2", "m", "127.0.0.1", 1, state="draining")], "least_load")
    assert [(row["state"], row["reason"]) for row in document["backends"]] == [
        ("failed", "CUDA out of memory"),
        ("loading", "5/9"),
        ("draining", None),
    ]
    assert (document["models"][0]["replicas"], document["models"][0]["ready"]) == (3, 0)


def test_a_backend_without_record_is_told_from_the_table(tracker: Tracker) -> None:
    [row] = tracker.snapshot([], [Backend("b", "m", "10.0.0.1", 80, node="n")], "least_load")["backends"]
    assert (row["id"], row["model"], row["node"], row["state"]) == ("b", "m", "n", "ready")
    assert (row["slots"], row["gpu"]) == (None, None)


# --- a relay that dies


def test_turns_in_flight_on_a_dead_relay_are_closed_as_cut(tracker: Tracker, clock: Clock) -> None:
    start(tracker, clock, "waiting")
    start(tracker, clock, "sent", "other")
    tracker.observe(TurnSent("sent", clock.now, "b", 5.0))
    clock.now += 1
    tracker.relay_restarted()
    finish(tracker, clock, "sent", backend="b")
    document = stats(tracker)
    assert (document["totals"]["requests"], document["totals"]["errors"]) == (2, 2)
    assert {session["state"] for session in sessions(tracker).values()} == {"idle"}
    rows = {row["turn"]: row for row in document["recent_turns"]}
    assert (rows["waiting"]["outcome"], rows["waiting"]["queue_ms"], rows["sent"]["queue_ms"]) == ("cut", 1000.0, 5.0)


def test_counters_go_on_where_the_dead_relay_left_them(tracker: Tracker) -> None:
    backend = [Backend("b", "m", "127.0.0.1", 1)]
    tracker.sample(gauges(counters={"requests": 10}, backends={"b": {"requests": 7}}))
    tracker.relay_restarted()
    assert tracker.snapshot([], backend, "least_load")["relay"]["rss_bytes"] is None
    tracker.sample(gauges(counters={"requests": 12}, backends={"b": {"requests": 9}}))
    document = tracker.snapshot([], backend, "least_load")
    assert (document["relay"]["requests"], document["relay"]["restarts"]) == (22, 1)
    assert document["backends"][0]["requests"] == 16


def test_a_counter_that_falls_comes_from_a_new_relay(tracker: Tracker) -> None:
    for count in (10, 3, 5):
        tracker.sample(gauges(counters={"requests": count}))
    assert stats(tracker)["relay"]["requests"] == 15


# --- bounds


def test_a_turn_whose_finish_was_lost_is_forgotten_and_a_late_finish_still_counts(
    tracker: Tracker, clock: Clock
) -> None:
    start(tracker, clock, "lost")
    clock.now += MAX_TURN_S
    tracker.sample(gauges())
    assert stats(tracker)["sessions"] == {"live": 0, "alive": 0, "active": 0, "listed": 0, "ended": 1, "evicted": 0}
    finish(tracker, clock, "lost", prompt_tokens=5)
    assert stats(tracker)["totals"]["tokens_in"] == 5


def test_recent_turns_are_a_hundred_at_most_and_the_latest_comes_first(tracker: Tracker, clock: Clock) -> None:
    for number in range(150):
        finish(tracker, clock, str(number))
    assert [row["turn"] for row in stats(tracker)["recent_turns"]] == [str(number) for number in range(149, 49, -1)]


def test_figures_of_backends_that_are_gone_are_forgotten(tracker: Tracker, clock: Clock) -> None:
    backend = [Backend("b", "m", "127.0.0.1", 1)]
    finish(tracker, clock, "t", backend="b", inference_ms=10.0)
    assert tracker.snapshot([], [], "least_load")["backends"] == []
    assert tracker.snapshot([], backend, "least_load")["backends"][0]["latency_ms"]["p50"] is None


# --- one session


def session_document(tracker: Tracker, clock: Clock, name: str = "s", **parameters: int) -> dict[str, Any] | None:
    """GET /stats/sessions/{id} without a history."""
    question = session_question({"session": name, **parameters}, tracker.session(name), clock.now)
    status, body = question(None)
    return json.loads(body) if status == 200 else None


def test_a_session_is_told_with_its_turns_latest_first(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t1")
    take_turn(tracker, clock, "other", session="another")
    take_turn(tracker, clock, "t2", post_ms=7.0)
    start(tracker, clock, "t3")
    document = session_document(tracker, clock)
    assert document is not None
    check_stats(document, "session_document")
    assert (document["session"]["state"], document["session"]["turns"]) == ("waiting", 2)
    assert [(row["number"], row["turn"], row["post_ms"]) for row in document["turns"]] == [
        (2, "t2", None),
        (1, "t1", 7.0),
    ]


def test_a_session_that_ended_is_told_and_one_that_never_was_is_not(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t1")
    tracker.observe(SessionEnded("s", clock.now))
    document = session_document(tracker, clock)
    assert document is not None
    assert document["session"]["state"] == "ended"
    assert session_document(tracker, clock, "another") is None


def test_of_a_sessions_turns_the_latest_two_hundred_are_told(tracker: Tracker, clock: Clock) -> None:
    for number in range(205):
        take_turn(tracker, clock, str(number))
    document = session_document(tracker, clock)
    assert document is not None
    assert [row["turn"] for row in document["turns"]] == [str(number) for number in range(204, 4, -1)]
    document = session_document(tracker, clock, limit=3, before=8)
    assert document is not None
    assert [row["number"] for row in document["turns"]] == [7, 6, 5]
    assert document["turns_total"] == 205


# --- records of turns, for those who keep them


def test_every_finished_turn_is_given_out_once(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t1", pre_ms=7.0)
    start(tracker, clock, "open")
    records, _ = tracker.take_records()
    assert [(record.turn, record.session, record.pre_ms, record.inference_ms) for record in records] == [
        ("t1", "s", 7.0, 1995.0)
    ]
    take_turn(tracker, clock, "t2")
    assert [record.turn for record in tracker.take_records()[0]] == ["t2"]
    assert tracker.take_records() == ([], {})


def test_post_is_in_the_record_or_comes_after_it(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t1")
    take_turn(tracker, clock, "t2", post_ms=30.0)
    records, posts = tracker.take_records()
    assert ([record.post_ms for record in records], posts) == ([30.0, None], {})
    take_turn(tracker, clock, "t3", post_ms=40.0)
    assert tracker.take_records()[1] == {"t2": 40.0}


def test_think_time_is_from_the_answer_before_to_the_request(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t1", pre_ms=1.0)
    clock.now += 4
    take_turn(tracker, clock, "t2", pre_ms=1000.0, post_ms=2000.0)
    first, second = tracker.take_records()[0]
    assert (first.think_ms, second.think_ms, second.unaccounted_ms) == (None, 4000.0, 1000.0)


def test_what_nobody_takes_is_bounded(tracker: Tracker, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_infra_core.insight.turns.MAX_UNTAKEN_TURNS", 10)
    for number in range(25):
        finish(tracker, clock, str(number))
    assert [record.turn for record in tracker.take_records()[0]] == [str(number) for number in range(15, 25)]


def test_another_tracker_goes_on_where_the_first_one_was(tracker: Tracker, clock: Clock) -> None:
    for number in range(3):
        take_turn(tracker, clock, f"t{number}", session=f"s{number % 2}", pre_ms=5.0, post_ms=[None, None, 3.0][number])
        clock.now += 1
    take_turn(tracker, clock, "alone", session=None)
    before: Any = stats(tracker)
    records, _ = tracker.take_records()
    other = Tracker(clock)
    other.restore(records, before["totals"])
    after: Any = stats(other)
    for part in ("totals", "clients", "recent_turns"):
        assert after[part] == before[part]
    assert after["sessions"]["live"] == 2
    assert other.take_records() == ([], {})


def test_a_restored_turn_is_not_counted_again_and_its_session_goes_on(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t1")
    other = Tracker(clock)
    other.restore(tracker.take_records()[0], {"requests": 1, "completed": 1, "tokens_in": "many"})
    finish(other, clock, "t1")
    clock.now += 5
    take_turn(other, clock, "t2", post_ms=1000.0)
    assert stats(other)["totals"]["requests"] == 2
    assert sessions(other)["s"]["turns"] == 2
    records, posts = other.take_records()
    assert ([record.think_ms for record in records], posts) == ([5000.0], {"t1": 1000.0})


def test_the_post_time_of_a_turn_that_was_open_at_a_restart_counts_once(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t1")
    clock.now += 1
    start(tracker, clock, "t2", post_ms=300.0)
    other = Tracker(clock)
    other.restore(tracker.take_records()[0], {})
    start(other, clock, "t2", post_ms=300.0)  # which the relay tells again
    assert sessions(other)["s"]["post_ms"] == sessions(tracker)["s"]["post_ms"] == 300.0
    finish(other, clock, "t2")
    start(other, clock, "t3", post_ms=300.0)
    assert sessions(other)["s"]["post_ms"] == 600.0


def test_sessions_that_are_idle_for_too_long_are_not_restored(tracker: Tracker, clock: Clock) -> None:
    take_turn(tracker, clock, "t")
    records, _ = tracker.take_records()
    clock.now += 1800
    other = Tracker(clock)
    other.restore(records, {})
    assert stats(other)["sessions"]["live"] == 0


def test_what_ended_before_a_restart_has_not_ended_since(tracker: Tracker, clock: Clock) -> None:
    for name in ("silent", "another"):
        take_turn(tracker, clock, name, session=name)
    clock.now += 1800
    for name in ("over", "idle", "live"):
        take_turn(tracker, clock, name, session=name)
    other = Tracker(clock, max_sessions=3)
    other.restore(tracker.take_records()[0], {}, ["over"])
    counts = stats(other)["sessions"]
    assert (counts["ended"], counts["evicted"]) == (0, 0)
    assert {name: row["state"] for name, row in sessions(other).items()}["over"] == "ended"
    other.observe(SessionEnded("live", clock.now))
    assert stats(other)["sessions"]["ended"] == 1


@pytest.mark.parametrize("words", ["hi \u00e4\u4e2d", "half a \ud83d character", "\0 and \u2028"])
def test_stats_are_sent_as_json_whatever_clients_said(tracker: Tracker, clock: Clock, words: str) -> None:
    take_turn(tracker, clock, "t", prompt=words)
    document = {**stats(tracker), "beyond": 2**70, "none": float("nan") if "half" in words else None}
    sent = encode_stats(document)
    assert sent.startswith(STATS_PREFIX)
    assert json.loads(sent) == {**document, "none": None}
