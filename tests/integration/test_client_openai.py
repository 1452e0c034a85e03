"""Sessions over real HTTP: the installed OpenAI SDK against a small server that records what arrives.

Needs nothing but pytest and openai, so that test_client_openai2.py can run it with the SDK's other major version.
"""

import asyncio
import contextlib
import gc
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from patience import PATIENCE_S
from testbed.ports import free_port

import agent_infra
from agent_infra_core.client import SessionContext, attach
from agent_infra_core.errors import AgentInfraError
from agent_infra_core.settings import Config, ModelConfig, ProxyConfig

ROOT = Path(agent_infra.__file__).parent
SESSION, TASK, CLIENT = "X-Session-ID", "X-Task-ID", "X-Client-ID"
PRE, POST = "X-Timing-Pre-Ms", "X-Timing-Post-Ms"


@dataclass
class Server:
    """A chat completions server; ``requests`` are (method, path, headers with names in lower case) as they arrived."""

    port: int = 0
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)  # of the next answers; then 200
    arrived_at: list[float] = field(default_factory=list)  # of chat completions, monotonic s
    answered_at: list[float] = field(default_factory=list)  # no client can have seen the answer's end before
    redirect_to: str | None = None
    answer_s: float = 0.0  # that an answer takes, or a streamed one's every event

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def headers(self, name: str, path: str = "/v1/chat/completions") -> list[str | None]:
        """One header of every request to ``path``."""
        return [headers.get(name.lower()) for _, requested, headers in self.requests if requested == path]

    def gaps_ms(self) -> list[float]:
        """From each answer's end to the next request, as this end sees it: what a client measures is never more."""
        ends_and_starts = zip(self.answered_at, self.arrived_at[1:], strict=False)
        return [1000 * (arrived - answered) for answered, arrived in ends_and_starts]


USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}


def completion(**choice: Any) -> dict[str, Any]:
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [{"index": 0, **choice}]}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    state: Server

    def do_GET(self) -> None:
        self.record()
        self.reply(200, {"object": "list", "data": []})

    def do_POST(self) -> None:
        self.state.arrived_at.append(time.monotonic())
        body = self.record()
        status = self.state.statuses.pop(0) if self.state.statuses else 200
        if status == 307 and self.state.redirect_to:
            self.reply(307, {}, Location=self.state.redirect_to)
        elif status != 200:
            self.reply(
                status,
                {"error": {"message": "told to", "type": "t", "param": None, "code": None}},
                **{"Retry-After-Ms": "1"},
            )
        elif body.get("stream"):
            self.stream()
        else:
            time.sleep(self.state.answer_s)
            said = {"message": {"role": "assistant", "content": "50"}, "finish_reason": "stop"}
            self.reply(200, completion(**said) | {"usage": USAGE})

    def record(self) -> dict[str, Any]:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.state.requests.append((self.command, self.path, headers))
        body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        return body

    def reply(self, status: int, document: dict[str, Any], **headers: str) -> None:
        payload = json.dumps(document).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(payload)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.state.answered_at.append(time.monotonic())
        self.wfile.write(payload)

    def stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        events = [completion(delta={"role": "assistant", "content": text}, finish_reason=None) for text in "50!"]
        events.append(completion() | {"choices": [], "usage": USAGE})
        for event in [*map(json.dumps, events), "[DONE]"]:
            time.sleep(self.state.answer_s)
            data = f"data: {event}\n\n".encode()
            if event == "[DONE]":
                self.state.answered_at.append(time.monotonic())
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client may leave in the middle of a stream
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    state = Server()
    handler = type("BoundHandler", (Handler,), {"state": state})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        state.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join(PATIENCE_S)


@pytest.fixture(autouse=True)
def _no_forward_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as state:
        yield state


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url, api_key="k") as opened:
        yield opened


MESSAGES: Any = [{"role": "user", "content": "?"}]


def ask(client: OpenAI, stream: bool = False, **options: Any) -> None:
    if not stream:
        client.chat.completions.create(model="m", messages=MESSAGES, **options)
        return
    for _ in client.chat.completions.create(model="m", messages=MESSAGES, stream=True, **options):
        pass


async def ask_async(client: AsyncOpenAI, stream: bool = False) -> None:
    if not stream:
        await client.chat.completions.create(model="m", messages=MESSAGES)
        return
    async for _ in await client.chat.completions.create(model="m", messages=MESSAGES, stream=True):
        pass


