"""The book of turns: what a request leaves there."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from agent_infra_core.relay.bodies import Codec
from agent_infra_core.relay.book import LONG_BODY_BYTES, TurnBook

PEER = ("127.0.0.1", 1)


class Book(TurnBook):
    def __init__(self) -> None:
        self.identify: Any = lambda *_: None
        sessions = SimpleNamespace(identify=lambda *given: self.identify(*given))
        relay: Any = SimpleNamespace(
            codec=Codec(), pools={}, models=["m"], admission=SimpleNamespace(sessions=sessions),
            settings=SimpleNamespace(proxy=SimpleNamespace(capture_text=0)),
        )  # fmt: skip
        super().__init__(relay)

    def ask(self, path: bytes, **fields: Any) -> None:
        labels = SimpleNamespace(session="s")
        plan: Any = SimpleNamespace(
            is_form=False, path=path, labels=labels, model=None, request=SimpleNamespace(fields={})
        )
        self.open(plan, json.dumps({"model": "m", **fields}).encode(), PEER)


def test_a_request_that_cannot_be_read_is_no_turn() -> None:
    book = Book()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    book.identify = fail
    with pytest.raises(ZeroDivisionError):
        book.ask(b"/v1/chat/completions", messages=[{"role": "user", "content": "x"}])
    assert (book.turns, book.count) == ({}, 0)


def test_what_is_known_of_a_chat_outlasts_a_long_response_of_its_session() -> None:
    book, text = Book(), "x" * LONG_BODY_BYTES
    for _ in range(2):
        book.ask(b"/v1/chat/completions", messages=[{"role": "user", "content": text}])
    assert book._bodies.find("s") is not None
    book.ask(b"/v1/responses", input=text)
    assert book._bodies.find("s") is not None
    assert len(book.turns) == 3
