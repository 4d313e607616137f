"""From a recipe brought to life to a run that is ready to train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from satune.agents.critic import LocalCritic
from satune.agents.learner import LocalLearner
from satune.agents.policy import Policy
from satune.agents.ports import Learner
from satune.agents.pretrained import Precision, load_policies
from satune.agents.specs import OptimizerSettings
from satune.commands.assemble import Cast, model_path
from satune.commands.recipe_digest import RESUMABLE
from satune.commands.trust import remember
from satune.commands.world import AheadWorld, LocalWorld
from satune.config.checks import decisions
from satune.config.derive import Named
from satune.config.load import differences, load_recipe, save_recipe
from satune.config.schema import AgentSection, Recipe
from satune.core.confidence import Spending
from satune.core.settings import ObjectiveSettings
from satune.loading import LAUNCH_VARIABLE, check_options, load_object
from satune.task_parts import is_fresh
from satune.tasks.catalog import draw, take
from satune.team import Team
from satune.training.ahead import Ahead
from satune.training.checkpoint import Checkpoints
from satune.training.credit import load_credit
from satune.training.ledger import Ledger
from satune.training.ordering import load_order
from satune.training.ports import Agents, Host, Watcher
from satune.training.run import Training
from satune.training.run_directory import RunDirectory
from satune.training.schedules import load_schedule
from satune.training.self_check import Tolerance
from satune.training.settings import TrainingSettings, UpdateSettings
from satune.training.state import State
from satune.training.supply import Supply
from satune.types import Problem, Progress, Task, TeamProtocol, UserError


def training_settings(recipe: Recipe) -> TrainingSettings:
    """The recipe's training sections for the loop, with what the user wrote loaded.

    Raises UserError for an objective, schedule, order or credit rule that cannot be loaded.
    """
    agents, rollout = recipe.team.resolved().agents, recipe.rollout
    return TrainingSettings(
        seed=recipe.seed,
        stages=recipe.stages,
        problems=rollout.problems,
        samples=rollout.samples,
        dynamic_sampling=rollout.dynamic_sampling,
        ahead=rollout.ahead,
        update=UpdateSettings(
            objective=load_objective(recipe.objective),
            credit=load_credit(recipe.credit.name, recipe.credit.options),
            trust_region=recipe.trust_region,
            gauge=recipe.gauge,
            epochs=recipe.optimizer.epochs,
            mini_batches=recipe.optimizer.mini_batches,
            max_new_tokens=rollout.max_new_tokens,
        ),
        schedule=load_schedule(recipe.schedule.name, recipe.schedule.options),
        order=load_order(recipe.order.name, recipe.order.options),
        certify=recipe.certify,
        deltas={name: a.delta for name, a in agents.items() if a.delta is not None},
        evaluate_every=recipe.evaluate.every,
        checkpoint=recipe.checkpoint,
    )


def load_objective(settings: ObjectiveSettings) -> ObjectiveSettings:
    """The settings with the function that they name, where that is the user's own."""
    if ":" not in settings.name:
        return settings
    loss = load_object(settings.name)
    check_options(f"objective {settings.name}", loss, settings.options, skip=1)
    return replace(settings, loss=loss)


def declared_decisions(recipe: Recipe) -> int | None:
    """Over how many tests the run splits its confidence; None: without end."""
    declared = recipe.certify.decisions
    if declared == "open":
        return None
    return decisions(recipe) if declared == "auto" else declared


def optimizer_settings(recipe: Recipe, agent: AgentSection) -> OptimizerSettings:
    """The recipe's optimiser with the agent's own rate, if it has one."""
    return replace(recipe.optimizer, lr=agent.learning_rate or recipe.optimizer.lr)


