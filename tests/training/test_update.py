"""One agent's step: what is accepted lies inside δ, and what is not leaves no trace."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_world
from satune.agents.learner import LocalLearner
from satune.core.trust_region import LineSearch, TrustRegionSettings
from satune.training.run import Training
from satune.training.settings import UpdateSettings
from satune.training.update import Outcome, improve
from satune.types import Experience, Failure, Grade, Key, Turn, logprobs_of

KEY = Key(0, "train", 1, 1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.build(tmp_path_factory.mktemp("world"))


def fresh(recipe: Path, out: Path, *overrides: str) -> tuple[Training, Experience]:
    """A run with one rollout drawn, and that rollout as experience."""
    run = tiny_world.training(recipe, out, overrides)
    for name in run.learners:
        run.publish(name)
    batch = run.supply.batch(1, 1)
    return run, Experience(tuple(batch.episodes), tuple(batch.log_weights))


def step(run: Training, experience: Experience, **region: Any) -> Outcome:
    settings = run.settings.update
    bounds = replace(settings.trust_region, **region)
    return improve(
        run.learners["ann"], "ann", experience, replace(settings, trust_region=bounds),
        beta=bounds.beta, cap=None, key=KEY,
    )  # fmt: skip


def logprobs(
    recipe: Path, weights: dict[str, torch.Tensor], turns: list[Turn], temperature: float = 1.0
) -> list[torch.Tensor]:
    """Full log-distributions [T, V] in float64 for each turn, by a model loaded afresh, one whole
    sequence at a time: nothing of the code under test takes part."""
    model = AutoModelForCausalLM.from_pretrained(recipe.parent / "model-0", dtype=torch.float64)
    model.load_state_dict({name: tensor.double() for name, tensor in weights.items()}, strict=False)
    model.eval()
    found = []
    for turn in turns:
        assert turn.prompt_ids is not None and turn.completion_ids is not None
        ids = torch.tensor([[*turn.prompt_ids, *turn.completion_ids]])
        with torch.no_grad():
            logits_V = model(input_ids=ids).logits[0] / temperature
        first = len(turn.prompt_ids) - 1
        found.append(logits_V[first : first + len(turn.completion_ids)].log_softmax(-1))
    return found


def kl_by_hand(
    recipe: Path, new: dict[str, torch.Tensor], old: dict[str, torch.Tensor], turns: list[Turn]
) -> torch.Tensor:
    """KL(new‖old) [T] over all own tokens, from two models' full distributions."""
    pairs = zip(logprobs(recipe, new, turns), logprobs(recipe, old, turns), strict=True)
    return torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs])


def own(experience: Experience, agent: str = "ann") -> list[Turn]:
    return [turn for e in experience.episodes for turn in e.turns if turn.agent == agent]


# The trust region


@pytest.mark.parametrize("lr", ["1e-4", "1e-3", "3e-2"])
def test_an_accepted_step_is_inside_delta_by_a_measurement_of_its_own(
    recipe: Path, tmp_path: Path, lr: str
) -> None:
    run, experience = fresh(recipe, tmp_path / "run", f"optimizer.lr={lr}")
    before = run.learners["ann"].export()
    outcome = step(run, experience, backtracks=20)
    assert outcome.accepted
    # The whole proposal's quantile is far below δ, about 2δ, and far above it.
    assert (outcome.event["scale"] < 1) == (lr != "1e-4")
    kl_T = kl_by_hand(recipe, run.learners["ann"].export(), before, own(experience))
    # The .99-quantile is the smallest value that at least 99% of the states do not exceed.
    quantile = float(kl_T.sort().values[math.ceil(0.99 * len(kl_T)) - 1])
    recorded = outcome.event["kl"]
    assert quantile <= 0.05
    # float32 against float64.
    assert recorded["quantile"] == pytest.approx(quantile, rel=1e-3)
    assert recorded["mean"] == pytest.approx(float(kl_T.mean()), rel=1e-3)
    assert recorded["max"] == pytest.approx(float(kl_T.max()), rel=1e-3)
    assert recorded["states"] == len(kl_T)


