"""A whole one-agent GRPO step, rollout and update, of satune and of TRL's GRPOTrainer: the same
model, prompts, lengths, optimiser and threads, a step of each in turn within one run.

TRL is no dependency of satune: pip install trl accelerate datasets

    python benchmarks/step.py [--steps 5] [--threads 1] [--json]
    python benchmarks/step.py --model models/smollm2-135m --problems 16 --new-tokens 16 --threads 2
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import (
    PLAIN_TEMPLATE,
    PROMPT_TOKENS,
    Subject,
    Timings,
    build_policy,
    build_tokenizer,
    compared,
    finish,
    prompts,
    show,
)
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from satune.agents.learner import LocalLearner, OptimizerSettings
from satune.agents.rendering import ChatRenderer, TemplateSettings
from satune.agents.weights import Weights
from satune.core.settings import ObjectiveSettings
from satune.core.trust_region import TrustRegionSettings
from satune.engines.local import LocalEngine
from satune.play.match import Match
from satune.play.rollout import rollout_sync
from satune.protocols.named import load_protocol
from satune.training.settings import UpdateSettings
from satune.training.update import improve
from satune.types import Experience, Grade, Key, Problem, Sampling, Seat

LEARNING_RATE = 1e-5


@dataclass(frozen=True, slots=True)
class Shape:
    """How much a step samples: problems × samples messages of so many new tokens."""

    problems: int
    samples: int
    new_tokens: int


def reward_of(text: str) -> float:
    """Varies between completions, and needs no grading worth timing."""
    return sum(map(ord, text)) % 7 / 6


class Reward:
    """The task: any message is its own answer."""

    name = "reward"

    def problems(self, split: str) -> list[Problem]:
        return []

    def extract(self, text: str) -> str | None:
        return text

    def equal(self, a: str, b: str) -> bool:
        return a == b

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        return Grade(reward_of(answer or ""))


@dataclass
class SatuneStep:
    """A team of one agent; ``run`` is one stage of it."""

    subject: Subject
    shape: Shape
    region: TrustRegionSettings
    reference_kl: float
    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    version: int = 0
    kl: float = 0.0

    def __post_init__(self) -> None:
        vocabulary, new_tokens = self.subject.vocabulary, self.shape.new_tokens
        policy = build_policy(self.subject.model(torch.float32), vocabulary)
        self.learner = LocalLearner(
            policy,
            OptimizerSettings(lr=LEARNING_RATE, weight_decay=0.0, max_grad_norm=1.0),
        )
        if self.reference_kl > 0:
            self.learner.keep_reference()
        self.engine = LocalEngine({"agent": policy}, {"agent": "agent"})
        renderer = ChatRenderer(policy.tokenizer, TemplateSettings(chat=PLAIN_TEMPLATE), 512)
        self.seats = [Seat("agent", "agent", renderer, Sampling(new_tokens))]
        self.protocol = load_protocol("solo", ["agent"], None)
        self.problems = [
            Problem.of(str(index), " ".join(f"w{token}" for token in ids))
            for index, ids in enumerate(prompts(self.shape.problems, vocabulary))
        ]
        self.settings = UpdateSettings(
            objective=ObjectiveSettings("grpo", reference_kl=self.reference_kl),
            trust_region=self.region,
            mini_batches=1,
            max_new_tokens=new_tokens,
        )

    def run(self) -> None:
        key = Key(0, "train", stage=self.version + 1)
        started = time.perf_counter()
        episodes = rollout_sync(
            Match(self.seats, self.protocol, self.engine, Reward()),
            self.problems,
            self.shape.samples,
            key,
        )
        sampled = time.perf_counter()
        experience = Experience(tuple(episodes), (0.0,) * len(episodes))
        outcome = improve(
            self.learner,
            "agent",
            experience,
            self.settings,
            beta=self.region.beta,
            cap=None,
            key=key,
        )
        self.version += 1
        self.engine.publish("agent", self.version, Weights(self.learner.export))
        ended = time.perf_counter()
        self.seconds.append(ended - started)
        self.parts.append({"rollout": sampled - started, **outcome.event["seconds"]})
        self.kl = outcome.event["kl"]["quantile"]
        turns = [turn for episode in episodes for turn in episode.turns]
        assert all(turn.prompt_tokens == PROMPT_TOKENS for turn in turns)
        self.tokens = sum(turn.completion_tokens for turn in turns)


class InTurn(TrainerCallback):
    """Times each step of TRL and takes a step of every satune variant after it."""

    def __init__(self, variants: list[SatuneStep]) -> None:
        self.variants = variants
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)
        for variant in self.variants:
            variant.run()


def train_in_turn(
    subject: Subject, shape: Shape, beta: float, steps: int, variants: list[SatuneStep]
) -> Timings:
    """``steps`` + 1 steps of GRPOTrainer; the first warms up and is left out."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    vocabulary = subject.vocabulary
    counts: list[int] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        counts.append(sum(len(ids) for ids in completion_ids))
        return [reward_of(text) for text in completions]

    texts = [" ".join(f"w{token}" for token in ids) for ids in prompts(shape.problems, vocabulary)]
    clock = InTurn(variants)
    # The trainer reports on standard output; --json promises one object there.
    with tempfile.TemporaryDirectory() as directory, redirect_stdout(sys.stderr):
        # From a directory, because the trainer reads its reference model from there.
        subject.model(torch.float32).save_pretrained(directory)
        config = GRPOConfig(
            output_dir=directory,
            model_init_kwargs={"dtype": "float32"},
            beta=beta,
            num_generations=shape.samples,
            per_device_train_batch_size=shape.problems * shape.samples,
            gradient_accumulation_steps=1,
            max_completion_length=shape.new_tokens,
            max_steps=steps + 1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=1.0,
            temperature=1.0,
            loss_type="grpo",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=directory,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=build_tokenizer(vocabulary),
            callbacks=[clock],
        )
        trainer.train()
    assert len(set(counts)) == 1, counts
    return Timings(clock.seconds[1:], counts[0])


