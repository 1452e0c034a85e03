"""Every view of the page under Streamlit's own test harness: what it mounts, and that it fails on no document."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import stats_server as stats
from program import MODULE, wait_for
from streamlit.testing.v1 import AppTest

PAGE = MODULE.with_name("streamlit_dashboard.py")
PANELS = ["verdict", "queue", "analysis", "timeline", "backends", "sessions", "turns", "watchdog", "cost"]


def settled(app: AppTest) -> AppTest:
    """The page once it has heard of its proxy: a run waits half a second for that, and shows what there is by then."""
    says = ("data-panel", "ai-problem", "complete address")
    wait_for(lambda: any(word in shown(app) for word in says) or not app.run(), "figures, or why there are none")
    return app


def run_page(monkeypatch: pytest.MonkeyPatch, url: str, *options: str, key: str = "") -> AppTest:
    """The page as it is once the browser has painted the first of it."""
    monkeypatch.setattr("sys.argv", [str(PAGE), "--proxy", url, *options])
    app = AppTest.from_file(str(PAGE), default_timeout=60)
    app.session_state["painted"] = True
    if key:
        app.query_params["key"] = key
    app.run()
    assert not app.exception
    return settled(app)


def mounted(app: AppTest) -> Any:
    """What the browser part gets."""
    return json.loads(app.get("bidi_component")[0].proto.bytes)


def shown(app: AppTest) -> str:
    """Its text."""
    message = mounted(app)
    return json.dumps([message["nodes"], message["slots"]], ensure_ascii=False)


def panels(app: AppTest) -> list[str]:
    return re.findall(r'"data-panel": "(\w+)"', shown(app))


@pytest.mark.parametrize("document", [stats.busy(), stats.extreme(), stats.all_down(), stats.empty()])
def test_every_view_shows_every_document(monkeypatch: pytest.MonkeyPatch, document: Any) -> None:
    with stats.serving(document) as server:
        app = run_page(monkeypatch, server.url)
        assert panels(app) == PANELS
        slots = [element.proto.bytes.decode() for element in app.get("bidi_component")[1:]]
        assert sorted(slots) == sorted(mounted(app)["slots"])
        assert server.url in shown(app)
        assert document["backends"][0]["id"] in shown(app)


def test_header_verdict_and_queue_come_first_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is seen first waits for nothing that takes longer; the browser part asks for the rest."""
    with stats.serving(stats.busy()) as server:
        monkeypatch.setattr("sys.argv", [str(PAGE), "--proxy", server.url])
        app = settled(AppTest.from_file(str(PAGE), default_timeout=60).run())
        assert panels(app) == ["verdict", "queue"]
        assert mounted(app)["isFirst"]
        assert not app.get("vega_lite_chart")
        app.session_state["painted"] = True
        app.run()
        assert panels(app) == PANELS
        assert not mounted(app)["isFirst"]
        assert len(app.get("vega_lite_chart")) == 2


def test_without_a_proxy_the_page_says_where_it_looked_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with stats.serving(stats.busy()) as server:
        url = server.url
    app = run_page(monkeypatch, url)
    assert panels(app) == []
    assert f"There is no proxy at {url}" in shown(app)
    assert "--proxy" in shown(app)


def test_the_pages_own_key_keeps_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_INFRA_PAGE_KEY", "the-right-key")
    with stats.serving(stats.busy()) as server:
        app = run_page(monkeypatch, server.url)
        assert "complete address" in shown(app)
        assert panels(app) == []
        assert server.asked == []
        assert panels(run_page(monkeypatch, server.url, key="the-right-key")) == PANELS


def test_the_proxys_key_comes_from_a_file_or_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    with stats.serving(stats.busy()) as server:
        server.token = "secret-token"
        monkeypatch.setenv("AGENT_INFRA_TOKEN", "secret-token")
        assert panels(run_page(monkeypatch, server.url)) == PANELS
    (tmp_path / "key").write_text("another-token\n")
    with stats.serving(stats.busy()) as server:
        server.token = "another-token"
        assert panels(run_page(monkeypatch, server.url, "--token-file", str(tmp_path / "key"))) == PANELS


def test_pause_and_interval_are_kept_by_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    with stats.serving(stats.busy()) as server:
        app = run_page(monkeypatch, server.url)
        app.button(key="pause").click().run()
        assert "paused" in shown(app)
        asked = len(server.asked)
        app.run()
        assert len(server.asked) == asked
        app.button(key="pause").click().run()
        assert "live" in shown(app)
        app.toggle(key="keys").set_value(True).run()
        assert "next panel" in shown(app)
