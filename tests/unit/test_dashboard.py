"""The page without Streamlit: formats, shaping, charts and panels are pure."""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stats_server as stats
from patience import PATIENCE_S
from stats_schema import check_stats

import streamlit_dashboard as page

SOURCE = Path(page.__file__)
TREE = ast.parse(SOURCE.read_text())
SPACE = "\u00a0"
DOCUMENTS = {"busy": stats.busy, "empty": stats.empty, "extreme": stats.extreme, "all down": stats.all_down}


def golden() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((stats.GOLDEN / "stats.json").read_text())
    return document


def texts(node: Any) -> str:
    """All text of a node, as a reader meets it."""
    if node is None:
        return ""
    return node if isinstance(node, str) else "".join(texts(child) for child in node[2:])


def nodes(node: Any) -> Iterator[Any]:
    """A node and all below it."""
    if isinstance(node, list):
        yield node
        for child in node[2:]:
            yield from nodes(child)


def all_panels(document: dict[str, Any], opened: frozenset[str] = frozenset()) -> list[Any]:
    entries = page.listed(document, "analysis") or [{}]
    details = {
        str(name): {"now": stats.NOW, "turns": [stats.turn(1, str(name))]} for name in page.session_rows(document)
    }
    opened |= {f"session:{name}" for name in details} | {f"turn:turn-{number}" for number in range(20)}
    return [
        page.header_panel(document, "http://127.0.0.1:5800", 1.5, None, False),
        page.verdict_panel(document),
        page.queue_panel(document),
        *(page.pipeline_panel(document, entry, ["one", "two"]) for entry in entries),
        *(page.what_if_panel(entry) for entry in entries),
        page.backends_panel(page.backend_frame(document), True),
        page.sessions_panel(document, page.session_frame(document), opened, details),
        page.turns_panel(page.turn_frame(page.listed(document, "recent_turns"), document.get("now")), opened),
        page.watchdog_panel(page.watchdog_frame(document)),
        page.cost_panel(document),
    ]


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0 ms"), (0.04, "0.0 ms"), (9.9, "9.9 ms"), (9.96, "10 ms"), (340.4, "340 ms"), (999.6, "1.00 s"),
        (3210, "3.21 s"), (32_100, "32.1 s"), (59_960, "1 min 00 s"), (125_000, "2 min 05 s"),
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


@pytest.mark.parametrize("name", [*DOCUMENTS, "golden", "nothing at all", "nothing but nulls"])
def test_every_panel_shows_every_document_without_nan_or_none(name: str) -> None:
    others: dict[str, Any] = {"golden": golden(), "nothing at all": {}, "nothing but nulls": dict.fromkeys(golden())}
    document = others[name] if name in others else DOCUMENTS[name]()
    for panel in all_panels(document):
        text = texts(panel)
        assert not re.search(r"\b(nan|NaN|None|inf|undefined)\b", text), text[:500]
        assert json.loads(json.dumps(panel, allow_nan=False)) == panel


def test_whatever_an_agent_sends_stays_text() -> None:
    """Tags and attribute names are words of this program; what came from outside is text or an attribute's value."""
    tags: set[str] = set()
    attributes: set[str] = set()
    document = stats.extreme()
    for panel in all_panels(document, frozenset({"clients", "turns"})):
        for node in nodes(panel):
            tags.add(node[0])
            attributes.update(node[1])
    words = set(re.findall(r'"([a-z0-9]+)"', SOURCE.read_text()))
    assert tags <= words
    assert tags.isdisjoint({"script", "iframe", "a", "img", "style", "object", "embed", "link"})
    assert attributes <= {
        "class", "title", "style", "role", "tabindex", "key", "id", "scope", "colspan", "aria-hidden", "aria-label",
        "aria-labelledby", "aria-expanded", "aria-pressed", "data-panel", "data-row", "data-toggle", "data-set",
        "data-age", "points", "fill", "viewBox", "preserveAspectRatio", "vector-effect",
    }  # fmt: skip
    shown = "".join(texts(panel) for panel in all_panels(document))
    assert all(text in shown for text in stats.HOSTILE)


