"""What litellm and Anthropic's SDK make of a deployment's answers and refusals.

``other_clients.py URL KEY`` prints it as a line of JSON. The Python that has both runs it; see test_other_clients.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import anthropic
import litellm

MESSAGES: list[Any] = [{"role": "user", "content": "Say hi"}]
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


def attempt(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns, or the name, status and text of the exception that it raises."""
    try:
        return call(*arguments)
    except Exception as error:  # noqa: BLE001 - which one is the question
        return [type(error).__name__, getattr(error, "status_code", None), str(error)]


def own_headers(headers: Any) -> list[str]:
    return sorted(name for name in headers if name.startswith(("x-agent-infra-", "x-request-id")))


def ask_anthropic(url: str, key: str, model: str, stream: bool) -> Any:
    client = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)
    if stream:
        with client.messages.stream(model=model, max_tokens=8, messages=MESSAGES) as events:
            return ["".join(events.text_stream) != "", own_headers(events.response.headers)]
    answer = client.messages.with_raw_response.create(model=model, max_tokens=8, messages=MESSAGES)
    return [answer.parse().content[0].text != "", own_headers(answer.headers)]


def ask_litellm(url: str, key: str, model: str, stream: bool, messages: Any = MESSAGES) -> Any:
    options = {"max_tokens": 8, "stream": stream, "api_base": url, "api_key": key, "num_retries": 0}
    answer = litellm.completion(model=model, messages=messages, **options)
    if stream:
        return ["".join(event.choices[0].delta.content or "" for event in answer) != ""]
    return [answer.choices[0].message.content != "", own_headers(answer._response_headers or {})]


def ask_responses(url: str, key: str, model: str, stream: bool) -> Any:
    answer = litellm.responses(
        model=model, input="hi", max_output_tokens=8, stream=stream, api_base=url, api_key=key, num_retries=0
    )
    if stream:
        return [getattr(event.type, "value", event.type) for event in answer][-1:]
    return [answer.output[0].content[0].text != ""]


def main() -> None:
    url, key = sys.argv[1:]
    litellm.suppress_debug_info = True
    found: dict[str, Any] = {}
    for way in ("plain", "streamed"):
        stream = way == "streamed"
        for model in ("smollm2", "nope"):
            found[f"anthropic {model} {way}"] = attempt(ask_anthropic, url, key, model, stream)
            for api, base in (("openai", f"{url}/v1"), ("anthropic", url)):
                found[f"litellm {api} {model} {way}"] = attempt(ask_litellm, base, key, f"{api}/{model}", stream)
            name = f"litellm responses {model} {way}"
            found[name] = attempt(ask_responses, f"{url}/v1", key, f"openai/{model}", stream)
        found[f"anthropic wrong key {way}"] = attempt(ask_anthropic, url, "wrong", "smollm2", stream)
        name = f"litellm openai wrong key {way}"
        found[name] = attempt(ask_litellm, f"{url}/v1", "wrong", "openai/smollm2", stream)
    for name, content in (("too long", "word " * 9000), ("a picture", [PICTURE])):
        message = {"role": "user", "content": content}
        answer = attempt(ask_litellm, f"{url}/v1", key, "openai/smollm2", False, [message])
        found[f"litellm openai {name} plain"] = answer
    print(json.dumps(found))


if __name__ == "__main__":
    main()
