"""Every tab of the page under Streamlit's own test harness: what it shows, and that it fails on no document."""

from __future__ import annotations

import json
from typing import Any

import pytest
import stats_server as stats
from program import MODULE, wait_for
from streamlit.testing.v1 import AppTest

PAGE = MODULE.with_name("streamlit_dashboard.py")
TWO_MODELS = [{**entry, "model": name} for name in ("qwen", "llama") for entry in stats.analysis("GPU-BOUND")]
TABS = ["Overview", "Sessions", "Replicas", "Analysis", "History"]


def shown(app: AppTest) -> str:
    """All text of the page."""
    kinds = (app.text, app.code, app.caption, app.markdown, app.metric)
    return "\n".join(str(element.value) for elements in kinds for element in elements)


def settled(app: AppTest) -> AppTest:
    """The page once it has heard of its proxy: a run waits half a second for that, and shows what there is by then."""
    wait_for(lambda: "CONNECTING" not in shown(app) or not app.run(), "figures, or why there are none")
    assert not app.exception
    return app


def run_page(
    monkeypatch: pytest.MonkeyPatch, url: str, *options: str, is_painted: bool = True, **parameters: str
) -> AppTest:
    """The page as it is once the browser has painted the first of it."""
    monkeypatch.setattr("sys.argv", [str(PAGE), "--proxy", url, *options])
    app = AppTest.from_file(str(PAGE), default_timeout=60)
    if is_painted:
        app.session_state["painted"] = True
    for name, value in parameters.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception
    return settled(app)


@pytest.mark.parametrize("tab", TABS)
@pytest.mark.parametrize(
    "document", [stats.busy(), stats.extreme(), stats.all_down(), stats.empty(), stats.busy(analysis=TWO_MODELS)]
)
def test_every_tab_shows_every_document(monkeypatch: pytest.MonkeyPatch, document: Any, tab: str) -> None:
    with stats.serving(document) as server:
        app = run_page(monkeypatch, server.url, tab=tab)
        assert server.url in shown(app)
        assert not app.exception
        tables = {json.loads(element.proto.columns or "{}").keys() and element.proto.id for element in app.dataframe}
        assert bool(tables) or document["totals"]["requests"] == 0 or tab == "History"


def test_only_the_open_tab_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    with stats.serving(stats.busy()) as server:
        app = run_page(monkeypatch, server.url, tab="Replicas")
        assert not app.metric
        assert {path.partition("?")[0] for path in server.asked} == {"/stats"}
        app = run_page(monkeypatch, server.url)
        assert len(app.metric) == 8


def test_the_status_comes_first_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is seen first waits for nothing that takes longer; the browser part asks for the rest."""
    with stats.serving(stats.busy()) as server:
        app = run_page(monkeypatch, server.url, is_painted=False)
        assert "GPU-BOUND" in shown(app)
        assert not app.metric
        app.session_state["painted"] = True
        app.run()
        assert app.metric


def test_without_a_proxy_the_page_says_where_it_looked_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with stats.serving(stats.busy()) as server:
        url = server.url
    app = run_page(monkeypatch, url)
    assert not app.metric
    assert f"There is no proxy at {url}" in shown(app)
    assert "--proxy" in shown(app)


def test_the_pages_own_key_keeps_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_INFRA_PAGE_KEY", "the-right-key")
    with stats.serving(stats.busy()) as server:
        app = run_page(monkeypatch, server.url)
        assert "complete address" in shown(app)
        assert server.asked == []
        assert run_page(monkeypatch, server.url, key="the-right-key").metric


def test_the_proxys_key_comes_from_a_file_or_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    with stats.serving(stats.busy()) as server:
        server.token = "secret-token"
        monkeypatch.setenv("AGENT_INFRA_TOKEN", "secret-token")
        assert run_page(monkeypatch, server.url).metric
    (tmp_path / "key").write_text("another-token\n")
    with stats.serving(stats.busy()) as server:
        server.token = "another-token"
        assert run_page(monkeypatch, server.url, "--token-file", str(tmp_path / "key")).metric


def test_a_paused_page_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with stats.serving(stats.busy()) as server:
        app = run_page(monkeypatch, server.url, tab="Replicas")  # for which it asks one thing, and that has come
        app.button(key="pause").click().run()
        assert "PAUSED" in shown(app)
        asked = len(server.asked)
        app.run()
        assert len(server.asked) == asked
        app.button(key="pause").click().run()
        assert "PAUSED" not in shown(app)


def test_filters_and_order_are_the_proxys_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with stats.serving(stats.busy()) as server:
        app = run_page(monkeypatch, server.url, tab="Sessions")
        assert "Showing 1 to 200 of 2,000 sessions, most recent first." in shown(app)
        app.text_input(key="query").set_value("task-01").run()
        app.selectbox(key="order").set_value("longest wait").run()
        wait_for(lambda: "100 sessions, longest wait first." in shown(app) or not app.run(), "the sessions")
        assert "query=task-01&state=all&sort=queued_s" in server.asked[-1]


def test_a_link_opens_a_session_of_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    with stats.serving(stats.busy()) as server:
        app = run_page(monkeypatch, server.url, session="task-1999")
        wait_for(lambda: "ended" in shown(app) or not app.run(), "the session")
        assert "task-1999" in [element.value for element in app.code]


def test_a_session_that_is_not_known_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with stats.serving(stats.busy()) as server:
        app = run_page(monkeypatch, server.url, session="nobody")
        wait_for(lambda: "no such session" in shown(app) or not app.run(), "the reason")


def test_a_proxy_without_traffic_shows_what_to_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    with stats.serving(stats.empty()) as server:
        app = run_page(monkeypatch, server.url)
        text = shown(app)
        assert "No turn has arrived yet." in text
        assert f"curl {server.url}/v1/chat/completions" in text
        assert '"model": "smollm2"' in text
        assert "attach(client" in text
