"""SessionContext without a proxy: ids, headers, timers; and what importing the library does to its user's process."""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S

import agent_infra
from agent_infra_core.client import SessionContext
from agent_infra_core.errors import AgentInfraError
from agent_infra_core.settings import DEFAULT_CONFIG, HeadersConfig

ROOT = Path(agent_infra.__file__).parent
PRE, POST = "X-Timing-Pre-Ms", "X-Timing-Post-Ms"


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=PATIENCE_S
    ).stdout


def test_headers_name_the_session_the_task_and_the_client() -> None:
    assert SessionContext("s1", "t1", "c1").get_headers() == {
        "X-Session-ID": "s1",
        "X-Task-ID": "t1",
        "X-Client-ID": "c1",
    }


def test_a_session_without_an_id_gets_a_fresh_one_and_no_task() -> None:
    first, second = SessionContext(), SessionContext()
    assert first.session_id != second.session_id
    assert "X-Task-ID" not in first.get_headers()


def test_a_client_without_an_id_is_its_process_and_command() -> None:
    code = (
        "import os, agent_infra; print(os.getpid()); print(agent_infra.SessionContext().get_headers()['X-Client-ID'])"
    )
    pid, client_id = run_python(code).splitlines()
    assert re.fullmatch(rf"[^ @]+@[^ ]+:{pid} -c", client_id)


def test_a_default_client_id_is_ascii_and_at_most_200_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/zoë/" + "größe" * 80 + ".py"])
    client_id = SessionContext().get_headers()["X-Client-ID"]
    assert client_id.isascii()
    assert len(client_id) == 200


@pytest.mark.parametrize("bad", ["", " a", "a ", "a\rb", "a\nX-Evil: 1", "a\n", "a\0b", "café", "会话", "x" * 201])
@pytest.mark.parametrize("what", ["session_id", "task_id", "client_id"])
def test_an_id_that_cannot_be_a_header_is_refused_by_name(what: str, bad: str) -> None:
    with pytest.raises(AgentInfraError, match=f"^{what}: ") as caught:
        SessionContext(**{what: bad})  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_an_id_that_is_no_string_is_refused() -> None:
    with pytest.raises(AgentInfraError, match=r"^task_id: 7 "):
        SessionContext(task_id=7)  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["127.0.0.1:5800", "file:///etc/passwd", "http://", ""])
def test_a_base_url_that_is_not_http_is_refused(url: str) -> None:
    with pytest.raises(AgentInfraError, match=r"^base_url: "):
        SessionContext(base_url=url)


def test_header_names_are_the_configurations() -> None:
    session = SessionContext("s", "t", "c", HeadersConfig("S", "T", "C", "Pre", "Post"))
    session.set_timing(1, 2)
    assert session.get_headers() == {"S": "s", "T": "t", "C": "c", "Pre": "1.000", "Post": "2.000"}


def test_timings_are_sent_once() -> None:
    session = SessionContext()
    session.set_timing(pre_ms=12.5, post_ms=250)
    headers = session.get_headers()
    assert (headers[PRE], headers[POST]) == ("12.500", "250.000")
    assert not {PRE, POST} & session.get_headers().keys()


def test_set_timing_replaces_what_was_said_or_measured_and_leaves_the_other() -> None:
    session = SessionContext()
    session.set_timing(pre_ms=1, post_ms=2)
    with session.observing():
        pass
    session.set_timing(pre_ms=3)
    headers = session.get_headers()
    assert (headers[PRE], headers[POST]) == ("3.000", "2.000")


@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf"), "12", [12]])
def test_an_impossible_timing_is_refused(bad: Any) -> None:
    with pytest.raises(AgentInfraError, match=f"^{POST}: "):
        SessionContext().set_timing(post_ms=bad)


def test_observing_is_pre_and_acting_is_post() -> None:
    session = SessionContext()
    with session.observing():
        time.sleep(0.02)
    assert float(session.get_headers()[PRE]) >= 20
    with session.acting():
        time.sleep(0.02)
    headers = session.get_headers()
    assert float(headers[POST]) >= 20
    assert PRE not in headers


def test_blocks_add_up_until_a_request_takes_them() -> None:
    session = SessionContext()
    for _ in range(3):
        with session.acting():
            time.sleep(0.01)
    assert float(session.get_headers()[POST]) >= 30


