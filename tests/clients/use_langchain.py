"""LangChain's ChatOpenAI: invoked, streamed, in a batch, and in a chain with a system message."""

import json
import sys

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

address, *questions = sys.argv[1:]
model = ChatOpenAI(
    model="team", base_url=address, api_key="any", seed=5, max_tokens=100, stream_usage=True
)
streamed = [list(model.stream(question)) for question in questions]
chat = [SystemMessage("Add."), HumanMessage(questions[0])]
first = model.invoke(questions[0])
found = {
    "plain": [model.invoke(question).content for question in questions],
    "streamed": ["".join(piece.content for piece in pieces) for pieces in streamed],
    "async": [reply.content for reply in model.batch(questions)],
    "system": model.invoke(chat).content,
    "usage": first.usage_metadata["total_tokens"],
    "finish": first.response_metadata["finish_reason"],
}
print(json.dumps(found))
