"""What computing in float16 or bfloat16 makes of a step of a pretrained model.

    python benchmarks/rounding.py MODEL [--scales 1 0.1 0.002] [--seed 0]

One agent answers sums; one real step in float32 (sat, learning rate 1e-5, adapters 2e-4) is taken
towards arbitrary advantages, and its share ``scale`` is gauged in each type on the same messages.
"On the grid": the weights are rounded to bfloat16 first, as published weights are.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch

from satune.agents.learner import LocalLearner
from satune.agents.packing import PackedTurns, pack
from satune.agents.policy import Policy
from satune.agents.pretrained import AgentSpec, Precision, load_policies
from satune.agents.specs import LoraSpec, OptimizerSettings
from satune.core.settings import ObjectiveSettings
from satune.core.trust_region import TrustRegionSettings
from satune.training.gauge import figures_of
from satune.types import Turn, ids_of

TEMPERATURE = 0.7
COLUMNS = ("token", "episode", "clipped", "floor", "kl", "kl_rounded", "kl_masters")
SAT = ObjectiveSettings("sat")


def loaded(model: Path, dtype: str, *, adapter: bool) -> LocalLearner:
    lora = LoraSpec() if adapter else None
    spec = AgentSpec("solver", str(model), temperature=TEMPERATURE, lora=lora)
    settings = OptimizerSettings(lr=2e-4 if adapter else 1e-5)
    policies = load_policies(
        [spec], shared_base=False, precision=Precision.of(dtype), device="cpu", seed=0
    )
    return LocalLearner(policies["solver"], settings)


def messages(policy: Policy, count: int, tokens: int, seed: int) -> list[list[Turn]]:
    """So many sampled answers to sums, an episode each."""
    random_numbers = random.Random(seed)
    torch.manual_seed(seed)
    found = []
    for _ in range(count):
        a, b = random_numbers.randint(2, 40), random_numbers.randint(2, 40)
        asked = [{"role": "user", "content": f"What is {a} + {b}? Answer with the number only."}]
        prompt = policy.tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        whole = policy.causal_lm.generate(
            prompt, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0,
            max_new_tokens=tokens, pad_token_id=0,
        )  # fmt: skip
        length = prompt.shape[1]
        turn = Turn(
            seat="solver", agent="solver", moment=0, own_index=0, text="", finish_reason="stop",
            version=0, prompt_ids=ids_of(whole[0, :length].tolist()),
            completion_ids=ids_of(whole[0, length:].tolist()),
        )  # fmt: skip
        found.append([turn])
    return found


def step_of(
    learner: LocalLearner, packed: PackedTurns
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights before and after one step towards every other message."""
    before = learner.export()
    advantages_E = torch.ones(packed.episodes, dtype=torch.float64)
    advantages_E[1::2] = -1.0
    learner.wake()
    anchor = learner.anchor(packed)
    everything = range(packed.episodes)
    learner.accumulate(anchor, everything, advantages_E, torch.ones_like(advantages_E), SAT)
    learner.step()
    return before, learner.export()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 0.1, 0.002])
    parser.add_argument("--types", nargs="+", default=["float32", "float16", "bfloat16"])
    parser.add_argument("--messages", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    print("| weights | computed in | scale | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for name, adapter, rounded in (
        ("full", False, False), ("full, on the grid", False, True), ("adapters", True, False)
    ):  # fmt: skip
        learner = loaded(chosen.model, "float32", adapter=adapter)
        if rounded:
            learner.load_weights({n: w.bfloat16().float() for n, w in learner.export().items()})
        turns = messages(learner.policy, chosen.messages, chosen.tokens, chosen.seed)
        before, after = step_of(learner, pack(turns))
        some = pack(turns[: chosen.messages // 2])
        for dtype in chosen.types:
            gauged = loaded(chosen.model, dtype, adapter=adapter)
            for scale in chosen.scales:
                gauged.interpolate(before, after, scale)
                figures = figures_of(gauged.gauge(some, before), some, SAT, TrustRegionSettings())
                cells = [f"{figures[c]:.2g}" if c in figures else "" for c in COLUMNS]
                print(f"| {name} | {dtype} | {scale:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