def test_a_block_that_raises_counts_and_lets_the_error_through() -> None:
    session = SessionContext()

    def fail() -> None:
        time.sleep(0.01)
        raise KeyError

    with pytest.raises(KeyError), session.acting():
        fail()
    with session.acting():
        pass
    assert float(session.get_headers()[POST]) >= 10


def test_no_moment_counts_twice_in_nested_blocks() -> None:
    session = SessionContext()
    started = time.monotonic()
    with session.observing(), session.observing():
        time.sleep(0.01)
        with session.acting():
            time.sleep(0.02)
        time.sleep(0.01)
    elapsed_ms = 1000 * (time.monotonic() - started)
    headers = session.get_headers()
    assert float(headers[PRE]) >= 20
    assert float(headers[POST]) >= 20
    assert float(headers[PRE]) + float(headers[POST]) <= elapsed_ms + 0.001


def test_a_request_inside_a_block_takes_the_time_so_far_and_the_rest_comes_with_the_next() -> None:
    session = SessionContext()
    started = time.monotonic()
    with session.observing():
        time.sleep(0.01)
        first = float(session.get_headers()[PRE])
        time.sleep(0.01)
    second = float(session.get_headers()[PRE])
    assert first >= 10
    assert second >= 10
    assert first + second <= 1000 * (time.monotonic() - started) + 0.002


def test_threads_may_take_turns_on_one_session() -> None:
    session = SessionContext()
    turns: list[dict[str, str]] = []

    def turn() -> None:
        with session.observing():
            turns.append(session.get_headers())

    for _ in range(3):
        thread = threading.Thread(target=turn)
        thread.start()
        thread.join(PATIENCE_S)
    assert [PRE in headers for headers in turns] == [True] * 3


def test_from_config_takes_header_names_and_the_address_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "proxy: {host: '::', port: 5812, api_key: a-key-of-ours}\n"
        "models: [{name: m, model_path: p}]\nheaders: {session: X-Episode}\n"
    )
    session = SessionContext.from_config(path, session_id="s1", task_id="t1")
    assert session.get_headers()["X-Episode"] == "s1"
    assert session.get_headers()["X-Task-ID"] == "t1"
    assert (session._base_url, session._api_key) == ("http://[::1]:5812/v1", "a-key-of-ours")


def test_from_config_takes_a_loaded_configuration() -> None:
    assert SessionContext.from_config(DEFAULT_CONFIG)._base_url == "http://127.0.0.1:5800/v1"


def test_a_session_that_knows_no_proxy_closes_quietly() -> None:
    with SessionContext() as session:
        pass
    session.close()


def test_the_client_module_is_importable_by_its_name() -> None:
    code = (
        "from agent_infra.client import SessionContext, attach\n"
        "import agent_infra, agent_infra.client\n"
        "print(agent_infra.client.SessionContext is SessionContext is agent_infra.SessionContext)\n"
        "print(agent_infra.client.attach is attach is agent_infra.attach)"
    )
    assert run_python(code).split() == ["True", "True"]


def test_importing_the_library_loads_nothing_heavy() -> None:
    heavy = {
        "gevent",
        "flask",
        "paramiko",
        "asyncio",
        "sqlite3",
        "yaml",
        "marshmallow",
        "urllib.request",
        "http.server",
    }
    code = f"import sys, agent_infra; print(sorted({heavy!r} & set(sys.modules)))"
    assert run_python(code).strip() == "[]"


def test_importing_the_library_leaves_its_users_event_loop_sockets_and_threads_alone() -> None:
    code = """
import asyncio, select, socket, ssl, subprocess, sys, threading, time

def parts():
    return [socket.socket, socket.create_connection, ssl.SSLContext, select.select, select.epoll, time.sleep,
            threading.Thread.start, threading.Lock, subprocess.Popen, sys.excepthook, asyncio.get_event_loop_policy()]

async def main():
    before = parts()
    from agent_infra.client import SessionContext
    with SessionContext("s") as session, session.observing():
        await asyncio.sleep(0)
        session.get_headers()
    print(all(old is new for old, new in zip(before, parts())), threading.active_count())

asyncio.run(main())
"""
    assert run_python(code).split() == ["True", "1"]
