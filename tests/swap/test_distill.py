"""Distillation end to end: a larger newcomer comes into the incumbent's region, or does not."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from satune.agents.learner import LocalLearner
from satune.agents.mixture import MixturePolicy
from satune.agents.policy import Policy
from satune.agents.ports import NonFinite
from satune.agents.specs import OptimizerSettings
from satune.core.divergence import DivergenceStatistics
from satune.core.logprobs import exact_kl
from satune.core.projection import alignment_terms
from satune.engines.local import LocalEngine
from satune.files.events import Distillation
from satune.swap.distill import (
    Distilled,
    _judge,
    _teach,
    distill,
)
from satune.swap.measurement import measure_projection
from satune.swap.settings import DistillSettings
from satune.training.update import own_turns
from satune.types import Completion, Episode, Grade, Key, Problem, Prompt, Sampling, Turn, ids_of
from tiny_models import Alphabet, next_token_logprobs, tiny_lm

SETTINGS = DistillSettings(
    delta=0.1,
    quantile=0.95,
    aim=0.4,
    rounds=100,
    problems=24,
    measure_problems=60,
    lr=3e-3,
)


def learner(
    student: Policy, tokens: int = 16384, kind: type[LocalLearner] = LocalLearner
) -> LocalLearner:
    """Its own learning rate is none that anybody would learn with: each step is given one."""
    return kind(student, OptimizerSettings(lr=1e6, weight_decay=0.0, micro_batch_tokens=tokens))


def policies(dtype: torch.dtype = torch.float32) -> tuple[Policy, Policy, Policy]:
    """Bob, who speaks first; the incumbent ann; a newcomer more than twice her size, who knows
    what she knows but has drifted: her weights and noise, and two layers of his own."""
    bob = Policy("bob", tiny_lm("qwen3", seed=9, dtype=dtype, layers=1), Alphabet(), 1.0)
    old = tiny_lm("qwen3", seed=1, dtype=dtype, layers=1, initializer_range=0.3)
    new = tiny_lm("qwen3", seed=2, dtype=dtype, layers=3, initializer_range=0.3)
    hers, generator = dict(old.named_parameters()), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if name in hers:
                noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
                parameter.copy_(hers[name] + 0.06 * noise)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.2)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (old, new)]
    assert sizes[1] > 2 * sizes[0]
    return bob, Policy("ann", old, Alphabet(), 0.8), Policy("new", new, Alphabet(), 1.1)


class Stage:
    """Bob writes two letters, ann answers with up to four; six problems, over and over."""

    def __init__(self, bob: Policy, ann: Policy) -> None:
        self.bob, self.ann = bob, ann
        self.engine = LocalEngine({"bob": bob, "ann": ann}, {"bob": "bob", "ann": "ann"})

    def publish(self, version: int, weights: Mapping[str, Tensor]) -> None:
        self.engine.publish("ann", version, weights)

    def draw(self, key: Key, offset: int, count: int) -> list[Episode]:
        async def one(own: Key, prompt: tuple[int, ...]) -> Episode:
            turns: list[Turn] = []
            ids = prompt
            for seat, tokens, temperature in (("bob", 2, 1.0), ("ann", 4, self.ann.temperature)):
                sampling = Sampling(tokens, temperature=temperature)
                said = await self.engine.generate(
                    seat, Prompt((), ids_of(ids)), sampling, own.at(seat=seat)
                )
                turns.append(_turn(seat, len(turns), ids, said))
                ids = (*ids, *(said.ids or ()), 2)
            self.engine.end(own)
            reward = float(sum(turns[1].completion_ids or ()) % 7) / 6
            return Episode(
                Problem.of(own.problem, ""), own.sample, tuple(turns), None, Grade(reward)
            )

        async def every() -> list[Episode]:
            keys = [
                (key.at(problem=f"p{n:04d}", sample=sample), (1 + n % 6, 7))
                for n in range(offset, offset + count)
                for sample in range(2)
            ]
            for own, _ in keys:
                self.engine.begin(own)
            return await asyncio.gather(*(one(*each) for each in keys))

        return asyncio.run(asyncio.wait_for(every(), 600))


def _turn(seat: str, moment: int, ids: tuple[int, ...], said: Completion) -> Turn:
    return Turn(
        seat=seat,
        agent=seat,
        moment=moment,
        own_index=0,
        text=said.text,
        finish_reason=said.finish_reason,
        version=said.version,
        prompt_ids=ids_of(ids),
        completion_ids=said.ids,
        sampled_logprobs=said.logprobs,
    )


def swapped(
    parts: tuple[Policy, Policy, Policy],
    settings: DistillSettings,
    kind: type[LocalLearner] = LocalLearner,
    **changes: Any,
) -> tuple[Distilled, Policy, list[Episode]]:
    bob, old, new = parts
    student = new.copied("ann")
    here, before = Stage(bob, student), Stage(bob, old)
    done = distill(
        "ann",
        old,
        new,
        learner(student, kind=kind),
        settings,
        **{
            "draw": here.draw,
            "draw_incumbent": before.draw,
            "publish": here.publish,
            **changes,
        },
    )
    return done, student, here.draw(Key(5, "evaluate"), 0, 30)


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.trainable().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def mean_kl(a: Policy, b: Policy, episodes: Sequence[Episode]) -> float:
    """Mean of KL(a‖b) over ann's states, by the whole models."""
    found = []
    for turn in (t for e in episodes for t in e.turns if t.agent == "ann"):
        ids = [*(turn.prompt_ids or ()), *(turn.completion_ids or ())]
        rows = slice(len(turn.prompt_ids or ()) - 1, -1)
        found.append(exact_kl(*(next_token_logprobs(each, ids)[rows] for each in (a, b))))
    return float(torch.cat(found).mean())


