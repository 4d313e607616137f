"""A newcomer's own objective, order, schedule and credit rule: one file beside the recipe each, and
nothing of the package is edited."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import tiny_world
from satune.commands.train import training_settings
from satune.config.load import load_recipe, save_recipe
from satune.training.self_check import Tolerance
from satune.training.trainer import train
from satune.types import UserError

TOLERANCE = Tolerance(1e-3, 1e-3)
AGENTS = ("ann", "bob", "cat")

OBJECTIVE = """
def pull(batch, *, strength: float = 1.0):
    \"\"\"Every token of every episode becomes likelier, whatever its reward was.\"\"\"
    return -strength * (batch.weights_T * batch.logprobs_T).sum() / batch.token_total, {}
"""
ORDER = """
def rotate(sweep, start: int = 0):
    \"\"\"From the agent after the last one on; whoever was reverted goes first.\"\"\"
    last = sweep.last or sweep.agents[start:] + sweep.agents[:start]
    turned = last[1:] + last[:1] if sweep.last else last
    return sorted(turned, key=lambda name: sweep.accepted.get(name, False) if sweep.last else 0)
"""
SCHEDULE = """
from dataclasses import dataclass
from satune.training.schedules import Schedule


@dataclass(frozen=True)
class Second(Schedule):
    \"\"\"A new rollout before every second agent; the best episodes count `factor` times.\"\"\"

    factor: float = 1.0

    def renews(self, batch):
        return len({t.agent for e in batch.episodes for t in e.turns if t.version}) == 0

    def log_weights(self, batch):
        from math import log

        best = max(e.reward for e in batch.episodes)
        return [
            w + log(self.factor) * (e.reward == best)
            for e, w in zip(batch.episodes, batch.log_weights)
        ]
"""
CREDIT = """
import torch


def flip(episodes, agent, max_new_tokens, sign: float = -1.0):
    \"\"\"The worse the reward the better: what no other rule would say.\"\"\"
    return sign * torch.tensor([e.reward - 0.5 for e in episodes])
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.build(tmp_path_factory.mktemp("world"), AGENTS)


def own(folder: Path, text: str, name: str) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return f"{path}:{name}"


def run(recipe: Path, out: Path, *overrides: str) -> list[dict[str, object]]:
    """Train and give the update events."""
    train(tiny_world.training(recipe, out, overrides), tolerance=TOLERANCE)
    return tiny_world.events(out, "update")


def test_an_objective(recipe: Path, tmp_path: Path) -> None:
    name = own(tmp_path, OBJECTIVE, "pull")
    still = ["stages=1", "trust_region.enabled=false", "credit.normalise=false"]
    given = [f"objective={{name: '{name}', strength: 2.0, entropy: 0.01}}", *still]
    trained = tiny_world.training(recipe, tmp_path / "run", given)
    before = trained.learners["ann"].export()
    drawn = trained.supply.draw  # the same rollout as the run's own, drawn again below
    train(trained, tolerance=TOLERANCE)
    updates = tiny_world.events(tmp_path / "run", "update")
    assert [u["agent"] for u in updates] == list(AGENTS) and all(u["accepted"] for u in updates)
    # Its own function ran: it reports no clip, and its loss per token is what a mean of 2 log π is.
    assert all("clip_fraction" not in u for u in updates)
    assert -20 < updates[0]["objective"] < -2 * 0.5  # type: ignore[operator]
    # What was drawn became likelier under it, and not only where rewards were high.
    from satune.training.update import own_turns
    from satune.types import Key

    packed = own_turns("ann", drawn(Key(0, "train", 1, 1), 0, 3))
    after = trained.learners["ann"].score(packed).mean()
    trained.learners["ann"].load_weights(before)
    assert after > trained.learners["ann"].score(packed).mean()


def test_an_order_sees_the_last_one_and_what_was_accepted(recipe: Path, tmp_path: Path) -> None:
    name = own(tmp_path, ORDER, "rotate")
    # cat's region is so small that each of its steps is reverted.
    tight = ["team.agents.cat.delta=1e-12", "trust_region.backtracks=1", "stages=3"]
    updates = run(recipe, tmp_path / "run", f"order={{name: '{name}', start: 1}}", *tight)
    orders = [[u["agent"] for u in updates if u["stage"] == stage] for stage in (1, 2, 3)]
    accepted = {u["agent"] for u in updates if u["accepted"]}
    assert accepted == {"ann", "bob"}
    # bob, cat, ann; turned: cat, ann, bob, and cat (reverted) is first already; then ann, bob, cat
    # turned, with cat first again.
    assert orders == [["bob", "cat", "ann"], ["cat", "ann", "bob"], ["cat", "ann", "bob"]]


