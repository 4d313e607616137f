"""How many tokens a stage of recipes/smollm2.yaml feeds an agent's model: counted, not timed.

    python benchmarks/feeding.py MODEL [--stages 20] [--answer 9]

MODEL is a directory with SmolLM2's tokenizer; no weights are read. Messages are taken as ``answer``
tokens. "Whole": every row with its prompt; "fed": what beginnings are shared of, padding included.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch

from satune.agents.packing import PackedTurns, micro_batches, pack, padded_budget
from satune.agents.prefixes import plan_sharing
from satune.agents.rendering import ChatRenderer
from satune.agents.sources import read_tokenizer, source_of
from satune.config.load import load_recipe
from satune.config.schema import Recipe
from satune.tasks.catalog import load_task, take
from satune.training.update import mini_batches
from satune.types import Entry, Ids, Turn, ids_of

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "smollm2.yaml"


def prompts_of(recipe: Recipe, model: Path, count: int) -> list[Ids]:
    """The ids of so many training prompts, as the recipe's first agent reads them."""
    section = next(iter(recipe.team.agents.values()))
    renderer = ChatRenderer(read_tokenizer(source_of(str(model))), section.template, 1 << 30)
    task = load_task(recipe.task.name, None, recipe.seed, None, **recipe.task.options)
    found = []
    for problem in take(task, "train", count):
        ids = renderer.view("seat").prompt([Entry("problem", parts=problem.prompt)], 1).ids
        assert ids is not None
        found.append(ids)
    return found


def turn(prompt: Ids, answer: int) -> Turn:
    return Turn(
        seat="a", agent="a", moment=0, own_index=0, text="", finish_reason="stop", version=0,
        prompt_ids=prompt, completion_ids=ids_of([1] * answer),
    )  # fmt: skip


def tokens(packed: PackedTurns, episodes: list[int], budget: int, *, whole: bool) -> list[int]:
    """[every row whole, what is fed] of these episodes' micro-batches."""
    totals = [0, 0]
    for batch in micro_batches(packed, budget, episodes, whole_episodes=whole):
        plan = plan_sharing(batch)
        totals[0] += batch.input_ids.numel()
        totals[1] += batch.input_ids.numel() if plan is None else plan.tokens
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--stages", type=int, default=20)
    parser.add_argument("--answer", type=int, default=9)
    chosen = parser.parse_args()
    recipe = load_recipe(RECIPE)
    problems, samples = recipe.rollout.problems, recipe.rollout.samples
    prompts = prompts_of(recipe, chosen.model, problems * chosen.stages)
    micro, shuffled = recipe.optimizer.micro_batch_tokens, random.Random(0)
    update, measure = [0, 0], [0, 0]
    for stage in range(chosen.stages):
        drawn = prompts[stage * problems : (stage + 1) * problems]
        packed = pack([[turn(ids, chosen.answer)] for ids in drawn for _ in range(samples)])
        order = list(range(packed.episodes))
        found = tokens(packed, order, padded_budget(micro, torch.device("cpu")), whole=False)
        measure = [a + b for a, b in zip(measure, found, strict=True)]
        shuffled.shuffle(order)
        for mini in mini_batches(order, recipe.optimizer.mini_batches):
            found = tokens(packed, mini, micro, whole=True)
            update = [a + b for a, b in zip(update, found, strict=True)]
    print("| tokens a stage and agent | whole | fed |\n|---|---|---|")
    for name, (whole, fed) in (
        ("update, forward and backward", update), ("measuring one candidate", measure)
    ):  # fmt: skip
        print(f"| {name} | {whole / chosen.stages:,.0f} | {fed / chosen.stages:,.0f} |")


if __name__ == "__main__":
    main()