def local_parts(
    cast: Cast, directory: RunDirectory
) -> tuple[dict[str, Learner | Host], LocalWorld]:
    """Learners over the models that the engine has, the hosts of agents that live elsewhere, and
    the world that they are played in."""
    recipe, policies, scratch = cast.recipe, cast.team.policies, directory.path / "optimizers"
    critics = make_critics(recipe, cast.team, cast.protocol, scratch, cast.progress)
    learners: dict[str, Learner | Host] = {
        name: cast.hosts[name]
        if name in cast.hosts
        else learner_of(recipe, policies[name], name, scratch, critics.get(name))
        for name in recipe.team.resolved().agents
        if name in cast.hosts or name in policies
    }
    world = AheadWorld if recipe.rollout.ahead else LocalWorld
    return learners, world(cast, directory, critics)


Parts = Callable[[Cast, RunDirectory], tuple[Agents, LocalWorld]]


def start_training(
    cast: Cast, directory: RunDirectory, watch: Watcher, parts: Parts = local_parts
) -> Training:
    """A training run over a cast, in a directory that was started; ``parts`` makes its learners and
    its world."""
    recipe = cast.recipe
    settings = training_settings(recipe)
    if settings.certify.problems:
        # A task without problems for certificates is told now, not after the first step.
        check_held_out(cast.task)
    learners, world = parts(cast, directory)
    remember(recipe.model_dump(mode="json"))
    return Training(
        settings=settings,
        learners=learners,
        seats={name: cast.team.seats_of(name) for name in learners},
        supply=Supply(world.draw, settings),
        world=world,
        directory=directory,
        store=Checkpoints(directory.checkpoints, recipe.checkpoint.keep),
        ledger=Ledger(directory.certify),
        state=State.beginning(
            list(learners),
            recipe.trust_region.beta,
            Spending(recipe.certify.confidence, declared_decisions(recipe)),
        ),
        watch=watch,
        recipe=recipe.model_dump(mode="json"),
        save_recipe=lambda: save_recipe(recipe, directory.recipe),
        ahead=Ahead(world if isinstance(world, AheadWorld) else None),
        evaluates_greedy=recipe.evaluate.greedy,
        progress=cast.progress,
    )


def learner_of(
    recipe: Recipe, policy: Policy, agent: str, scratch: Path, critic: LocalCritic | None
) -> LocalLearner:
    """The learner of an agent over its policy, whose moments rest in ``scratch`` where they rest on
    the disk."""
    section = recipe.team.resolved().agents[agent]
    return LocalLearner(
        policy,
        optimizer_settings(recipe, section),
        frozen=section.frozen,
        scratch=scratch,
        critic=critic,
    )


def make_critics(
    recipe: Recipe, team: Team, protocol: TeamProtocol, scratch: Path, progress: Progress
) -> dict[str, LocalCritic]:
    """The critic of each agent that learns, where the recipe has critics. Their moments rest in
    ``scratch`` where the agents' do. Raises UserError for a model that cannot be loaded, or that
    reads other tokens than the agent."""
    settings = recipe.critic
    sections = recipe.team.resolved().agents
    critics = {}
    for name, policy in team.policies.items():
        if settings.kind == "none" or sections[name].frozen:
            continue
        states = policy
        if settings.kind == "model":
            states = _value_model(recipe, team, protocol, name, progress)
        optimizer = optimizer_settings(recipe, sections[name])
        file = scratch / f"{name}.critic.safetensors"
        critics[name] = LocalCritic(states, settings, optimizer, file)
    return critics


def _value_model(
    recipe: Recipe, team: Team, protocol: TeamProtocol, agent: str, progress: Progress
) -> Policy:
    """The model that an agent's critic has to itself, all of it to be trained."""
    spec = team.specs[agent]
    model = spec.model
    if recipe.critic.model is not None:
        resolved = recipe.team.resolved()
        section = resolved.agents[agent].model_copy(update={"model": recipe.critic.model})
        model = model_path(section, recipe, protocol, resolved.seats, progress)
    precision = Precision.of(recipe.team.dtype, recipe.optimizer.autocast)
    spec = replace(spec, name=f"critic of {agent}", model=model, lora=None)
    found = load_policies(
        [spec], shared_base=False, precision=precision, device=recipe.team.device, seed=recipe.seed
    )[spec.name]
    if found.tokenizer.get_vocab() != team.policies[agent].tokenizer.get_vocab():
        raise UserError(
            f"critic.model: {recipe.critic.model} and agent {agent} have different tokenizers; a"
            " critic reads the agent's tokens: give a model of its family"
        )
    return found


