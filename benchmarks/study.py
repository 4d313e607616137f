"""Studies: sets of training runs over seeds, each a `satune train` command, and a table of them.

    python benchmarks/study.py schedules --out runs/studies  # or: teams, trust_region, gate, credit
    python benchmarks/study.py guess --data SECRETS.jsonl --official OFFICIAL.jsonl
    python benchmarks/study.py models_and_teams --models models --jobs 1 --threads 2
                                            # or: models_schedules, models_adapters, models_gate

Runs that are already finished under --out are read, not repeated; one that was stopped goes on.
Two go on at a time, with a thread each, unless --jobs and --threads say otherwise. The tables of
docs/results.md come from here. The studies of pretrained models are those of `make study`, which
takes most of a day on two cores and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml
from study_runs import Run, draw_majority, perform_all
from study_tables import against_the_first, gate_table, table

SEEDS = (0, 1, 2)
# simultaneous gives stale's weights bit for bit (tests/training), so it is not run twice.
SCHEDULES = ("fresh", "reuse", "hybrid", "stale")


def agents(*models: str) -> str:
    """The override that makes a team of these models."""
    names = ("first", "second", "third", "fourth")
    return json.dumps({n: {"model": m} for n, m in zip(names, models, strict=False)})


def schedules(_: argparse.Namespace) -> Iterator[Run]:
    """What each schedule costs and buys, for 2 agents (two rounds) and 4 agents (one round)."""
    for count in (2, 4):
        team = agents(*["tiny:llama-s"] * count)
        for schedule in SCHEDULES:
            overrides = (
                f"team.agents={team}",
                f"protocol={{name: chain, rounds: {4 // count}}}",
                f"schedule={schedule}",
                "stages=5",
            )
            for seed in SEEDS:
                yield Run(f"{count} agents {schedule}", seed, "recipes/relay.yaml", overrides)


def teams(_: argparse.Namespace) -> Iterator[Run]:
    """Other families, and weights that are shared."""
    hetero = f"team.agents={agents('tiny:llama-s', 'tiny:qwen3-s', 'tiny:llama-s')}"
    debate = "protocol={name: debate, rounds: 3}"
    rows = {
        "shared": ("team.sharing=shared", "stages=10"),
        "lora": ("team.sharing=lora", "optimizer.lr=5e-3", "stages=10"),
        "hetero chain": (hetero, "stages=10"),
        "hetero debate": (hetero, debate, "stages=6"),
    }
    for label, overrides in rows.items():
        for seed in SEEDS:
            yield Run(label, seed, "recipes/relay.yaml", overrides)


def trust_region(_: argparse.Namespace) -> Iterator[Run]:
    """Too large a step, with the trust region and without it."""
    for enabled in ("true", "false"):
        for seed in SEEDS:
            overrides = ("optimizer.lr=5e-3", "stages=8", f"trust_region.enabled={enabled}")
            yield Run(f"lr 5e-3 region {enabled}", seed, "recipes/relay.yaml", overrides)


def guess(arguments: argparse.Namespace) -> Iterator[Run]:
    """Guess-number on the official secrets; settings were chosen on training secrets."""
    data = (f"task.data={arguments.data}", f"evaluate.data={arguments.official}")
    for seed in SEEDS:
        yield Run("guess number", seed, "recipes/guess_number.yaml", data)


GATE = {
    "default step": (),
    "ten times the step, no region": ("optimizer.lr=1e-2", "trust_region.enabled=false"),
}


def gate(_: argparse.Namespace) -> Iterator[Run]:
    """What the certified gate keeps and costs, at a sane step and at one far too large."""
    watched = ("stages=6", "evaluate={problems: 2000, every: 1, greedy: false}")
    certified = (
        "certify={problems: 512, samples: 4, theory: false, accept: certified, tolerance: 0.02}"
    )
    for label, overrides in GATE.items():
        for name, more in (("ungated", ()), ("gated", (certified,))):
            for seed in range(5):
                yield Run(
                    f"{label}, {name}", seed, "recipes/relay.yaml", (*overrides, *watched, *more)
                )


HEAD = ("credit=gae", "critic={kind: head, boundary: token, lr: 1e-3, epochs: 2}")
"""The critic that explained most of relay (docs/results.md) at the cost of a line."""
TOLD = (*HEAD, "critic.likelihoods=true")
CREDITS = {
    "group of 2": (2, ()),
    "critic, 2 samples": (2, HEAD),
    "critic with likelihoods, 2 samples": (2, TOLD),
    "group of 4": (4, ()),
    "group of 8": (8, ()),
}


def credit(_: argparse.Namespace) -> Iterator[Run]:
    """A critic with two samples a problem against groups, at as many episodes a stage."""
    for seed in range(5):
        for label, (samples, more) in CREDITS.items():
            drawn = (f"rollout.samples={samples}", f"rollout.problems={384 // samples}")
            overrides = ("stages=8", *drawn, *more)
            yield Run(label, seed, "recipes/relay.yaml", overrides)


ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = "recipes/smollm2.yaml"
SHORT = ("stages=8", "evaluate.problems=128", "checkpoint.every=4")
"""What makes a run of the recipe take some ten minutes on two cores."""
# As many messages a stage as three seats write in the recipe's 8 problems x 8 samples.
AS_MANY_MESSAGES = ("rollout.problems=24",)
AS_FEW_PROBLEMS = ("rollout.problems=8", "rollout.samples=24")
FREE = ("trust_region.enabled=false", "trust_region.beta=0", "trust_region.adapt=false")
VOTERS = 3
"""Seats of the recipe, of which each gives an answer."""
FAR = ("optimizer.lr=4e-5",)
"""Four times the recipe's step."""


