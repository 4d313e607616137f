"""How much of what can be known of relay's reward the critics of a trained team tell.

    python benchmarks/explained.py [--seeds 0 1 2] [--stages 16] ["critic={kind: head}"]

Trains the quickstart's team with critics, then has it answer problems that no critic has learnt
from, each so many times that what was written before a turn comes again: the rewards of such
episodes differ by nothing but what comes after, which no value can tell. What is left of the
variance can be told, by whoever knows the team. Prints both shares for each seat, and their ratio.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from satune.agents.packing import pack
from satune.cli.common import shipped_recipe
from satune.commands.assemble import assemble
from satune.commands.train import start_training, tolerance_of
from satune.config.load import load_recipe
from satune.training.ascent import critic_values
from satune.training.likelihoods import written
from satune.training.run import Training
from satune.training.run_directory import RunDirectory
from satune.training.trainer import train
from satune.types import Episode

CRITIC = "critic={kind: head, boundary: token, epochs: 2, likelihoods: true}"
Told = dict[str, tuple[float, float]]


def told(run: Training, episodes: Sequence[Episode]) -> Told:
    """Of each agent, the share of the rewards' variance that its critic explains at the start of
    its turns, and the share that can be explained. Counts episodes that begin as others do."""
    return dict(_told(run, episodes))


def _told(run: Training, episodes: Sequence[Episode]) -> Iterator[tuple[str, tuple[float, float]]]:
    for name, learner in run.learners.items():
        own = [[turn for turn in e.turns if turn.agent == name] for e in episodes]
        packed = pack(own)
        assert learner.critic is not None
        written_TF = written(packed, episodes, name, learner.critic.settings)
        values_T = critic_values(learner, learner.anchor(packed), written_TF, {"score": 0.0})
        first_E = torch.searchsorted(packed.episode_T, torch.arange(len(episodes)))
        alike = defaultdict(list)
        for number, (episode, turns) in enumerate(zip(episodes, own, strict=True)):
            before = tuple(t.text for t in episode.turns if t.moment < turns[0].moment)
            alike[episode.problem.id, before].append(number)
        groups = [torch.tensor(each) for each in alike.values() if len(each) > 1]
        rewards_E = torch.tensor([e.reward for e in episodes], dtype=torch.float64)
        within = sum(len(g) * float(rewards_E[g].var()) for g in groups)
        counted = torch.cat(groups)
        rewards_N, values_N = rewards_E[counted], values_T[first_E[counted]].double()
        total = len(counted) * float(rewards_N.var())
        missed = float((rewards_N - values_N).square().sum())
        yield name, (1 - missed / total, 1 - within / total)


def begun(out: Path, overrides: Sequence[str]) -> tuple[Training, object]:
    """A run of the quickstart's recipe that is ready to train, and its recipe."""
    recipe = load_recipe(shipped_recipe("relay"), list(overrides))
    directory = RunDirectory(out)
    directory.start(resume=False)
    return start_training(assemble(recipe), directory, lambda event: None), recipe


def trained_and_asked(
    out: Path, overrides: Sequence[str], problems: int = 32, samples: int = 256
) -> Told:
    """Train in ``out``, draw ``samples`` answers to each of ``problems`` more, and ask."""
    run, recipe = begun(out / "run", overrides)
    train(run, tolerance=tolerance_of(recipe), checkpoint=None)
    drawn = [f"rollout={{problems: {problems}, samples: {samples}, max_new_tokens: 16}}"]
    other, _ = begun(out / "asked", [*overrides, *drawn])
    for name, learner in run.learners.items():
        other.learners[name].restore(learner.snapshot())
        other.publish(name)
    other.supply.offset = run.supply.offset
    return told(other, other.supply.batch(1, 1).episodes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("critic", nargs="?", default=CRITIC)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stages", type=int, default=16)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print("| seed | seat | explained | can be explained | ratio |\n|---|---|---|---|---|")
    for seed in chosen.seeds:
        overrides = [
            f"seed={seed}", f"tiny.seed={seed}", f"stages={chosen.stages}", "credit=gae",
            chosen.critic, "evaluate.problems=16",
        ]  # fmt: skip
        with tempfile.TemporaryDirectory() as out:
            found = trained_and_asked(Path(out), overrides)
        for seat, (explained, attainable) in found.items():
            ratio = explained / attainable
            print(f"| {seed} | {seat} | {explained:.3f} | {attainable:.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