@pytest.fixture(scope="module")
def story() -> tuple[Any, ...]:
    parts = policies()
    held = [weights(policy) for policy in parts]
    return parts, held, *swapped(parts, SETTINGS)


def test_the_newcomer_comes_inside(story):
    (_, old, new), _, done, student, episodes = story
    assert done.decision == "distilled", done.reason
    rows, kl = done.event["rounds"], done.event["kl"]
    assert done.event.keys() == Distillation.__annotations__.keys()
    # It began far outside and ended inside, measured on states of either team that taught nothing.
    assert rows[0]["kl"]["quantile"] > 5 * SETTINGS.delta and len(rows) > 5
    inside = [row["kl"]["quantile"] <= SETTINGS.stop * SETTINGS.delta for row in rows]
    assert inside[-3:] == [True] * 3 and not inside[-4] and "grad_norm" not in rows[-1]
    assert max(kl[whose]["quantile"] for whose in ("newcomer", "incumbent")) <= SETTINGS.delta
    assert kl["newcomer"]["problems"] == kl["incumbent"]["problems"] == 60
    assert 0 < done.event["trajectory"]["forward"] < 4 * SETTINGS.delta
    assert 0 < done.event["trajectory"]["reverse"] < 4 * SETTINGS.delta
    # KL to the mixture fell all the way, and the newcomer it came from moved off.
    assert rows[-1]["to_mixture"] < 0.1 * rows[0]["to_mixture"]
    assert rows[0]["to_newcomer"] < 1e-6 < 0.05 < rows[-1]["to_newcomer"]
    # Judged apart from satune's own measurement: inside, and nearer the newcomer than ann was.
    assert mean_kl(student, old, episodes) < 0.6 * SETTINGS.delta
    assert mean_kl(student, new, episodes) < 0.9 * mean_kl(old, new, episodes)


def test_nobody_else_is_touched(story):
    parts, held, done, student, episodes = story
    assert all(same(weights(policy), before) for policy, before in zip(parts, held, strict=True))
    assert not same(weights(student), held[2])
    assert done.event["version"] == sum("grad_norm" in row for row in done.event["rounds"])
    assert {t.version for e in episodes for t in e.turns if t.agent == "ann"} == {
        done.event["version"]
    }


def test_it_is_reproducible(story):
    short = replace(SETTINGS, rounds=4)
    (one, first, _), (two, second, _) = (swapped(policies(), short) for _ in range(2))
    assert one.event["rounds"] == two.event["rounds"]
    # The learning rate's way depends on how many rounds there are, what is played first does not.
    first_of = ("states", "reward", "kl", "to_mixture")
    began, longer = (done.event["rounds"][0] for done in (one, story[2]))
    assert [began[name] for name in first_of] == [longer[name] for name in first_of]
    assert one.event["kl"] == two.event["kl"] and same(weights(first), weights(second))


