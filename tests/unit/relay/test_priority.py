"""The priority that is put into a request's body leaves everything else as it came."""

from __future__ import annotations

import json

import pytest

from agent_infra_core.relay.bodies import with_priority


@pytest.mark.parametrize(
    "body",
    [b'{"model":"m"}', b' \n{ "model" : "m", "messages": [] }\n', b'{"a":{"priority":1}}'],
    ids=["short", "blanks", "nested"],
)
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_a_body_gets_its_priority_in_front(body: bytes, kind: type[bytes] | type[bytearray]) -> None:
    parts = with_priority(kind(body), 12_345)
    assert parts is not None
    assert json.loads(parts[0] + parts[1]) == {"priority": 12_345, **json.loads(body)}
    assert parts[1].obj is not None
    assert bytes(parts[1]) == body.partition(b"{")[2]


@pytest.mark.parametrize("body", [b"{}", b"{ }", b"", b"[]"])
def test_what_has_no_fields_stays_as_it_is(body: bytes) -> None:
    assert with_priority(body, 1) is None
