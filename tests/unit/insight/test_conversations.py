"""A session whose client names none is found by what was said: the whole of it, and nothing less."""

from __future__ import annotations

import json
import random
import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_infra_core.http.bodies import BodyDecoder, encode_chunk
from agent_infra_core.http.events import EventStream, conversation_key
from agent_infra_core.insight.tracker import Tracker
from agent_infra_core.insight.turns import TurnRecord
from agent_infra_core.protocol import RETRY_S, SessionEnded, TurnFinished, TurnStarted
from agent_infra_core.relay.bodies import Codec

CODEC = Codec()
Message = dict[str, Any]


def traced(messages: list[Message], is_named: bool = False, **fields: Any) -> tuple[bytes, str | None]:
    """What the relay says of a request: the prints of its messages, and what conversation it follows."""
    body = json.dumps({"model": "m", "messages": messages, **fields}).encode()
    return CODEC.trace(CODEC.request(body), is_named)


def key_after(messages: list[Message], answer: Message) -> str | None:
    """What the relay says of a plain answer: what the next request is known by."""
    body = json.dumps({"choices": [{"message": answer, "finish_reason": "stop"}], "usage": {}}).encode()
    digest = CODEC.digest(body, 50, traces=True)
    assert digest is not None
    assert digest.print is not None
    return conversation_key(traced(messages)[0][4:], digest.print)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def says(text: str | None, *calls: str, **more: Any) -> Message:
    message: Message = {"role": "assistant", "content": text, **more}
    function = {"name": "run", "arguments": "{}"}
    tool_calls = [{"id": call, "type": "function", "function": function} for call in calls]
    return {**message, "tool_calls": tool_calls} if calls else message


START = [{"role": "system", "content": "Be brief."}, user("Hello")]


# --- what the relay sees in requests and answers


@pytest.mark.parametrize(
    ("answered", "sent_back"),
    [
        (says("Hi. “Ünïcode” \U0001f600\n"), says("Hi. “Ünïcode” \U0001f600\n")),
        (says("Hi.", refusal=None, annotations=[]), says("Hi.")),
        (says(" Hi.\n"), says("Hi.")),
        (says("Hi."), {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]}),
        (says("Hi.", reasoning_content="Hm."), says("Hi.")),
        (says(None, "call_1", "call_2"), says(None, "call_1", "call_2")),
        (says(None, "call_1"), says("", "call_1")),
    ],
    ids=["words", "fields", "blanks", "parts", "reasoning", "calls", "no words"],
)
def test_a_request_follows_the_answer_that_it_repeats(answered: Message, sent_back: Message) -> None:
    tail = [{"role": "tool", "tool_call_id": "call_1", "content": "ok"}, user("go on")]
    assert traced([*START, sent_back, *tail])[1] == key_after(START, answered)


@pytest.mark.parametrize(
    "sent_back",
    [
        [*START, says("Ho.", "call_1")],
        [*START, says("Hi.", "call_2")],
        [*START, says("Hi.")],
        [START[0], user("hello"), says("Hi.", "call_1")],
        [*START[1:], says("Hi.", "call_1")],
        [*START, user("more"), says("Hi.", "call_1")],
        [*START, says("Hi.", "call_1"), user("and"), says("Hi.", "call_1")],
    ],
)
def test_a_request_that_repeats_anything_else_follows_nothing(sent_back: list[Message]) -> None:
    assert traced([*sent_back, user("go on")])[1] != key_after(START, says("Hi.", "call_1"))


def test_a_request_without_an_answer_in_it_begins_and_one_with_a_session_is_not_looked_at() -> None:
    assert traced(START)[1] == ""
    assert traced([*START, says("x"), user("y")], is_named=True)[1] is None
    assert traced([])[1] is None
    assert CODEC.trace(CODEC.request(b'{"messages":"none"}'), False) == (b"", None)


REASONING = {"type": "reasoning", "id": "rs_1", "summary": []}
CALL = {"type": "function_call", "call_id": "call_1", "name": "run", "arguments": "{}", "id": "fc_1"}


def responds(text: str) -> Message:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}], "id": "msg_1"}


def traced_items(given: Any, is_named: bool = False) -> tuple[bytes, str | None]:
    """What the relay says of a request of /v1/responses."""
    return CODEC.trace_response(CODEC.request(json.dumps({"model": "m", "input": given}).encode()), is_named)


def key_after_items(given: Any, output: list[Message]) -> str:
    """What the next request of a response's conversation is known by."""
    digest = CODEC.digest(json.dumps({"object": "response", "id": "r1", "output": output}).encode(), 50, traces=True)
    assert digest is not None
    assert digest.response == "r1"
    assert digest.print is not None
    return conversation_key(traced_items(given)[0][4:], digest.print)


