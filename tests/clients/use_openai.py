"""openai-python: plain, streamed and async. Prints what was answered as JSON."""

import asyncio
import json
import sys

import openai

address, *questions = sys.argv[1:]
client = openai.OpenAI(base_url=address, api_key="any")


def chat(question: str) -> dict:
    messages = [{"role": "user", "content": question}]
    return {"model": "team", "messages": messages, "seed": 5, "max_completion_tokens": 100}


def plain(question: str) -> str:
    return client.chat.completions.create(**chat(question)).choices[0].message.content


def streamed(question: str) -> dict:
    options = {"include_usage": True}
    *pieces, last = client.chat.completions.create(
        **chat(question), stream=True, stream_options=options
    )
    deltas = [piece.choices[0].delta for piece in pieces]
    return {
        "content": "".join(delta.content or "" for delta in deltas),
        "reasoning": "".join(getattr(d, "reasoning_content", None) or "" for d in deltas),
        "usage": last.usage.model_dump(),
    }


async def together() -> list[str]:
    many = openai.AsyncOpenAI(base_url=address, api_key="any")
    asks = [many.chat.completions.create(**chat(question)) for question in questions]
    return [reply.choices[0].message.content for reply in await asyncio.gather(*asks)]


found = {
    "models": [model.id for model in client.models.list()],
    "plain": [plain(question) for question in questions],
    "streamed": [streamed(question) for question in questions],
    "async": asyncio.run(together()),
}
print(json.dumps(found))