def test_it_learns_from_what_it_has_just_seen_and_again_from_earlier_rounds(monkeypatch):
    taught: list[Counter[str]] = []
    sizes: list[int] = []
    rates: list[float] = []

    def teach(student: Any, teacher: Any, play: Any, episodes: Any, number: int) -> float:
        taught.append(Counter(f"{e.problem.id}/{e.sample}" for e in episodes))
        return _teach(student, teacher, play, episodes, number)

    class Watched(LocalLearner):
        def distil(self, packed: Any, episodes: Any, mixture: Any) -> float:
            sizes.append(len(episodes))
            return super().distil(packed, episodes, mixture)

        def step(self, rate: float | None = None) -> float:
            assert rate is not None
            rates.append(rate)
            return super().step(rate)

    monkeypatch.setattr("satune.swap.distill._teach", teach)
    settings = replace(
        SETTINGS, rounds=4, problems=5, passes=3, batch=8, warmup=0.25, measure_problems=4
    )
    done, _, _ = swapped(policies(), settings, Watched)
    assert done.decision == "mixture"
    fresh = [
        {f"p{n:04d}/{sample}" for n in range(5 * k, 5 * k + 5) for sample in range(2)}
        for k in range(4)
    ]
    # Ten new ones a round; beside them 2 x 10 earlier ones, or as many as there are.
    assert [sum(each.values()) for each in taught] == [10, 20, 30, 30]
    assert all(max(each.values()) == 1 for each in taught)
    for number, each in enumerate(taught):
        assert fresh[number] <= set(each) <= set().union(*fresh[: number + 1])
    # At most eight a step: 10 in 2, 20 in 3, 30 in 4.
    assert sizes == [5, 5, 6, 7, 7, *[7, 8] * 4]
    # Half a cosine over the four rounds, and its first quarter on the way up.
    steps_of = (2, 3, 4, 4)
    shares = [(k + n / of) / 4 for k, of in enumerate(steps_of) for n in range(1, of + 1)]
    expected = [
        3e-3 * min(1.0, 4 * share) * (1 + math.cos(math.pi * share)) / 2 for share in shares
    ]
    assert rates == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("otherwise", ["mixture", "refused"])
def test_a_student_outside_is_not_taken(otherwise):
    parts = policies()
    done, student, episodes = swapped(parts, replace(SETTINGS, rounds=1, otherwise=otherwise))
    assert done.decision == otherwise and "above delta 0.1" in done.reason
    # The newcomer's weights again, and the engine has been told.
    assert same(weights(student), weights(parts[2]))
    assert {t.version for e in episodes for t in e.turns if t.agent == "ann"} == {2}
    assert done.event["kl"]["newcomer"]["violation_ucb"] > 0.5


@pytest.mark.parametrize(
    ("newcomer", "incumbent", "decision"),
    [
        (0.05, 0.1, "distilled"),
        (0.05, 0.11, "mixture"),  # outside on the states of one team alone
        (0.11, 0.05, "mixture"),
        (0.05, math.nan, "refused"),
        (math.inf, 0.05, "refused"),
    ],
)
def test_both_teams_states_have_to_be_inside(story, newcomer, incumbent, decision):
    some = DivergenceStatistics(**story[2].event["kl"]["newcomer"])
    found = {
        "newcomer": replace(some, quantile=newcomer),
        "incumbent": replace(some, quantile=incumbent),
    }
    assert _judge(found, SETTINGS)[0] == decision


def test_a_newcomer_inside_is_taken_as_it_is():
    bob, old, _ = policies()
    near = old.copied("new")
    with torch.no_grad():
        for parameter in near.trainable().values():
            parameter.mul_(1.001)
    done, student, _ = swapped((bob, old, near), SETTINGS)
    assert done.decision == "distilled" and len(done.event["rounds"]) == SETTINGS.confirm
    assert done.event["version"] == 0
    assert same(weights(student), weights(near))


def test_what_is_not_finite_is_refused():
    parts = policies()
    settings = replace(SETTINGS, lr=math.inf)
    done, student, _ = swapped(parts, settings)
    assert done.decision == "refused" and done.reason == "the student's logits are not finite"
    assert "kl" not in done.event and same(weights(student), weights(parts[2]))
    student = parts[2].copied("ann")
    with torch.no_grad():
        next(iter(parts[2].trainable().values()))[:] = math.nan
    with pytest.raises(NonFinite, match="the newcomer's logits are not finite"):
        mixture = MixturePolicy("ann", parts[1], parts[2], 0.1)
        packed = own_turns("ann", Stage(*parts[:2]).draw(Key(1, "swap"), 0, 2))
        learner(student).distances(packed, mixture)