class Conversation:
    """Three turns of one attached client, sync or async, streaming or not, with work of the agent's between them."""

    def __init__(self, server: Server, is_async: bool, stream: bool) -> None:
        self.server, self.is_async, self.stream = server, is_async, stream

    def run(self, between: Callable[[SessionContext], None]) -> None:
        if self.is_async:
            asyncio.run(self._run_async(between))
            return
        with OpenAI(base_url=self.server.url, api_key="k") as client, attach(client, "s1") as session:
            for turn in range(3):
                if turn:
                    between(session)
                ask(client, self.stream)

    async def _run_async(self, between: Callable[[SessionContext], None]) -> None:
        async with AsyncOpenAI(base_url=self.server.url, api_key="k") as client:
            with attach(client, "s1") as session:
                for turn in range(3):
                    if turn:
                        between(session)
                    await ask_async(client, self.stream)


@pytest.fixture(params=["sync", "sync-stream", "async", "async-stream"])
def conversation(request: pytest.FixtureRequest, server: Server) -> Conversation:
    return Conversation(server, request.param.startswith("async"), request.param.endswith("stream"))


def test_an_attached_client_names_its_session_in_every_turn(conversation: Conversation) -> None:
    conversation.run(lambda _: None)
    assert conversation.server.headers(SESSION) == ["s1"] * 3
    assert None not in conversation.server.headers(CLIENT)


def test_the_gap_after_an_answers_end_counts_as_observing(conversation: Conversation) -> None:
    conversation.server.answer_s = 0.02
    conversation.run(lambda _: time.sleep(0.02))
    first, *measured = conversation.server.headers(PRE)
    assert first is None
    for said, gap in zip(measured, conversation.server.gaps_ms()[:2], strict=True):
        assert 20 <= float(said or 0) <= gap
    assert conversation.server.headers(POST) == [None] * 3


def test_a_gap_that_the_agent_split_is_sent_as_split(conversation: Conversation) -> None:
    def between(session: SessionContext) -> None:
        with session.acting():
            time.sleep(0.02)
        time.sleep(0.05)
        with session.observing():
            time.sleep(0.01)

    conversation.run(between)
    pairs = list(zip(conversation.server.headers(PRE), conversation.server.headers(POST), strict=True))
    assert pairs[0] == (None, None)
    for (pre, post), gap in zip(pairs[1:], conversation.server.gaps_ms()[:2], strict=True):
        assert float(pre or 0) >= 10
        assert float(post or 0) >= 20
        assert float(pre or 0) + float(post or 0) <= gap - 50


def test_timings_that_the_agent_says_win_over_the_gap(conversation: Conversation) -> None:
    conversation.run(lambda session: session.set_timing(post_ms=7))
    assert conversation.server.headers(POST) == [None, "7.000", "7.000"]
    assert conversation.server.headers(PRE) == [None] * 3


def test_closing_an_attached_session_ends_it_at_the_proxy(conversation: Conversation) -> None:
    conversation.run(lambda _: None)
    method, path, headers = conversation.server.requests[-1]
    assert (method, path, headers["authorization"]) == ("POST", "/sessions/s1/end", "Bearer k")


def test_the_sdk_sends_the_same_timings_again_when_it_retries(server: Server, client: OpenAI) -> None:
    server.statuses = [200, 503, 200, 200]
    with attach(client) as session:
        ask(client)
        session.set_timing(post_ms=7)
        ask(client)
        ask(client)
    assert server.headers(POST) == [None, "7.000", "7.000", None]
    assert server.headers("x-stainless-retry-count") == ["0", "0", "1", "0"]


def test_the_sdk_sends_extra_headers_again_when_it_retries(server: Server, client: OpenAI) -> None:
    session = SessionContext("s1")
    session.set_timing(pre_ms=3)
    server.statuses = [503, 200]
    ask(client, extra_headers=session.get_headers())
    ask(client, extra_headers=session.get_headers())
    assert server.headers(PRE) == ["3.000", "3.000", None]


def test_a_retrys_waiting_is_no_gap(server: Server, client: OpenAI) -> None:
    server.statuses = [503, 200]
    with attach(client):
        ask(client)
    assert server.headers(PRE) == [None, None]


def test_a_request_within_a_block_is_not_timed_as_the_agents(server: Server, client: OpenAI) -> None:
    server.answer_s = 0.2
    with attach(client) as session:
        started = time.monotonic()
        with session.observing():
            ask(client)
        ask(client)
        assert float(server.headers(PRE)[1] or 0) <= 1000 * (time.monotonic() - started) - 2 * 200


