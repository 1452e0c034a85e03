"""What counts as an answer in a stream: complete or cut, an error, text, tokens, the session's next request."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from agent_infra_core.http.bodies import LAST_CHUNK, BodyDecoder, encode_chunk
from agent_infra_core.http.events import (
    AnswerDigest,
    EventStream,
    ResponseIndices,
    answer_text_and_calls,
    message_fingerprint,
)

CHAT, COMPLETIONS, MESSAGES, RESPONSES = (
    b"/v1/chat/completions", b"/v1/completions", b"/v1/messages", b"/v1/responses"
)  # fmt: skip
DONE = b"data: [DONE]\n\n"


def event(document: Any, name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: %b\n\n" % json.dumps(document).encode()


def typed(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


def delta(index: int = 0, reason: str | None = None, **fields: Any) -> bytes:
    return event({"choices": [{"index": index, "delta": fields, "finish_reason": reason}]})


def one_each(events: list[bytes]) -> list[bytes]:
    return [encode_chunk(each) for each in events]


def all_in_one(events: list[bytes]) -> list[bytes]:
    return [encode_chunk(b"".join(events))]


def in_scraps(events: list[bytes]) -> list[bytes]:
    data = b"".join(one_each(events))
    return [data[at : at + 7] for at in range(0, len(data), 7)]


every_framing = pytest.mark.parametrize("framing", [one_each, all_in_one, in_scraps])
Framing = Callable[[list[bytes]], list[bytes]]


def read(events: list[bytes], path: bytes = CHAT, framing: Framing = one_each, end: bytes = LAST_CHUNK) -> EventStream:
    """The stream after these events; ``end`` empty: the connection broke instead of ending the body."""
    stream = EventStream(
        BodyDecoder(None), to_chunks=True, cuts_usage=True, path=path, wanted_text=200, traces=path != RESPONSES
    )
    for piece in [*framing(events), *([end] if end else [])]:
        stream.feed(piece)
    if not end:
        stream.close()
    return stream


# Complete or cut.

BEGUN = {
    CHAT: [delta(role="assistant", content="Hel"), delta(content="lo")],
    COMPLETIONS: [event({"choices": [{"index": 0, "text": "Hello", "finish_reason": None}]})],
    MESSAGES: [
        typed("message_start", message={"role": "assistant", "content": [], "usage": {"input_tokens": 1}}),
        typed("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hello"}),
        typed("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 1}),
    ],
    RESPONSES: [
        typed("response.created", response={"status": "in_progress", "error": None, "usage": None}),
        typed("response.output_text.delta", output_index=0, delta="Hello"),
        typed("response.output_text.done", output_index=0, text="Hello"),
    ],
}
ENDS = [
    (CHAT, delta(reason="stop"), "stop"),
    (COMPLETIONS, event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}), "length"),
    (MESSAGES, typed("message_stop"), "end_turn"),
    (RESPONSES, typed("response.completed", response={"status": "completed"}), "completed"),
    (
        RESPONSES,
        typed("response.incomplete", response={"status": "incomplete", "incomplete_details": {"reason": "max_output"}}),
        "max_output",
    ),
]


@every_framing
@pytest.mark.parametrize(("path", "last", "reason"), ENDS)
def test_a_stream_with_its_apis_last_event_is_complete(path: bytes, last: bytes, reason: str, framing: Framing) -> None:
    stream = read([*BEGUN[path], last], path, framing)
    digest = stream.digest()
    assert (stream.fault, stream.error, digest.text, digest.finish_reason) == (None, None, "Hello", reason)


@every_framing
@pytest.mark.parametrize("path", BEGUN)
@pytest.mark.parametrize("end", [LAST_CHUNK, b""])
def test_a_stream_without_its_apis_last_event_is_cut_however_orderly_its_end(
    path: bytes, framing: Framing, end: bytes
) -> None:
    assert read(BEGUN[path], path, framing, end).fault


@pytest.mark.parametrize("path", BEGUN)
def test_a_stream_of_no_events_is_no_answer(path: bytes) -> None:
    assert read([], path).fault
    assert read([b": ping\n\n"], path).fault


def test_a_finish_reason_needs_a_proper_end_and_a_last_event_needs_none() -> None:
    assert read([*BEGUN[CHAT], delta(reason="stop")], end=b"").fault
    assert read([*BEGUN[CHAT], delta(reason="stop"), DONE], end=b"").fault is None
    assert read([*BEGUN[MESSAGES], typed("message_stop")], MESSAGES, end=b"").fault is None


@every_framing
def test_a_stream_of_two_choices_is_complete_once_both_are(framing: Framing) -> None:
    begun = [delta(0, content="a"), delta(1, content="b"), delta(0, reason="stop")]
    assert read(begun, framing=framing).fault
    assert read([*begun, delta(1, reason="length")], framing=framing).fault is None


# Errors.

DIED = {"message": "the engine core died", "type": "InternalServerError", "code": 500}
REPORTS = [
    (CHAT, event({"error": DIED})),
    (CHAT, event(DIED | {"object": "error"})),
    (CHAT, b"event: error\ndata: the engine core died\n\n"),
    (MESSAGES, typed("error", error=DIED)),
    (RESPONSES, typed("error", message="the engine core died", code="x", param=None)),
    (RESPONSES, typed("response.failed", response={"status": "failed", "error": DIED, "usage": None})),
]


@every_framing
@pytest.mark.parametrize(("path", "report"), REPORTS)
@pytest.mark.parametrize("rest", [[], [DONE]])
@pytest.mark.parametrize("end", [LAST_CHUNK, b""])
def test_an_error_in_a_stream_is_the_engines_own_answer(
    path: bytes, report: bytes, rest: list[bytes], end: bytes, framing: Framing
) -> None:
    for begun in ([], BEGUN[path]):
        stream = read([*begun, report, *rest], path, framing, end)
        assert (stream.error, stream.fault) == ("the engine core died", None)
        assert stream.digest().error == "the engine core died"


def test_the_word_error_in_an_answer_is_none() -> None:
    stream = read([delta(content='{"error": {"message": "boo"}}'), delta(reason="stop"), DONE])
    assert (stream.error, stream.fault) == (None, None)


# The first token.


@pytest.mark.parametrize("framing", [one_each, in_scraps])
def test_only_an_event_with_data_is_a_first_token(framing: Framing) -> None:
    stream = EventStream(BodyDecoder(None), to_chunks=True, cuts_usage=True, path=CHAT, wanted_text=0)
    silent = (b": data: ping", b"data:", b"data: ", b"data:\r", b"retry: 10", b"event: x\nid: 1")
    for nothing in [each + b"\n\n" for each in silent]:
        for piece in framing([nothing]):
            stream.feed(piece)
        assert stream.events == 0
    for piece in framing([delta(role="assistant")]):
        stream.feed(piece)
    assert stream.events == 1


# Tokens.


def figures(digest: AnswerDigest) -> tuple[int | None, int | None, int | None]:
    return digest.prompt_tokens, digest.cached_tokens, digest.completion_tokens


CACHED = {"input_tokens": 12, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4800}


def messages_stream(first: dict[str, int], last: dict[str, int], deltas: int = 1) -> list[bytes]:
    words = [
        typed("content_block_delta", index=0, delta={"type": "text_delta", "text": f"w{n}"}) for n in range(deltas)
    ]
    return [
        typed("message_start", message={"content": [], "usage": first}),
        typed("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        *words,
        typed("content_block_stop", index=0),
        typed("message_delta", delta={"stop_reason": "end_turn"}, usage=last),
        typed("message_stop"),
    ]


@every_framing
@pytest.mark.parametrize("deltas", [1, 300])
@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ({"output_tokens": 50}, (4812, 4800, 50)),
        ({**CACHED, "output_tokens": 50}, (4812, 4800, 50)),
        ({"input_tokens": 12, "output_tokens": 50}, (4812, 4800, 50)),
    ],
)
def test_the_prompt_on_messages_is_what_was_cached_and_what_was_not(
    last: dict[str, int], expected: tuple[int, int, int], deltas: int, framing: Framing
) -> None:
    events = messages_stream({**CACHED, "output_tokens": 1}, last, deltas)
    assert figures(read(events, MESSAGES, framing).digest()) == expected


def test_a_messages_stream_of_an_older_server_has_its_prompt_in_one_figure() -> None:
    assert figures(read(messages_stream({"input_tokens": 4812}, {"output_tokens": 50}), MESSAGES).digest()) == (
        4812, None, 50
    )  # fmt: skip


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({**CACHED, "output_tokens": 50}, (4812, 4800, 50)),
        ({"input_tokens": 10, "cache_creation_input_tokens": 90, "output_tokens": 5}, (100, None, 5)),
        (
            {"prompt_tokens": 4812, "completion_tokens": 50, "prompt_tokens_details": {"cached_tokens": 4800}},
            (4812, 4800, 50),
        ),
        (
            {"input_tokens": 4812, "output_tokens": 50, "input_tokens_details": {"cached_tokens": 4800}},
            (4812, 4800, 50),
        ),
        ({"prompt_tokens": -1, "completion_tokens": True, "cached_tokens": "7"}, (None, None, None)),
    ],
)
def test_tokens_are_read_of_every_apis_usage(
    usage: dict[str, Any], expected: tuple[int | None, int | None, int | None]
) -> None:
    digest = AnswerDigest()
    digest.add({"usage": usage})
    assert figures(digest) == expected


def test_usage_is_found_however_many_events_follow_it() -> None:
    usage = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 9}})
    more = [event({"choices": [], "x": n}) for n in range(50)]
    assert figures(read([*BEGUN[CHAT], delta(reason="stop"), usage, *more, DONE]).digest()) == (7, None, 9)


# Text, and what the session's next request is known by.


@every_framing
def test_the_text_of_two_choices_is_the_first_ones(framing: Framing) -> None:
    words = [("The ", "It "), ("answer ", "may "), ("is 4.", "be 5.")]
    deltas = [delta(index, content=word) for pair in words for index, word in enumerate(pair)]
    ends = [delta(index, reason="stop") for index in (1, 0)]
    stream = read([delta(0, role="assistant", content=""), *deltas, *ends, DONE], framing=framing)
    digest = stream.digest()
    assert (digest.text, digest.finish_reason) == ("The answer is 4.", "stop")
    assert digest.print == message_fingerprint("The answer is 4.", [])


@every_framing
def test_the_text_of_a_responses_stream_is_kept_once_and_without_reasoning(framing: Framing) -> None:
    item = {"type": "message", "content": [{"type": "output_text", "text": "Hello"}]}
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]}
    events = [
        typed("response.created", response={"status": "in_progress", "output": []}),
        typed("response.reasoning_text.delta", output_index=0, delta="Hm."),
        typed("response.output_item.done", output_index=0, item=thought),
        typed("response.function_call_arguments.delta", output_index=2, delta="{}"),
        typed("response.output_text.delta", output_index=1, delta="Hel"),
        typed("response.output_text.delta", output_index=1, delta="lo"),
        typed("response.output_text.done", output_index=1, text="Hello"),
        typed("response.content_part.done", output_index=1, part=item["content"][0]),
        typed("response.output_item.done", output_index=1, item=item),
        typed(
            "response.completed",
            response={
                "status": "completed",
                "output": [thought, item],
                "usage": {"input_tokens": 9, "output_tokens": 4},
            },
        ),
    ]
    for sent in (events, events[:1] + events[-1:]):  # some servers send no deltas
        digest = read(sent, RESPONSES, framing).digest()
        assert (digest.text, digest.finish_reason, *figures(digest)) == ("Hello", "completed", 9, None, 4)


@every_framing
@pytest.mark.parametrize("later", [{"id": "call_a"}, {"id": ""}, {"id": None}, {}])
def test_a_tool_calls_id_counts_once_whatever_its_later_deltas_say(later: dict[str, Any], framing: Framing) -> None:
    events = [
        delta(tool_calls=[{"index": 0, "id": "call_a", "function": {"name": "run", "arguments": ""}}]),
        *(delta(tool_calls=[{"index": 0, **later, "function": {"arguments": "{"}}]) for _ in range(3)),
        delta(tool_calls=[{"index": 1, "id": "call_b", "function": {"name": "run", "arguments": ""}}]),
        *(delta(tool_calls=[{"index": 1, **later, "function": {"arguments": "}"}}]) for _ in range(3)),
        delta(reason="tool_calls"),
        DONE,
    ]
    assert read(events, framing=framing).digest().print == message_fingerprint("", ["call_a", "call_b"])


@every_framing
def test_thinking_on_messages_is_no_text(framing: Framing) -> None:
    events = [
        typed("message_start", message={"content": [], "usage": CACHED}),
        typed("content_block_start", index=0, content_block={"type": "thinking", "thinking": ""}),
        typed("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "Hm."}),
        typed("content_block_start", index=1, content_block={"type": "text", "text": ""}),
        typed("content_block_delta", index=1, delta={"type": "text_delta", "text": "Hello"}),
        typed("content_block_start", index=2, content_block={"type": "tool_use", "id": "toolu_1", "input": {}}),
        typed("content_block_delta", index=2, delta={"type": "input_json_delta", "partial_json": '{"text":"no"}'}),
        typed("message_delta", delta={"stop_reason": "tool_use"}, usage={"output_tokens": 3}),
        typed("message_stop"),
    ]
    digest = read(events, MESSAGES, framing).digest()
    assert (digest.text, digest.print) == ("Hello", message_fingerprint("Hello", ["toolu_1"]))


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"choices": [{"message": {"content": "a", "tool_calls": [{"id": "c"}, {"id": ""}]}}]}, ("a", ["c"])),
        ({"choices": [{"index": 1, "text": "b"}, {"index": 0, "text": "a"}]}, ("a", [])),
        ({"content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "a"}]}, ("a", [])),
        ({"content": [{"type": "tool_use", "id": "t"}]}, ("", ["t"])),
        (
            {
                "output": [
                    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
                    {"type": "message", "content": [{"type": "output_text", "text": "a"}]},
                    {"type": "function_call", "call_id": "f", "id": "fc_1"},
                ]
            },
            ("a", ["f"]),
        ),
        ({"output": "nothing"}, ("", [])),
    ],
)
def test_a_whole_answers_text_is_its_first_choices_without_its_reasoning(
    document: dict[str, Any], expected: tuple[str, list[str]]
) -> None:
    assert answer_text_and_calls(document) == expected


def test_events_of_responses_get_the_indices_that_they_miss() -> None:
    indices = ResponseIndices()

    def complete(document: dict[str, Any]) -> Any:
        name, _, data = indices.complete(b"event: x\ndata: " + json.dumps(document).encode() + b"\n\n").partition(b"\n")
        assert name == b"event: " + document["type"].encode()
        return json.loads(data.removeprefix(b"data: "))

    created = complete({"type": "response.created", "response": {"id": "r"}})
    assert (created["sequence_number"], created["response"]) == (0, {"id": "r", "output": []})
    for number, name in enumerate(("one", "two")):
        added = complete({"type": "response.output_item.added", "item": {"id": name}})
        assert (added["output_index"], "content_index" in added) == (number, False)
        delta = complete({"type": "response.output_text.delta", "item_id": name, "delta": "x"})
        assert (delta["output_index"], delta["content_index"], delta["delta"]) == (number, 0, "x")
    kept = {"type": "response.output_text.delta", "item_id": "one", "output_index": 7, "content_index": 3}
    assert complete(kept) == {**kept, "sequence_number": 5}
    assert indices.complete(b": ping\n\n") == b": ping\n\n"
