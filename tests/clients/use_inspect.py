"""inspect-ai: an evaluation of a task of its own. Prints the score and the answers as JSON."""

import json
import sys

from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import get_model
from inspect_ai.scorer import exact
from inspect_ai.solver import generate

address, logs, answers, *questions = sys.argv[1:]
# The key's variable and the address by the provider's own rules: openai-api/NAME/MODEL.
model = get_model("openai-api/satune/team", base_url=address, api_key="any")
samples = [
    Sample(input=question, target=answer)
    for question, answer in zip(questions, json.loads(answers), strict=True)
]
task = Task(dataset=MemoryDataset(samples), solver=generate(), scorer=exact())
(log,) = eval(task, model=model, log_dir=logs, display="none", seed=5, max_tokens=100)
assert log.status == "success", log.error
found = {
    "answers": [sample.output.completion for sample in log.samples],
    "reasoning": [sample.output.message.model_dump()["content"] for sample in log.samples],
    "accuracy": log.results.scores[0].metrics["mean"].value,
}
print(json.dumps(found))
