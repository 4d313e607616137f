"""A seat given to a newcomer with the incumbent's tokenizer: projected, distilled, measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from satune.agents.learner import LocalLearner
from satune.agents.mixture import MixturePolicy
from satune.commands.assemble import Cast
from satune.commands.reseat import Reseated, with_newcomer, with_policy
from satune.commands.train import optimizer_settings
from satune.files.events import Projection, Round
from satune.play.rollout import rollout_sync
from satune.swap.distill import Distilled, distill
from satune.swap.measurement import measure_projection
from satune.swap.settings import DistillSettings
from satune.types import Episode, Key

PREVIEWED = 64
"""Problems on which it is measured what the projection of a newcomer would be."""
PROBLEMS = 192
"""Problems of a round of distillation, played once each: what a newcomer lacks in the end are
states that it never saw, and samples of one problem visit the same ones."""
MEASURED = 256
"""Problems on which it is measured at last."""
OTHERWISE: dict[str, Literal["mixture", "refused", "outside"]] = {
    "mixture": "mixture",
    "refuse": "refused",
    "handover": "outside",
}
"""What becomes of a newcomer that is drawn to the incumbent and stays outside delta."""


@dataclass(slots=True)
class Counted:
    """Rollouts on training problems, and what they cost."""

    samples: int
    tokens: int = 0

    def of(self, cast: Cast) -> Callable[[Key, int, int], list[Episode]]:
        def draw(key: Key, offset: int, count: int) -> list[Episode]:
            problems = cast.train_problems(count, offset)
            episodes = rollout_sync(cast.match(), problems, self.samples, key, label="projection")
            self.tokens += sum(t.completion_tokens for e in episodes for t in e.turns)
            return episodes

        return draw


def preview(
    base: Reseated,
    reseated: Reseated,
    seat: str,
    *,
    delta: float,
    key: Key,
    offset: int,
) -> tuple[Projection, int]:
    """How the newcomer's projection would lie and lean, on the incumbent's own episodes: the
    alignment score with its standard error, λ, KL; and the tokens that this took."""
    name = reseated.agent_of(seat)
    incumbent = base.cast.team.policies[base.agent_of(seat)]
    newcomer = reseated.cast.team.policies[name]
    taken = with_newcomer(base, seat, reseated.newcomers[name], loaded=newcomer)
    old = with_policy(taken, name, incumbent)
    rollouts = Counted(max(2, base.cast.recipe.rollout.samples))
    episodes = rollouts.of(old.cast)(key, offset, PREVIEWED)
    mixture = MixturePolicy(name, incumbent, newcomer, delta)
    return measure_projection(mixture, name, episodes).to_dict(), rollouts.tokens


def project_seat(
    base: Reseated,
    reseated: Reseated,
    seat: str,
    *,
    delta: float,
    otherwise: str,
    rounds: int,
    key: Key,
    offset: int,
    watch: Callable[[Round], None],
) -> tuple[Reseated | None, Distilled, int]:
    """``base`` with the newcomer in ``seat``, drawn to within ``delta`` of the incumbent; where it
    does not come so near, what ``otherwise`` says: None for a refusal. Also what was measured, and
    the tokens that this took."""
    name = reseated.agent_of(seat)
    newcomer = reseated.cast.team.policies[name]
    incumbent = base.cast.team.policies[base.agent_of(seat)]
    taken = with_newcomer(base, seat, reseated.newcomers[name], loaded=newcomer)
    mixture = MixturePolicy(name, incumbent, newcomer, delta)
    if rounds == 0:
        found = Distilled("mixture", "mixed at decode time, as asked", {"decision": "mixture"})
        return with_policy(taken, name, mixture), found, 0
    student = newcomer.copied(name)
    new = with_policy(taken, name, student)
    old = with_policy(taken, name, incumbent)
    recipe = new.cast.recipe
    optimizer = optimizer_settings(recipe, recipe.team.resolved().agents[name])
    rollouts = Counted(1)
    found = distill(
        name,
        incumbent,
        newcomer,
        LocalLearner(student, optimizer),
        DistillSettings(
            delta=delta,
            quantile=recipe.trust_region.quantile,
            unit=recipe.trust_region.unit,
            otherwise=OTHERWISE[otherwise],
            rounds=rounds,
            problems=PROBLEMS,
            measure_problems=MEASURED,
            seed=key.seed,
            lr=optimizer.lr,
        ),
        draw=rollouts.of(new.cast),
        draw_incumbent=rollouts.of(old.cast),
        publish=lambda version, weights: new.cast.engine.publish(name, version, weights),
        version=new.numbers.of(name, student),
        offset=offset,
        watch=watch,
    )
    new.numbers.give(name, student, found.version)
    if found.decision == "mixture":
        new = with_policy(taken, name, mixture)
    return (None if found.decision == "refused" else new), found, rollouts.tokens