def test_what_the_engine_is_off_by_stands_beside_delta(recipe: Path, tmp_path: Path) -> None:
    """An engine that says .1 more of every token than the anchor: KL(sampled‖anchor) is estimated
    by exp(-.1) - 1 + .1 a token."""
    run, experience = fresh(recipe, tmp_path / "run")
    off = [
        replace(e, turns=tuple(
            replace(turn, sampled_logprobs=logprobs_of([v + 0.1 for v in turn.sampled_logprobs]))
            for turn in e.turns
        ))
        for e in experience.episodes
    ]  # fmt: skip
    outcome = step(run, replace(experience, episodes=tuple(off)), delta=0.02)
    found = outcome.event["mismatch"]
    assert found["mean"] == pytest.approx(0.1, abs=1e-4)
    assert found["max"] == pytest.approx(0.1, abs=1e-3)
    kl = math.exp(-0.1) - 1 + 0.1
    assert found["kl"] == pytest.approx(kl, rel=1e-2)
    assert found["of_delta"] == pytest.approx(kl / 0.02, rel=1e-2)


def test_without_a_trust_region_a_large_step_stays_large(recipe: Path, tmp_path: Path) -> None:
    run, experience = fresh(recipe, tmp_path / "run", "optimizer.lr=3e-2")
    before = run.learners["ann"].export()
    outcome = step(run, experience, enabled=False)
    assert outcome.accepted and outcome.event["scale"] == 1.0
    kl_T = kl_by_hand(recipe, run.learners["ann"].export(), before, own(experience))
    assert float(kl_T.quantile(0.99)) > 1.0
    assert outcome.event["kl"]["quantile"] > 1.0


def test_without_a_trust_region_the_same_is_measured(recipe: Path, tmp_path: Path) -> None:
    """A small step, which the region takes as it is, and a large one, which it would revert."""
    for lr, larger in (("1e-4", False), ("3e-2", True)):
        found = {}
        for enabled in (True, False):
            run, experience = fresh(recipe, tmp_path / f"{lr}{enabled}", f"optimizer.lr={lr}")
            outcome = step(run, experience, enabled=enabled, backtracks=0)
            found[enabled] = outcome.event
            assert outcome.accepted == (not larger or not enabled)
        for key in ("kl", "delta", "candidates", "objective", "clip_fraction"):
            assert found[True][key] == found[False][key], key
        kl = found[False]["kl"]
        assert (kl["violation_share"] > 0.01 and kl["violation_rate"] > 0) == larger
        assert {"quantile", "reverse_quantile", "violation_ucb", "trajectory"} <= set(kl)


def test_a_shrunk_step_lies_on_the_line_from_the_anchor(recipe: Path, tmp_path: Path) -> None:
    whole, experience = fresh(recipe, tmp_path / "a", "optimizer.lr=3e-3")
    anchor = whole.learners["ann"].export()
    step(whole, experience, enabled=False)
    shrunk, same_experience = fresh(recipe, tmp_path / "b", "optimizer.lr=3e-3")
    assert same_experience == experience
    outcome = step(shrunk, experience)
    scale = outcome.event["scale"]
    assert outcome.accepted and 0 < scale < 1
    for name, found in shrunk.learners["ann"].export().items():
        target = whole.learners["ann"].export()[name]
        wanted = anchor[name].double() + scale * (target.double() - anchor[name].double())
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)
    # A shrink keeps the optimiser's moments, those of the whole proposal.
    moments = shrunk.learners["ann"].optimizer_state()
    assert tiny_world.same(moments, whole.learners["ann"].optimizer_state())


def test_what_cannot_be_brought_inside_is_reverted_bit_for_bit(
    recipe: Path, tmp_path: Path
) -> None:
    run, experience = fresh(recipe, tmp_path / "run")
    learner = run.learners["ann"]
    # A first accepted step, so that there are moments to be restored.
    assert step(run, experience).accepted
    before, moments, steps = learner.export(), learner.optimizer_state(), learner.steps
    assert moments and steps > 0
    outcome = step(run, experience, delta=1e-12, backtracks=2)
    assert not outcome.accepted
    assert tiny_world.same(learner.export(), before)
    assert tiny_world.same(learner.optimizer_state(), moments)
    assert learner.steps == steps
    assert outcome.event["accepted"] is False and outcome.event["scale"] == 0.0
    assert "above delta" in outcome.event["reason"]
    assert len(outcome.event["candidates"]) == 3
    assert outcome.log_ratio_E.tolist() == [0.0] * len(experience.episodes)


