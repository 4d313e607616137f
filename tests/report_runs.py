"""Runs written without training: every kind of event, conversations with ids and log-probabilities,
all numbers drawn from a seed."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from satune.files.arrays import append_rows
from satune.files.events import append_event

AGENTS = ("ada", "ben", "cleo")
NONE: dict[str, Any] = {"policy": {}, "world": {}}
RECIPE = """\
seed: {seed}
stages: {stages}
task: {{name: relay, numbers: 4}}
schedule: {{name: hybrid, ess: 0.5}}
trust_region: {{delta: {delta}, quantile: 0.99}}
certify: {{problems: 64, accept: certified}}
objective: {{name: sat, clip: 0.2}}
"""


def write_run(
    run: Path,
    *,
    stages: int = 6,
    delta: float = 0.05,
    seed: int = 0,
    problems: int = 6,
    samples: int = 4,
    agents: Sequence[str] = AGENTS,
    finished: bool = True,
) -> Path:
    """A run with accepted, shrunk, reverted and refused steps, an idle one and one whose loss was
    not finite; failures of both kinds; certificates, with vacuous bounds; a swap."""
    rng = random.Random(seed)
    (run / "episodes").mkdir(parents=True)
    (run / "recipe.yaml").write_text(RECIPE.format(seed=seed, stages=stages, delta=delta))
    events: list[dict[str, Any]] = [_run_event(agents, stages, seed)]
    events += [_evaluation(0, greedy, 0.4, rng) for greedy in (True, False)]
    _hold_out(run, 0, agents, 0.0)
    for stage in range(1, stages + 1):
        level = 0.4 + 0.45 * (1 - math.exp(-stage / 4))
        for step, agent in enumerate(agents, start=1):
            if step == 1 or (stage % 3 == 0 and step == len(agents)):
                rows = _episodes(stage, step, level, problems, samples, agents, rng)
                append_rows(run / "episodes" / f"stage-{stage:04d}.jsonl", rows)
                events.append(_rollout(stage, step, rows))
            events.append(_update(stage, step, agent, delta, problems * samples, rng))
        events.append(
            {"event": "stage", "stage": stage, "reward": level, "order": list(agents),
             "seconds": 12 + rng.random(), "memory": {"peak": 2**30 + stage * 2**25}}
        )  # fmt: skip
        if stage % 2 == 0 and stage < stages:
            events.append(_evaluation(stage, False, level, rng))
    if finished:
        events += [_evaluation(stages, greedy, 0.8, rng) for greedy in (True, False)]
        events.append(_swap(stages))
        _hold_out(run, stages, agents, 1.0)
    for event in events:
        append_event(run / "events.jsonl", event)  # type: ignore[arg-type]
    return run


def _hold_out(run: Path, stage: int, agents: Sequence[str], score: float) -> None:
    """Three conversations of an evaluation, which hold no ids."""
    rows = []
    for p in range(3):
        row = episode(f"held-out-{p}", 0, score, agents, random.Random(p))
        for turn in row["turns"]:
            turn |= {"prompt_ids": None, "completion_ids": None, "sampled_logprobs": None}
        rows.append({"stage": stage, "greedy": False, **row})
    append_rows(run / "episodes" / f"evaluation-{stage:04d}.jsonl", rows)


def _run_event(agents: Sequence[str], stages: int, seed: int) -> dict[str, Any]:
    checked = {"ratio": 0.0, "kl": 1e-9, "mismatch_mean": 1e-7}
    return {
        "event": "run", "seed": seed, "stages": stages, "agents": {a: [a] for a in agents},
        "self_check": {a: checked for a in agents},
        "host": {"torch": "2.8.0", "python": "3.11.7", "device": "cpu", "threads": 1},
    }  # fmt: skip


def _evaluation(stage: int, greedy: bool, reward: float, rng: random.Random) -> dict[str, Any]:
    reward = min(1.0, reward + 0.02 * rng.random())
    event: dict[str, Any] = {
        "event": "eval", "stage": stage, "greedy": greedy, "reward": reward,
        "interval": [reward - 0.05, min(1.0, reward + 0.05)], "problems": 64, "samples": 4,
        "per_problem": [reward] * 64, "tokens": 5000, "seconds": 3.0, "figures": {},
        "failures": {"policy": {"overflow": 1} if stage == 2 else {}, "world": {}},
    }  # fmt: skip
    return event | ({"difference": [reward - 0.4, 0.01, 0.5]} if stage else {})


def _rollout(stage: int, step: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rewards = [row["grade"]["score"] for row in rows]
    world = sum(row["failure"] is not None and not row["failure"]["policy"] for row in rows)
    policy = sum(row["failure"] is not None and row["failure"]["policy"] for row in rows)
    return {
        "event": "rollout", "stage": stage, "step": step, "episodes": len(rows),
        "reward": sum(rewards) / len(rewards),
        "failures": {"policy": {"overflow": policy} if policy else {},
                     "world": {"connection": world} if world else {}},
        "tokens": {"prompt": 40 * len(rows), "sampled": 18 * len(rows), "environment": 0},
        "seconds": {"rollout": 3.0},
    }  # fmt: skip


def _update(
    stage: int, step: int, agent: str, delta: float, episodes: int, rng: random.Random
) -> dict[str, Any]:
    kind = {(1, 2): "shrunk", (2, 3): "reverted", (3, 1): "refused", (4, 2): "idle",
            (4, 3): "not finite", (5, 1): "shrunk"}.get((stage, step), "accepted")  # fmt: skip
    rollout = 3.0 if step == 1 else 0.0
    event: dict[str, Any] = {
        "event": "update", "stage": stage, "step": step, "agent": agent, "seats": [agent],
        "schedule": "hybrid", "version": stage, "failures": NONE, "episodes": episodes,
        "ess": episodes * (1 - 0.25 * (step - 1) * rng.random()), "delta": delta,
        "beta": 0.001 * 2 ** (stage % 3), "scale": 1.0, "accepted": True,
        "reason": f"KL within delta {delta:g}", "tokens": {"own": 400},
        "seconds": {"rollout": rollout, "update": 0.0, "measure": 0.0},
    }  # fmt: skip
    if kind == "idle":
        return event | {"accepted": False, "scale": 0.0, "reason": "no group's rewards differ"}
    event["seconds"] |= {"score": 0.5 + rng.random(), "update": 2 + rng.random()}
    if kind == "not finite":
        return event | {"accepted": False, "scale": 0.0, "reason": "the loss is not finite"}
    event["seconds"] |= {"measure": 0.4 + rng.random(), "certify": 1.5}
    quantile = delta * (0.5 + 0.45 * rng.random())
    if kind == "reverted":
        event |= {"accepted": False, "scale": 0.0, "reason": f"KL beyond delta {delta:g}"}
        quantile = delta * 1.4
    if kind == "shrunk":
        event["scale"] = 0.6
    rate = round(64 * math.sqrt(delta) * (0.3 + 0.1 * rng.random())) / 64
    event |= {
        "kl": {
            "mean": quantile / 8, "quantile": quantile, "max": quantile * 3,
            "trajectory": {"forward": 0.2, "reverse": 0.21}, "violation_rate": rate,
            "violation_ucb": min(1.0, rate + 0.1), "level_shifted_quantile": "inf",
            "states": 400, "problems": 64,
        },
        "unit": "token", "candidates": [[1.0, quantile]], "objective": 0.1 * rng.random(),
        "clip_fraction": 0.1, "grad_norm": 3.0, "mismatch": {"mean": 1e-8, "max": 1e-6},
    }  # fmt: skip
    if stage == 1:
        event["rounding"] = {"token": 1e-6, "episode": 2e-5 * step, "clipped": 0.0, "floor": 1e-9,
                             "kl": quantile}  # fmt: skip
        if step == 3:
            event["rounding"]["warning"] = f"agent {agent}: rounding decides: it clips"
    if kind != "reverted":
        _certify(event, kind, rng)
    return event


def _certify(event: dict[str, Any], kind: str, rng: random.Random) -> None:
    mean = 0.02 + 0.02 * rng.random()
    lower = mean - (0.09 if kind == "refused" else 0.03)
    statistical = {
        "evidence": "fresh", "method": "betting", "mean": mean, "lower": lower, "alpha": 0.004,
        "decision": 1, "problems": 64, "samples": [4, 4], "claim": f"at least {lower:+.3f}",
    }  # fmt: skip
    rows = [
        {"name": "one own turn", "gain": mean, "penalty": 0.0, "lower": mean,
         "status": "plug-in positive"},
        {"name": "paper", "gain": mean, "penalty": 3988.0, "lower": mean - 3988.0,
         "status": "vacuous"},
    ]  # fmt: skip
    event["certificate"] = {"statistical": statistical, "theory": rows}
    verdict = {"refused": "reverted", "shrunk": "shrunk"}.get(kind, "kept")
    event["gate"] = {
        "accept": "certified", "verdict": verdict, "agents": [event["agent"]],
        "since": {"stage": event["stage"], "step": event["step"]}, "candidates": [[1.0, lower]],
        "tolerance": 0.02, "reason": f"lower bound {lower:+.4f}",
    }  # fmt: skip
    event["tokens"]["certify"] = 900
    if kind == "refused":
        event |= {"accepted": False, "scale": 0.0}


def _swap(stage: int) -> dict[str, Any]:
    record = {
        "seats": ["ben"], "agents": {"ben": "ben-new"}, "models": {"ben": "tiny:llama-m"},
        "method": "project", "verdict": "accepted", "tokens": 4000, "seconds": 9.0, "before": 0.8,
        "naive": 0.55, "naive_difference": [-0.25, -0.3, -0.2], "problems": 64,
        "reason": "within delta", "after": 0.81, "difference": [0.01, -0.02, 0.04],
    }  # fmt: skip
    return {
        "event": "swap", "stage": stage, "seats": ["ben"], "swaps": [record], "source": "run",
        "checkpoint": None, "verdict": "accepted", "reason": "within delta", "tolerance": 0.02,
        "confidence": 0.05, "delta": 0.01, "tokens": 4000, "seconds": 9.0,
    }  # fmt: skip


def _episodes(
    stage: int,
    step: int,
    level: float,
    problems: int,
    samples: int,
    agents: Sequence[str],
    rng: random.Random,
) -> list[dict[str, Any]]:
    """Whole groups; half of the problems come again in every stage."""
    rows = []
    for p in range(problems):
        name = f"always-{p}" if p % 2 == 0 else f"stage-{stage}-{step}-{p}"
        for sample in range(samples):
            score = float(rng.random() < level)
            row = episode(name, sample, score, agents, rng)
            if (p, sample) == (1, 0):
                row["failure"] = {"reason": "connection: reset by the server", "policy": False}
            if (p, sample) == (2, 1):
                row["failure"] = {"reason": "overflow: the context is full", "policy": True}
                row["grade"]["score"] = 0.0
            rows.append({"stage": stage, "step": step, **row})
    return rows


def episode(
    problem: str,
    sample: int,
    score: float,
    agents: Sequence[str],
    rng: random.Random,
    text: str | None = None,
) -> dict[str, Any]:
    """A conversation in which each agent speaks once, the last one giving the answer."""
    turns = []
    for moment, agent in enumerate(agents):
        said = text or f"{agent} takes {rng.randrange(9)} and {rng.randrange(9)}, so {moment}."
        ids = array("i", [rng.randrange(300) for _ in range(12)])
        turns.append(
            {"seat": agent, "agent": agent, "moment": moment, "own_index": 0, "text": said,
             "finish_reason": "length" if (sample, moment) == (3, 1) else "stop", "version": 0,
             "prompt_ids": array("i", [1, 2, 3]), "completion_ids": ids,
             "sampled_logprobs": array("f", [math.log(1 - rng.random()) for _ in ids]),
             "dropped": int((sample, moment) == (2, 2)), "prompt_tokens": 3,
             "completion_tokens": len(ids)}
        )  # fmt: skip
    return {
        "problem": {"id": problem, "prompt": [{"type": "text", "text": f"Work out {problem}."}],
                    "answer": "7", "metadata": {}},
        "sample": sample, "turns": turns, "answer": "7" if score else None,
        "grade": {"score": score, "components": {"right": score},
                  "detail": "as the reference" if score else "7 expected", "seats": None},
        "observations": [[1, "the board is clear"]], "environment_tokens": 0, "failure": None,
    }  # fmt: skip