@pytest.mark.parametrize(
    ("given", "output", "sent_back"),
    [
        ("Hello", [REASONING, responds("Hi."), CALL], [user("Hello"), REASONING, responds("Hi."), CALL]),
        ([user("Hello")], [responds("Hi."), CALL], [user("Hello"), responds("Hi."), CALL]),
        ("Hello", [responds("Hi.")], [user("Hello"), {"role": "assistant", "content": "Hi."}]),
        ("Hello", [REASONING, CALL], [user("Hello"), CALL]),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "input_text", "text": "Hel"}, {"type": "input_text", "text": "lo"}],
                }
            ],
            [responds("Hi.")],
            [user("Hello"), responds("Hi.")],
        ),
    ],
    ids=["text", "items", "easy message", "calls alone", "parts"],
)
def test_a_response_request_follows_the_answer_that_it_repeats(
    given: Any, output: list[Message], sent_back: list[Message]
) -> None:
    tail = [{"type": "function_call_output", "call_id": "call_1", "output": "ok"}, user("go on")]
    assert traced_items([*sent_back, *tail])[1] == key_after_items(given, output)


@pytest.mark.parametrize(
    "sent_back",
    [
        [user("Hello"), responds("Ho."), CALL],
        [user("hello"), responds("Hi."), CALL],
        [user("Hello"), responds("Hi.")],
        [user("Hello"), user("more"), responds("Hi."), CALL],
        [{"role": "system", "content": "Hello"}, responds("Hi."), CALL],
    ],
)
def test_a_response_request_that_repeats_anything_else_follows_nothing(sent_back: list[Message]) -> None:
    assert traced_items([*sent_back, user("go on")])[1] != key_after_items("Hello", [responds("Hi."), CALL])


@pytest.mark.parametrize("given", [None, [], {}, 7])
def test_an_input_that_is_no_text_and_no_list_is_of_no_conversation(given: Any) -> None:
    assert traced_items(given) == (b"", None)


def test_a_response_request_without_an_answer_begins_a_conversation() -> None:
    assert traced_items("Hello")[1] == ""
    assert traced_items([user("Hello"), 7, responds("x"), user("y")], is_named=True)[1] is None


def test_other_tools_or_parameters_leave_the_conversation_what_it_is() -> None:
    messages = [*START, says("x"), user("y")]
    assert traced(messages)[1] == traced(messages, tools=[{"type": "function"}], temperature=1.0, stream=True)[1]
    assert traced(messages)[0][:4] != traced(messages, tools=[{"type": "function"}])[0][:4]
    assert traced(messages)[0][4:] == traced(messages, tools=[{"type": "function"}])[0][4:]


def sse(*events: Any) -> list[bytes]:
    return [encode_chunk(b"data: %b\n\n" % json.dumps(event, ensure_ascii=False).encode()) for event in events]


def delta(**fields: Any) -> Any:
    return {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def stream_print(pieces: list[bytes]) -> bytes | None:
    stream = EventStream(BodyDecoder(None), to_chunks=True, cuts_usage=False, path=b"", wanted_text=20, traces=True)
    for piece in pieces:
        stream.feed(piece)
    digest = stream.digest()
    assert len(digest.text) <= 20
    return digest.print


@pytest.mark.parametrize("split", [0, 1, 50])
def test_a_streamed_answer_has_the_print_of_the_message_that_it_makes(split: int) -> None:
    words = [f' wörd{number} "\\\n{{}}' for number in range(100)]
    calls = [{"index": 0, "id": "call_1", "function": {"name": "run", "arguments": ""}}]
    more = [{"index": 0, "function": {"arguments": '{"content":"not this","id":"nor this"}'}}]
    deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in words)]
    pieces = sse(*(delta(**each) for each in deltas), delta(tool_calls=calls), delta(tool_calls=more))
    if split:
        data = b"".join(pieces)
        pieces = [data[at : at + split] for at in range(0, len(data), split)]
    body = json.dumps({"choices": [{"message": says("".join(words), "call_1")}], "usage": {}}).encode()
    digest = CODEC.digest(body, 20, traces=True)
    assert digest is not None
    assert stream_print(pieces) == digest.print


