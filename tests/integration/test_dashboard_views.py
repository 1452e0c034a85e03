"""Every view of the page under Streamlit's own test harness: what it mounts, and that it fails on no document."""

from __future__ import annotations

import json
from typing import Any

import pytest
import stats_server as stats
from program import MODULE
from streamlit.testing.v1 import AppTest

PAGE = MODULE.with_name("streamlit_dashboard.py")
MOUNTS = ["header", "verdict", "queue", "analysis", "what_ifs", "timeline_title"]
MOUNTS += ["backends", "sessions", "turns", "watchdog", "cost"]


def run_page(monkeypatch: pytest.MonkeyPatch, url: str) -> AppTest:
    monkeypatch.setattr("sys.argv", [str(PAGE), "--proxy", url])
    app = AppTest.from_file(str(PAGE), default_timeout=60)
    app.run()
    assert not app.exception
    return app


def mounted(app: AppTest) -> dict[str, str]:
    """Panel → the text that the browser part gets."""
    found = {}
    for element in app.main:
        found.update(_mounted_below(element))
    return found


def _mounted_below(element: Any) -> dict[str, str]:
    found = {}
    if element.type == "bidi_component":
        data = json.loads(element.proto.bytes)
        found[str(element.key)] = json.dumps(data["nodes"], ensure_ascii=False)
    for child in getattr(element, "children", {}).values():
        found.update(_mounted_below(child))
    return found


@pytest.mark.parametrize("document", [stats.busy(), stats.extreme(), stats.all_down(), stats.empty()])
def test_every_view_shows_every_document(monkeypatch: pytest.MonkeyPatch, document: Any) -> None:
    with stats.serving(document) as server:
        panels = mounted(run_page(monkeypatch, server.url))
        assert sorted(panels) == sorted(MOUNTS)
        assert server.url in panels["header"]
        assert document["backends"][0]["id"] in panels["backends"]


def test_without_a_proxy_the_page_says_where_it_looked_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with stats.serving(stats.busy()) as server:
        url = server.url
    panels = mounted(run_page(monkeypatch, url))
    assert list(panels) == ["header"]
    assert f"There is no proxy at {url}" in panels["header"]
    assert "--proxy" in panels["header"]


def test_the_pages_own_key_keeps_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_INFRA_PAGE_KEY", "the-right-key")
    with stats.serving(stats.busy()) as server:
        assert list(mounted(run_page(monkeypatch, server.url))) == ["refused"]
        assert server.asked == []
        monkeypatch.setattr("sys.argv", [str(PAGE), "--proxy", server.url])
        app = AppTest.from_file(str(PAGE), default_timeout=60)
        app.query_params["key"] = "the-right-key"
        app.run()
        assert "verdict" in mounted(app)


def test_the_proxys_key_comes_from_a_file_or_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    with stats.serving(stats.busy()) as server:
        server.token = "secret-token"
        monkeypatch.setenv("AGENT_INFRA_TOKEN", "secret-token")
        assert "verdict" in mounted(run_page(monkeypatch, server.url))
    (tmp_path / "key").write_text("another-token\n")
    with stats.serving(stats.busy()) as server:
        server.token = "another-token"
        monkeypatch.setattr("sys.argv", [str(PAGE), "--proxy", server.url, "--token-file", str(tmp_path / "key")])
        app = AppTest.from_file(str(PAGE), default_timeout=60).run()
        assert "verdict" in mounted(app)


def test_pause_and_interval_are_kept_by_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    with stats.serving(stats.busy()) as server:
        app = run_page(monkeypatch, server.url)
        app.button(key="pause").click().run()
        assert "paused" in mounted(app)["header"]
        asked = len(server.asked)
        app.run()
        assert len(server.asked) == asked
        app.button(key="pause").click().run()
        assert "live" in mounted(app)["header"]
        app.toggle(key="keys").set_value(True).run()
        assert "next panel" in mounted(app)["header"]