@pytest.mark.parametrize("unit", ["token", "turn", "trajectory"])
def test_a_hopeless_candidate_is_not_measured_to_its_end_and_nothing_else_changes(
    recipe: Path, tmp_path: Path, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = LocalLearner.measure

    def played(name: str) -> tuple[Training, Outcome, int]:
        overrides = ("optimizer.lr=3e-2", "optimizer.micro_batch_tokens=64")
        run, experience = fresh(recipe, tmp_path / name, *overrides)
        batches: list[Any] = []

        def counted(learner: LocalLearner, anchor: Any, stop: Any) -> Any:
            def seen(so_far: Any) -> bool:
                batches.append(so_far)
                return stop(so_far)

            return measure(learner, anchor, seen)

        with monkeypatch.context() as patch:
            patch.setattr(LocalLearner, "measure", counted)
            return run, step(run, experience, unit=unit), len(batches)

    cut, outcome, few = played("cut")
    monkeypatch.setattr(LineSearch, "foregone", math.inf)
    whole, reference, many = played("whole")
    found, wanted = dict(outcome.event), dict(reference.event)
    assert few < many and found.pop("at_least")[0] == 1.0 and "at_least" not in wanted
    # Only what is said of the hopeless candidates differs, and that is a lower bound.
    pairs = list(zip(found.pop("candidates"), wanted.pop("candidates"), strict=True))
    assert all(a[0] == b[0] and a[1] <= b[1] for a, b in pairs)
    assert pairs[0][0][1] < pairs[0][1][1] and pairs[-1][0] == pairs[-1][1]
    for event in (found, wanted):
        event.pop("seconds")
    assert found == wanted and outcome.accepted
    assert outcome.beta == reference.beta
    assert tiny_world.same(cut.learners["ann"].export(), whole.learners["ann"].export())


def test_the_log_ratio_of_a_step_is_that_of_two_models(recipe: Path, tmp_path: Path) -> None:
    run, experience = fresh(recipe, tmp_path / "run")
    before = run.learners["ann"].export()
    outcome = step(run, experience)
    after = run.learners["ann"].export()
    wanted = []
    for episode in experience.episodes:
        turns = [turn for turn in episode.turns if turn.agent == "ann"]
        total = 0.0
        for new, old, turn in zip(
            logprobs(recipe, after, turns), logprobs(recipe, before, turns), turns, strict=True
        ):
            ids = torch.tensor(turn.completion_ids)[:, None]
            total += float((new - old).gather(1, ids).sum())
        wanted.append(total)
    assert max(map(abs, wanted)) > 0.01
    torch.testing.assert_close(
        outcome.log_ratio_E, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-4
    )


# What is not finite


def damaged(experience: Experience, score: float) -> Experience:
    first, *rest = experience.episodes
    return replace(experience, episodes=(replace(first, grade=Grade(score)), *rest))


def test_a_reward_that_is_not_a_number_reverts_and_says_so(recipe: Path, tmp_path: Path) -> None:
    run, experience = fresh(recipe, tmp_path / "run")
    learner = run.learners["ann"]
    assert step(run, experience).accepted
    before, moments, steps = learner.export(), learner.optimizer_state(), learner.steps
    outcome = step(run, damaged(experience, math.nan))
    assert not outcome.accepted and "not finite" in outcome.event["reason"]
    assert outcome.event["scale"] == 0.0 and "kl" not in outcome.event
    assert tiny_world.same(learner.export(), before)
    assert tiny_world.same(learner.optimizer_state(), moments)
    assert learner.steps == steps
    # An overshoot without bound: beta doubles.
    assert outcome.beta == 2 * run.settings.update.trust_region.beta
    # Nothing of the damaged gradient is left behind for the next step.
    assert all(p.grad is None for p in learner.policy.trainable().values())
    assert step(run, experience).accepted


def test_beta_stands_still_where_it_may_not_adapt(recipe: Path, tmp_path: Path) -> None:
    run, experience = fresh(recipe, tmp_path / "run")
    beta = run.settings.update.trust_region.beta
    assert step(run, damaged(experience, math.nan), adapt=False).beta == beta
    assert step(run, experience, adapt=False, delta=1e-4, backtracks=9).beta == beta


def test_a_rate_that_throws_the_weights_out_of_the_finite_is_reverted(
    recipe: Path, tmp_path: Path
) -> None:
    run, experience = fresh(recipe, tmp_path / "run", "optimizer.lr=1e30")
    before = run.learners["ann"].export()
    outcome = step(run, experience)
    assert not outcome.accepted and "not finite" in outcome.event["reason"]
    assert tiny_world.same(run.learners["ann"].export(), before)


def test_an_agent_that_said_nothing_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    run, experience = fresh(recipe, tmp_path / "run")
    silent = tuple(
        replace(e, turns=tuple(t for t in e.turns if t.agent != "ann")) for e in experience.episodes
    )
    before = run.learners["ann"].export()
    outcome = step(run, replace(experience, episodes=silent))
    assert (outcome.accepted, outcome.event["reason"]) == (False, "the agent wrote nothing")
    assert tiny_world.same(run.learners["ann"].export(), before)


def test_settings_default_to_the_paper() -> None:
    assert UpdateSettings().trust_region == TrustRegionSettings(delta=0.05, quantile=0.99)


def test_a_batch_without_a_difference_in_reward_changes_nothing(
    recipe: Path, tmp_path: Path
) -> None:
    run = tiny_world.training(recipe, tmp_path / "run", [])
    learner = run.learners["ann"]
    episodes = tuple(replace(e, grade=Grade(0.5)) for e in run.supply.batch(1, 1).episodes)
    before = learner.export()
    outcome = improve(
        learner,
        "ann",
        Experience(episodes, (0.0,) * len(episodes)),
        run.settings.update,
        beta=0.1,
        cap=None,
        key=Key(0, "train", 1, 1),
    )
    assert not outcome.accepted and outcome.event["reason"] == "no group's rewards differ"
    assert all(torch.equal(before[name], now) for name, now in learner.export().items())
    assert learner.steps == 0


def test_a_step_tells_how_far_it_is(recipe: Path, tmp_path: Path) -> None:
    run, experience = fresh(recipe, tmp_path / "run")
    told: list[tuple[int, int, str]] = []
    improve(
        run.learners["ann"], "ann", experience, run.settings.update,
        beta=0.1, cap=None, key=KEY, progress=lambda *now: told.append(now),
    )  # fmt: skip
    # Two mini-batches, and the measurement of what they made.
    assert told == [(done, 3, "update of ann") for done in range(4)]


LOST = Failure("the server is gone", policy=False)


def test_what_the_world_ended_has_no_part_in_a_step(recipe: Path, tmp_path: Path) -> None:
    """With whole groups lost, the step is to the last bit the step without them."""
    steps = {}
    for kind in ("lost", "absent"):
        run, experience = fresh(recipe, tmp_path / kind)
        gone = {experience.episodes[0].problem.id}
        marked = tuple(
            replace(e, failure=LOST, grade=Grade(math.nan)) if e.problem.id in gone else e
            for e in experience.episodes
        )
        if kind == "absent":
            marked = tuple(e for e in marked if not e.masked)
        weighted = Experience(marked, tuple(5.0 * e.masked for e in marked))
        outcome = step(run, weighted)
        steps[kind] = outcome, run.learners["ann"].export()
    (lost, weights), (absent, expected) = steps["lost"], steps["absent"]
    assert lost.accepted and tiny_world.same(weights, expected)
    assert lost.event.pop("masked") == 4 and "masked" not in absent.event
    for outcome in (lost, absent):
        outcome.event.pop("seconds")
    assert lost.event == absent.event and lost.event["ess"] == 8
    # Their weight in the batch does not move.
    assert lost.log_ratio_E[:4].tolist() == [0.0] * 4
    assert torch.equal(lost.log_ratio_E[4:], absent.log_ratio_E)


def test_with_everything_lost_nothing_is_tried(recipe: Path, tmp_path: Path) -> None:
    run, experience = fresh(recipe, tmp_path / "run")
    lost = tuple(replace(e, failure=LOST) for e in experience.episodes)
    before = run.learners["ann"].export()
    outcome = step(run, replace(experience, episodes=lost))
    assert not outcome.accepted and outcome.event["masked"] == 12
    assert tiny_world.same(run.learners["ann"].export(), before)


@pytest.mark.parametrize("entropy", [0.0, 0.01])
def test_a_mini_batch_without_any_advantage_takes_no_optimiser_step(
    recipe: Path, tmp_path: Path, entropy: float
) -> None:
    """Twelve mini-batches of one episode; only one problem's four episodes differ in reward."""
    run, experience = fresh(recipe, tmp_path / "run", f"objective.entropy={entropy}")
    first = experience.episodes[0].problem.id
    episodes = tuple(
        replace(e, grade=Grade(float(e.sample % 2) if e.problem.id == first else 0.5))
        for e in experience.episodes
    )
    settings = replace(run.settings.update, mini_batches=12)
    outcome = improve(
        run.learners["ann"], "ann", replace(experience, episodes=episodes), settings,
        beta=0.1, cap=None, key=KEY,
    )  # fmt: skip
    # An entropy bonus teaches at every episode.
    expected = 12 if entropy else 4
    assert outcome.event["optimizer_steps"] == run.learners["ann"].steps == expected
