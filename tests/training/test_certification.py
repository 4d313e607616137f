"""Certificates and the gate inside a run: what they compare, what they keep, what they cost."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_world
from satune.commands.train import declared_decisions, training_settings
from satune.config.load import load_recipe
from satune.core import confidence
from satune.core.certificates import StatisticalCertificate
from satune.training import certification
from satune.training.change import Change, log_ratios
from satune.training.own_steps import OwnSteps, measure_own_steps, theory_rows
from satune.training.run import Training
from satune.training.self_check import Tolerance
from satune.training.state import CertifyState, Held
from satune.training.trainer import train
from satune.training.update import own_turns
from satune.types import Episode, Failure, Grade, Key, Problem, UserError

TOLERANCE = Tolerance(1e-3, 1e-3)
ON = "certify.problems=4"
GATED = ["certify={problems: 4, samples: 2, accept: certified, tolerance: 0.1, backtracks: 1}"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.build(tmp_path_factory.mktemp("world"))


GENERATED = '''
from satune.tasks.relay import Relay
from satune.types import Grade


class Ordinal(Relay):
    """Problems without end whose rewards differ between almost any two texts."""

    def grade(self, problem, answer):
        return Grade(sum(map(ord, answer or "")) % 7 / 6)
'''


def recorded(run: Training) -> list[tuple[dict[str, int], list[Episode]]]:
    """What every draw for a certificate gave, with the versions that the engine had."""
    drawn: list[tuple[dict[str, int], list[Episode]]] = []
    certify = run.world.certify

    def watched(*arguments: Any) -> list[Episode]:
        episodes = certify(*arguments)
        drawn.append((dict(run.world.cast.engine.versions), episodes))  # type: ignore[attr-defined]
        return episodes

    run.world.certify = watched  # type: ignore[method-assign]
    return drawn


def judged(monkeypatch: pytest.MonkeyPatch, lowers: Sequence[float]) -> list[torch.Tensor]:
    """Let the tests of the run come to these lower bounds one after the other, whatever the
    evidence; gives the evidence of each."""
    seen: list[torch.Tensor] = []
    real = certification.certify

    def certify(evidence_P: torch.Tensor, *rest: Any, **named: Any) -> StatisticalCertificate:
        seen.append(evidence_P)
        return replace(real(evidence_P, *rest, **named), lower=lowers[len(seen) - 1])

    monkeypatch.setattr(certification, "certify", certify)
    return seen


def refusing(failing: str) -> Callable[..., Any]:
    """``judge`` as if the trust region had refused every proposal of this agent."""
    judge = certification.judge

    def refused(agent: str, outcome: Any, key: Key, **around: Any) -> Any:
        if agent == failing:
            around["learners"][agent].restore(outcome.before)
            nothing = torch.zeros_like(outcome.log_ratio_E)
            outcome = replace(outcome, accepted=False, log_ratio_E=nothing)
        return judge(agent, outcome, key, **around)

    return refused


def test_a_certificate_compares_the_proposal_with_the_team_before(
    recipe: Path, tmp_path: Path
) -> None:
    run = tiny_world.training(recipe, tmp_path / "run", [ON, "certify.samples=3", "stages=1"])
    drawn = recorded(run)
    train(run, tolerance=TOLERANCE)
    updates = tiny_world.events(tmp_path / "run", "update")
    assert len(drawn) == 2 * len(updates) == 4
    for step, update in enumerate(updates):
        (new_versions, new), (old_versions, old) = drawn[2 * step : 2 * step + 2]
        agent = update["agent"]
        assert new_versions[agent] == old_versions[agent] + 1
        assert [e.problem.id for e in new] == [e.problem.id for e in old]
        assert all(len(side) == 12 for side in (new, old))
        gain = sum(e.reward for e in new) / 12 - sum(e.reward for e in old) / 12
        statistical = update["certificate"]["statistical"]
        assert statistical["mean"] == pytest.approx(gain, abs=1e-12)
        assert statistical["problems"] == 4 and statistical["samples"] == [3, 3]
        assert statistical["held_out"] == "finite"
        assert update["tokens"]["certify"] == sum(
            turn.completion_tokens for e in [*new, *old] for turn in e.turns
        )
        assert update["gate"]["verdict"] == "kept"


def test_its_problems_give_no_gradient_and_are_new_for_every_decision(
    recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "ordinal.py").write_text(GENERATED)
    relay = [f"task={{name: '{tmp_path / 'ordinal.py'}:Ordinal', numbers: 3}}", ON, "stages=2"]
    run = tiny_world.training(recipe, tmp_path / "run", relay)
    drawn = recorded(run)
    taught: set[str] = set()
    draw = run.supply.draw

    def watched(key: Key, offset: int, count: int) -> list[Episode]:
        episodes = draw(key, offset, count)
        taught.update(e.problem.text for e in episodes)
        return episodes

    run.supply.draw = watched
    train(run, tolerance=TOLERANCE)
    sides = [{e.problem.id for e in episodes} for _, episodes in drawn]
    assert sides and all(len(side) == 4 for side in sides)
    decisions = sides[::2]
    assert decisions == sides[1::2]
    assert len(set().union(*decisions)) == 4 * len(decisions)
    assert not taught & {e.problem.text for _, episodes in drawn for e in episodes}


def test_without_a_change_both_sides_are_the_same_to_the_token(
    recipe: Path, tmp_path: Path
) -> None:
    """The two sides share their uniforms; a step too small to change a token changes nothing."""
    run = tiny_world.training(recipe, tmp_path / "run", [ON, "optimizer.lr=1e-12", "stages=1"])
    drawn = recorded(run)
    train(run, tolerance=TOLERANCE)
    for (_, new), (_, old) in zip(drawn[::2], drawn[1::2], strict=True):
        ids = [[t.completion_ids for e in side for t in e.turns] for side in (new, old)]
        assert ids[0] == ids[1]
    for update in tiny_world.events(tmp_path / "run", "update"):
        assert update["certificate"]["statistical"]["mean"] == 0.0


def test_a_refused_step_leaves_no_trace(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(monkeypatch, [-0.5] * 8)
    run = tiny_world.training(recipe, tmp_path / "run", GATED)
    before = tiny_world.weights(run)
    train(run, tolerance=TOLERANCE)
    assert all(tiny_world.same(before[n], w) for n, w in tiny_world.weights(run).items())
    assert all(not learner.optimizer_state() for learner in run.learners.values())
    assert all(learner.steps == 0 for learner in run.learners.values())
    assert run.state.versions == {"ann": 0, "bob": 0}
    for update in tiny_world.events(tmp_path / "run", "update"):
        assert not update["accepted"] and update["scale"] == 0.0
        assert update["reason"].startswith("gate: lower bound -0.5")
        assert [scale for scale, _ in update["gate"]["candidates"]] == [1.0, 0.25]
    stage = tiny_world.events(tmp_path / "run", "stage")[0]
    assert stage["certificate"]["lower"] == 0.0 and stage["certificate"]["decisions"] == 4
    rewards = [e["reward"] for e in tiny_world.events(tmp_path / "run", "eval")]
    assert rewards[1] == rewards[-1]


def test_a_shrunk_step_is_a_quarter_of_the_proposal_and_keeps_the_moments(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_world.training(recipe, tmp_path / "whole", ["stages=1"])
    before = tiny_world.weights(whole)
    train(whole, tolerance=TOLERANCE)
    judged(monkeypatch, [-0.5, 0.0, 0.0])
    run = tiny_world.training(recipe, tmp_path / "run", [*GATED, "stages=1"])
    train(run, tolerance=TOLERANCE)
    for name, tensor in tiny_world.weights(run)["ann"].items():
        start, target = before["ann"][name], tiny_world.weights(whole)["ann"][name]
        assert torch.equal(tensor, start + 0.25 * (target - start))
    first, second = tiny_world.events(tmp_path / "run", "update")
    unshrunk = tiny_world.events(tmp_path / "whole", "update")[0]
    assert first["accepted"] and first["gate"]["verdict"] == "shrunk"
    assert first["scale"] == pytest.approx(0.25 * unshrunk["scale"], rel=1e-12)
    moments = run.learners["ann"].optimizer_state()
    assert moments and all(
        torch.equal(moments[n], m) for n, m in whole.learners["ann"].optimizer_state().items()
    )
    # The second agent's experience was that of the unshrunk step: it is drawn anew.
    assert [e["step"] for e in tiny_world.events(tmp_path / "run", "rollout")] == [1, 2]
    assert second["ess"] == second["episodes"]


def test_one_certificate_over_several_steps_takes_all_of_them_back(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(monkeypatch, [-0.5] * 4)
    run = tiny_world.training(recipe, tmp_path / "run", [*GATED, "certify.every=2"])
    before = tiny_world.weights(run)
    train(run, tolerance=TOLERANCE)
    assert all(tiny_world.same(before[n], w) for n, w in tiny_world.weights(run).items())
    first, second, *_ = tiny_world.events(tmp_path / "run", "update")
    assert first["accepted"] and "certificate" not in first
    assert not second["accepted"] and second["gate"]["agents"] == ["ann", "bob"]
    assert run.state.accepted == {"ann": False, "bob": False}
    # What was taken back is what was there before, under its own number; the two candidates of
    # either window had numbers of theirs, which nothing else may ever have.
    assert run.state.versions == {"ann": 0, "bob": 0}
    assert run.state.issued == {"ann": 4, "bob": 4}
    assert run.world.cast.engine.versions == run.state.versions  # type: ignore[attr-defined]
    # What was taken back is no update that the team has.
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["updates_accepted"] == 0


def test_a_certificate_says_since_which_step_it_claims(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of three steps over stages of two: 1.1 to 2.1, which ends well, and 2.2 to 3.2."""
    judged(monkeypatch, [0.25, -0.5, -0.5])
    run = tiny_world.training(recipe, tmp_path / "run", [*GATED, "certify.every=3", "stages=3"])
    train(run, tolerance=TOLERANCE)
    updates = tiny_world.events(tmp_path / "run", "update")
    found = {(u["stage"], u["step"]): u["gate"] for u in updates if "gate" in u}
    assert found.keys() == {(2, 1), (3, 2)}
    assert found[2, 1]["since"] == {"stage": 1, "step": 1}
    assert found[2, 1]["verdict"] == "kept"
    assert found[3, 2]["since"] == {"stage": 2, "step": 2}
    assert found[3, 2]["verdict"] == "reverted"
    first, second, third = tiny_world.events(tmp_path / "run", "stage")
    assert "certificate" not in first and first["uncertified"] == ["ann", "bob"]
    assert second["certificate"]["since"] == {"stage": 1, "step": 1}
    assert second["certificate"]["lower"] == 0.25 and second["uncertified"] == ["bob"]
    # The third stage took the second's last step back: it is unchanged since then, not since 3.1.
    assert third["certificate"]["since"] == {"stage": 2, "step": 2}
    assert third["certificate"]["lower"] == 0.0 and "uncertified" not in third
    assert run.state.totals["updates"] == 3


