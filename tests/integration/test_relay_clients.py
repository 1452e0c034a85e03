"""The OpenAI SDK, curl and a bare socket get the same answers, byte for byte where it counts."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from program import wait_for
from relay_harness import KEY, Client, RelayProcess, backend

HELLO: Any = [{"role": "user", "content": "hello"}]
WORDS = "word0 word1 word2"
PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/rerank",
    "/v1/score",
    "/tokenize",
    "/detokenize",
]


class Echo(NamedTuple):
    """An engine that answers every request with its path and its very bytes, and streams what it is told to."""

    port: int
    bodies: list[bytes]


class EchoHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bodies: list[bytes]

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.bodies.append(body)
        events = json.loads(body).get("events") if body[:1] == b"{" else None
        self.send_response(200)
        if events is None:
            self.send_header("Content-Type", self.headers["Content-Type"] or "application/json")
            self.send_header("X-Path", self.path)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events:
            data = event.encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    EchoHandler.bodies = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), EchoHandler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield Echo(server.server_address[1], EchoHandler.bodies)
    server.shutdown()
    server.server_close()
    thread.join(PATIENCE_S)


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory, echo: Echo) -> Iterator[RelayProcess]:
    with RelayProcess(tmp_path_factory.mktemp("relay")) as relay, FakeEngine() as engine:
        relay.controller.send_table([backend(1, engine.port), backend(2, echo.port, model="echo")])
        yield relay


@pytest.fixture
def url(relay: RelayProcess) -> str:
    return f"http://127.0.0.1:{relay.port}"


@pytest.fixture
def sdk(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE_S) as client:
        yield client


def curl(url: str, body: bytes, *options: str) -> bytes:
    command = ["curl", "--silent", "--no-buffer", "--max-time", f"{PATIENCE_S:g}", *options, "--data-binary", "@-", url]
    done = subprocess.run(command, input=body, stdout=subprocess.PIPE, timeout=PATIENCE_S, check=True)
    return done.stdout


def without_pid(document: Any) -> Any:
    return {name: value for name, value in document.items() if name != "pid"}


# One answer for all.


def test_the_sdk_curl_and_a_bare_socket_get_the_same_answer(sdk: openai.OpenAI, relay: RelayProcess, url: str) -> None:
    body = json.dumps({"model": "m", "messages": HELLO}).encode()
    with Client(relay.port) as client:
        bare = client.post("/v1/chat/completions", body).json()
    assert json.loads(curl(f"{url}/v1/chat/completions", body)) == bare
    assert json.loads(curl(f"{url}/v1/chat/completions", body, "--http1.0")) == bare
    assert json.loads(curl(f"{url}/v1/chat/completions", body, "--header", "Transfer-Encoding: chunked")) == bare
    answer = sdk.chat.completions.create(model="m", messages=HELLO)
    assert answer.choices[0].message.content == bare["choices"][0]["message"]["content"] == WORDS
    assert answer.usage is not None
    assert answer.usage.total_tokens == bare["usage"]["total_tokens"]


def test_the_sdk_curl_and_a_bare_socket_get_the_same_stream(sdk: openai.OpenAI, relay: RelayProcess, url: str) -> None:
    document = {"model": "m", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(document).encode()
    with Client(relay.port) as client:
        bare = client.post("/v1/chat/completions", body)
    assert curl(f"{url}/v1/chat/completions", body) == bare.body
    assert curl(f"{url}/v1/chat/completions", body, "--http1.0") == bare.body
    chunks = list(
        sdk.chat.completions.create(model="m", messages=HELLO, stream=True, stream_options={"include_usage": True})
    )
    dumped = [chunk.model_dump(exclude_unset=True) for chunk in chunks]
    assert dumped == [json.loads(event) for event in bare.events()[:-1]]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 7


def test_the_asynchronous_sdk_streams_many_at_once(url: str) -> None:
    async def ask(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(
            model="m", messages=HELLO, stream=True, extra_body={"fake": {"tokens": 20, "gap": 0.001, "usage": True}}
        )
        parts = [chunk async for chunk in stream]
        assert all(part.choices for part in parts)
        assert parts[-1].choices[0].finish_reason == "stop"
        return "".join(part.choices[0].delta.content or "" for part in parts)

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE_S) as client:
            return await asyncio.gather(*(ask(client) for _ in range(20)))

    assert set(asyncio.run(ask_all())) == {"".join(f"word{number} " for number in range(20))}


def test_the_sdk_raises_its_own_exceptions(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.chat.completions.create(model="nobody", messages=HELLO)
    assert caught.value.code == "model_not_found"
    for status, error in ((400, openai.BadRequestError), (500, openai.InternalServerError)):
        with pytest.raises(error, match="as asked"):
            sdk.chat.completions.create(model="m", messages=HELLO, extra_body={"fake": {"status": status}})


def test_the_sdk_lists_the_models_and_embeds(sdk: openai.OpenAI) -> None:
    assert {model.id for model in sdk.models.list()} == {"m", "echo"}
    assert sdk.embeddings.create(model="m", input="a", encoding_format="float").data[0].embedding == [0.5] * 8


def test_curl_is_told_to_go_on_with_a_long_body(url: str) -> None:
    body = json.dumps({"model": "echo", "padding": "y" * 2_000_000}).encode()
    assert curl(f"{url}/tokenize", body, "--header", "Expect: 100-continue") == body


# Tool calls.


def tool_call_events() -> list[str]:
    """A streamed answer that calls two tools, the arguments in pieces that cut words, escapes and characters."""
    arguments = json.dumps({"städte": ["Zürich", "東京 🗼"], "quote": '"usage": \\ \n', "reason": "abort"})
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None}]
    for index in range(2):
        call = {"index": index, "id": f"call_{index}", "type": "function"}
        deltas.append({"tool_calls": [{**call, "function": {"name": "look", "arguments": ""}}]})
        deltas += [{"tool_calls": [{"index": index, "function": {"arguments": piece}}]} for piece in arguments]
    rows: list[dict[str, Any]] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    rows.append({"index": 0, "delta": {}, "finish_reason": "tool_calls"})
    common: dict[str, Any] = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "echo"}
    documents: list[dict[str, Any]] = [{**common, "choices": [row]} for row in rows]
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    documents.append({**common, "choices": [], "usage": usage})
    return [f"data: {json.dumps(document)}\n\n" for document in documents] + ["data: [DONE]\n\n"]


@pytest.mark.parametrize("at_once", [True, False])
def test_streamed_tool_calls_arrive_intact(sdk: openai.OpenAI, at_once: bool) -> None:
    events = ["".join(tool_call_events())] if at_once else tool_call_events()
    with sdk.chat.completions.stream(model="echo", messages=HELLO, extra_body={"events": events}) as stream:
        answer = stream.get_final_completion()
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert [call.id for call in calls] == ["call_0", "call_1"]
    for call in calls:
        assert json.loads(call.function.arguments)["städte"] == ["Zürich", "東京 🗼"]
        assert json.loads(call.function.arguments)["quote"] == '"usage": \\ \n'
    assert answer.choices[0].finish_reason == "tool_calls"


def test_no_event_of_a_streamed_tool_call_is_changed(relay: RelayProcess) -> None:
    events = tool_call_events()
    with Client(relay.port) as client:
        document = {"model": "echo", "stream": True, "events": events}
        assert client.post("/v1/chat/completions", document).body.decode() == "".join(events[:-2] + events[-1:])
        document["stream_options"] = {"include_usage": True}
        assert client.post("/v1/chat/completions", document).body.decode() == "".join(events)


@pytest.mark.parametrize(("path", "last"), [("/v1/responses", "response.completed"), ("/v1/messages", "message_stop")])
def test_a_stream_of_another_api_passes_byte_for_byte(relay: RelayProcess, path: str, last: str) -> None:
    events = [
        f'event: {kind}\ndata: {{"type": "{kind}", "usage": {{"input_tokens": 1}}, "message": {{"usage": {{}}}}}}\n\n'
        for kind in ("message_start", "response.created", "ping", "message_delta", last)
    ]
    with Client(relay.port) as client:
        answer = client.post(path, {"model": "echo", "stream": True, "events": events})
        assert answer.is_complete
        assert answer.body.decode() == "".join(events)


# Bodies of all kinds, byte for byte.


@pytest.mark.parametrize("path", PATHS)
def test_a_request_and_its_answer_pass_byte_for_byte(relay: RelayProcess, echo: Echo, path: str) -> None:
    body = b'{ "model":"echo",\t"input": ["\\u00e9 \xc3\xa9", 1e3, 1.0, null],"z":{"a":1,"a":2} }\n'
    with Client(relay.port) as client:
        for target in (path, path + "?beta=true&x=%20", "/echo" + path):
            answer = client.post(target, body)
            assert (answer.status, answer.body) == (200, body)
            assert answer.headers["x-path"] == target.removeprefix("/echo")
            assert answer.headers["x-agent-infra-backend"] == "r2"
            assert echo.bodies[-1] == body


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_multimodal_body_of_twenty_megabytes_passes_byte_for_byte(
    url: str, echo: Echo, tmp_path: Path, is_chunked: bool
) -> None:
    image = base64.b64encode(os.urandom(15_000_000)).decode()
    content = [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
    ]
    body = json.dumps({"messages": [{"role": "user", "content": content}], "model": "echo"}).encode()
    assert len(body) > 20_000_000
    options = ("--header", "Transfer-Encoding: chunked") if is_chunked else ()
    assert curl(f"{url}/v1/chat/completions", body, "--header", "Content-Type: application/json", *options) == body
    assert echo.bodies[-1] == body


def test_a_form_with_a_file_passes_byte_for_byte(url: str, echo: Echo, tmp_path: Path) -> None:
    sound = os.urandom(300_000)
    (tmp_path / "sound.wav").write_bytes(sound)
    form = ["--form", "model=echo", "--form", f"file=@{tmp_path / 'sound.wav'}"]
    command = ["curl", "--silent", "--max-time", f"{PATIENCE_S:g}", *form, f"{url}/v1/audio/transcriptions"]
    answer = subprocess.run(command, stdout=subprocess.PIPE, timeout=PATIENCE_S, check=True).stdout
    assert answer == echo.bodies[-1]
    assert sound in answer
    assert re.match(rb"--[-\w]+\r\n", answer)


def test_half_a_character_in_a_streams_excerpt_ends_no_relay(relay: RelayProcess) -> None:
    events = [r'data: {"choices":[{"delta":{"content":"\ud83d"}}],"error":"\udfff"}' + "\n\n", "data: [DONE]\n\n"]
    with Client(relay.port) as client:
        answer = client.post("/v1/chat/completions", {"model": "echo", "stream": True, "events": events})
        assert answer.body.decode() == "".join(events)
        wait_for(lambda: "?" in [turn["answer"] for turn in relay.controller.finished()])
        assert client.chat().status == 200
