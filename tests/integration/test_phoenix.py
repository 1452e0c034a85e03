"""Turns of a real proxy in a real Arize Phoenix: what it makes of the spans, as its own API tells it."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from program import Program, wait_for
from relay_harness import Client
from testbed.ports import free_port

START_S = 4 * PATIENCE_S  # it creates a database first
PROJECT = "agents"


@pytest.fixture
def phoenix(tmp_path: Path) -> Iterator[str]:
    """The URL of a Phoenix with an empty database."""
    python = os.environ.get("AGENT_INFRA_PHOENIX_PYTHON")
    if python is None:
        pytest.skip("AGENT_INFRA_PHOENIX_PYTHON names no Python with Phoenix: pip install arize-phoenix")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    port = free_port()
    settings = {"HOST": "127.0.0.1", "PORT": str(port), "GRPC_PORT": str(free_port())}
    settings |= {"WORKING_DIR": str(tmp_path / "phoenix"), "TELEMETRY_ENABLED": "false"}
    environment = {**os.environ, **{f"PHOENIX_{name}": text for name, text in settings.items()}}
    command = [python, "-m", "phoenix.server.main", "serve"]
    with (
        (tmp_path / "phoenix.log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(lambda: process.poll() is not None or answers(url), "Phoenix", START_S)
            assert process.poll() is None, (tmp_path / "phoenix.log").read_text()
            yield url
        finally:
            process.terminate()
            process.wait(timeout=PATIENCE_S)


def answers(url: str) -> bool:
    try:
        get(f"{url}/v1/projects")
    except OSError:
        return False
    return True


def get(url: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
        rows: list[dict[str, Any]] = json.load(answer)["data"]
    return rows


def run_agents(port: int) -> None:
    """A session with a tool call, one that fails in two ways, and one of other APIs."""
    weather: dict[str, Any] = {"X-Session-ID": "weather", "X-Task-ID": "shop", "X-Client-ID": "a1"}
    question = {"role": "user", "content": "How warm is it in Paris?"}
    call = {"id": "call-1", "type": "function", "function": {"name": "thermometer", "arguments": "{}"}}
    messages = [
        *(question, {"role": "assistant", "content": None, "tool_calls": [call]}),
        {"role": "tool", "tool_call_id": "call-1", "content": "18 degrees"},
    ]
    with Client(port) as client:
        calls = {"usage": True, "calls": ["call-1"], "finish_reason": "tool_calls", "tokens": 0}
        assert client.chat(weather, stream=True, messages=[question], fake=calls).status == 200
        assert client.chat(weather, stream=True, messages=messages, fake={"usage": True, "tokens": 5}).status == 200
        assert client.chat({"X-Session-ID": "failing"}, fake={"status": 400}).status == 400
        whole = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi <b>there</b>"}]}
        assert client.post("/v1/messages", whole, {"X-Session-ID": "others"}).status == 200
        text = {"model": "m", "input": "embed this"}
        assert client.post("/v1/embeddings", text, {"X-Session-ID": "others"}).status == 200
    with Client(port) as client:
        client.chat({"X-Session-ID": "failing"}, stream=True, fake={"cut": 2, "tokens": 5})


@pytest.mark.slow
def test_phoenix_shows_sessions_prompts_answers_tokens_and_errors(
    app: Program, engine: FakeEngine, phoenix: str
) -> None:
    app.config.write_text(json.dumps({"otel": {"endpoint": f"{phoenix}/v1/traces", "text": True}}))
    app.environment["OTEL_RESOURCE_ATTRIBUTES"] = f"openinference.project.name={PROJECT}"
    proxy = app.bring_up_proxy(engine.port, "--config", str(app.config), model="m")
    run_agents(app.port)
    assert proxy.end() == 0

    def shown() -> list[dict[str, Any]]:
        known = [row["name"] for row in get(f"{phoenix}/v1/projects")]
        rows = get(f"{phoenix}/v1/projects/{PROJECT}/spans?limit=100") if PROJECT in known else []
        return rows if len(rows) == 6 else []

    spans = wait_for(shown, "six spans")
    spans.sort(key=lambda span: str(span["start_time"]))
    of_session: dict[str, list[dict[str, Any]]] = {}
    for span in spans:
        of_session.setdefault(span["attributes"]["session.id"], []).append(span)
    calling, answering = of_session["weather"]
    assert [span["span_kind"] for span in spans] == ["LLM", "LLM", "LLM", "LLM", "EMBEDDING", "LLM"]
    assert (calling["name"], calling["status_code"], calling["parent_id"]) == ("chat m", "UNSET", None)
    assert calling["attributes"]["llm.finish_reason"] == "tool_calls"
    assert "output.value" not in calling["attributes"]  # it only called a tool
    assert {
        "llm.model_name": "m",
        "input.value": "How warm is it in Paris?",
        "output.value": "word0 word1 word2 word3 word4 ",
        "llm.input_messages.0.message.content": "How warm is it in Paris?",
        "llm.output_messages.0.message.role": "assistant",
        "llm.token_count.prompt": 7,
        "llm.token_count.completion": 5,
        "llm.token_count.total": 12,
        "llm.token_count.prompt_details.cache_read": 5,
        "agent_infra.replica": "m-1",
        "agent_infra.task": "shop",
    }.items() <= answering["attributes"].items()
    assert answering["end_time"] > answering["start_time"]
    refused, cut = of_session["failing"]
    assert [(span["status_code"], span["attributes"]["error.type"]) for span in (refused, cut)] == [
        *(("ERROR", "400"), ("ERROR", "cut"))
    ]
    assert refused["status_message"] == "as asked"
    assert cut["attributes"]["output.value"] == "word0 word1 "
    whole, embedding = of_session["others"]
    assert whole["attributes"]["input.value"] == "Hi <b>there</b>"
    assert (embedding["attributes"]["embedding.model_name"], embedding["attributes"]["input.value"]) == (
        *("m", "embed this"),
    )
    sessions = {row["session_id"]: row for row in get(f"{phoenix}/v1/projects/{PROJECT}/sessions")}
    assert {name: len(row["traces"]) for name, row in sessions.items()} == {"weather": 1, "failing": 1, "others": 1}
    assert sessions["weather"]["token_count_total"] == 19