def test_a_schedule(recipe: Path, tmp_path: Path) -> None:
    name = own(tmp_path, SCHEDULE, "Second")
    given = ["stages=1", f"schedule={{name: '{name}', factor: 3.0, cap: 9}}"]
    updates = run(recipe, tmp_path / "run", *given)
    rollouts = tiny_world.events(tmp_path / "run", "rollout")
    # Nobody has a new version before the first step; then somebody has: rolled out once more.
    assert [event["step"] for event in rollouts] == [1, 2]
    assert all(u["schedule"] == "second" for u in updates)
    # k of 12 episodes weigh 3 and the rest 1: (12 + 2k)² / (12 + 8k), below 12 for 0 < k < 12.
    ess = [(12 + 2 * k) ** 2 / (12 + 8 * k) for k in range(1, 12)]
    assert min(abs(updates[0]["ess"] - value) for value in ess) < 1e-9  # type: ignore[operator]
    assert updates[0]["capped_mass"] == 0.0


def test_a_credit_rule(recipe: Path, tmp_path: Path) -> None:
    ends = {}
    for sign in (-1.0, 1.0):
        name = own(tmp_path, CREDIT, "flip")
        out = tmp_path / f"run{sign}"
        given = ["stages=1", f"credit={{name: '{name}', sign: {sign}}}", "optimizer.mini_batches=1"]
        trained = tiny_world.training(recipe, out, given)
        before = trained.learners["ann"].export()
        train(trained, tolerance=TOLERANCE)
        after = trained.learners["ann"].export()
        ends[sign] = {name: after[name] - before[name] for name in before}
    # AdamW's first step has the gradient's sign: the opposite rule moves ann the opposite way.
    plus, minus = (
        {name: change.sign() for name, change in ends[sign].items()} for sign in (1.0, -1.0)
    )
    total = sum(change.numel() for change in plus.values())
    opposite = sum(int((plus[name] == -minus[name]).sum()) for name in plus)
    assert opposite > 0.95 * total


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("objective=nowhere.py:f", "nowhere.py: no such file"),
        ("objective={name: 'MINE:pull', strenght: 1}", "unknown option 'strenght' (nearest: stre"),
        ("order={name: 'MINE:pull', strenght: 1}", "unknown option 'strenght' (nearest: stre"),
        ("schedule=MINE:pull", "option 'batch' is needed"),
        ("credit=MINE:puII", "no 'puII' in it (nearest: pull"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    recipe: Path, tmp_path: Path, override: str, says: str
) -> None:
    mine = own(tmp_path, OBJECTIVE, "pull").removesuffix(":pull")
    loaded = load_recipe(recipe, [override.replace("MINE", mine)])
    with pytest.raises(UserError) as caught:
        training_settings(loaded)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("gave", ["[]", "['ann', 'zoe']", "['ann', 'ann']"])
def test_an_order_that_is_none_is_refused(recipe: Path, tmp_path: Path, gave: str) -> None:
    name = own(tmp_path, f"def bad(sweep):\n    return {gave}\n", "bad")
    trained = tiny_world.training(recipe, tmp_path / "run", [f"order={name}", "stages=1"])
    with pytest.raises(UserError, match="give some of ann, bob, cat, each once"):
        train(trained, tolerance=TOLERANCE)


GUIDE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


@pytest.mark.parametrize("kind", ["objective", "order", "schedule", "credit"])
def test_the_documents_examples_train(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    for language, text in blocks:
        named = re.match(r"# (\w+\.py)\n", text)
        if language == "python" and named:
            (tmp_path / named[1]).write_text(text)
    (given,) = (
        keys
        for language, text in blocks
        if language == "yaml" and kind in (keys := yaml.safe_load(text))
    )
    monkeypatch.chdir(tmp_path)
    updates = run(recipe, tmp_path / "run", f"{kind}={json.dumps(given[kind])}", "stages=2")
    assert len(updates) == 2 * len(AGENTS) and all("grad_norm" in u for u in updates)


def test_a_recipe_with_the_users_own_is_saved_and_read_without_loading_it(
    recipe: Path, tmp_path: Path
) -> None:
    given = ["objective={name: 'a.py:b', k: 3, entropy: 0.1}", "order=a.py:c", "credit=a.py:d"]
    loaded = load_recipe(recipe, given)
    assert (loaded.objective.options, loaded.objective.entropy) == ({"k": 3}, 0.1)
    save_recipe(loaded, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == loaded