def smollm2(models: Path, seats: int = 3) -> str:
    """The override that puts SmolLM2, from the directory of models, into so many of the recipe's
    seats."""
    recipe = yaml.safe_load((ROOT / SMOLLM2).read_text(encoding="utf-8"))
    agents = recipe["team"]["agents"]
    model = {"model": str(models / "smollm2-135m")}
    return f"team.agents={json.dumps({n: agents[n] | model for n in list(agents)[:seats]})}"


def of_models(arguments: argparse.Namespace, rows: Mapping[str, tuple[str, ...]]) -> Iterator[Run]:
    """A run of the recipe a row and seed, all rows of a seed before the next one's."""
    team = smollm2(arguments.models)
    for seed in SEEDS:
        for label, overrides in rows.items():
            yield Run(label, seed, SMOLLM2, (*SHORT, team, *overrides))


def models_and_teams(arguments: argparse.Namespace) -> Iterator[Run]:
    """Three agents against one that writes as many messages, and three trained as the one is. A
    team asks each problem of every seat, so that one agent sees three times as many for as many
    messages, unless it is given as few."""
    alone = smollm2(arguments.models, seats=1)
    solo = (alone, "protocol=solo", "schedule=fresh", *AS_MANY_MESSAGES, *FREE)
    rows = {
        "vote": (),
        "alone GRPO": (*solo, "objective=grpo"),
        "alone GRPO, as few problems": (*solo, "objective=grpo", *AS_FEW_PROBLEMS),
        "alone DAPO": (
            *solo, "objective={name: dapo, clip_low: 0.2, clip_high: 0.28}",
            "rollout.dynamic_sampling=true",
        ),
        "one agent in all seats": ("team.sharing=shared",),
        "vote, no region": FREE,
        "vote, GRPO, no region": ("objective=grpo", *FREE),
        "chain": ("protocol=chain",),
        "debate": ("protocol={name: debate, rounds: 2}",),
    }  # fmt: skip
    return of_models(arguments, rows)


def models_schedules(arguments: argparse.Namespace) -> Iterator[Run]:
    """Schedules at the recipe's step, then at four times it with the region and without."""
    rows: dict[str, tuple[str, ...]] = {s: (f"schedule={s}",) for s in SCHEDULES}
    for schedule in ("fresh", "stale"):
        rows[f"{schedule}, 4 x step"] = (f"schedule={schedule}", *FAR)
        rows[f"{schedule}, 4 x step, no region"] = (f"schedule={schedule}", *FAR, *FREE)
    return of_models(arguments, rows)


def models_adapters(arguments: argparse.Namespace) -> Iterator[Run]:
    """Full weights against adapters on a shared base."""
    rows = {"full weights": (), "adapters": ("team.sharing=lora", "optimizer.lr=2e-4")}
    return of_models(arguments, rows)


def models_gate(arguments: argparse.Namespace) -> Iterator[Run]:
    """Certificates, and a gate that goes by them."""
    certified = "certify={problems: 128, samples: 2, theory: false, accept: certified}"
    rows = {"ungated": ("stages=3",), "gated": ("stages=3", certified)}
    return of_models(arguments, rows)


OF_MODELS = (models_and_teams, models_schedules, models_adapters, models_gate)
STUDIES = {f.__name__: f for f in (schedules, teams, trust_region, guess, gate, credit, *OF_MODELS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    parser.add_argument("--data", help="training secrets (guess)")
    parser.add_argument("--official", help="official secrets (guess)")
    parser.add_argument("--models", type=Path, default=Path("models"), help="of `make models`")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument("--rows", nargs="+", help="only the rows of these labels")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    runs = [
        run
        for run in STUDIES[arguments.study](arguments)
        if run.seed in (arguments.seeds or [run.seed])
        and run.label in (arguments.rows or [run.label])
    ]
    summaries = perform_all(runs, arguments.out, arguments.jobs, arguments.threads)
    for run in runs:
        if "protocol=solo" in run.overrides and run.recipe == SMOLLM2:
            draw_majority(run, arguments.out, VOTERS, arguments.threads)
    if arguments.study == "gate":
        print(gate_table(runs, arguments.out))
    else:
        print(table(runs, summaries))
        print(against_the_first(runs, arguments.out))


if __name__ == "__main__":
    main()