def test_an_anthropic_answer_is_known_again_streamed_or_not() -> None:
    content: list[Any] = [
        {"type": "text", "text": "Hi there"},
        {"type": "tool_use", "id": "toolu_1", "name": "run", "input": {}},
    ]
    body = json.dumps({"type": "message", "content": content, "usage": {"input_tokens": 1}}).encode()
    plain = CODEC.digest(body, 20, traces=True)
    streamed = stream_print(
        sse(
            {"type": "message_start", "message": {"id": "msg_1", "content": [], "usage": {"input_tokens": 1}}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi "}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "there"}},
            {"type": "content_block_start", "index": 1, "content_block": content[1]},
            {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": "{}"}},
        )
    )
    assert plain is not None
    assert streamed == plain.print
    assert plain.print is not None
    followed = traced([user("Hello"), {"role": "assistant", "content": content}, user("go on")])[1]
    assert followed == conversation_key(traced([user("Hello")])[0][4:], plain.print)


def test_an_answer_longer_than_can_be_kept_is_not_known_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_infra_core.http.events.MAX_TRACED_BYTES", 1000)
    assert stream_print(sse(*[delta(content="x" * 40)] * 60)) is None


# --- what the tracker makes of it


class Agents:
    """A tracker, and agents that send no header at all."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.tracker = Tracker(lambda: self.now)
        self.turns = 0
        self.records: list[TurnRecord] = []

    def ask(self, messages: list[Message], **fields: Any) -> TurnStarted:
        self.turns += 1
        self.now += 1
        prints, follows = traced(messages)
        turn = TurnStarted(
            f"t{self.turns}", self.now, "m", "/v1/chat/completions", prints=prints, follows=follows, **fields
        )
        self.tracker.observe(turn)
        return turn

    def answer(self, turn: TurnStarted, messages: list[Message], answer: Message | None) -> str | None:
        """The session that the turn turned out to be of; without an answer, it fails."""
        self.now += 1
        outcome, key = ("completed", key_after(messages, answer)) if answer is not None else ("cut", None)
        self.tracker.observe(TurnFinished(turn.turn, self.now, outcome, 200, "a", key=key))
        [record] = self.tracker.take_records()[0]
        self.records.append(record)
        return record.session

    def restart(self) -> None:
        """Another tracker goes on after all turns so far."""
        self.tracker = Tracker(lambda: self.now)
        self.tracker.restore(self.records, {})

    def take_turn(self, messages: list[Message], answer: Message | None, **fields: Any) -> str | None:
        return self.answer(self.ask(messages, **fields), messages, answer)


@pytest.fixture
def agents() -> Agents:
    return Agents()


def test_an_agent_without_headers_is_one_session_across_its_turns(agents: Agents) -> None:
    messages, found = list(START), []
    for number in range(5):
        answer = says(f"answer {number}", f"call_{number}")
        found.append(agents.take_turn(messages, answer))
        messages += [answer, {"role": "tool", "tool_call_id": f"call_{number}", "content": "ok"}]
    assert found == ["auto-t1"] * 5
    document = agents.tracker.snapshot([], [], "")
    [session] = document["clients"][0]["sessions"]
    assert (session["id"], session["turns"]) == ("auto-t1", 5)
    assert agents.tracker.snapshot([], [], "")["recent_turns"][0]["think_ms"] == 1000.0


def test_agents_that_begin_alike_are_sessions_of_their_own(agents: Agents) -> None:
    one, other = agents.take_turn(START, says("a")), agents.take_turn(START, says("b"))
    assert one != other
    assert agents.take_turn([*START, says("b"), user("go on")], says("c")) == other
    assert agents.take_turn([*START, says("a"), user("go on")], says("c")) == one


def test_an_answer_that_several_gave_is_continued_once_by_each(agents: Agents) -> None:
    one, other = agents.take_turn(START, says("a")), agents.take_turn(START, says("a"))
    messages = [*START, says("a"), user("go on")]
    assert [agents.take_turn(messages, says("b")) for _ in range(2)] == [one, other]
    assert agents.take_turn(messages, says("c")) not in (one, other)


def test_turns_from_one_answer_at_a_time_are_sessions_of_their_own(agents: Agents) -> None:
    first = agents.take_turn(START, says("a"))
    messages = [*START, says("a"), user("go on")]
    sampled = [agents.ask(messages) for _ in range(3)]
    found = [agents.answer(turn, messages, says(f"b{number}")) for number, turn in enumerate(sampled)]
    assert found[0] == first
    assert len(set(found)) == 3
    assert agents.take_turn([*messages, says("b1"), user("so")], says("c")) == found[1]


def test_a_second_turn_from_an_answer_that_was_gone_on_from_is_a_branch(agents: Agents) -> None:
    first = agents.take_turn(START, says("a"))
    messages = [*START, says("a"), user("go on")]
    assert agents.take_turn(messages, says("b")) == first
    assert agents.take_turn(messages, says("c")) != first


def test_a_turn_that_failed_is_tried_again_in_its_session(agents: Agents) -> None:
    first = agents.take_turn(START, says("a"))
    messages = [*START, says("a"), user("go on")]
    assert agents.take_turn(messages, None) == first
    assert agents.take_turn(messages, says("b")) == first


BEGUN = [*START, says("a"), user("go on")]


@pytest.mark.parametrize("named", [None, "s"])
@pytest.mark.parametrize("messages", [START, BEGUN], ids=["first", "later"])
@pytest.mark.parametrize("answer", [says("b"), None], ids=["answered", "failed"])
def test_a_client_librarys_retry_is_the_same_turn_again_without_think_time(
    named: str | None, messages: list[Message], answer: Message | None, agents: Agents
) -> None:
    if messages == BEGUN:
        agents.take_turn(START, says("a"), session=named)
    first = agents.take_turn(messages, answer, session=named)
    assert agents.take_turn(messages, says("c"), session=named, is_retry=True) == first
    assert (agents.records[-1].think_ms, agents.records[-1].pre_ms) == (None, None)
    assert agents.take_turn([*messages, says("c"), user("so")], says("d"), session=named) == first
    assert agents.records[-1].think_ms == 1000.0
    if named is None:  # the answer that the first try continued isn't there for another turn
        assert agents.take_turn(messages, says("e")) != first


def test_an_answer_that_was_continued_or_is_old_was_received_and_its_body_is_not_sent_again(agents: Agents) -> None:
    first = agents.take_turn(START, says("a"))
    assert agents.take_turn(BEGUN, says("b")) == first
    assert agents.take_turn(START, says("c"), is_retry=True) != first
    second = agents.take_turn([user("Hi")], says("a"))
    agents.now += RETRY_S
    assert agents.take_turn([user("Hi")], says("b"), is_retry=True) != second


def test_a_retry_whose_body_several_have_just_sent_is_a_session_of_its_own(agents: Agents) -> None:
    found = [agents.take_turn(START, says(answer)) for answer in "ab"]
    assert agents.take_turn(START, says("c"), is_retry=True) not in found


def test_a_retry_goes_to_the_turn_without_an_answer_rather_than_to_one_with(agents: Agents) -> None:
    failed, other = agents.take_turn(START, None), agents.take_turn(START, says("a"))
    assert agents.take_turn(START, says("b"), is_retry=True) == failed != other


def test_bodies_that_may_be_sent_again_are_bounded(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_infra_core.protocol.MAX_TRIES", 3)
    found = [agents.take_turn([user(str(number))], None) for number in range(5)]
    assert agents.take_turn([user("4")], says("a"), is_retry=True) == found[4]
    assert agents.take_turn([user("0")], says("a"), is_retry=True) not in found


def test_examples_in_a_first_request_are_no_session(agents: Agents) -> None:
    shots = [user("2+2"), says("4"), user("3+3")]
    assert agents.take_turn(shots, says("6")) != agents.take_turn(shots, says("six"))


def test_a_session_that_was_told_to_end_goes_on_if_its_agent_does(agents: Agents) -> None:
    first = agents.take_turn(START, says("a"))
    assert first is not None
    agents.tracker.observe(SessionEnded(first, agents.now))
    assert agents.take_turn([*START, says("a"), user("go on")], says("b")) == first


def test_sessions_are_found_after_a_restart(agents: Agents) -> None:
    first = agents.take_turn(START, says("a"))
    agents.restart()
    assert agents.take_turn([*START, says("a"), user("go on")], says("b")) == first


def test_after_a_restart_an_answer_that_was_gone_on_from_is_nobodys(agents: Agents) -> None:
    one = agents.take_turn(START, says("a"))
    assert agents.take_turn([*START, says("a"), user("go on")], says("b")) == one
    agents.restart()
    other = agents.take_turn(START, says("a"))
    assert other != one
    assert agents.take_turn([*START, says("a"), user("then")], says("c")) == other
    agents.restart()
    assert agents.take_turn([*START, says("a"), user("then"), says("c"), user("so")], says("d")) == other
    assert agents.take_turn([*START, says("a"), user("go on"), says("b"), user("so")], says("e")) == one


def test_after_a_restart_agents_that_began_alike_at_a_time_are_told_apart(agents: Agents) -> None:
    messages = [*START, says("a"), user("go on")]
    one = agents.take_turn(START, says("a"))
    turn = agents.ask(messages)
    other = agents.take_turn(START, says("a"))
    assert agents.answer(turn, messages, says("b")) == one
    agents.restart()
    assert agents.take_turn([*START, says("a"), user("then")], says("c")) == other


def test_the_queue_names_the_sessions_that_were_found(agents: Agents) -> None:
    turn = agents.ask(START)
    waiting = [{"turn": turn.turn, "session": None, "model": "m", "waited_ms": 3}]
    agents.tracker.sample({"queue": {"pending": 1, "in_flight": 0, "oldest_ms": 3, "waiting": waiting}})
    assert agents.tracker.snapshot([], [], "")["queue"]["waiting"] == [{**waiting[0], "session": "auto-t1"}]


def test_what_is_remembered_of_answers_is_bounded(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_infra_core.protocol.MAX_CONVERSATIONS", 3)
    found = [agents.take_turn(START, says(str(number))) for number in range(5)]
    assert agents.take_turn([*START, says("4"), user("x")], says("y")) == found[4]
    assert agents.take_turn([*START, says("0"), user("x")], says("y")) not in found


def test_a_turn_that_says_nothing_of_a_conversation_is_of_no_session(agents: Agents) -> None:
    turn = TurnStarted("t", agents.now, "m", "/v1/embeddings")
    agents.tracker.observe(turn)
    assert agents.answer(turn, START, says("a")) is None


def test_the_message_that_the_client_changed_is_named(agents: Agents) -> None:
    def miss(before: list[Message], after: list[Message], **fields: Any) -> str | None:
        tracker = Tracker(lambda: agents.now)
        for number, (messages, more) in enumerate(((before, {}), (after, fields))):
            prints, _ = traced(messages, **more)
            started = TurnStarted(str(number), agents.now, "m", "/v1/chat/completions", "s", prints=prints)
            tracker.observe(
                TurnFinished(
                    str(number), agents.now, "completed", 200, "a", started=started,
                    prompt_tokens=5000, completion_tokens=100, cached_tokens=16,
                )
            )  # fmt: skip
        return tracker.take_records()[0][1].cache_miss

    grown = [*START, says("a"), user("b"), says("c"), user("d")]
    assert miss(grown[:4], grown) == "evicted from a"
    assert miss(grown[:4], [{"role": "system", "content": "It is 10:42."}, *grown[1:]]) == (
        "your client changed message 1 of 6"
    )
    assert miss(grown[:4], [*grown[:2], *grown[3:]]) == "your client changed message 3 of 5"
    assert miss(grown[:4], grown, tools=[{}]) == "your client changed the tools or the system prompt"
    long = [user(str(number)) for number in range(400)]
    assert miss(long, [*long[:300], user("x"), *long[301:]]) == "evicted from a"


# --- any interleaving


steps = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["ask", "finish", "fail"])), max_size=60)


@settings(max_examples=200, deadline=None)
@given(steps, st.integers(0, 2**32))
def test_no_interleaving_of_agents_ever_mixes_their_turns(plan: list[tuple[int, str]], seed: int) -> None:
    """Agents with answers of their own: every turn of an agent is in its session, and no other agent's is."""
    agents, chance = Agents(), random.Random(seed)
    histories: dict[int, list[Message]] = {agent: list(START) for agent in range(4)}
    open_turns: dict[int, TurnStarted] = {}
    found: dict[int, set[str | None]] = {agent: set() for agent in range(4)}
    has_answered: set[int] = set()
    for agent, step in plan:
        messages = histories[agent]
        if step == "ask" and agent not in open_turns:
            open_turns[agent] = agents.ask(messages)
        elif step != "ask" and agent in open_turns:
            words = "".join(chance.choices(string.ascii_letters, k=12)) if step == "finish" else None
            answer = says(words) if words is not None else None
            session = agents.answer(open_turns.pop(agent), messages, answer)
            if answer is not None or agent in has_answered:  # a first try that failed leaves nothing to go by
                found[agent].add(session)
            if answer is not None:
                has_answered.add(agent)
                messages += [answer, user("go on")]
    sessions = [session for names in found.values() for session in names]
    assert all(len(names) <= 1 for names in found.values())
    assert len(sessions) == len(set(sessions))


def test_a_cache_mark_that_moves_changes_nothing_that_was_said() -> None:
    def marked(is_marked: bool) -> Message:
        mark = {"cache_control": {"type": "ephemeral"}} if is_marked else {}
        return {"role": "user", "content": [{"type": "text", "text": "Hello", **mark}]}

    plain = traced([marked(False), says("Hi"), user("Go on")])
    assert traced([marked(True), says("Hi"), user("Go on")]) == plain
    assert traced([marked(True), says("Hi"), user("Stop")]) != plain
