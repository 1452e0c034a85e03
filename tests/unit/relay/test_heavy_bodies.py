"""Bodies that would keep the relay busy for seconds, and those that an engine can't answer."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest

from agent_infra_core.http.errors import RequestError
from agent_infra_core.protocol import LACKS
from agent_infra_core.relay.bodies import (
    HEAVY_BODY_BYTES,
    MAX_READ_VALUES,
    MAX_SKIPPED_VALUES,
    Codec,
    refuse_unsupported,
)

CODEC = Codec()


@pytest.mark.parametrize("field", ["messages", "prompt", "input", "tools", "other"])
@pytest.mark.parametrize("value", [b"{}", b"[]", b"1"])
def test_of_a_body_of_very_many_values_only_what_routes_it_is_read(field: str, value: bytes) -> None:
    body = b'{"%b":[%b],"model":"m","stream":true}' % (field.encode(), b",".join([value] * (MAX_READ_VALUES + 10)))
    fields = CODEC.request(body)
    assert (fields.model, fields.stream) == ("m", True)
    assert CODEC.trace(fields, is_named=False) == (b"", None)
    assert CODEC.prompt_excerpt(fields, 50) == ""


def test_a_heavy_body_of_text_is_read_and_one_of_millions_of_values_is_refused() -> None:
    text = b'{"model":"m","messages":[{"role":"user","content":"%b"}]}' % (b"word " * (HEAVY_BODY_BYTES // 5))
    assert CODEC.prompt_excerpt(CODEC.request(text), 4) == "word"
    values = b'{"model":"m","other":[%b]}' % b",".join([b"1234"] * (MAX_SKIPPED_VALUES + 10))
    with pytest.raises(RequestError) as caught:
        CODEC.request(values)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("body", "is_refused"),
    [
        ({"n": 2}, True),
        ({"max_tokens": 0}, True),
        ({"max_completion_tokens": 0}, True),
        ({"n": 1, "max_tokens": 1}, False),
        ({"n": "2", "max_tokens": None}, False),  # the engine says what is wrong with it
        ({}, False),
    ],
)
def test_what_an_engine_lacks_is_refused_and_by_others_served(body: dict[str, Any], is_refused: bool) -> None:
    fields = CODEC.request(json.dumps({"model": "m", "messages": [], **body}).encode())
    refuse_unsupported(fields, ())
    with pytest.raises(RequestError) if is_refused else contextlib.nullcontext():
        refuse_unsupported(fields, LACKS)
