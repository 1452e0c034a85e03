"""The page without Streamlit: formats, status, shaping and charts are pure."""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import stats_server as stats
from patience import PATIENCE_S
from stats_schema import check_stats

import streamlit_dashboard as page
from agent_infra_core.insight.sessions import Session

SOURCE = Path(page.__file__)
TREE = ast.parse(SOURCE.read_text())
SPACE = "\u00a0"
DOCUMENTS = {"busy": stats.busy, "empty": stats.empty, "extreme": stats.extreme, "all down": stats.all_down}


def replica_frame(document: dict[str, Any]) -> Any:
    return page.replica_frame(page.by_urgency(document), document.get("now"))


def golden() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((stats.GOLDEN / "stats.json").read_text())
    return document


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0 ms"), (0.04, "0.0 ms"), (9.9, "9.9 ms"), (9.96, "10 ms"), (340.4, "340 ms"), (999.6, "1.00 s"),
        (3210, "3.21 s"), (32_100, "32.1 s"), (59_960, "1 min"), (125_000, "2 min 05 s"),
        (11_520_000, "3 h 12 min"), (97 * 3_600_000, "4 d 1 h"), (None, "–"), (math.nan, "–"), (math.inf, "–"),
    ],
)  # fmt: skip
def test_a_duration_has_three_figures_and_its_unit(ms: Any, text: str) -> None:
    assert page.duration(ms) == text.replace(" ms", f"{SPACE}ms").replace(" s", f"{SPACE}s").replace(
        " min", f"{SPACE}min"
    ).replace(" h", f"{SPACE}h").replace(" d", f"{SPACE}d")


def test_figures_say_what_they_are_and_dashes_what_is_not_known() -> None:
    assert [page.count(value) for value in (7, 12_345, 1_250_000, 3.2e9, None)] == [
        "7", "12,345", f"1.25{SPACE}M", f"3.20{SPACE}G", "–",
    ]  # fmt: skip
    assert [page.figure(value) for value in (0.3239, 4.859, 43.21, 1840, 0, -2.5, None)] == [
        "0.324", "4.86", "43.2", "1,840", "0", "−2.50", "–",
    ]  # fmt: skip
    assert [page.percent(value) for value in (0.42, 0.004, 0, None)] == [
        f"42{SPACE}%", f"0.4{SPACE}%", f"0{SPACE}%", "–",
    ]  # fmt: skip
    assert page.percent(-0.12, signed=True) == f"−12{SPACE}%"
    assert page.percent(-0.00004, signed=True) == f"0{SPACE}%"
    assert page.things(1, "session") + page.things(2, "session") == "1 session2 sessions"
    assert page.seconds(-3) == f"0{SPACE}s"


def test_an_estimate_has_its_interval_and_a_dash_where_it_refuses_to_guess() -> None:
    agents = {"value": 147.0, "low": 135.2, "high": 158.8, "unit": "agents"}
    assert page.estimate(agents, page.count) == f"147{SPACE}agents (135 to 159)"
    assert page.estimate({**agents, "value": None}, page.count) == f"135 to 159{SPACE}agents"
    assert page.estimate({"value": None, "low": None, "high": None, "reason": "too few turns"}) == "–"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_documents_of_these_tests_are_such_as_the_proxy_makes(name: str) -> None:
    check_stats(DOCUMENTS[name]())


@pytest.mark.parametrize("name", [*DOCUMENTS, "golden", "nothing at all"])
def test_every_document_is_shaped_without_nan_or_none_in_a_text(name: str) -> None:
    others: dict[str, Any] = {"golden": golden(), "nothing at all": {}}
    document = others[name] if name in others else DOCUMENTS[name]()
    entries = page.listed(document, "analysis")
    frames = [
        *(shape(document) for shape in (replica_frame, page.failure_frame, page.watchdog_frame, page.run_frame)),
        *(shape(document) for shape in (page.pipeline_frame, page.hours_frame, page.cost_frame)),
        *(shape(entry) for entry in entries for shape in (page.option_frame, page.share_frame)),
    ]
    shown = [str(value) for frame in frames for column in frame for value in frame[column] if isinstance(value, str)]
    for status in page.status_of(document, None, 0.2):
        shown += [status.word, status.sentence, status.hint]
    for metric in (*page.metrics_of_now(document), *page.metrics_of_minute(document)):
        shown += [metric.label, metric.value, metric.note]
    assert not [text for text in shown if re.search(r"\b(nan|NaN|None|inf|undefined)\b", text)]