def test_a_request_that_is_no_turn_leaves_the_timings_for_the_next_turn(server: Server, client: OpenAI) -> None:
    with attach(client) as session:
        session.set_timing(pre_ms=5)
        client.models.list()
        ask(client)
    assert server.headers(PRE, "/v1/models") == [None]
    assert server.headers(PRE) == ["5.000"]


def test_an_abandoned_stream_that_is_collected_late_ends_no_later_turn(client: OpenAI) -> None:
    with attach(client) as session:
        abandoned = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        next(iter(abandoned))
        following = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        del abandoned
        gc.collect()
        assert PRE not in session.get_headers()
        following.close()
        assert PRE in session.get_headers()


def test_copies_of_an_attached_client_belong_to_its_session(server: Server, client: OpenAI) -> None:
    with attach(client, "s1"):
        ask(client)
        ask(client.with_options(timeout=10))
    assert server.headers(SESSION) == ["s1", "s1"]
    assert server.headers(PRE)[1] is not None


def test_two_clients_attached_to_two_sessions_never_mix(server: Server, client: OpenAI) -> None:
    other = client.with_options()  # shares the HTTP client, and with it the hooks
    with attach(client, "s1") as first, attach(other, "s2") as second:
        first.set_timing(pre_ms=1)
        second.set_timing(pre_ms=2)
        ask(other)
        ask(client)
        second.close()
        first.set_timing(pre_ms=3)
        ask(other)
        ask(client)
    assert server.headers(SESSION) == ["s2", "s1", None, "s1"]
    assert server.headers(PRE) == ["2.000", "1.000", None, "3.000"]


def test_many_concurrent_async_sessions_on_one_http_client_keep_their_own_timings(server: Server) -> None:
    async def agent(shared: AsyncOpenAI, number: int) -> None:
        client = shared.with_options()
        with attach(client, f"s{number}") as session:
            for turn in range(3):
                session.set_timing(pre_ms=100 * number + turn)
                await ask_async(client, stream=bool(number % 2))

    async def run() -> None:
        async with AsyncOpenAI(base_url=server.url, api_key="k") as shared:
            await asyncio.gather(*[agent(shared, number) for number in range(8)])

    asyncio.run(run())
    pairs = sorted(zip(server.headers(SESSION), server.headers(PRE), strict=True), key=str)
    expected = [(f"s{number}", f"{100 * number + turn}.000") for number in range(8) for turn in range(3)]
    assert pairs == sorted(expected, key=str)


def test_attaching_a_client_again_replaces_its_session(server: Server, client: OpenAI) -> None:
    first = attach(client, "s1", "t1")
    second = attach(client, "s2")
    first.set_timing(pre_ms=1)
    first.close()
    second.set_timing(pre_ms=2)
    ask(client)
    assert (server.headers(SESSION), server.headers(TASK), server.headers(PRE)) == (["s2"], [None], ["2.000"])


def test_a_closed_session_leaves_the_client_as_it_was(server: Server) -> None:
    with OpenAI(base_url=server.url, api_key="k", default_headers={TASK: "own"}) as client:
        hooks = {name: list(value) for name, value in client._client.event_hooks.items()}
        attach(client, "s1", "t1").close()
        ask(client)
        assert client._client.event_hooks == hooks
    assert (server.headers(SESSION), server.headers(TASK)) == ([None], ["own"])


def test_a_collected_client_leaves_no_hook_behind_for_the_next(client: OpenAI) -> None:
    for _ in range(5):
        attach(client.with_options())
    with attach(client):
        assert len(client._client.event_hooks["request"]) == 1


def test_requests_to_another_server_carry_none_of_the_headers(server: Server, client: OpenAI) -> None:
    with serving() as other:
        with attach(client, "s1", "t1") as session:
            session.set_timing(pre_ms=1)
            client.post(f"{other.url}/elsewhere", cast_to=object, body={})
            ask(client.with_options(base_url=other.url))
            server.statuses, server.redirect_to = [307], f"{other.url}/redirected"
            ask(client)
        assert server.headers(PRE) == ["1.000"]
        assert [path for _, path, _ in other.requests] == [
            "/v1/elsewhere",
            "/v1/chat/completions",
            "/v1/redirected",
        ]
        for _, _, headers in other.requests:
            assert not {name.lower() for name in (SESSION, TASK, CLIENT, PRE, POST)} & headers.keys()