def measure(subject: Subject, shape: Shape, beta: float, steps: int) -> list[dict[str, Any]]:
    variants = {
        "trust region on": SatuneStep(subject, shape, TrustRegionSettings(), beta),
        "trust region off": SatuneStep(
            subject, shape, TrustRegionSettings(enabled=False, beta=0.0), beta
        ),
    }
    peer = train_in_turn(subject, shape, beta, steps, list(variants.values()))
    rows: list[dict[str, Any]] = []
    for name, ours in variants.items():
        parts = {
            f"satune_{part}_seconds": Timings([p[part] for p in ours.parts[1:]], ours.tokens).median
            for part in ours.parts[0]
        }
        rows.append(
            {"subject": subject.name, "beta": beta, "variant": name, "kl_quantile": ours.kl}
            | compared(Timings(ours.seconds[1:], ours.tokens), peer)
            | parts
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="a GRPO step: satune against TRL's GRPOTrainer")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[260])
    parser.add_argument("--model", type=Path, help="a pretrained model's directory")
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--beta", type=float, nargs="+", default=[0.0, 0.04])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    missing = [n for n in ("trl", "accelerate", "datasets") if not importlib.util.find_spec(n)]
    if missing:
        print(
            f"error: {', '.join(missing)} not found; pip install trl accelerate datasets",
            file=sys.stderr,
        )
        sys.exit(2)
    torch.set_num_threads(arguments.threads)
    transformers_logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows: list[dict[str, Any]] = []
    shape = Shape(arguments.problems, arguments.samples, arguments.new_tokens)
    for subject in Subject.all(arguments.model, arguments.vocabulary):
        for beta in arguments.beta:
            for row in measure(subject, shape, beta, arguments.steps):
                rows.append(row)
                if not arguments.json:
                    show(f"β {beta:g}, {row['variant']}, {subject.name}", row)
    finish(
        {
            "benchmark": "step",
            "peer": "trl.GRPOTrainer",
            "threads": arguments.threads,
            "rows": rows,
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