def test_the_browser_part_knows_no_markup() -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", page.JS)


def test_only_views_and_main_speak_to_streamlit_and_nothing_knows_agent_infra() -> None:
    text = SOURCE.read_text()
    views = text[: text.index("# Views: the only part")].count("\n")
    assert min(node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Name) and node.id == "st") > views
    imported = {alias.name for node in ast.walk(TREE) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
    assert "agent_infra" not in imported
    assert "unsafe_allow_html" not in text
    assert not re.search(r"st\.(markdown|write|html|caption|text)\(", text)


def test_functions_stay_small() -> None:
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    large = {node.name: (node.end_lineno or 0) - node.lineno for node in functions}
    assert {name: lines for name, lines in large.items() if lines > 55} == {}


# --- Replicas ---------------------------------------------------------------------------------------------------------


def test_what_needs_a_look_stands_first() -> None:
    frame = page.backend_frame(stats.extreme())
    assert list(frame["state"][:3]) == ["failed", "unhealthy", "loading"]
    marked = set(frame["id"][3:7])
    assert marked == {"qwen-9", "qwen-10", "qwen-11", "qwen-12"}  # slowest, tunnel down, ends soon, cache full
    assert list(frame["id"][7:10]) == ["qwen-1", "qwen-2", "qwen-3"]


def test_the_slowest_replica_is_marked_only_when_it_is_slower_than_the_others() -> None:
    alike, one = stats.busy(), stats.busy()
    one["backends"][2]["latency_ms"] = stats.percentiles(20_000.0)
    assert not page.backend_frame(alike)["is_slowest"].any()
    frame = page.backend_frame(one)
    assert list(frame[frame["is_slowest"]]["id"]) == ["qwen-3"]
    assert "▲ slowest" in texts(page.backends_panel(frame, False))


def test_columns_of_which_nothing_is_known_are_left_out() -> None:
    text = texts(page.backends_panel(page.backend_frame(stats.empty()), False))
    assert "GPU busy" not in text
    assert "tunnel" not in text
    assert "job ends in" not in text
    assert "no traffic" in text
    text = texts(page.backends_panel(page.backend_frame(stats.busy()), False))
    assert all(word in text for word in ("GPU busy", "GPU memory", "KV cache", "tunnel", "job ends in"))


def test_sixty_four_replicas_are_cut_until_asked_for() -> None:
    frame = page.backend_frame(stats.extreme())
    short, whole = page.backends_panel(frame, False), page.backends_panel(frame, True)
    assert sum(node[0] == "tr" for node in nodes(short)) == 1 + page.LISTED_BACKENDS
    assert sum(node[0] == "tr" for node in nodes(whole)) == 1 + 64
    assert "show all 64 replicas" in texts(short)
    assert "61 of 64 ready" in texts(short)


def test_durations_are_told_by_the_proxys_clock_alone() -> None:
    """Whatever this machine's clock says; and a time of the future is no time ago."""
    document = stats.busy()
    document["clients"][0]["sessions"][0]["last_seen"] = document["now"] + 500
    document["backends"][0]["ends_at"] = document["now"] - 60
    assert page.session_frame(document)["silent_s"].min() == 0
    assert page.backend_frame(document)["left_s"].min() == 0


# --- Sessions and turns -----------------------------------------------------------------------------------------------


def test_a_streamed_turn_is_split_at_its_first_token_and_no_other_is() -> None:
    row = stats.turn(1, "s", inference_ms=5000.0, ttft_ms=800.0)
    streamed, whole = page.turn_frame([row, {**row, "stream": False}], stats.NOW).itertuples(index=False)
    assert (streamed.prefill, streamed.decode) == (800.0, 4200.0)
    assert not page.is_known(streamed.inference)
    assert whole.inference == 5000.0
    assert not page.is_known(whole.prefill)
    assert streamed.total_ms == whole.total_ms


def test_the_parts_of_a_waterfall_are_as_wide_as_they_are_long() -> None:
    bar = page.phase_bar({"pre": 250.0, "queue": None, "decode": 500.0, "unaccounted": 250.0}, 1000.0)
    assert [child[1]["class"].split("ai-")[-1] for child in bar[2:]] == ["pre", "decode", "unaccounted"]
    assert [child[1]["style"] for child in bar[2:]] == ["width:25.00%", "width:50.00%", "width:25.00%"]
    assert bar[1]["aria-label"] == "pre 250 ms, decode 500 ms, unaccounted 250 ms".replace(" ms", f"{SPACE}ms")


def test_sessions_are_grouped_by_client_and_open_to_their_turns() -> None:
    document = stats.busy(clients=2, sessions=6)
    frame = page.session_frame(document)
    closed = texts(page.sessions_panel(document, frame, frozenset(), {}))
    assert "host0:4000" in closed
    assert "Asking the proxy" not in closed
    waiting = page.sessions_panel(document, frame, frozenset({"session:task-0000"}), {})
    assert "Asking the proxy" in texts(waiting)
    detail = {"now": stats.NOW, "turns": [stats.turn(number, "task-0000") for number in range(5)]}
    opened = texts(page.sessions_panel(document, frame, frozenset({"session:task-0000"}), {"task-0000": detail}))
    assert "5 latest turns" in opened
    assert stats.MISS in opened
    gone = {"task-0000": {"problem": "no such session"}}
    assert "no such session" in texts(page.sessions_panel(document, frame, frozenset({"session:task-0000"}), gone))
    folded = page.sessions_panel(document, frame, frozenset({"client:host0:4000 python agent.py --env webshop"}), {})
    assert "task-0000" not in texts(folded)
    assert "task-0001" in texts(folded)


@pytest.mark.parametrize(("prompt", "shown"), [(1000, f"90{SPACE}%"), (0, page.UNKNOWN), (None, page.UNKNOWN)])
def test_what_was_cached_is_a_share_of_the_prompt_and_not_of_the_answer(prompt: int | None, shown: str) -> None:
    document = stats.busy(clients=1, sessions=1)
    figures: dict[str, Any] = {"context_tokens": 1800, "prompt_tokens": prompt, "cached_tokens": 900}
    document["clients"][0]["sessions"] = [stats.session(0, **figures)]
    panel = page.sessions_panel(document, page.session_frame(document), frozenset(), {})
    [row] = [node for node in nodes(panel) if node[1].get("key") == "session:task-0000"]
    assert texts(row[10]) == shown


def test_rows_keep_their_keys_when_their_order_changes() -> None:
    document = stats.busy(clients=1, sessions=5)
    later = copy.deepcopy(document)
    later["clients"][0]["sessions"].reverse()
    keys = []
    for each in (document, later):
        panel = page.sessions_panel(each, page.session_frame(each), frozenset(), {})
        keys.append([node[1]["key"] for node in nodes(panel) if node[0] == "tr" and "key" in node[1]])
    assert sorted(keys[0]) == sorted(keys[1])
    assert keys[0] != keys[1]
    assert len(set(keys[0])) == len(keys[0])


# --- Analysis and charts ----------------------------------------------------------------------------------------------


def test_the_verdict_names_diagnosis_confidence_suggestion_and_advice() -> None:
    text = texts(page.verdict_panel(stats.busy()))
    assert "▲ GPU-BOUND" in text
    assert f"97{SPACE}% sure" in text
    assert "147 agents135 to 159 · now 260" in text
    assert "Run 147 agents (now 260)" in text
    assert "▲ KV-BOUND" in text
    assert "over 99" in texts(page.verdict_panel(stats.busy(analysis=stats.analysis("AGENT-BOUND"))))
    nothing = texts(page.verdict_panel(stats.busy(analysis=stats.analysis("NO DATA"))))
    assert "○ NO DATA" in nothing
    assert "12 of 30 turns" in nothing
    assert "No recent traffic" in texts(page.verdict_panel(stats.busy(analysis=[])))
    assert "No traffic yet" in texts(page.verdict_panel(stats.empty(analysis=[])))


def test_a_share_of_errors_is_judged_and_a_small_one_is_not() -> None:
    calm, bad = stats.busy(), stats.busy()
    bad["totals"].update(errors=800)
    assert not any("ai-bad" in node[1].get("class", "") for node in nodes(page.queue_panel(calm)))
    assert any("ai-bad" in node[1].get("class", "") for node in nodes(page.queue_panel(bad)))


def test_the_timeline_has_all_lines_in_seconds_and_at_most_so_many_points() -> None:
    document = stats.busy()
    frame = page.timeline_frame(document)
    assert set(frame) == {"at", *(name for names in page.TIMELINE.values() for name in names.values())}
    assert len(frame) == 300
    assert 6 < frame["median"].mean() < 8
    document["throughput"]["history"] = stats.history(5000)
    document["throughput"]["history"][0]["latency_ms"] = {"p50": None}
    frame = page.timeline_frame(document)
    assert len(frame) <= page.MAX_POINTS
    assert frame["median"].isna().sum() == frame["95th percentile"].isna().sum() == 1
    assert page.timeline_frame(stats.empty()).empty


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


@pytest.mark.parametrize("chart", [page.timeline_chart, page.capacity_chart])
def test_a_chart_is_the_same_with_its_data_as_the_template_that_is_filled_with_them(chart: Any) -> None:
    document = stats.busy()
    frames = {
        page.timeline_chart: page.timeline_frame(document),
        page.capacity_chart: page.capacity_frame(document["analysis"][0]),
    }
    with pytest.warns(UserWarning, match="deduplicated") if chart is page.timeline_chart else contextlib.nullcontext():
        whole = chart(frames[chart]).to_dict()
    (name,) = whole.pop("datasets")
    template = page.chart_template(chart)
    assert template.pop("usermeta")
    assert _without_names(whole, name) == _without_names(template, "rows")
    text = json.dumps(template)
    assert all(word in text for word in ("tooltip", "title"))


def _without_names(specification: Any, data: str) -> str:
    """A specification with the names of its data and views, which hang on the data, made the same."""
    text = json.dumps(specification, sort_keys=True).replace(f'"{data}"', '"DATA"')
    return re.sub(r'"view_[^"]*"', '"VIEW"', text)


def test_the_crosshair_is_common_to_the_three_charts() -> None:
    template = page.chart_template(page.timeline_chart)
    (moment,) = [each for each in template["params"] if each["name"] == "moment"]
    views = {layer["name"] for chart in template["vconcat"] for layer in chart["layer"] if "name" in layer}
    assert len(views) == 3
    assert views <= set(moment["views"])
    assert template["resolve"]["scale"]["x"] == "shared"


def test_what_is_not_known_of_gpu_hours_is_told_in_replica_hours() -> None:
    assert list(page.hours_frame(stats.busy())["unit"]) == ["GPU-hours"]
    none = {"pending": 0.0, "loading": 0.0, "ready_busy": 0.0, "ready_idle": 0.0}
    some = {**none, "ready_busy": 1.5}
    rows = [{"model": name, "gpu_hours": none, "replica_hours": some} for name in ("a", "b")]
    document = {"accounting": {"since": 0, "gpu_hours": none, "replica_hours": some, "by_model": rows}}
    frame = page.hours_frame(document)
    assert list(frame["unit"]) == ["replica-hours"] * 3
    assert list(frame["ready_busy"]) == [1.5] * 3
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
        ({"document": {"hello": "world"}}, "is not Agent Infra's proxy"),
        ({"document": b"<html>"}, "is not Agent Infra's proxy"),
        ({"status": 503}, "has no figures yet"),
        ({"status": 404}, "is not Agent Infra's proxy"),
        ({"token": "secret-token"}, "asks for its key"),
    ],
)
def test_a_proxy_that_gives_no_figures_is_told_with_what_to_do(change: dict[str, Any], what: str) -> None:
    with stats.serving(stats.busy()) as server:
        for name, value in change.items():
            setattr(server, name, value)
        with pytest.raises(page.ProxyError, match=what) as caught:
            page.ProxyClient(server.url, None).stats()
        assert caught.value.problem.fix


