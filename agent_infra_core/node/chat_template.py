"""Chat templates of GGUF files, and tools for those whose own template leaves them out."""

from __future__ import annotations

import mmap
import struct

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type → bytes
_STRING, _ARRAY = 8, 9  # the other value types
_LENGTH = struct.Struct("<Q")
_KEY = b"tokenizer.chat_template"

# Comes before a model's own template: puts the tools into the system message, and calls and results into plain
# messages, in the form (of Hermes) that most small models know and llama.cpp reads back.
_TOOLS = """\
{%- if tools or messages | selectattr('role', 'equalto', 'tool') | list -%}
{%- set ns = namespace(messages=[], system='') -%}
{%- for message in messages -%}
{%- set content = message.content if message.content is string else '' -%}
{%- if message.role == 'system' -%}
{%- set ns.system = (ns.system + '\\n\\n' + content) | trim -%}
{%- elif message.role == 'tool' -%}
{%- set result = '<tool_response>\\n' + content + '\\n</tool_response>' -%}
{%- set ns.messages = ns.messages + [{'role': 'user', 'content': result}] -%}
{%- elif message.tool_calls -%}
{%- set calls = namespace(text=content) -%}
{%- for call in message.tool_calls -%}
{%- set given = call.function.arguments -%}
{%- set given = given if given is string else given | tojson -%}
{%- set named = '{"name": "' + call.function.name + '", "arguments": ' + given + '}' -%}
{%- set calls.text = calls.text + '\\n<tool_call>\\n' + named + '\\n</tool_call>' -%}
{%- endfor -%}
{%- set ns.messages = ns.messages + [{'role': 'assistant', 'content': calls.text | trim}] -%}
{%- else -%}
{%- set ns.messages = ns.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- if tools -%}
{%- set ns.system = ns.system + '\\n\\n# Tools\\n\\nYou may call one or more functions. Their signatures:\\n<tools>' -%}
{%- for tool in tools -%}
{%- set ns.system = ns.system + '\\n' + (tool | tojson) -%}
{%- endfor -%}
{%- set ns.system = ns.system + '\\n</tools>\\n\\nFor each call, return JSON within <tool_call></tool_call>:' -%}
{%- set form = '{"name": <function-name>, "arguments": <args-json-object>}' -%}
{%- set ns.system = ns.system + '\\n<tool_call>\\n' + form + '\\n</tool_call>' -%}
{%- endif -%}
{%- set first = [{'role': 'system', 'content': ns.system | trim}] if ns.system else [] -%}
{%- set messages = first + ns.messages -%}
{%- endif -%}
"""


def template_with_tools(model_path: str) -> str:
    """Return a GGUF file's chat template, extended by tools; empty if it has tools itself, or can't be read."""
    try:
        with open(model_path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            template = read_chat_template(data)
    except (OSError, ValueError, KeyError, OverflowError, RecursionError, struct.error):
        return ""  # the engine says what is wrong with the file
    return "" if not template or "tools" in template else _TOOLS + template


def read_chat_template(data: bytes | mmap.mmap) -> str | None:
    """Return the chat template in a GGUF file's metadata; None without one. Raises ValueError, KeyError,
    OverflowError, RecursionError or struct.error if the file is no GGUF file (version 2 or later)."""
    magic, version, _, count = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version < 2:
        raise ValueError("not a GGUF file that can be read")
    at = 24
    for _ in range(count):
        key_end = _string_end(data, at)
        key, (kind,) = data[at + 8 : key_end], struct.unpack_from("<I", data, key_end)
        at = key_end + 4
        if key == _KEY and kind == _STRING:
            return data[at + 8 : _string_end(data, at)].decode("utf-8", "replace")
        at = _value_end(data, at, kind)
    return None


def _string_end(data: bytes | mmap.mmap, at: int) -> int:
    return at + 8 + int(_LENGTH.unpack_from(data, at)[0])


def _value_end(data: bytes | mmap.mmap, at: int, kind: int) -> int:
    """Where the value at a position ends."""
    if kind == _STRING:
        return _string_end(data, at)
    if kind != _ARRAY:
        return at + _SIZES[kind]
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind in _SIZES:
        return at + _SIZES[kind] * int(count)
    for _ in range(count):
        at = _value_end(data, at, kind)
    return at