def test_a_redirect_on_the_same_server_is_one_turn(server: Server, client: OpenAI) -> None:
    server.statuses, server.redirect_to = [307], "/v1/again"
    with attach(client, "s1") as session:
        session.set_timing(pre_ms=1)
        ask(client)
    assert server.headers(PRE) == ["1.000"]
    assert server.headers(PRE, "/v1/again") == ["1.000"]


def test_a_client_of_another_kind_is_refused_with_the_way_out() -> None:
    with pytest.raises(AgentInfraError, match=r"builtins\.object is built differently.*extra_headers"):
        attach(object())


def test_a_refused_id_leaves_the_client_attached_as_it_was(server: Server, client: OpenAI) -> None:
    with attach(client, "s1"):
        for bad in ({"session_id": "a\nb"}, {"task_id": "a\nb"}, {"client_id": "a\nb"}):
            with pytest.raises(AgentInfraError):
                attach(client, **bad)  # type: ignore[arg-type]
        ask(client)
    assert server.headers(SESSION) == ["s1"]


def test_close_ends_the_session_once_and_quotes_its_id(server: Server) -> None:
    session = SessionContext("a/b c?", base_url=server.url)
    session.close()
    session.close()
    assert [(method, path) for method, path, _ in server.requests] == [("POST", "/sessions/a%2Fb%20c%3F/end")]


def test_leaving_a_session_from_a_config_ends_it_with_the_configs_key(server: Server) -> None:
    proxy = ProxyConfig(host="0.0.0.0", port=server.port, api_key="a-key-of-ours")
    with SessionContext.from_config(Config(models=(ModelConfig("m", "p"),), proxy=proxy), "s1"):
        pass
    ((method, path, headers),) = server.requests
    assert (method, path, headers["authorization"]) == ("POST", "/sessions/s1/end", "Bearer a-key-of-ours")


def test_close_asks_no_forward_proxy_for_loopback(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    SessionContext("s1", base_url=server.url).close()
    assert len(server.requests) == 1


def test_close_stays_silent_when_the_proxy_refuses(server: Server) -> None:
    server.statuses = [500]
    SessionContext("s1", base_url=server.url).close()


def test_close_stays_silent_when_the_proxy_is_gone_or_speaks_nonsense() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer() -> None:
            with listener.accept()[0] as connection:
                connection.sendall(b"nonsense\r\n\r\n")
                connection.recv(65536)

        thread = threading.Thread(target=answer)
        thread.start()
        SessionContext(base_url=f"http://127.0.0.1:{port}/v1").close()
        thread.join(PATIENCE_S)
    SessionContext(base_url=f"http://127.0.0.1:{port}/v1").close()


def run_example(name: str, url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OPENAI_BASE_URL": url, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("arguments", [[], ["--stream"]])
def test_the_quickstart_holds_one_session_of_ten_timed_turns(server: Server, arguments: list[str]) -> None:
    finished = run_example("quickstart.py", server.url, *arguments)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "10 turns: 30 tokens in " in finished.stdout
    (session,) = set(server.headers(SESSION))
    assert set(server.headers(TASK)) == {"quickstart"}
    assert len(server.headers(PRE)) == 10
    assert None not in server.headers(PRE)
    assert server.headers(POST)[0] is None
    assert None not in server.headers(POST)[1:]
    assert server.requests[-1][1] == f"/sessions/{session}/end"


def test_the_attach_example_holds_one_session_of_ten_turns(server: Server) -> None:
    finished = run_example("attach.py", server.url)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert len(server.headers(SESSION)) == 10
    assert len(set(server.headers(SESSION))) == 1
    assert None not in server.headers(PRE)[1:]


@pytest.mark.parametrize("example", ["quickstart.py", "attach.py"])
def test_the_examples_say_in_one_line_that_there_is_no_proxy(example: str) -> None:
    port = free_port()
    finished = run_example(example, f"http://127.0.0.1:{port}/v1")
    assert finished.returncode == 1
    assert finished.stderr.startswith(f"no proxy at http://127.0.0.1:{port}/v1: start one with ")
    assert finished.stderr.count("\n") == 1


def test_the_quickstart_says_in_one_line_what_the_proxy_refused(server: Server) -> None:
    server.statuses = [404]
    finished = run_example("quickstart.py", server.url)
    assert finished.returncode == 1
    assert "told to" in finished.stderr
    assert finished.stderr.count("\n") == 1


def test_the_sdk_is_of_a_version_that_attach_promises() -> None:
    assert openai.VERSION.split(".")[0] in ("2", "3")
