"""A long conversation's next request is read from where the last one ended, and says what a full reading would say."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_infra_core.relay.bodies import KNOWN_FIELDS, MAX_READ_VALUES, Codec, KnownBodies, KnownBody

CODEC = Codec()
WORDS = ['plain "quoted" \\ ünï \n', "]}", '"}],"model":"other"', '{"role":"user"}', "0", "", "messages", "\ud83d"]


def read(body: bytes, known: KnownBody | None, is_named: bool) -> tuple[dict[str, Any], KnownBody | None, bool]:
    """What the relay takes from a body, what it would keep of it, and whether it went on from ``known``."""
    fields = CODEC.request(body, known)
    if fields is None:
        return {}, None, False
    prints, follows = CODEC.trace(fields, is_named)
    words = CODEC.prompt_excerpt(fields, 50)
    said = {name: getattr(fields, name) for name in KNOWN_FIELDS} | {"prints": prints, "follows": follows}
    said |= {"tools": bytes(fields.tools), "system": bytes(fields.system), "words": words}
    turn: Any = SimpleNamespace(prints=prints, follows=follows, prompt=words)
    kept = CODEC.known_body(fields, body, turn) if prints else None
    return said, kept, getattr(fields, "before", None) is not None


def message(random_source: random.Random) -> dict[str, Any]:
    text = random_source.choice(WORDS) + str(random_source.random())
    content: Any = text if random_source.random() < 0.7 else [{"type": "text", "text": text}]
    return {"role": random_source.choice(["user", "assistant", "tool", "system"]), "content": content}


def request(random_source: random.Random, messages: list[dict[str, Any]], before: list[str]) -> bytes:
    """A body with some fields before its messages, always the same, and some behind, as they come."""
    values: dict[str, Any] = {
        "model": random_source.choice(["m", "n", None]),
        "stream": random_source.choice([True, False]),
        "stream_options": {"include_usage": True},
        "tools": [{"type": "function", "function": {"name": random_source.choice(WORDS)}}],
        "system": "s",
        "metadata": messages[-1] if messages else None,
    }
    fixed = {"model": "m", "stream": True, "tools": [], "system": [{"text": '"]}'}], "metadata": {"messages": [1]}}
    after = [name for name in values if random_source.random() < 0.4]
    document = {name: fixed[name] for name in before} | {"messages": messages}
    text = json.dumps(document, ensure_ascii=random_source.random() < 0.5)
    for name in after:  # also a second time: then the last one counts
        text = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(values[name])}}}"
    return text.encode("utf-8", "replace")


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0),
    st.booleans(),
    st.lists(st.sampled_from(["model", "stream", "tools", "system", "metadata"]), unique=True),
)
def test_what_a_request_says_does_not_depend_on_what_was_read_before(
    seed: int, is_named: bool, before: list[str]
) -> None:
    random_source = random.Random(seed)
    messages = [message(random_source)]
    known: KnownBody | None = None
    for _ in range(8):
        body = request(random_source, messages, before)
        said, kept, _ = read(body, known, is_named)
        assert said == read(body, None, is_named)[0]
        known = kept or known
        if random_source.random() < 0.2:  # the client shortened or changed its history
            messages = messages[: random_source.randrange(len(messages)) + 1]
            messages[-1] = message(random_source)
        messages = messages + [message(random_source) for _ in range(random_source.randrange(3))]


def test_a_conversation_that_goes_on_is_read_from_where_it_was() -> None:
    messages = [{"role": "user", "content": "x" * 100}]
    known = None
    for turn in range(5):
        body = json.dumps({"messages": messages, "model": "m"}).encode()
        _, known, went_on = read(body, known, True)
        assert went_on == (turn > 0)
        assert known is not None
        assert bytes(known.start) == body[: body.rindex(b"]")]
        messages = [*messages, {"role": "assistant", "content": "]}"}, {"role": "user", "content": str(turn)}]


def test_only_what_is_new_of_a_conversation_is_looked_through() -> None:
    """One of 60,000 values would not be read at once, but came bit by bit."""
    messages: list[dict[str, Any]] = []
    known = None
    for turn in range(4):
        messages = [*messages, {"role": "user", "content": f"{turn}," * (MAX_READ_VALUES // 3)}]
        said, known, went_on = read(json.dumps({"messages": messages, "model": "m"}).encode(), known, True)
        assert went_on == (turn > 0)
        assert len(said["prints"]) == 4 * (1 + len(messages))


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [{"role": "user"}, {"role"',  # broken off
        b'{"messages": [{"role": "user"}]} x',
        b'{"messages": [{"role": "user"}, ]}',
        b'{"messages": [{"role": "user"}], "messages": [{"role": "assistant"}]}',
        b'{"messages": [{"role": "user"}] "model": "m"}',
    ],
)
def test_a_beginning_that_is_known_makes_nothing_valid(body: bytes) -> None:
    _, known, _ = read(b'{"messages": [{"role": "user"}], "model": "m"}', None, True)
    assert known is not None
    assert body.startswith(bytes(known.start))
    assert getattr(CODEC.request(body, known), "messages", None) == getattr(CODEC.request(body), "messages", None)


def test_what_is_kept_is_bounded_and_the_longest_unused_goes_first() -> None:
    bodies = KnownBodies(1000)
    for number in range(20):
        bodies.keep(number, KnownBody(memoryview(b"x" * 100), {}, b"", b"", None, ""))
        bodies.keep(0, KnownBody(memoryview(b"x" * 100), {}, b"", b"", None, ""))
    assert bodies.bytes == 1000
    assert bodies.find(0) is not None
    assert bodies.find(1) is None
    assert bodies.find(19) is not None
    bodies.keep(0, None)
    assert bodies.find(0) is None
    assert bodies.bytes == 900