def test_the_browser_parts_know_no_markup() -> None:
    for script in (page.BAR_JS, page.TRACE_JS):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", script)


def test_only_views_and_main_speak_to_streamlit_and_nothing_knows_agent_infra() -> None:
    text = SOURCE.read_text()
    views = text[: text.index("# Views: the only part")].count("\n")
    assert min(node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Name) and node.id == "st") > views
    imported = {alias.name for node in ast.walk(TREE) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.startswith("agent_infra")]


def test_what_reads_markdown_gets_words_of_this_program_alone() -> None:
    """Text from agents is in st.text, st.code, tables and the browser parts, which know no markup."""
    text = SOURCE.read_text()
    assert "unsafe_allow" not in text
    assert not re.search(r"st\.(write|latex|info|success|toast)\(", text)
    assert re.findall(r"st\.html\((.*)\)", text) == ['f"<style>{PAGE_CSS}</style>"']
    markdown = {
        ast.unparse(node.args[0])
        for node in ast.walk(TREE)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("st.markdown", "st.caption", "st.error")
        and not isinstance(node.args[0], ast.Constant)
    }
    assert markdown == {"title", "f\"**Turn {int(turn['number'])}**\""}
    calls = [node for node in ast.walk(TREE) if isinstance(node, ast.Call) and ast.unparse(node.func) == "show_card"]
    assert {ast.unparse(call.args[0]) for call in calls if not isinstance(call.args[0], ast.Constant)} == {"title"}
    titles = [
        node.value
        for node in ast.walk(TREE)
        if isinstance(node, ast.Assign) and "title" in map(ast.unparse, node.targets)
    ]
    assert [ast.unparse(title) for title in titles] == [
        "f'**{hours.columns[0]}**, last {seconds(since_s)}' if not hours.empty else '**GPU time**'"
    ]


def test_what_is_not_known_of_a_change_has_no_row() -> None:
    entry = stats.analysis("GPU-BOUND")[0]
    assert {"now", "suggested", "+1 replica"} < set(page.option_frame(entry)["what if"])
    unknown = {"value": None, "low": None, "high": None, "unit": "", "reason": "too few turns"}
    entry["what_ifs"] = [{**row, "change": unknown} for row in entry["what_ifs"]]
    assert "+1 replica" not in set(page.option_frame(entry)["what if"])


def test_functions_stay_small() -> None:
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    large = {node.name: (node.end_lineno or 0) - node.lineno for node in functions}
    assert {name: lines for name, lines in large.items() if lines > 55} == {}


# --- Status -----------------------------------------------------------------------------------------------------------

VERDICTS = ["GPU-BOUND", "AGENT-BOUND", "NO DATA"]


def idle(document: dict[str, Any], seconds: float) -> dict[str, Any]:
    """``document`` so long after its last turn, as the controller goes on making it."""
    document["now"] += seconds
    document["queue"].update(in_flight=0, pending=0, waiting=[])
    return document


def failed(document: dict[str, Any], replicas: int) -> dict[str, Any]:
    for row in document["backends"][:replicas]:
        failure = {"kind": "out_of_memory", "line": "CUDA out of memory", "hint": "Lower gpu_memory_utilization."}
        row.update(state="failed", healthy=False, reason="CUDA out of memory", failure=failure)
    return document


def all_turns_fail(document: dict[str, Any]) -> dict[str, Any]:
    document["totals"].update(requests=2000, errors=12)
    document["recent_outcomes"] = stats.outcomes(0, errors=12)
    document["recent_turns"] = [
        stats.turn(number, "s", outcome="error", error="the replica died") for number in range(12)
    ]
    return document


def healthy(document: dict[str, Any]) -> dict[str, Any]:
    document["recent_turns"] = [stats.turn(number, "s", outcome="completed") for number in range(100)]
    document["recent_outcomes"] = stats.outcomes(3600)
    return document