def test_a_key_goes_in_the_header_and_nowhere_else() -> None:
    with stats.serving(stats.busy()) as server:
        server.token = "secret-token"
        assert page.ProxyClient(server.url, "secret-token").stats()["schema_version"] == 2
        assert server.asked == ["/stats"]


def test_many_viewers_ask_the_proxy_once() -> None:
    with stats.serving(stats.busy()) as server:
        poller = page.Poller(page.ProxyClient(server.url, None))
        readings = [poller.read(60.0, patience_s=10.0) for _ in range(20)]
        assert len(server.asked) == 1
        assert all(reading.document == server.document for reading in readings)


def test_the_last_figures_stay_while_the_proxy_is_gone_and_are_renewed_when_it_is_back() -> None:
    with stats.serving(stats.busy()) as server:
        poller, port = page.Poller(page.ProxyClient(server.url, None)), server.port
        assert poller.read(0.0, patience_s=10.0).problem is None
    lost = poller.read(0.0, patience_s=10.0)
    assert lost.problem is not None
    assert "There is no proxy" in lost.problem.what
    assert lost.document is not None
    with stats.serving(stats.busy(uptime_seconds=1.0), port):
        found = poller.read(0.0, patience_s=10.0)
        assert found.problem is None
        assert found.document is not None
        assert found.document["uptime_seconds"] == 1.0


