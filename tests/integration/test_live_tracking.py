"""What the proxy says of real agents: whose turns they are, and where their time went, beside what was planted."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_engine import FakeEngine
from openai.types.chat import ChatCompletionMessageParam
from program import Program, program, wait_for
from relay_harness import Client
from stats_schema import check_stats


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Program]:
    with program(tmp_path) as made:
        yield made


def bring_up(app: Program, *engines: FakeEngine) -> None:
    backends = [word for engine in engines for word in ("--backend", f"m=127.0.0.1:{engine.port}")]
    running = app.spawn("proxy", "--port", str(app.port), *backends)
    running.wait_line("^proxy  http")
    wait_for(lambda: app.get("/health")["models"]["m"]["ready"] == len(engines), "the backends in the proxy")


def wait_turns(app: Program, count: int) -> Any:
    """The /stats document, once so many turns are in it."""
    return wait_for(
        lambda: app.get("/stats") if app.get("/stats")["totals"]["requests"] == count else None, "all turns"
    )


def sessions(document: Any) -> dict[str, Any]:
    return {session["id"]: session for client in document["clients"] for session in client["sessions"]}


# --- one session


@pytest.mark.parametrize("name", ["task-17", "größe/ü 😀", "/a//b/", "a?b#c%2F", "end", "x/end"])
def test_a_session_can_be_looked_at_and_ended_whatever_it_is_called(
    app: Program, engine: FakeEngine, name: str
) -> None:
    bring_up(app, engine)
    with Client(app.port) as client:
        for _ in range(2):
            assert client.chat({"X-Session-ID": name.encode().decode("latin-1")}).status == 200
        path = urllib.parse.quote(name, safe="")
        wait_for(lambda: client.get(f"/stats/sessions/{path}").status == 200, "the session")
        wait_turns(app, 2)
        answer = client.get(f"/stats/sessions/{path}")
        document = answer.json()
        check_stats(document, "session_document")
        assert (document["session"]["id"], len(document["turns"])) == (name, 2)
        assert client.post(f"/sessions/{path}/end", {}).json() == {"session": name, "ended": True}
        wait_for(lambda: client.get(f"/stats/sessions/{path}").json()["session"]["state"] == "ended", "its end")
        missing = client.get("/stats/sessions/nobody")
        assert (missing.status, missing.json()["error"]["type"]) == (404, "not_found_error")


# --- an agent that sends no header at all


def answer(client: openai.OpenAI, messages: list[ChatCompletionMessageParam], stream: bool, **fake: Any) -> Any:
    """The answer as an agent would put it into its next request."""
    if not stream:
        done = client.chat.completions.create(model="m", messages=messages, extra_body={"fake": fake})
        return done.choices[0].message.model_dump(exclude_none=True)
    words, calls = "", []
    with client.chat.completions.create(model="m", messages=messages, stream=True, extra_body={"fake": fake}) as events:
        for event in events:
            for choice in event.choices:
                words += choice.delta.content or ""
                calls += [call.model_dump(exclude={"index"}) for call in choice.delta.tool_calls or ()]
    return {"role": "assistant", "content": words, **({"tool_calls": calls} if calls else {})}


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streaming"])
def test_agents_without_any_header_are_sessions_of_their_own(app: Program, engine: FakeEngine, stream: bool) -> None:
    bring_up(app, engine)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{app.port}/v1", api_key="unused", max_retries=0)
    histories: list[list[Any]] = [[{"role": "user", "content": "Begin."}] for _ in range(3)]
    with client:
        for turn in range(4):
            for agent, messages in enumerate(histories):
                call = f"call_{agent}_{turn}"
                said = answer(client, messages, stream, say=f"Agent {agent} – turn {turn}\n", calls=[call])
                messages += [said, {"role": "tool", "tool_call_id": call, "content": "done"}]
    found = sessions(wait_turns(app, 12))
    assert sorted(session["turns"] for session in found.values()) == [4, 4, 4]
    assert all(name.startswith("auto-") for name in found)


def test_samples_of_one_prompt_are_not_taken_for_one_session(app: Program, engine: FakeEngine) -> None:
    bring_up(app, engine)
    for _ in range(3):
        app.chat("Begin.", model="m", fake={"say": "the same"})
    said = [{"role": "user", "content": "Begin."}, {"role": "assistant", "content": "the same"}]
    for _ in range(2):
        app.chat(model="m", messages=[*said, {"role": "user", "content": "So?"}], fake={"say": "other"})
    assert sorted(session["turns"] for session in sessions(wait_turns(app, 5)).values()) == [1] * 5
