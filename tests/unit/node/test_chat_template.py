"""The chat template of a GGUF file, and what tools add to one that leaves them out."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import jinja2
import pytest

from agent_infra_core.node.chat_template import read_chat_template, template_with_tools

PLAIN = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + PLAIN


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(template: str | None) -> bytes:
    """A GGUF file's metadata with values of all types, the template behind them."""
    pairs = [text(f"number.{kind}") + struct.pack("<I", kind) + b"x" * size for kind, size in ((0, 1), (7, 1), (12, 8))]
    pairs.append(text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("é"))
    pairs.append(text("scores") + struct.pack("<IIQ", 9, 6, 3) + b"x" * 12)
    pairs.append(text("nested") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 4, 2) + b"x" * 8)
    if template is not None:
        pairs.append(text("tokenizer.chat_template") + struct.pack("<I", 8) + text(template))
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, len(pairs)) + b"".join(pairs)


def extended(tmp_path: Path, content: bytes) -> str:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    return template_with_tools(str(file))


def rendered(template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
    environment = jinja2.Environment()
    environment.filters["tojson"] = json.dumps  # as in llama.cpp; Jinja's own is for HTML
    return environment.from_string(template).render(messages=messages, tools=tools)


def test_the_template_is_found_behind_values_of_every_type() -> None:
    assert read_chat_template(gguf(PLAIN)) == PLAIN
    assert read_chat_template(gguf(None)) is None


def corrupt(value: bytes) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, 2) + text("key") + value


FAR = corrupt(struct.pack("<IQ", 8, 2**64 - 100) + b"x" * 100)  # a text's length
DEEP = corrupt(struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000)  # lists in lists


@pytest.mark.parametrize(
    "content",
    [gguf(WITH_TOOLS), gguf(None), b"", b"GGUF", gguf(PLAIN)[:80], b"x" * 500, FAR, DEEP],
    ids=["tools", "none", "empty", "magic", "short", "other", "far", "deep"],
)
def test_a_file_that_has_tools_or_cannot_be_read_is_left_to_the_engine(tmp_path: Path, content: bytes) -> None:
    assert extended(tmp_path, content) == ""


QUESTION = {"role": "user", "content": "Weather in Paris?"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def test_without_tools_a_conversation_reads_as_before(tmp_path: Path) -> None:
    template = extended(tmp_path, gguf(PLAIN))
    messages = [{"role": "system", "content": "Be brief."}, QUESTION]
    assert rendered(template, messages) == rendered(PLAIN, messages)


def test_tools_stand_in_the_system_message_and_calls_and_results_in_plain_ones(tmp_path: Path) -> None:
    template = extended(tmp_path, gguf(PLAIN))
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "18 C"},
    ]
    system, _, rest = rendered(template, messages, [TOOL]).partition("<user>")
    assert system.startswith("<system>Be brief.")
    assert json.loads(system.partition("<tools>\n")[2].partition("\n</tools>")[0]) == TOOL
    said = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert rest == f"Weather in Paris?<assistant>{said}<user><tool_response>\n18 C\n</tool_response>"


def test_every_system_message_stays_beside_the_tools(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, QUESTION, {"role": "system", "content": "Be kind."}]
    said = rendered(extended(tmp_path, gguf(PLAIN)), messages, [TOOL])
    assert said.startswith("<system>Be brief.\n\nBe kind.\n\n# Tools")