def test_old_weights_in_the_engine_stop_it():
    with pytest.raises(RuntimeError, match="not given the new weights"):
        swapped(policies(), SETTINGS, publish=lambda version, weights: None)


@pytest.mark.parametrize(
    ("key", "value"), [("delta", 0.0), ("aim", 0.0), ("stop", 1.5), ("rounds", 0), ("quantile", 2)]
)
def test_settings_out_of_range(key, value):
    with pytest.raises(ValueError, match=rf"distill\.{key}"):
        replace(SETTINGS, **{key: value})


# -- measurement ----------------------------------------------------------------------------------


def test_measurement_is_that_of_the_whole_models():
    bob, old, new = policies(torch.float64)
    mixture = MixturePolicy("ann", old, new, 0.1)
    student = Policy("ann", tiny_lm("llama", seed=4, layers=1), Alphabet(), 0.7)
    episodes = Stage(bob, old).draw(Key(1, "swap"), 0, 5)
    packed = own_turns("ann", episodes)
    # A few tokens at a time: what comes back is in the order of the experience all the same.
    found = learner(student, 20).distances(packed, mixture)
    examined = measure_projection(mixture, "ann", episodes, tokens=20)
    at = 0
    for episode in episodes:
        turn = episode.turns[1]
        ids = [*(turn.prompt_ids or ()), *(turn.completion_ids or ())]
        rows = slice(len(turn.prompt_ids or ()) - 1, -1)
        end = at + len(turn.completion_ids or ())
        p_NV, q_NV, own_NV = (next_token_logprobs(m, ids)[rows] for m in (old, new, student))
        mixed_NV = mixture.project(mixture.hidden(torch.tensor([ids]))[0])[rows] / 0.8
        for column_T, pair in (
            (found.to_incumbent_T, (own_NV, p_NV)),
            (found.from_incumbent_T, (p_NV, own_NV)),
            (found.to_mixture_T, (own_NV, mixed_NV)),
            (found.to_newcomer_T, (own_NV, q_NV)),
            (examined.newcomer_kl_T, (q_NV, p_NV)),
            (examined.projection.kl_N, (mixed_NV, p_NV)),
            (examined.projection.reverse_kl_N, (p_NV, mixed_NV)),
        ):
            assert torch.allclose(column_T[at:end], exact_kl(*pair), rtol=1e-5, atol=1e-9)
        at = end
    assert at == packed.tokens


def test_the_projection_measured_says_which_way_the_newcomer_leans():
    bob, old, new = policies(torch.float64)
    mixture = MixturePolicy("ann", old, new, 0.1)
    drawn = Stage(bob, old).draw(Key(1, "swap"), 0, 40)

    def liking(sign: float) -> list[Episode]:
        """Rewards for what the newcomer likes more than ann does, or less."""
        rewarded = []
        for episode in drawn:
            turn = episode.turns[1]
            ids = [*(turn.prompt_ids or ()), *(turn.completion_ids or ())]
            rows = slice(len(turn.prompt_ids or ()) - 1, -1)
            p_NV, q_NV = (next_token_logprobs(m, ids)[rows] for m in (old, new))
            terms = alignment_terms(p_NV, q_NV, torch.tensor(turn.completion_ids), 0.1)
            share = float(torch.sigmoid(sign * terms.sum()))
            rewarded.append(replace(episode, grade=Grade(share)))
        return rewarded

    for sign in (1.0, -1.0):
        figures = measure_projection(mixture, "ann", liking(sign)).to_dict()
        score = figures["alignment"]
        assert sign * score["score"] > 3 * score["standard_error"] > 0
        assert score["problems"] == 40
    assert figures["kl"]["high"] <= 0.1 < figures["newcomer_kl"]["high"]
    assert 0 < figures["lambda"]["low"] < figures["lambda"]["high"] <= 1
    assert figures["infeasible"] == 0 and 0 <= figures["inside"] < 0.5
    alone = [episode for episode in drawn if episode.sample == 0]
    assert "alignment" not in measure_projection(mixture, "ann", alone).to_dict()
    with pytest.raises(ValueError, match="wrote nothing"):
        measure_projection(mixture, "nobody", drawn)