def test_a_window_begins_with_its_first_change(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 1.1 changes nothing: the team before it is the team before step 1.2."""
    monkeypatch.setattr("satune.training.stage.judge", refusing("ann"))
    run = tiny_world.training(recipe, tmp_path / "run", [ON, "certify.every=3"])
    train(run, tolerance=TOLERANCE)
    updates = tiny_world.events(tmp_path / "run", "update")
    gates = [u["gate"] for u in updates if "gate" in u]
    assert [gate["since"] for gate in gates] == [{"stage": 1, "step": 2}, {"stage": 2, "step": 2}]
    assert [gate["agents"] for gate in gates] == [["bob"], ["bob"]]


class OnDevice(torch.Tensor):
    """Stands for a tensor on an accelerator: every copy stays there but the one to the CPU."""

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def on_device(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.as_subclass(OnDevice) for name, tensor in tensors.items()}


@pytest.mark.parametrize("every", [1, 3])
def test_what_is_held_leaves_the_device_before_the_next_episode(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    befores: list[Any] = []
    judge = certification.judge

    def far(agent: str, outcome: Any, key: Key, **around: Any) -> Any:
        before = outcome.before
        before.weights, before.optimizer = on_device(before.weights), on_device(before.optimizer)
        befores.append(before)
        return judge(agent, outcome, key, **around)

    monkeypatch.setattr("satune.training.stage.judge", far)
    run = tiny_world.training(recipe, tmp_path / "run", [*GATED, f"certify.every={every}"])
    certify, draw = run.world.certify, run.supply.draw
    seen = 0

    def held() -> list[torch.Tensor]:
        kept = [*befores, *(before.snapshot for before in run.state.certify.held.values())]
        return [t for s in kept for part in (s.weights, s.optimizer) for t in part.values()]

    def watched(play: Any) -> Any:
        def playing(*arguments: Any) -> Any:
            nonlocal seen
            seen += len(held())
            assert not any(isinstance(tensor, OnDevice) for tensor in held())
            own = {w.untyped_storage().data_ptr() for w in parameters(run)}
            assert not own & {t.untyped_storage().data_ptr() for t in held()}
            return play(*arguments)

        return playing

    run.world.certify = watched(certify)  # type: ignore[method-assign]
    run.supply.draw = watched(draw)
    train(run, tolerance=TOLERANCE)
    assert seen > 0 and len(befores) == 4


def parameters(run: Training) -> list[torch.Tensor]:
    return [p for learner in run.learners.values() for p in learner._parameters.values()]  # type: ignore[attr-defined]


@pytest.mark.gpu
def test_on_an_accelerator_a_revert_is_exact_and_what_is_held_lies_on_the_cpu(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no accelerator")
    judged(monkeypatch, [-0.5] * 8)
    overrides = [*GATED, "certify.every=3", "team.device=cuda"]
    run = tiny_world.training(recipe, tmp_path / "run", overrides)
    before = tiny_world.weights(run)
    draw = run.supply.draw

    def watched(*arguments: Any) -> list[Episode]:
        for held in run.state.certify.held.values():
            parts = (held.snapshot.weights, held.snapshot.optimizer)
            assert all(t.device.type == "cpu" for part in parts for t in part.values())
        return draw(*arguments)

    run.supply.draw = watched
    train(run, tolerance=TOLERANCE)
    assert all(tiny_world.same(before[n], w) for n, w in tiny_world.weights(run).items())
    assert all(not learner.optimizer_state() for learner in run.learners.values())


@pytest.mark.slow
def test_what_is_held_is_written_once_a_window(recipe: Path, tmp_path: Path) -> None:
    """Windows of three steps: ann is held from 1.1 to 2.1; the next one begins with bob."""
    overrides = [ON, "certify.every=3", "checkpoint.keep=9"]
    train(tiny_world.training(recipe, tmp_path / "run", overrides), tolerance=TOLERANCE)
    at = tmp_path / "run" / "checkpoints"

    def file(name: str, agent: str) -> tuple[int, bytes] | None:
        path = at / name / f"{agent}.held.safetensors"
        return (path.stat().st_ino, path.read_bytes()) if path.exists() else None

    first = file("stage-0001-step-1", "ann")
    assert first is not None and file("stage-0001-step-1", "bob") is None
    assert file("stage-0001", "ann") == first and file("stage-0001", "bob") is not None
    assert file("stage-0002-step-1", "ann") is file("stage-0002-step-1", "bob") is None
    # A resumed run links to what it went on from, and what is held anew is not what was.
    more = [*overrides, "stages=4"]
    run = tiny_world.training(recipe, tmp_path / "run", more, resume=True)
    train(run, tolerance=TOLERANCE, checkpoint="stage-0001")
    second = file("stage-0002", "bob"), file("stage-0003-step-1", "bob")
    assert None not in second and second[0] == second[1] != file("stage-0001", "bob")
    # Saved by stage alone, bob's second window follows his first without a checkpoint between.
    train(
        tiny_world.training(recipe, tmp_path / "rare", [*more, "checkpoint.every=stage"]),
        tolerance=TOLERANCE,
    )
    rare = tmp_path / "rare" / "checkpoints" / "stage-0002" / "bob.held.safetensors"
    assert rare.read_bytes() == second[0][1]  # type: ignore[index]


def test_moments_come_back_bit_for_bit_with_the_weights(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four steps in windows of two, the first window is kept and the second taken back."""
    half = tiny_world.training(recipe, tmp_path / "half", ["stages=1"])
    train(half, tolerance=TOLERANCE)
    judged(monkeypatch, [0.0, -0.5, -0.5])
    run = tiny_world.training(recipe, tmp_path / "run", [*GATED, "certify.every=2"])
    train(run, tolerance=TOLERANCE)
    for name, learner in run.learners.items():
        assert tiny_world.same(learner.export(), half.learners[name].export())
        moments = learner.optimizer_state()
        assert moments and tiny_world.same(moments, half.learners[name].optimizer_state())
        assert learner.steps == half.learners[name].steps > 0


def test_a_gate_without_decisions_left_refuses_and_says_why(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(monkeypatch, [0.0])
    run = tiny_world.training(recipe, tmp_path / "run", GATED)
    run.state.certify = CertifyState(confidence.Spending(0.05, 1))
    train(run, tolerance=TOLERANCE)
    verdicts = [e["gate"]["verdict"] for e in tiny_world.events(tmp_path / "run", "update")]
    assert verdicts == ["kept", "reverted", "reverted", "reverted"]
    last = tiny_world.events(tmp_path / "run", "update")[-1]
    assert last["reason"] == "gate: the declared number of decisions is used up"
    assert run.state.certify.spending.spent == 0.05


def test_without_a_gate_a_change_that_no_test_is_left_for_stays_and_claims_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(monkeypatch, [0.25])
    run = tiny_world.training(recipe, tmp_path / "run", [ON])
    run.state.certify = CertifyState(confidence.Spending(0.05, 1))
    train(run, tolerance=TOLERANCE)
    updates = tiny_world.events(tmp_path / "run", "update")
    assert [u["gate"]["verdict"] for u in updates] == ["kept", *["not tested"] * 3]
    assert ["certificate" in u for u in updates] == [True, False, False, False]
    assert all(u["accepted"] for u in updates)
    stages = tiny_world.events(tmp_path / "run", "stage")
    assert [stage["certificate"]["lower"] for stage in stages] == [-1.0, -1.0]
    assert [stage["certificate"]["alpha"] for stage in stages] == [0.05, 0.0]


@pytest.mark.parametrize("gate, needed", [("trust_region", 4), ("certified", 8)])
def test_the_confidence_is_split_over_all_decisions_that_may_come(
    recipe: Path, tmp_path: Path, gate: str, needed: int
) -> None:
    run = tiny_world.training(recipe, tmp_path / "run", [*GATED, f"certify.accept={gate}"])
    assert run.state.certify.spending.decisions == needed
    open_ended = tiny_world.training(recipe, tmp_path / "open", [ON, "certify.decisions=open"])
    assert open_ended.state.certify.spending.decisions is None


@pytest.mark.slow
@pytest.mark.parametrize("evidence", ["fresh", "balance", "pessimistic"])
def test_a_run_that_goes_on_from_within_a_window_is_the_same(
    recipe: Path, tmp_path: Path, evidence: str
) -> None:
    settings = f"certify={{problems: 3, samples: 2, every: 3, evidence: {evidence}}}"
    overrides = [settings, "stages=3", "checkpoint.keep=9"]
    whole = tiny_world.training(recipe, tmp_path / "whole", overrides)
    train(whole, tolerance=TOLERANCE)
    names = tiny_world.checkpoints(tmp_path / "whole", keep=9).names()
    assert "stage-0001-step-1" in names and "stage-0002" in names
    for name in ("stage-0001-step-1", "stage-0002"):
        again = tiny_world.training(recipe, tmp_path / "whole", overrides, resume=True)
        expected = tiny_world.events(tmp_path / "whole")
        train(again, tolerance=TOLERANCE, checkpoint=name)
        assert tiny_world.events(tmp_path / "whole") == expected
        for agent, weights in tiny_world.weights(again).items():
            assert tiny_world.same(weights, tiny_world.weights(whole)[agent])


def changed(run: Training) -> Change:
    """Both agents moved by a step that was not measured, large enough to matter."""
    held = {}
    for name, learner in run.learners.items():
        held[name] = Held(learner.snapshot(), 0, (1, 1))
        moved = {n: w + 0.05 * torch.randn_like(w) for n, w in learner.export().items()}
        learner.load_weights(moved)
        run.world.publish(name, 1, moved)
    return Change(run.learners, held)


@pytest.fixture
def moved(recipe: Path, tmp_path: Path) -> tuple[Training, Change]:
    run = tiny_world.training(recipe, tmp_path / "run")
    torch.manual_seed(0)
    return run, changed(run)


def test_the_log_ratio_is_new_over_old_of_all_that_changed(
    moved: tuple[Training, Change],
) -> None:
    run, change = moved
    episodes = run.world.certify(Key(0, "certify"), 0, 3, 2)
    written = [sum(p for t in e.turns for p in t.sampled_logprobs or ()) for e in episodes]
    u_E = log_ratios(change, episodes)
    with change.undone():
        for name in run.learners:
            run.world.publish(name, 0, change.held[name].snapshot.weights)
        back = run.world.certify(Key(0, "certify"), 0, 3, 2)
        # Under the old weights the proposal is what is undone: the same sum with its sign turned.
        old = [
            sum(
                float(learner.score(own_turns(name, [e])).sum())
                for name, learner in run.learners.items()
            )
            for e in episodes
        ]
    assert u_E.tolist() == pytest.approx(
        [new - before for new, before in zip(written, old, strict=True)], abs=1e-4
    )
    # E log(new/old) is a KL under new, minus one under old.
    assert float(u_E.mean()) > 0.0 > float(log_ratios(change, back).mean())


def test_own_steps_are_moments_and_their_ratios_add_up(moved: tuple[Training, Change]) -> None:
    run, change = moved
    episodes = run.world.certify(Key(0, "certify"), 0, 3, 2)
    steps = measure_own_steps(change, episodes)
    assert steps.log_ratio_EH.shape == (6, 2)
    assert torch.allclose(steps.log_ratio_EH.sum(-1), log_ratios(change, episodes), atol=1e-4)
    assert bool((steps.kl_EH > 0).all())
    # A message has six tokens at the most, and so a token at least a sixth of its KL.
    assert float(steps.kl_EH.max()) / 6 <= steps.largest_token_kl <= float(steps.kl_EH.max())
    one = Change({"bob": run.learners["bob"]}, {"bob": change.held["bob"]})
    assert measure_own_steps(one, episodes).own == 1


def test_a_task_that_holds_nothing_out_is_told_before_the_first_step(
    recipe: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no rows for 'certify'"):
        tiny_world.training(
            recipe,
            tmp_path / "run",
            [ON, "task.eval_fraction=0.0", f"evaluate.data={recipe.parent / 'rows.jsonl'}"],
        )


NOISE = '''
import random
coin = random.Random(0)
def noise(prompts, completions, **columns):
    """A reward that nothing can influence."""
    return [float(coin.random() < 0.5) for _ in completions]
'''


@pytest.mark.slow
@pytest.mark.parametrize("evidence", ["fresh", "balance", "pessimistic"])
def test_a_reward_of_noise_is_hardly_ever_certified(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evidence: str
) -> None:
    """200 steps, each tested at an error probability of 5% of its own."""
    shares: Callable[[Any, int], float] = lambda spending, k: 0.05  # noqa: E731
    monkeypatch.setattr(confidence.Spending, "share", shares)
    (tmp_path / "noise.py").write_text(NOISE)
    run = tiny_world.training(
        recipe,
        tmp_path / "run",
        [
            f"certify={{problems: 48, samples: 2, evidence: {evidence}, theory: false}}",
            f"task.reward={tmp_path / 'noise.py'}:noise",
            "stages=103",
            "checkpoint.every=stage",
        ],
    )
    train(run, tolerance=TOLERANCE)
    certificates = [
        e["certificate"]["statistical"]
        for e in tiny_world.events(tmp_path / "run", "update")
        if "certificate" in e  # a step without a change has none
    ][:200]
    assert len(certificates) == 200 and {c["alpha"] for c in certificates} == {0.05}
    assert sum(c["positive"] for c in certificates) <= 10
    # The bounds are no mere -1.
    assert sorted(c["lower"] for c in certificates)[100] > -0.3


@pytest.mark.parametrize("schedule", ["hybrid", "reuse", "stale"])
def test_a_revert_over_stages_leaves_no_experience_of_the_team_it_undid(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    """ann's change of stage 1 is taken back in stage 2, whose batch that ann had drawn."""
    judged(monkeypatch, [-0.5] * 8)
    monkeypatch.setattr("satune.training.stage.judge", refusing("bob"))
    run = tiny_world.training(
        recipe, tmp_path / "run", [*GATED, "certify.every=3", f"schedule={schedule}"]
    )
    train(run, tolerance=TOLERANCE)
    rollouts = [(e["stage"], e["step"]) for e in tiny_world.events(tmp_path / "run", "rollout")]
    assert rollouts == [(1, 1), (2, 1), (2, 2)]


def test_a_revert_leaves_alone_what_earlier_stages_have_accepted(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ann's steps of both stages are taken back at the first of stage 2, bob's of stage 1 as well;
    bob has not had its turn in stage 2."""
    judged(monkeypatch, [-0.5] * 2 + [0.5])
    run = tiny_world.training(recipe, tmp_path / "run", [*GATED, "certify.every=3"])
    seen: list[dict[str, bool]] = []
    run.watch = lambda event: (
        seen.append(dict(run.state.accepted)) if event["event"] == "update" else None
    )
    train(run, tolerance=TOLERANCE)
    assert seen == [
        {"ann": True}, {"ann": True, "bob": True}, {"ann": False}, {"ann": False, "bob": True},
    ]  # fmt: skip


def test_rows_of_theory_leave_out_what_the_world_ended(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate counts it as lost instead."""
    run = tiny_world.training(recipe, tmp_path / "run", [ON, "certify.samples=2", "stages=1"])
    draw, rows_of = run.world.certify, certification.theory_rows
    gone = Failure("connection: refused", policy=False)
    used: list[list[str]] = []

    def certify(*arguments: Any) -> list[Episode]:
        first, *rest = draw(*arguments)
        return [replace(first, grade=Grade(0.0), failure=gone), *rest]

    def rows(episodes: list[Episode], *rest: Any) -> Any:
        used.append([e.problem.id for e in episodes if not e.masked])
        assert len(used[-1]) == len(episodes)
        return rows_of(episodes, *rest)

    run.world.certify = certify  # type: ignore[method-assign]
    monkeypatch.setattr(certification, "theory_rows", rows)
    train(run, tolerance=TOLERANCE)
    assert [len(each) for each in used] == [7, 7]
    for update in tiny_world.events(tmp_path / "run", "update"):
        statistical = update["certificate"]["statistical"]
        assert (statistical["problems"], statistical["samples"]) == (4, [2, 2])


def test_an_episode_without_others_of_its_problem_is_held_against_a_half() -> None:
    """r - 1 = 1 for all. Two that won problem p are worth nothing beside each other; the one of q
    is worth 1 - 1/2: a mean over problems of 1/4."""
    episodes = [
        Episode(Problem.of(name, ""), sample, (), None, Grade(1.0))
        for name, sample in (("p", 0), ("p", 1), ("q", 0))
    ]
    double_EH = torch.full((3, 1), 2.0, dtype=torch.float64).log()
    rows = theory_rows(episodes, OwnSteps(double_EH, torch.zeros_like(double_EH), 0.1), None)
    assert [row["gain"] for row in rows] == pytest.approx([0.25] * 3, rel=1e-12)


def test_a_naive_batch_stays_where_only_what_came_after_it_was_undone(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is taken back by itself: the one batch of a stage is still of the team's."""
    judged(monkeypatch, [-0.5] * 8)
    run = tiny_world.training(recipe, tmp_path / "run", [*GATED, "schedule=stale"])
    train(run, tolerance=TOLERANCE)
    rollouts = [(e["stage"], e["step"]) for e in tiny_world.events(tmp_path / "run", "rollout")]
    assert rollouts == [(1, 1), (2, 1)]


def test_a_gate_is_not_extended_beyond_the_tests_it_declared(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps declare 8 tests and use 4; a third stage may take another 4, a fourth 8."""
    judged(monkeypatch, [0.0] * 6)
    train(tiny_world.training(recipe, tmp_path / "run", GATED), tolerance=TOLERANCE)
    more = tiny_world.training(recipe, tmp_path / "run", [*GATED, "stages=4"], resume=True)
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"declared 8 tests .* used 4, more stages may need .* 8;"):
        train(more, tolerance=TOLERANCE, checkpoint="stage-0002")
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before
    third = tiny_world.training(recipe, tmp_path / "run", [*GATED, "stages=3"], resume=True)
    train(third, tolerance=TOLERANCE, checkpoint="stage-0002")
    assert third.state.certify.spending.used == 6


def test_a_window_cut_by_the_end_of_a_run_counts_when_it_goes_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of three steps: of two stages 3 + 1, of three 3 + 1 + 2, where six in one go are two.

    The gate has 4 tests for the first two windows; the third is not to be refused for want of one.
    """
    judged(monkeypatch, [-0.5, 0.0, -0.5, 0.0])
    windows = [*GATED, "certify.every=3"]
    train(tiny_world.training(recipe, tmp_path / "run", windows), tolerance=TOLERANCE)
    more = tiny_world.training(recipe, tmp_path / "run", [*windows, "stages=3"], resume=True)
    with pytest.raises(UserError, match=r"declared 4 tests .* used 4, more stages may need .* 2;"):
        train(more, tolerance=TOLERANCE, checkpoint="stage-0002")


@pytest.mark.parametrize("schedule", ["fresh", "simultaneous"])
@pytest.mark.parametrize("every", [1, 2, 3, 5, 9])
def test_the_tests_left_are_those_declared_at_every_step(
    recipe: Path, schedule: str, every: int
) -> None:
    """Counted step by step, from any place of a run of three stages of two steps whose windows all
    take their two tests."""
    loaded = load_recipe(
        recipe, [*GATED, f"certify.every={every}", f"schedule={schedule}", "stages=3"]
    )
    settings = training_settings(loaded)
    used, uncertified = 0, 0
    said: list[tuple[int, int]] = []
    for number in range(7):
        left = certification.tests_left(settings, 2, *divmod(number, 2), uncertified)
        said.append((used, left))
        uncertified += 1
        due = number < 6 and (uncertified >= every or number == 5)
        if due and (schedule == "fresh" or number % 2):
            used, uncertified = used + 2, 0
    declared = declared_decisions(loaded)
    assert declared is not None and said[0] == (0, declared) and said[-1][1] == 0
    for before, left in said:
        assert used - before <= left <= declared - before
        if schedule == "fresh":
            assert left == used - before


SAME = '''
from satune.tasks.relay import Relay


class Same(Relay):
    """A class that gives every split the same problems."""

    fresh = {fresh}

    def problem_at(self, split, index):
        return super().problem_at("train", index)

    def problems(self, split):
        endless = (self.problem_at(split, index) for index in itertools.count())
        return endless if self.fresh else itertools.islice(endless, 20)


import itertools
'''


@pytest.mark.parametrize("fresh", [True, False])
def test_a_task_that_certifies_on_what_it_trains_on_is_refused(
    recipe: Path, tmp_path: Path, fresh: bool
) -> None:
    (tmp_path / "same.py").write_text(SAME.replace("{fresh}", str(fresh)))
    task = f"task={{name: '{tmp_path / 'same.py'}:Same', numbers: 3}}"
    with pytest.raises(UserError, match="problems for certificates are those it trains on"):
        tiny_world.training(recipe, tmp_path / "run", [task, ON])
    tiny_world.training(recipe, tmp_path / "without", [task])


def test_a_finite_set_is_drawn_with_replacement_and_each_draw_is_played_for_itself(
    recipe: Path, tmp_path: Path
) -> None:
    """Three held-out rows in 30 draws: in epochs each came ten times; the odds that independent
    draws do are 30!/(10!)^3/3^30 = 2.7%, and this seed's do not."""
    run = tiny_world.training(recipe, tmp_path / "run", [ON])
    episodes = run.world.certify(Key(0, "certify"), 0, 30, 2)
    rows = Counter(e.problem.id.partition("#")[0] for e in episodes)
    assert len(rows) == 3 and sorted(rows.values()) != [20, 20, 20]
    assert len({e.problem.id for e in episodes}) == 30
    by_row: dict[str, set[Any]] = {}
    for e in episodes:
        by_row.setdefault(e.problem.text, set()).add(tuple(e.turns[0].completion_ids))
    # The same row drawn again has random numbers of its own.
    assert all(len(messages) > 5 for messages in by_row.values())


def test_the_rows_of_theory_say_what_they_are_made_of(recipe: Path, tmp_path: Path) -> None:
    """2 x .99 sqrt(delta/2) / .01^2 for the region's delta = .05: 3130.65..."""
    run = tiny_world.training(recipe, tmp_path / "run", [ON, "certify.every=3"])
    train(run, tolerance=TOLERANCE)
    updates = tiny_world.events(tmp_path / "run", "update")
    several, one = (u["certificate"]["theory"] for u in updates if "certificate" in u)
    assert all(row["basis"].startswith(("measured: ", "enforced: ")) for row in several + one)
    assert {row["name"] for row in several} == {"sup-free", "paper", "turns"}
    rows = {row["name"]: row for row in one}
    assert rows.keys() == {"sup-free", "paper", "paper, region", "one own turn"}
    assert rows["paper, region"]["penalty"] == pytest.approx(1.98e4 * 0.025**0.5, rel=1e-12)
    assert rows["paper, region"]["basis"].startswith("enforced: delta 0.05")
    # What was measured stands in the basis; it may exceed delta, which holds a quantile.
    largest = float(re.search(r"of a token, ([0-9.e-]+)", rows["paper"]["basis"])[1])  # type: ignore[index]
    assert rows["paper"]["penalty"] == pytest.approx(1.98e4 * (largest / 2) ** 0.5, rel=1e-2)
    # Without a region that holds a step there is no delta to speak of.
    free = tiny_world.training(
        recipe, tmp_path / "free", [ON, "trust_region.enabled=false", "stages=1"]
    )
    train(free, tolerance=TOLERANCE)
    for update in tiny_world.events(tmp_path / "free", "update"):
        assert "paper, region" not in {row["name"] for row in update["certificate"]["theory"]}
