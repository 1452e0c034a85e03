"""A ten-turn agent: it guesses a number, and its world answers "too low" or "too high".

    python agent_infra.py up                      # in another terminal
    python examples/quickstart.py [--stream]

The session times what the agent does between its requests, so that the proxy knows whom a turn waits for.
"""

import argparse
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from openai import APIConnectionError, APIError, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from agent_infra import SessionContext

BASE_URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:5800/v1")
API_KEY = os.environ.get("OPENAI_API_KEY", "unused")
RULES = "You guess a number from 1 to 100. Answer with one number and nothing else."


class NumberGame:
    """The world: a number to be guessed, and a new one after each hit."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.low, self.high, self.secret = 1, 100, 1 + secrets.randbelow(100)

    def observe(self) -> str:
        return f"The number is at least {self.low} and at most {self.high}. Your guess?"

    def act(self, answer: str) -> str:
        guess = next(map(int, re.findall(r"\d+", answer)), 0)
        if not self.low <= guess <= self.high:  # small models lose the thread
            guess = (self.low + self.high) // 2
        if guess == self.secret:
            self.start()
            return f"{guess} is right, a new game"
        if guess < self.secret:
            self.low = guess + 1
            return f"{guess} is too low"
        self.high = guess - 1
        return f"{guess} is too high"


def ask(
    client: OpenAI, model: str, messages: list[ChatCompletionMessageParam], headers: dict[str, str], stream: bool
) -> tuple[str, int]:
    """The model's answer and the number of its tokens."""
    create = client.chat.completions.create
    if not stream:
        completion = create(model=model, messages=messages, max_tokens=8, extra_headers=headers)
        tokens = completion.usage.completion_tokens if completion.usage else 0
        return completion.choices[0].message.content or "", tokens
    answer, tokens = "", 0
    chunks = create(
        model=model,
        messages=messages,
        max_tokens=8,
        extra_headers=headers,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in chunks:
        answer += "".join(choice.delta.content or "" for choice in chunk.choices)
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return answer, tokens


def play(model: str, stream: bool, turns: int = 10) -> None:
    client = OpenAI(base_url=BASE_URL, api_key=API_KEY)
    game, total_tokens, total_s = NumberGame(), 0, 0.0
    messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": RULES}]
    with SessionContext(task_id="quickstart", base_url=BASE_URL) as session:
        for turn in range(1, turns + 1):
            with session.observing():
                messages.append({"role": "user", "content": game.observe()})
            started = time.monotonic()
            answer, tokens = ask(client, model, messages, session.get_headers(), stream)
            elapsed_s = time.monotonic() - started
            with session.acting():
                messages.append({"role": "assistant", "content": answer})
                result = game.act(answer)
            print(f"turn {turn:2}  {elapsed_s:5.2f} s  {tokens:3} tokens  {answer[:30]!r}: {result}")
            total_tokens, total_s = total_tokens + tokens, total_s + elapsed_s
    print(f"session {session.session_id}")
    print(f"{turns} turns: {total_tokens} tokens in {total_s:.2f} s, {total_tokens / total_s:.0f} tokens/s")


@contextmanager
def explained() -> Iterator[None]:
    """Ends the program with what to do, where there is no proxy or it says no."""
    try:
        yield
    except APIConnectionError:
        sys.exit(f"no proxy at {BASE_URL}: start one with `python agent_infra.py up`, or set OPENAI_BASE_URL")
    except APIError as error:
        sys.exit(f"the proxy at {BASE_URL} says: {error.message}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Hold a ten-turn conversation through the Agent Infra proxy.")
    parser.add_argument("--model", default="smollm2", help="name of the model (default: %(default)s)")
    parser.add_argument("--stream", action="store_true", help="stream the answers")
    arguments = parser.parse_args()
    with explained():
        play(arguments.model, arguments.stream)


if __name__ == "__main__":
    main()