STATES: dict[str, tuple[Any, float, Any]] = {  # change of the document, age of the figures, words of the headline
    "working": (healthy, 0.3, None),
    "one failed": (lambda document: failed(healthy(document), 1), 0.3, "FAILED"),
    "all failed": (lambda document: failed(healthy(document), 4), 0.3, "DOWN"),
    "failing turns": (all_turns_fail, 0.3, "ERRORS"),
    "idle": (lambda document: idle(healthy(document), 400.0), 0.3, "IDLE"),
    "restarted": (lambda document: {**healthy(document), "uptime_seconds": 20.0}, 0.3, None),
    "controller dead": (
        lambda document: {**failed(healthy(document), 1), "snapshot_age_ms": 24_500},
        25.0,
        "CONTROLLER GONE",
    ),
    "no traffic": (lambda _document: stats.empty(), 0.3, "NO TRAFFIC"),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("verdict", VERDICTS)
def test_the_status_contradicts_neither_the_figures_nor_itself(verdict: str, state: str) -> None:
    change, age_s, headline = STATES[state]
    document = change(stats.busy(analysis=stats.analysis(verdict)))
    statements = page.status_of(document, None, age_s, "UTC")
    check_truth(document, age_s, statements)
    words = [status.word for status in statements]
    expected = headline or ("MEASURING" if verdict == "NO DATA" else verdict)
    assert words[0] == expected, words


def check_truth(document: dict[str, Any], age_s: float, statements: list[Any]) -> None:
    """What is said follows from the document, whatever it is."""
    words, said = [status.word for status in statements], " ".join(status.sentence for status in statements)
    rows = document["backends"]
    down, ready = [row for row in rows if row["state"] == "failed"], [row for row in rows if row["state"] == "ready"]
    if age_s >= page.STALE_S:
        assert words == ["CONTROLLER GONE"]  # and nothing of the past as if it were now
        return
    assert ("FAILED" in words or "DOWN" in words) == bool(down)
    assert ("DOWN" in words) == (bool(down) and not ready)
    if down:
        assert statements[0].judgement == page.BAD
        assert statements[0].hint == "Lower gpu_memory_utilization."
        assert f"{len(down)} of {len(rows)} replicas failed: {down[0]['id']} (out of memory)" in said
    failed, finished = (int(document["recent_outcomes"]["errors"]), page.recent_failures(document)[1])
    assert ("ERRORS" in words) == bool(failed)
    if failed:
        assert f"{failed} of {finished} turns failed" in said
        assert page.metrics_of_now(document)[3].value == page.percent(failed / finished)
    is_open = document["queue"]["in_flight"] + document["queue"]["pending"] > 0
    quiet_s = min((document["now"] - turn["finished_at"] for turn in document["recent_turns"]), default=None)
    assert ("NO TRAFFIC" in words) == (document["totals"]["requests"] == 0 and not is_open)
    assert ("IDLE" in words) == (not is_open and quiet_s is not None and quiet_s >= page.IDLE_S)
    verdict = document["analysis"][0]["verdict"]["name"]
    assert (verdict in words) == (verdict != "NO DATA" and not {"IDLE", "NO TRAFFIC", "DOWN"} & set(words))
    assert not ({"MEASURING", "IDLE", "NO TRAFFIC"} & set(words) and "sure" in said)


def test_twelve_of_twelve_failing_turns_are_told_with_their_window() -> None:
    """Among two thousand earlier ones, they were 0.6 %."""
    statements = page.status_of(all_turns_fail(stats.busy()), None, 0.3)
    assert statements[0].sentence.startswith(f"12 of 12 turns failed in the last 5{SPACE}min: the replica")


def test_the_status_and_the_overview_speak_of_the_same_turns() -> None:
    """Not of the hundred that /stats lists: of 2,000 turns in five minutes, those may all have failed, or none."""
    for document in (all_turns_fail(stats.busy()), healthy(stats.busy())):
        document["recent_outcomes"] = stats.outcomes(1900, errors=100)
        (status,) = (each for each in page.status_of(document, None, 0.3) if each.word == "ERRORS")
        assert status.sentence.startswith(f"100 of 2,000 turns failed in the last 5{SPACE}min")
        metric = page.metrics_of_now(document)[3]
        assert (metric.value, metric.note, metric.judgement) == (f"5{SPACE}%", f"last 5{SPACE}min", page.BAD)
    assert page.metrics_of_now({})[3].value == page.UNKNOWN


def test_slots_are_those_of_replicas_that_can_have_turns() -> None:
    document = stats.busy()
    document["backends"][0].update(state="failed", healthy=False)
    document["backends"][1].update(state="draining")
    document["backends"][2].update(state="loading")
    assert page.metrics_of_now(document)[1].note == "of 128 slots"


def test_only_what_an_earlier_controller_measured_tells_of_a_restart() -> None:
    """A fresh controller may have served more turns than /stats lists; a history off has nothing to restore."""
    document = {**healthy(stats.busy()), "uptime_seconds": 20.0}
    assert "RESTARTED" in [status.word for status in page.status_of(document, None, 0.3)]
    points = document["throughput"]["history"]
    document["throughput"]["history"] = [point for point in points if point["at"] >= stats.NOW - 20]
    assert "RESTARTED" not in [status.word for status in page.status_of(document, None, 0.3)]


def test_a_proxy_that_does_not_answer_is_not_said_to_have_lost_its_controller() -> None:
    (status,) = page.status_of(stats.busy(), None, 25.0)
    assert (status.word, "for 25" in status.sentence) == ("NO CONNECTION", True)


def test_a_time_of_another_day_has_its_day() -> None:
    assert page.clock(stats.NOW, "UTC", stats.NOW + 60) == "16:30:00"
    assert page.clock(stats.NOW, "UTC", stats.NOW + 86_400) == "22 Nov 16:30:00"
    assert page.paused_status({}, "UTC", stats.NOW).sentence == "The figures stand still until you resume."
    assert "are of 16:30:00" in page.paused_status(stats.busy(), "UTC", stats.NOW).sentence


def test_what_is_not_known_is_a_gap_in_the_course_of_a_figure() -> None:
    document = stats.busy()
    for point in document["throughput"]["history"]:
        if stats.NOW - 60 <= point["at"] < stats.NOW - 30:
            point["turns_per_minute"] = None
    document["throughput"]["history"] = [p for p in document["throughput"]["history"] if p["at"] >= stats.NOW - 120]
    course = page.metrics_of_minute(document)[0].course
    assert [page.is_known(value) for value in course] == [True] * 4 + [False] * 2 + [True]


@pytest.mark.parametrize("verdict", ["GPU-BOUND", "AGENT-BOUND", "NO DATA"])
def test_an_idle_deployment_says_since_when_and_how_old_its_last_verdict_is(verdict: str) -> None:
    """Whatever an idle fleet looks like: for some minutes limited by its agents, later there is no data."""
    document = idle(healthy(stats.busy(analysis=stats.analysis(verdict))), 719.0)
    document["analysis"][0].update(stats.last_verdict("GPU-BOUND"), model="qwen", gpu=None)
    (status,) = page.status_of(document, None, 0.3, "UTC")
    assert status.word == "IDLE"
    assert f"No turn for 11{SPACE}min 59{SPACE}s, since " in status.sentence
    assert f"Last verdict: qwen: GPU-BOUND as of 12{SPACE}min ago." in status.sentence


def test_while_there_is_no_verdict_the_last_one_stands_there_with_its_age() -> None:
    document = healthy(stats.busy(analysis=stats.analysis("NO DATA")))
    document["analysis"][0].update(stats.last_verdict("BALANCED"))
    status = page.status_of(document, None, 0.3)[-1]
    assert status.word == "MEASURING"
    assert status.sentence.endswith(f"too few for any number. The last one: BALANCED as of 1{SPACE}s ago.")


def test_a_suggestion_states_its_price_or_why_that_is_not_known() -> None:
    priced = {**stats.analysis("GPU-BOUND")[0]["suggestion"], "sentence": "Run 3 agents: +4 % turns/h."}
    assert page.advice_of({"suggestion": priced}) == f"Run 3 agents: +4{SPACE}% turns/h."
    unpriced = {"bound_by": "kv", "sentence": "Run 3 agents.", "then": {"change": {"low": None, "reason": "too few"}}}
    text = "Run 3 agents. What it does to throughput isn't known: too few."
    assert page.advice_of({"suggestion": unpriced}) == text


def test_without_a_connection_nothing_else_is_said() -> None:
    problem = page.ProxyError("There is no proxy at http://x.", "Start one.")
    (status,) = page.status_of(failed(stats.busy(), 4), problem, 71.0)
    assert status.judgement == page.BAD
    assert f"1{SPACE}min 11{SPACE}s old" in status.sentence
    assert page.status_of({}, None, None)[0].word == "CONNECTING"


def test_replicas_that_start_say_how_far_they_are() -> None:
    document = stats.busy(replicas=2)
    document["backends"][0].update(state="pending", reason="Resources")
    document["backends"][1].update(state="loading", progress="5/9")
    status = page.status_of(document, None, 0.3)[0]
    assert status.word == "ERRORS"
    said = page.status_of(healthy(document), None, 0.3)[0]
    assert (said.word, said.judgement) == ("STARTING", page.BUSY)
    assert said.sentence == "0 of 2 replicas ready; 1 pending, 1 loading: qwen-1 (Resources), qwen-2 (5/9)."


# --- Replicas ---------------------------------------------------------------------------------------------------------


def test_what_needs_a_look_stands_first() -> None:
    frame = replica_frame(stats.extreme())
    assert [each for (each,) in frame["state"][:3]] == ["✕ failed", "✕ unhealthy", "▲ loading"]
    marked = dict(zip(frame["replica"][3:7], frame["note"][3:7], strict=True))
    assert marked == {
        "qwen-9": "slowest", "qwen-10": "tunnel down", "qwen-11": "job ends soon", "qwen-12": "KV cache full",
    }  # fmt: skip
    assert list(frame["replica"][7:10]) == ["qwen-1", "qwen-2", "qwen-3"]


def test_the_slowest_replica_is_marked_only_when_it_is_slower_than_the_others() -> None:
    alike, one = stats.busy(), stats.busy()
    one["backends"][2]["latency_ms"] = stats.percentiles(20_000.0)
    assert set(replica_frame(alike)["note"]) == {""}
    assert list(replica_frame(one).query("note == 'slowest'")["replica"]) == ["qwen-3"]


def test_replicas_keep_their_rows_while_one_is_chosen() -> None:
    """Streamlit knows a chosen row by its place: also one that fails or vanishes stays where it was."""
    former = page.by_urgency(stats.busy())
    document = stats.busy(replicas=5)
    document["backends"][3].update(state="failed", healthy=False)
    del document["backends"][1]
    assert page.by_urgency(document)[0]["id"] == "qwen-4"
    rows, others = page.arranged(former, page.by_urgency(document), gone="gone")
    frame = page.replica_frame(rows, document["now"])
    assert list(frame["replica"]) == ["qwen-1", "qwen-2", "qwen-3", "qwen-4"]
    assert [state for (state,) in frame["state"]] == ["● ready", "○ gone", "● ready", "✕ failed"]
    assert [row["id"] for row in others] == ["qwen-5"]


# --- Sessions and turns -----------------------------------------------------------------------------------------------


def test_rows_keep_their_place_and_new_sessions_wait_until_they_are_asked_for() -> None:
    former = [stats.session_row(number) for number in range(3)]
    later = [stats.session_row(9), {**former[2], "turns": 99}, former[0]]  # without the second one
    rows, others = page.arranged(former, later, gone="not current")
    assert [row["id"] for row in rows] == [row["id"] for row in former]
    assert (rows[2]["turns"], others) == (99, [later[0]])
    assert [row["state"] for row in rows] == [former[0]["state"], "not current", former[2]["state"]]


def test_a_session_thinks_or_is_silent_in_its_own_view_as_in_the_list() -> None:
    row = {**stats.session(1, state="idle"), "turns": 10, "last_seen": stats.NOW - 31}
    for think_ms, word in ((9 * 4000.0, "silent"), (9 * 90_000.0, "thinking")):
        row.update(pre_ms=think_ms / 2, post_ms=think_ms / 4, unaccounted_ms=think_ms / 4)
        assert page.session_facts(row, stats.NOW).startswith(word)


@pytest.mark.parametrize(
    ("silent_s", "think_s", "word"),
    [(20.0, 4.0, "thinking"), (31.0, 4.0, "silent"), (31.0, 90.0, "thinking"), (1620.0, 90.0, "silent")],
)
def test_a_session_that_is_quiet_for_longer_than_it_thinks_is_not_said_to_think(
    silent_s: float, think_s: float, word: str
) -> None:
    row = stats.session_row(1, "idle")
    row.update(last_at=stats.NOW - silent_s, turns=10, think_s=9 * think_s)
    assert page.session_frame([row], stats.NOW)["state"].tolist() == [word]


@pytest.mark.parametrize("turns", [1, 2, 10])
@pytest.mark.parametrize("think_s", [None, 1.0, 20.0, 90.0])
@pytest.mark.parametrize("silent_s", [0.0, 29.0, 31.0, 79.0, 81.0, 370.0])
def test_sessions_that_work_or_think_are_those_that_the_proxy_counts_as_alive(
    turns: int, think_s: float | None, silent_s: float
) -> None:
    sum_s = None if think_s is None else think_s * (turns - 1)
    session = Session("s", None, None, "m", stats.NOW - silent_s, turns=turns)
    session.think_ms = sum_s and 1000 * sum_s
    row = {**stats.session_row(1, "idle"), "last_at": stats.NOW - silent_s, "turns": turns, "think_s": sum_s}
    assert (page.session_state(row, stats.NOW) == "thinking") == session.is_alive(stats.NOW)


@pytest.mark.parametrize(("tokens_in", "shown"), [(1000, 90.0), (0, None), (None, None)])
def test_what_was_cached_is_a_share_of_the_input(tokens_in: int | None, shown: float | None) -> None:
    row = {**stats.session_row(1), "tokens_in": tokens_in, "cached_tokens": 900}
    (value,) = page.session_frame([row], stats.NOW)["cached"]
    assert value == shown or (shown is None and not page.is_known(value))


def test_the_phases_of_a_waterfall_follow_each_other_on_one_axis() -> None:
    turns = [stats.traced_turn(number, "s") for number in (7, 2)]  # latest first
    drawn = page.waterfall(turns, 7)
    assert [row["number"] for row in drawn["rows"]] == [2, 7]
    assert [row["is_open"] for row in drawn["rows"]] == [False, True]
    names = [[name for name, _, _ in row["bars"]] for row in drawn["rows"]]
    assert names[1] == ["think", "queued", "retry", "replayed prefill", "prefill", "decode"]
    for row in drawn["rows"]:
        for (_, left, width), (_, following, _) in zip(row["bars"], row["bars"][1:], strict=False):
            assert left + width == pytest.approx(following, abs=0.01)
    assert drawn["rows"][0]["bars"][0][1] == 0.0
    assert drawn["rows"][1]["bars"][-1][1] + drawn["rows"][1]["bars"][-1][2] == pytest.approx(100.0, abs=0.01)
    assert "cache miss" in drawn["rows"][1]["note"]


def test_think_time_contains_idle_time_and_an_answer_that_was_not_streamed_is_one_piece() -> None:
    turn = {**stats.traced_turn(3, "s"), "prefill_ms": None, "decode_ms": None}
    phases = page.phases_of(turn)
    assert (phases["think"], phases["idle"], phases["inference"]) == (2000.0, 1000.0, turn["inference_ms"])
    assert "inference" not in page.phases_of(stats.traced_turn(3, "s"))


def test_a_turn_says_what_was_cached_expected_and_why_it_was_missed() -> None:
    facts = dict(page.turn_facts(stats.traced_turn(7, "s")))
    assert facts["cached"] == f"1,800 of {facts['tokens'].split()[0]} input tokens, 2,000 expected"
    assert facts["cache miss"] == stats.MISS


@pytest.mark.parametrize("span_ms", [3.0, 900.0, 61_000.0, 7_200_000.0, 900_000_000.0])
def test_an_axis_has_a_few_round_times(span_ms: float) -> None:
    ticks = page.ticks(span_ms)
    assert 2 <= len(ticks) <= 7
    assert ticks[0] == 0
    assert ticks[-1] <= span_ms


# --- Analysis and charts ----------------------------------------------------------------------------------------------


def test_steps_are_flat_and_a_gap_of_the_controller_is_a_gap_everywhere() -> None:
    document = stats.over_time(stats.NOW - 3600, stats.NOW, 300)
    frame = page.history_frame(document)
    at = document["series"]["at"]
    assert len(frame) == 2 * len(at)
    values = frame["turns_per_minute"]
    assert (values[0::2].reset_index(drop=True).dropna() == values[1::2].reset_index(drop=True).dropna()).all()
    gap = frame[values.isna()]
    assert len(gap) == 2 * document["series"]["turns_per_minute"].count(None)
    assert gap.drop(columns="at").isna().all(axis=None)
    assert 6 < frame["latency_ms_p50"].mean() < 8  # s
    assert 500 < document["series"]["ttft_ms_p50"][0] < 800
    assert page.history_frame({}).empty


def test_the_history_is_asked_for_in_steps_that_viewers_share() -> None:
    paths = {page.history_path(stats.NOW + second, 3600.0, None) for second in range(10)}
    assert len(paths) <= 2
    assert page.history_path(stats.NOW, math.inf, "a b") == "/history?from=0&points=300&model=a+b"


def test_every_series_has_its_chart_and_finish_reasons_are_found_by_name() -> None:
    frame = page.history_frame(stats.over_time(stats.NOW - 3600, stats.NOW, 100))
    panels = page.panels_of(page.HISTORY_PANELS, frame.columns)
    drawn = {name for panel in panels for name in panel.lines}
    assert set(frame.columns) - drawn == {"at", "queued_ms_p95"}
    assert panels[-1].lines == {"finish_reasons_stop": "stop", "finish_reasons_tool_calls": "tool_calls"}
    assert page.panels_of([page.QUEUE], ["at"]) == ()


def test_the_charts_over_time_share_what_is_zoomed_and_a_crosshair() -> None:
    template = page.timeline_chart(page.OVERVIEW_PANELS).to_dict()
    params = {each["name"]: each for each in template["params"]}
    assert len(params["moment"]["views"]) >= 3
    assert params["zoom"]["select"]["type"] == "interval"
    assert "'~s'" in json.dumps(template)
    assert '"format": "~s"' not in json.dumps(template)  # with which a half is "500m"
    strip, *rest = template["vconcat"]
    assert "domain" not in json.dumps(strip["encoding"]["x"])
    for chart in rest:
        for layer in chart["layer"]:
            assert layer["encoding"]["x"]["scale"]["domain"] == {"param": "zoom"}


@pytest.mark.parametrize("is_dark", [False, True])
def test_text_and_lines_of_charts_stand_out_from_their_background(is_dark: bool) -> None:
    background = "#121417" if is_dark else "#f4f5f7"
    config = page.themed({}, is_dark)["config"]
    for text in (config["axis"]["labelColor"], config["legend"]["labelColor"], config["title"]["color"]):
        assert contrast(text, background) >= 4.5
    for line in (*config["range"]["category"], config["rule"]["color"]):
        assert contrast(line, background) >= 3


def contrast(one: str, other: str) -> float:
    """Contrast of two colours, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_curve_has_the_run_its_limits_and_room_for_their_labels() -> None:
    frame = page.capacity_frame(stats.analysis("GPU-BOUND")[0])
    assert list(frame["kind"].value_counts()[[*page.CAPACITY.values(), "limit"]]) == [40, 1, 3]
    limits = frame[frame["kind"] == "limit"].sort_values("agents")
    assert list(limits["text"]) == ["KV cache full 164", "70 % utilisation 169", "knee 181"]
    assert list(limits["turns_per_hour"]) == sorted(limits["turns_per_hour"], reverse=True)
    assert limits["turns_per_hour"].min() > frame[frame["kind"] != "limit"]["high"].max()
    assert page.capacity_frame(stats.analysis("NO DATA")[0]).empty
    agent_bound = page.capacity_frame(stats.analysis("AGENT-BOUND")[0])
    curve = agent_bound[agent_bound["kind"] == page.CAPACITY["curve"]]
    assert (agent_bound["agents"] <= max(curve["agents"].max(), 20.0)).all()  # nothing beyond what may be said


def test_what_is_not_known_of_gpu_time_is_told_of_replicas() -> None:
    assert page.hours_frame(stats.busy()).columns[0] == "GPU time"
    none = {"pending": 0.0, "loading": 0.0002, "ready_busy": 0.0, "ready_idle": 0.0}
    some = {**none, "ready_busy": 1.5}
    rows = [{"model": name, "gpu_hours": dict.fromkeys(none, 0.0), "replica_hours": some} for name in ("a", "b")]
    document = {"accounting": {"since": 0, "gpu_hours": {}, "replica_hours": some, "by_model": rows}}
    frame = page.hours_frame(document)
    assert list(frame["replica time"]) == ["a", "b", "all"]
    assert list(frame["busy"]) == [f"1{SPACE}h 30{SPACE}min"] * 3
    assert list(frame["loading"]) == [f"720{SPACE}ms"] * 3
    assert page.hours_frame({"accounting": None}).empty


# --- Client -----------------------------------------------------------------------------------------------------------


def test_a_url_is_checked_and_loses_its_slash() -> None:
    assert page.checked_url("http://127.0.0.1:5800/") == "http://127.0.0.1:5800"
    assert page.checked_url("localhost:5800") == "http://localhost:5800"
    for wrong in ("ftp://host", "http://user:word@host", "http://", "http://host/?key=1"):
        with pytest.raises(ValueError, match="--proxy"):
            page.checked_url(wrong)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"document": stats.busy(schema_version=1)}, "speaks version 1"),
        ({"document": stats.busy(schema_version=99)}, "speaks version 99"),
        ({"document": {"hello": "world"}}, "isn't Agent Infra's proxy"),
        ({"document": b"<html>"}, "isn't Agent Infra's proxy"),
        ({"status": 503}, "as the test said"),
        ({"status": 404}, "isn't Agent Infra's proxy"),
        ({"token": "secret-token"}, "asks for its key"),
    ],
)
def test_a_proxy_that_gives_no_figures_is_told_with_what_to_do(change: dict[str, Any], what: str) -> None:
    with stats.serving(stats.busy()) as server:
        for name, value in change.items():
            setattr(server, name, value)
        with pytest.raises(page.ProxyError, match=what) as caught:
            page.ProxyClient(server.url, None).get("/stats")
        assert caught.value.fix


def test_a_proxy_that_is_busy_gives_its_own_reason() -> None:
    for body, what in ((b"", "has no figures yet"), (b'{"error": {"message": "the controller is gone"}}', "is gone")):
        with pytest.raises(page.ProxyError, match=what) as caught:
            page.document_of("http://x", "/stats", 503, body)
        assert "started" not in str(caught.value)


def test_a_key_goes_in_the_header_and_nowhere_else() -> None:
    with stats.serving(stats.busy()) as server:
        server.token = "secret-token"
        assert page.ProxyClient(server.url, "secret-token").get("/stats")["schema_version"] == 2
        assert server.asked == ["/stats"]


def test_many_viewers_ask_the_proxy_once() -> None:
    with stats.serving(stats.busy()) as server:
        documents = page.Documents(page.ProxyClient(server.url, None))
        readings = [documents.read("/stats", 60.0, patience_s=PATIENCE_S) for _ in range(20)]
        assert len(server.asked) == 1
        assert all(reading.document == server.document for reading in readings)


def test_the_last_figures_stay_while_the_proxy_is_gone_and_are_renewed_when_it_is_back() -> None:
    with stats.serving(stats.busy()) as server:
        documents, port = page.Documents(page.ProxyClient(server.url, None)), server.port
        assert documents.read("/stats", 0.0, patience_s=PATIENCE_S).problem is None
    lost = documents.read("/stats", 0.0, patience_s=PATIENCE_S)
    assert lost.problem is not None
    assert "There is no proxy" in lost.problem.what
    assert lost.document is not None
    with stats.serving(stats.busy(uptime_seconds=1.0), port):
        found = documents.read("/stats", 0.0, patience_s=PATIENCE_S)
        assert found.problem is None
        assert found.document is not None
        assert found.document["uptime_seconds"] == 1.0


def test_a_proxy_that_refuses_a_document_says_why() -> None:
    with stats.serving(stats.busy()) as server:
        client = page.ProxyClient(server.url, None)
        with pytest.raises(page.ProxyError, match="no such session") as caught:
            client.get("/stats/sessions/nobody")
        assert caught.value.is_final


def test_the_figures_of_now_wait_for_no_slow_question() -> None:
    free = threading.Event()

    class Slow(page.ProxyClient):
        def get(self, path: str) -> Any:
            if path != "/stats":
                free.wait(PATIENCE_S)
            return {}

    documents = page.Documents(Slow("http://x", None))
    for number in range(5):
        documents.read(f"/sessions?offset={number}", 0.0, patience_s=0.0)
    assert documents.read("/stats", 0.0, patience_s=PATIENCE_S).document == {}
    free.set()


def test_no_more_documents_are_kept_than_are_read() -> None:
    with stats.serving(stats.busy()) as server:
        documents = page.Documents(page.ProxyClient(server.url, None))
        for number in range(2 * documents.MOST):
            documents.read(f"/stats/sessions/{number}", 60.0, patience_s=PATIENCE_S)
        assert len(documents._kept) == documents.MOST


def test_the_page_is_in_the_wheel_with_its_colours() -> None:
    text = (SOURCE.parent / "pyproject.toml").read_text()
    assert '"streamlit_dashboard.py"' in text
    assert '".streamlit" = "agent_infra_data/.streamlit"' in text
    assert (SOURCE.parent / ".streamlit/config.toml").exists()


def test_importing_agent_infra_loads_neither_streamlit_nor_pandas() -> None:
    program = "import sys, agent_infra; assert not {'streamlit', 'pandas', 'altair'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=SOURCE.parent, check=True, timeout=PATIENCE_S)
