"""The conversation of quickstart.py in the fewest lines: attach() adds the headers and measures the gaps by itself."""

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam
from quickstart import API_KEY, BASE_URL, RULES, NumberGame, explained

from agent_infra import attach

client = OpenAI(base_url=BASE_URL, api_key=API_KEY)
game = NumberGame()
messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": RULES}]
with explained(), attach(client, task_id="attach"):
    for _ in range(10):
        messages.append({"role": "user", "content": game.observe()})
        completion = client.chat.completions.create(model="smollm2", messages=messages, max_tokens=8)
        answer = completion.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": answer})
        print(game.act(answer))
