"""Which session a turn belongs to, and what the relay learns from its answer and from its waits."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace
from typing import Any

import pytest

from agent_infra_core.http.events import AnswerDigest
from agent_infra_core.relay.admission import Admission
from agent_infra_core.relay.book import Turn
from agent_infra_core.relay.sessions import SessionRoutes
from agent_infra_core.routing.affinity import LONGEST_HOLD_S
from agent_infra_core.routing.policies import View

PROXY = SimpleNamespace(queue_timeout=600.0)


def make_relay() -> Any:
    return SimpleNamespace(
        replicas={}, pools={}, control=SimpleNamespace(is_connected=True), loading=(), wakes=(),
        settings=SimpleNamespace(proxy=PROXY),
    )  # fmt: skip


class Conversations:
    """Turns as the relay would serve them: identified, placed on one replica, finished."""

    def __init__(self) -> None:
        self.routes = SessionRoutes(make_relay(), random.Random(0))
        self.view: Any = View("r", 0)
        self.count = 0

    def start(self, tokens: int = 1000, prints: bytes = b"", is_retry: bool = False, **known: Any) -> Turn:
        self.count += 1
        labels = SimpleNamespace(session=known.get("session"), is_retry=is_retry, ends_session=False)
        plan: Any = SimpleNamespace(path=b"/v1/responses", labels=labels)
        turn = Turn(str(self.count), "m", plan, 0)
        turn.tokens, turn.prints = tokens, prints
        if (response := known.get("continues")) is not None:
            self.routes.find_holder(turn, response)
        elif turn.session is None:
            turn.follows = ""
        self.routes.identify(turn, b"", 0)
        assert turn.routed is not None
        assert self.routes.choose(turn, turn.routed, [self.view], time.monotonic()) is not None
        turn.backend = "r"
        return turn

    def finish(self, turn: Turn, outcome: str = "completed", response: str | None = None, prompt: int = 1000) -> str:
        turn.outcome, turn.ended = outcome, time.monotonic()
        turn.digest = AnswerDigest(prompt_tokens=prompt, completion_tokens=1, response=response)
        self.routes.finish(turn, None)
        assert turn.routed is not None
        return turn.routed.session


@pytest.mark.parametrize("is_known", [True, False])
def test_turns_that_continue_by_id_teach_nothing_of_other_prompts_sizes(is_known: bool) -> None:
    said = Conversations()
    said.finish(said.start(), response="0")
    for number in range(50):  # 10 tokens of text each, behind a context that only the engine has
        turn = said.start(10, continues=str(number) if is_known else "before this relay")
        said.finish(turn, response=str(number + 1), prompt=100_000)
    turn = said.start(1000)
    assert turn.routed is not None
    assert turn.routed.prompt == 1000


def test_a_turn_that_continues_an_unknown_answer_may_go_anywhere() -> None:
    turn = Conversations().start(10, continues="unknown")
    views: Any = [View("a", 0), View("b", 1)]
    assert list(turn.route.among(views)) == views


def test_a_retry_belongs_to_the_session_of_the_try_that_got_no_answer_once() -> None:
    said = Conversations()
    session = said.finish(said.start(prints=b"1234"), "aborted")
    retry = said.start(prints=b"1234", is_retry=True)
    other = said.start(prints=b"1234", is_retry=True)
    assert said.finish(retry) == session
    assert said.finish(other) != session


def test_a_retry_of_a_turn_that_was_answered_too_late_for_its_client_belongs_to_its_session() -> None:
    said = Conversations()
    session = said.finish(said.start(prints=b"1234"))
    assert said.finish(said.start(prints=b"1234", is_retry=True)) == session
    assert said.finish(said.start(prints=b"1234")) != session


def test_a_retry_does_not_join_a_session_that_lives() -> None:
    """Many workers may begin with the same words; and a body that wasn't read has no prints."""
    said = Conversations()
    living = [said.start(prints=prints) for prints in (b"1234", b"")]
    said.finish(said.start(prints=b"", continues="unknown"), "aborted")
    retries = [said.start(prints=prints, is_retry=True) for prints in (b"1234", b"")]
    assert len({said.finish(turn) for turn in (*living, *retries)}) == 4


def test_a_hold_ends_with_its_time_though_no_slot_was_offered_since() -> None:
    said = Conversations()
    turn = said.start()
    assert turn.routed is not None
    turn.routed.is_held = True
    last = turn.arrived + LONGEST_HOLD_S
    assert said.routes.is_held(turn, last - 1.0)
    assert said.routes.why_held(turn, last - 1.0) is not None
    assert not said.routes.is_held(turn, last)
    assert said.routes.why_held(turn, last) is None


def test_a_priority_is_near_that_of_requests_without_one() -> None:
    """vLLM's own is 0: a session's seconds of service come behind it, seconds of waiting before."""
    said, admission = Conversations(), Admission(make_relay())
    fresh, busy, waited = (said.start(session=name) for name in ("fresh", "busy", "waited"))
    admission._attained.charge("busy", 100.0, busy.arrived)
    waited.arrived -= 30.0
    assert abs(admission.priority(fresh)) < 10_000
    assert admission.priority(busy) > 90_000
    assert admission.priority(waited) < -100_000
