"""satune's local engine against ``generate`` of transformers, or against vLLM: the same model,
prompts, lengths, precision and threads, in turn within one run.

    python benchmarks/sampling.py [--repeats 5] [--threads 1] [--json]
    python benchmarks/sampling.py --model models/smollm2-135m --new-tokens 64
    python benchmarks/sampling.py --model models/smollm2-135m --adapter --dtype float32
    python benchmarks/sampling.py --model models/smollm2-135m --vllm --dtype float32

vLLM is asked through ``engine: vllm``, in the environment that SATUNE_VLLM_PYTHON names or that
``make vllm`` made; its server has as many threads.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    DTYPES,
    SEQUENCES,
    Subject,
    Timings,
    build_policy,
    compared,
    finish,
    prompts,
    show,
)
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel
from transformers.utils import logging

from satune.agents.policy import Policy
from satune.engines.local import LocalEngine
from satune.engines.vllm.engine import VLLMEngine
from satune.engines.vllm.settings import VLLMSettings
from satune.types import Completion, Engine, Key, Prompt, Sampling, ids_of

RANK = 16


def sample_with_satune(
    engine: Engine, rows: Sequence[tuple[int, ...]], new_tokens: int, draw: int
) -> list[Completion]:
    async def one(index: int, ids: tuple[int, ...]) -> Completion:
        key = Key(0, "evaluate", draw=draw, problem=f"{index:04d}")
        completion = await engine.generate(
            "agent", Prompt((), ids_of(ids)), Sampling(new_tokens), key
        )
        engine.end(key)
        return completion

    async def every() -> list[Completion]:
        for index in range(len(rows)):
            engine.begin(Key(0, "evaluate", draw=draw, problem=f"{index:04d}"))
        try:
            return await asyncio.gather(*(one(index, ids) for index, ids in enumerate(rows)))
        finally:
            await engine.close()

    return asyncio.run(every())


@torch.inference_mode()
def sample_with_generate(
    model: PreTrainedModel, rows: Sequence[tuple[int, ...]], new_tokens: int
) -> torch.Tensor:
    """Rows [R, prompt + new] of ids."""
    ids_RS = torch.tensor(rows)
    return model.generate(  # type: ignore[operator]
        ids_RS,
        attention_mask=torch.ones_like(ids_RS),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
    )


def measure(
    subject: Subject, dtype: str, distinct: int, new_tokens: int, repeats: int
) -> dict[str, float]:
    model, vocabulary = subject.model(DTYPES[dtype]), subject.vocabulary
    engine = LocalEngine({"agent": build_policy(model, vocabulary)}, {"agent": "agent"})
    rows = [ids for ids in prompts(distinct, vocabulary) for _ in range(SEQUENCES // distinct)]
    seconds: dict[str, list[float]] = {"satune": [], "peer": []}
    counts = {"satune": 0, "peer": 0}
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        completions = sample_with_satune(engine, rows, new_tokens, repeat)
        between = time.perf_counter()
        generated = sample_with_generate(model, rows, new_tokens)
        ended = time.perf_counter()
        if repeat:  # the first round only warms up
            seconds["satune"].append(between - started)
            seconds["peer"].append(ended - between)
        counts["satune"] = sum(len(completion.ids or ()) for completion in completions)
        counts["peer"] = generated[:, len(rows[0]) :].numel()
    return compared(
        Timings(seconds["satune"], counts["satune"]), Timings(seconds["peer"], counts["peer"])
    )


def measure_adapter(
    subject: Subject, dtype: str, distinct: int, new_tokens: int, repeats: int
) -> dict[str, float]:
    """The model with an adapter on every layer against the model alone, both sampled by satune: the
    ratio is the time of whole weights over that of the adapter."""
    vocabulary = subject.vocabulary
    whole = build_policy(subject.model(DTYPES[dtype]), vocabulary)
    config = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(subject.model(DTYPES[dtype]), config, adapter_name="own")
    adapted = Policy("agent", model, whole.tokenizer, 1.0, adapter="own")
    torch.manual_seed(0)
    for parameter in adapted.trainable().values():
        torch.nn.init.normal_(parameter, std=1e-3)
    rows = [ids for ids in prompts(distinct, vocabulary) for _ in range(SEQUENCES // distinct)]
    engines = {
        name: LocalEngine({"agent": policy}, {"agent": "agent"})
        for name, policy in (("peer", whole), ("satune", adapted))
    }
    return in_turn(engines, rows, new_tokens, repeats)


def measure_vllm(
    subject: Subject, dtype: str, distinct: int, new_tokens: int, repeats: int
) -> dict[str, float]:
    """satune's local engine against vLLM, which is asked by satune too. It may keep 2 GB of keys
    and values, enough for all sequences."""
    policy = build_policy(subject.model(DTYPES[dtype]), subject.vocabulary)
    rows = [
        ids for ids in prompts(distinct, subject.vocabulary) for _ in range(SEQUENCES // distinct)
    ]
    settings = VLLMSettings(memory=2e9, probe=0, context=512)
    peer = VLLMEngine({"agent": policy}, {"agent": "agent"}, settings)
    try:
        own = LocalEngine({"agent": policy}, {"agent": "agent"})
        return in_turn({"satune": own, "peer": peer}, rows, new_tokens, repeats)
    finally:
        peer.stop()


def in_turn(
    engines: Mapping[str, Engine], rows: Sequence[tuple[int, ...]], new_tokens: int, repeats: int
) -> dict[str, float]:
    """Each engine after the other, ``repeats`` times, compared."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    counts: dict[str, int] = {}
    for repeat in range(repeats + 1):
        for name, engine in engines.items():
            started = time.perf_counter()
            completions = sample_with_satune(engine, rows, new_tokens, repeat)
            if repeat:  # the first round only warms up
                seconds[name].append(time.perf_counter() - started)
            counts[name] = sum(len(completion.ids or ()) for completion in completions)
    return compared(
        Timings(seconds["satune"], counts["satune"]), Timings(seconds["peer"], counts["peer"])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="sampling: satune against transformers.generate")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[260, 32000])
    parser.add_argument("--model", type=Path, help="a pretrained model's directory")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 64], help="distinct ones")
    parser.add_argument(
        "--adapter", action="store_true", help="a LoRA adapter against whole weights instead"
    )
    parser.add_argument("--vllm", action="store_true", help="against vLLM instead")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    rows: list[dict[str, Any]] = []
    measured, peer = measure, "transformers.generate"
    if arguments.adapter:
        measured, peer = measure_adapter, "whole weights"
    elif arguments.vllm:
        measured, peer = measure_vllm, "vLLM"
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    for subject in Subject.all(arguments.model, arguments.vocabulary):
        for dtype in arguments.dtype:
            for distinct in arguments.prompts:
                figures = measured(
                    subject, dtype, distinct, arguments.new_tokens, arguments.repeats
                )
                setting = {"subject": subject.name, "dtype": dtype, "prompts": distinct}
                rows.append(setting | figures)
                if not arguments.json:
                    samples = SEQUENCES // distinct
                    show(f"{distinct} prompts × {samples}, {dtype}, {subject.name}", figures)
    finish(
        {
            "benchmark": "sampling",
            "peer": peer,
            "threads": arguments.threads,
            "sequences": SEQUENCES,
            "new_tokens": arguments.new_tokens,
            "rows": rows,
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