def check_held_out(task: Task) -> None:
    """Problems that teach make every certificate worthless. Raises UserError where the split
    "certify" is empty, or is "train" by another name."""

    def content(problems: Iterable[Problem]) -> list[str]:
        return [repr((p.text, p.answer, p.metadata)) for p in problems]

    first = draw(task, "certify", 16)
    if is_fresh(task):
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


def _launched(recipe: Recipe) -> bool:
    """Whether ``satune launch`` keeps agents of this recipe in hosts of its own."""
    return any(a.host_token_env == LAUNCH_VARIABLE for a in recipe.team.agents.values())


def check_recipe_unchanged(
    directory: RunDirectory, recipe: Recipe, recorded: Mapping[str, Any] | None = None
) -> None:
    """A resumed run goes on under the recipe it was started with, but for ``RESUMABLE``.

    ``recorded`` is the recipe that the checkpoint was made under, as plain values: what somebody
    has edited in the run's own file is held against it like an override. Without a checkpoint the
    file is what there is. Raises UserError naming the first key that differs.
    """
    if recorded is not None:
        try:
            held = Recipe.model_validate(recorded)
        except ValidationError as error:
            key = ".".join(map(str, error.errors()[0]["loc"]))
            raise UserError(
                f"{directory.path}: another satune trained it (its recipe has {key}); go on with "
                "that one"
            ) from None
    elif directory.recipe.is_file():
        held = load_recipe(directory.recipe, alone=True)
    else:
        return
    changed = [key for key in differences(held, recipe) if not _may_change(key, held, recipe)]
    if changed and changed[0].endswith(".host") and _launched(held) != _launched(recipe):
        started = "`satune launch --hosts N`" if _launched(held) else "no `--hosts`"
        raise UserError(
            f"{directory.path}: the run was started with {started}, and goes on with that alone"
        )
    if changed:
        raise UserError(
            f"{directory.path}: the run was started with another recipe ({changed[0]}), and "
            "that decides what comes out; resume with the same recipe and overrides, or with its "
            f"own, {directory.recipe} as it was written (docs/recipe.md lists what may change)"
        )


def _may_change(key: str, held: Recipe, now: Recipe) -> bool:
    parts = key.split(".")
    for pattern, mark in RESUMABLE.items():
        named = pattern.split(".")
        if len(parts) < len(named):
            continue
        if all(a in (b, "NAME") for a, b in zip(named, parts, strict=False)):
            return mark.allows(*(_value(each, parts[: len(named)]) for each in (held, now)))
    return False


def _value(recipe: Any, parts: Sequence[str]) -> Any:
    """The value of a dotted key of a recipe; None where there is none."""
    for part in parts:
        section = recipe.options if isinstance(recipe, Named) else recipe
        recipe = section.get(part) if isinstance(section, Mapping) else getattr(section, part, None)
    return recipe


def tolerance_of(recipe: Recipe) -> Tolerance:
    """What engine and learner may differ by: rounding of the compute type."""
    computed = recipe.optimizer.autocast or recipe.team.dtype
    if computed == "bfloat16":
        return Tolerance(mean=0.05, largest=2.0)
    if computed == "float16":
        return Tolerance(mean=0.01, largest=0.5)
    if recipe.team.dtype == "float64":
        return Tolerance(mean=1e-6, largest=1e-5)
    return Tolerance(mean=1e-4, largest=1e-3)
