"""GET /history, /sessions and /stats/sessions/{id} of a real proxy: what its agents did, and a former one kept."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import urllib.error
import urllib.request
from typing import Any

import pytest
from fake_engine import FakeEngine
from otlp_receiver import attributes, otlp_receiver
from patience import PATIENCE_S
from program import Program, once_told, wait_for
from relay_harness import Client
from stats_schema import check_stats


def get(app: Program, path: str) -> Any:
    return once_told(lambda: app.get(path))


def wait_history(app: Program, path: str, is_there: Any) -> Any:
    """A document of the history, once what was written last is in it."""

    def attempt() -> Any:
        document = get(app, path)
        return document if is_there(document) else None

    return wait_for(attempt, path)


def written(app: Program) -> tuple[int, int]:
    """How many turns and ends of sessions a kill -9 can't take any more."""
    path = app.state / "agent-infra" / f"proxy-{app.port}" / "history.db"
    with contextlib.closing(sqlite3.connect(path)) as file:
        return tuple(file.execute("SELECT (SELECT count(*) FROM turns), (SELECT count(*) FROM ended)").fetchone())


def test_what_agents_did_is_told_over_time_and_by_session_even_to_the_next_controller(
    app: Program, engine: FakeEngine
) -> None:
    proxy = app.bring_up_proxy(engine.port, model="m")
    with Client(app.port) as client:
        for number in range(3):
            for turn in range(2):
                headers = {"X-Session-ID": f"web-{number}", "X-Task-ID": "Shop", "X-Client-ID": "a1 agent.py"}
                words = [{"role": "user", "content": f"{turn} of {number}"}]
                assert client.chat(headers, messages=words, stream=True).status == 200
        assert client.chat({"X-Session-ID": "bad"}, fake={"status": 400}).status == 400
        assert client.post("/sessions/web-0/end", {}).status == 200
        wait_for(lambda: get(app, "/sessions?state=ended")["total"] == 1, "the end of a session")

        listed = get(app, "/sessions?sort=turns&query=WEB")
        check_stats(listed, "sessions_document")
        assert [(row["id"], row["turns"]) for row in listed["sessions"]] == [("web-0", 2), ("web-1", 2), ("web-2", 2)]
        assert [row["id"] for row in get(app, "/sessions?outcome=error")["sessions"]] == ["bad"]
        document = get(app, "/stats/sessions/web-1?before=2")
        check_stats(document, "session_document")
        [turn_row] = document["turns"]
        assert (turn_row["number"], turn_row["prompt"], turn_row["replica"]) == (1, "0 of 1", "m-1")
        assert turn_row["decode_ms"] is not None

        def has_all(document: Any) -> bool:
            per_minute = document["series"]["turns_per_minute"]
            return bool(round(sum(rate or 0.0 for rate in per_minute) * document["step_s"] / 60) == 6)

        wait_for(lambda: written(app) == (7, 1), "all turns and the end of a session, in the file")
        over_time = wait_history(app, "/history?from=0&points=2000", has_all)
        check_stats(over_time, "history_document")
        assert sum(filter(None, over_time["series"]["finish_reasons.stop"])) == 6
        for path, allowed in (("/history?points=9999", "from 1 to 2,000"), ("/sessions?sort=x", "one of id, state")):
            refused = client.get(path)
            assert (refused.status, refused.json()["error"]["type"]) == (400, "invalid_request_error")
            assert allowed in refused.json()["error"]["message"]

    os.kill(proxy.process.pid, signal.SIGKILL)
    proxy.process.wait(timeout=PATIENCE_S)
    app.bring_up_proxy(engine.port, model="m")
    states = {row["id"]: row["state"] for row in get(app, "/sessions")["sessions"]}
    assert states == {"web-0": "ended", "web-1": "idle", "web-2": "idle", "bad": "idle"}
    ended = get(app, "/stats/sessions/web-0")
    assert [(row["number"], row["prompt"]) for row in ended["turns"]] == [(2, "1 of 0"), (1, "0 of 0")]
    wait_history(app, "/history?from=0&points=2000", has_all)


def test_turns_reach_an_otlp_receiver_and_text_stays_here(app: Program, engine: FakeEngine) -> None:
    pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    with otlp_receiver() as receiver:
        app.config.write_text(json.dumps({"otel": {"endpoint": receiver.endpoint}}))
        proxy = app.bring_up_proxy(engine.port, "--config", str(app.config), model="m")
        with Client(app.port) as client:
            for session in ("a", "b", "a"):
                words = [{"role": "user", "content": "secret"}]
                assert client.chat({"X-Session-ID": session}, messages=words, stream=True).status == 200
        assert proxy.end() == 0  # the rest is sent at the end
        told = [attributes(span) for span in receiver.spans]
        assert sorted(each["gen_ai.conversation.id"] for each in told) == ["a", "a", "b"]
        assert len({span.trace_id for span in receiver.spans}) == 2
        assert {each["agent_infra.replica"] for each in told} == {"m-1"}
        assert "secret" not in str(told)


@pytest.mark.parametrize("path", ["/history", "/sessions", "/stats/sessions/s?limit=1"])
def test_a_foreign_web_page_learns_nothing(app: Program, engine: FakeEngine, path: str) -> None:
    app.bring_up_proxy(engine.port, model="m")
    for name, value in (("Origin", "https://evil.example"), ("Host", "evil.example"), ("Sec-Fetch-Site", "cross-site")):
        request = urllib.request.Request(f"http://127.0.0.1:{app.port}{path}", headers={name: value})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=PATIENCE_S)
        with refused.value as answer:
            assert answer.code == 403
            assert "session" not in json.dumps(json.load(answer)).replace("session_", "")


def test_without_a_history_sessions_come_from_the_controller(app: Program, engine: FakeEngine) -> None:
    app.bring_up_proxy(engine.port, "--history", "off", model="m")
    with Client(app.port) as client:
        assert client.chat({"X-Session-ID": "s"}).status == 200
        listed = wait_history(app, "/sessions", lambda document: document["sessions"])
        assert [(row["id"], row["turns"], row["state"]) for row in listed["sessions"]] == [("s", 1, "idle")]
        assert [row["number"] for row in get(app, "/stats/sessions/s")["turns"]] == [1]
        refused = client.get("/history")
        assert (refused.status, "proxy.history" in refused.json()["error"]["message"]) == (404, True)