def test_a_sessions_turns_are_asked_for_when_it_is_opened_and_again_only_when_something_happened() -> None:
    name = "a/b c?ü"
    document = stats.busy(clients=1, sessions=1)
    document["clients"][0]["sessions"][0]["id"] = name
    with stats.serving(document) as server:
        poller = page.Poller(page.ProxyClient(server.url, None))
        for _ in range(3):
            reading = poller.read(0.0, [name], patience_s=10.0)
        assert reading.sessions[name]["turns"]
        assert [path for path in server.asked if path != "/stats"] == ["/stats/sessions/a%2Fb%20c%3F%C3%BC"]
        server.document["clients"][0]["sessions"][0]["turns"] += 1
        poller.read(0.0, [name], patience_s=10.0)
        assert len([path for path in server.asked if path != "/stats"]) == 2


def test_an_idle_poller_ends_its_thread_and_starts_another_when_asked() -> None:
    with stats.serving(stats.busy()) as server:
        poller = page.Poller(page.ProxyClient(server.url, None), idle_s=0.0)
        assert poller.read(0.0, patience_s=10.0).document is not None
        thread = poller._thread
        if thread is not None:
            thread.join(timeout=PATIENCE_S)
        assert poller.read(0.0, patience_s=10.0).problem is None


def test_the_page_is_in_the_wheel_with_its_colours() -> None:
    text = (SOURCE.parent / "pyproject.toml").read_text()
    assert '"streamlit_dashboard.py"' in text
    assert '".streamlit" = "agent_infra_data/.streamlit"' in text
    assert (SOURCE.parent / ".streamlit/config.toml").exists()


def test_importing_agent_infra_loads_neither_streamlit_nor_pandas() -> None:
    program = "import sys, agent_infra; assert not {'streamlit', 'pandas', 'altair'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=SOURCE.parent, check=True, timeout=PATIENCE_S)
