"""From a recipe brought to life to a run that is ready to train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from satune.agents.learner import LocalLearner, OptimizerSettings
from satune.commands.assemble import Cast
from satune.config.checks import decisions
from satune.config.load import differences, load_recipe, save_recipe
from satune.config.schema import AgentSection, Recipe
from satune.core.confidence import Spending
from satune.core.objectives import ObjectiveSettings
from satune.core.trust_region import TrustRegionSettings
from satune.loading import served
from satune.play.evaluation import progress_of
from satune.play.rollout import rollout_sync
from satune.play.rows import episode_from_row, episode_to_row
from satune.tasks.catalog import draw, take
from satune.training.checkpoint import Checkpoints
from satune.training.ports import Watcher
from satune.training.run import Training
from satune.training.run_directory import RunDirectory
from satune.training.schedules import Supply
from satune.training.self_check import Tolerance
from satune.training.settings import (
    AdvantageSettings,
    CertifySettings,
    ScheduleSettings,
    TrainingSettings,
    UpdateSettings,
)
from satune.training.state import State
from satune.types import Episode, Key, Problem, Task, UserError


def training_settings(recipe: Recipe) -> TrainingSettings:
    """The recipe's training sections in the loop's own terms."""
    objective, region = recipe.objective, recipe.trust_region
    low, high = objective.clips or (0.2, 0.2)
    update = UpdateSettings(
        objective=ObjectiveSettings(
            objective.name,
            clip_low=low,
            clip_high=high,
            reference_kl=objective.reference_kl,
            entropy=objective.entropy,
        ),
        advantage=AdvantageSettings(
            baseline=objective.baseline,
            normalise=objective.normalise,
            clip=objective.advantage_clip,
            dynamic_sampling=getattr(objective, "dynamic_sampling", False),
            overlong_buffer=getattr(objective, "overlong_buffer", 0),
        ),
        trust_region=TrustRegionSettings(**region.model_dump()),
        epochs=recipe.optimizer.epochs,
        mini_batches=recipe.optimizer.mini_batches,
        max_new_tokens=recipe.rollout.max_new_tokens,
    )
    agents = recipe.team.resolved().agents
    return TrainingSettings(
        seed=recipe.seed,
        stages=recipe.stages,
        problems=recipe.rollout.problems,
        samples=recipe.rollout.samples,
        update=update,
        schedule=ScheduleSettings(**recipe.schedule.model_dump()),
        order=recipe.order,
        certify=certify_settings(recipe),
        deltas={name: a.delta for name, a in agents.items() if a.delta is not None},
        evaluate_every=recipe.evaluate.every,
        checkpoint_steps=recipe.checkpoint.every == "step",
        keep_checkpoints=recipe.checkpoint.keep,
    )


def certify_settings(recipe: Recipe) -> CertifySettings:
    declared = recipe.certify.decisions
    count = {"open": None, "auto": decisions(recipe)}.get(str(declared), declared)
    return CertifySettings(**{**recipe.certify.model_dump(), "decisions": count})


def optimizer_settings(recipe: Recipe, agent: AgentSection) -> OptimizerSettings:
    section = recipe.optimizer
    return OptimizerSettings(
        lr=agent.learning_rate or section.lr,
        weight_decay=section.weight_decay,
        betas=section.betas,
        eps=section.eps,
        warmup_steps=section.warmup_steps,
        max_grad_norm=section.max_grad_norm,
        micro_batch_tokens=section.micro_batch_tokens,
        gradient_checkpointing=section.gradient_checkpointing,
        offload=section.offload,
    )


class LocalWorld:
    """What training needs done outside its room, over a cast in this process."""

    def __init__(self, cast: Cast, directory: RunDirectory) -> None:
        self.cast = cast
        self.directory = directory

    def draw(self, key: Key, offset: int, count: int) -> list[Episode]:
        problems = self.cast.train_problems(count, offset)
        return rollout_sync(self.cast.match(), problems, self.cast.recipe.rollout.samples, key)

    def publish(self, agent: str, version: int, weights: Mapping[str, Tensor]) -> None:
        self.cast.engine.publish(agent, version, weights)

    def evaluate(self, *, greedy: bool, before: Sequence[float] | None) -> dict[str, Any]:
        # The same key each time: the same problems and the same uniforms.
        key = Key(self.cast.recipe.seed, "evaluate", draw=int(greedy))
        return progress_of(self.cast.evaluate(greedy=greedy, key=key), before)

    @property
    def certifies(self) -> Literal["fresh", "finite"]:
        return "fresh" if getattr(self.cast.task, "fresh", False) else "finite"

    def certify(self, key: Key, offset: int, problems: int, samples: int) -> list[Episode]:
        drawn = draw(self.cast.task, "certify", problems, offset)
        return rollout_sync(self.cast.match(), drawn, samples, key, label="certificate")

    def to_row(self, episode: Episode) -> dict[str, Any]:
        return episode_to_row(episode)

    def from_row(self, row: Mapping[str, Any]) -> Episode:
        return episode_from_row(row)

    def save_team(self) -> None:
        self.cast.team.save(self.directory.team)


def start_training(cast: Cast, directory: RunDirectory, watch: Watcher) -> Training:
    """A training run over a cast, in a directory that was started."""
    recipe = cast.recipe
    settings = training_settings(recipe)
    save_recipe(recipe, directory.recipe)
    world = LocalWorld(cast, directory)
    if settings.certify.problems:
        # A task without problems for certificates is told now, not after the first step.
        check_held_out(cast.task)
    resolved = recipe.team.resolved()
    learners = {
        name: LocalLearner(
            policy,
            optimizer_settings(recipe, resolved.agents[name]),
            frozen=resolved.agents[name].frozen,
            scratch=directory.path / "optimizers",
        )
        for name, policy in cast.team.policies.items()
    }
    return Training(
        settings=settings,
        learners=learners,
        seats={name: cast.team.seats_of(name) for name in learners},
        supply=Supply(world.draw, settings),
        world=world,
        directory=directory,
        store=Checkpoints(directory.checkpoints, recipe.checkpoint.keep),
        state=State.beginning(
            list(learners),
            recipe.trust_region.beta,
            Spending(settings.certify.confidence, settings.certify.decisions),
        ),
        watch=watch,
        evaluates_greedy=recipe.evaluate.greedy,
    )


def check_held_out(task: Task) -> None:
    """Problems that teach make every certificate worthless. Raises UserError where the split
    "certify" is empty, or is "train" by another name."""

    def content(problems: Iterable[Problem]) -> list[str]:
        return [repr((p.text, p.answer, p.metadata)) for p in problems]

    first = draw(task, "certify", 16)
    if getattr(task, "fresh", False):
        taught = content(take(task, "train", len(first)))
        same = content(first) == taught
    else:
        taught = content(task.problems("train"))
        same = set(content(task.problems("certify"))) <= set(taught)
    # Games may differ in their random numbers alone; then nothing can be told from the problems.
    if same and len(set(taught)) > 1:
        raise UserError(
            f"task {task.name}: its problems for certificates are those it trains on; "
            "give problems(split) other ones for 'certify' than for 'train'"
        )


RESUMABLE = ("stages", "team.agents.NAME.server", "team.agents.NAME.model")
"""The keys that may be changed when a run is resumed; of the last the address of a served model
alone."""


def check_recipe_unchanged(directory: RunDirectory, recipe: Recipe) -> None:
    """A resumed run goes on under the recipe it was started with, but for ``RESUMABLE``.

    Raises UserError naming the first key that differs.
    """
    if not directory.recipe.is_file():
        return
    held = load_recipe(directory.recipe)
    changed = [key for key in differences(held, recipe) if not _may_change(key, held, recipe)]
    if changed:
        raise UserError(
            f"{directory.recipe}: the run was started with another recipe ({changed[0]}); resume "
            "with the same recipe and overrides, or with this file; only stages and where and how "
            "served models are asked may change"
        )


def _may_change(key: str, held: Recipe, now: Recipe) -> bool:
    match key.split("."):
        case ["stages"] | ["team", "agents", _, "server", *_]:
            return True
        case ["team", "agents", name, "model"]:
            before, after = (served(each.team.agents[name].model) for each in (held, now))
            return before is not None and after is not None and before[1] == after[1]
    return False


def tolerance_of(recipe: Recipe) -> Tolerance:
    """What engine and learner may differ by: rounding of the compute type."""
    if recipe.team.dtype == "bfloat16" or recipe.optimizer.autocast:
        return Tolerance(mean=0.05, largest=2.0)
    if recipe.team.dtype == "float64":
        return Tolerance(mean=1e-6, largest=1e-5)
    return Tolerance(mean=1e-4, largest=1e-3)
