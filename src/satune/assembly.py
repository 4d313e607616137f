"""From a recipe to the things it names: task, protocol, team, engine, and a run ready to train."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from satune.agents.learner import LocalLearner, OptimizerSettings
from satune.agents.loading import AgentSpec, LoraSpec
from satune.agents.policy import Policy
from satune.agents.rendering import TemplateSettings
from satune.agents.tiny_training import TinySettings
from satune.agents.zoo import is_tiny, tiny_directory
from satune.config.checks import decisions
from satune.config.load import differences, load_recipe, save_recipe
from satune.config.schema import AgentSection, Recipe
from satune.core.confidence import Spending
from satune.core.objectives import ObjectiveSettings
from satune.core.trust_region import TrustRegionSettings
from satune.demonstrations import demonstrate
from satune.engines.local import LocalEngine
from satune.evaluation import Evaluation, evaluate, mean_estimate
from satune.protocols.catalog import load_protocol
from satune.rollout import episode_from_row, episode_to_row, rollout_sync
from satune.tasks.catalog import draw, load_task, take
from satune.team import Team, build_team
from satune.training.certification import CertifyState
from satune.training.checkpoint import Checkpoints, tensor_errors
from satune.training.run import State, Training, Watcher
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
from satune.types import Episode, Key, Problem, Task, TeamProtocol, UserError

Progress = Callable[[int, int, str], None]
"""(done, of how many, of what), called while something long goes on."""

DEFAULT_CACHE_TOKENS = 1 << 20
GATE_PROBLEMS = 128
"""Problems on which a tiny base must reach its greedy success."""


def no_progress(done: int, total: int, message: str) -> None: ...


@dataclass(slots=True)
class Cast:
    """A recipe brought to life: everything that rollouts need."""

    recipe: Recipe
    task: Task
    held_out: tuple[Task, str]
    protocol: TeamProtocol
    team: Team
    engine: LocalEngine
    progress: Progress = no_progress

    def train_problems(self, count: int, offset: int) -> list[Problem]:
        return take(self.task, "train", count, offset)

    def held_out_problems(self, count: int) -> list[Problem]:
        task, split = self.held_out
        if not getattr(task, "fresh", False):
            count = min(count, len(list(task.problems(split))))
        return take(task, split, count, 0)

    def evaluate(self, *, greedy: bool, key: Key) -> Evaluation:
        """The team on the recipe's held-out problems, the same ones each time."""
        settings = self.recipe.evaluate
        sampling = {"temperature": 0.0} if greedy else {}
        return evaluate(
            self.held_out_problems(settings.problems),
            1 if greedy else settings.samples,
            key,
            seats=self.team.seats_for(self.recipe.rollout.max_new_tokens, **sampling),
            protocol=self.protocol,
            engine=self.engine,
            task=self.held_out[0],
            progress=lambda done, total: self.progress(done, total, "evaluation"),
        )


def load_tasks(recipe: Recipe) -> tuple[Task, tuple[Task, str]]:
    """The training task, and the task and split that evaluations use."""
    section = recipe.task
    task = load_task(section.name, section.data, recipe.seed, None, **section.options)
    if recipe.evaluate.data is None:
        return task, (task, "eval")
    held_out = load_task(section.name, recipe.evaluate.data, recipe.seed, None, **section.options)
    return task, (held_out, "all")


def assemble(recipe: Recipe, progress: Progress = no_progress) -> Cast:
    """Load or build everything a recipe names. Raises UserError for whatever cannot be had."""
    resolved = recipe.team.resolved()
    task, held_out = load_tasks(recipe)
    protocol = load_protocol(
        recipe.protocol.name, list(resolved.seats), None, **recipe.protocol.options
    )
    specs = [
        AgentSpec(
            name=name,
            model=model_path(agent, recipe, protocol, resolved.seats, progress),
            temperature=agent.temperature,
            template=TemplateSettings(**agent.template.model_dump()),
            lora=lora_spec(agent),
            delta=agent.delta,
            trust_remote_code=agent.trust_remote_code,
        )
        for name, agent in resolved.agents.items()
    ]
    team = build_team(
        specs,
        resolved.seats,
        sharing=recipe.team.sharing,
        dtype=recipe.team.dtype,
        autocast=recipe.optimizer.autocast,
        device=recipe.team.device,
        seed=recipe.seed,
        protocol=recipe.protocol.model_dump(),
        task=recipe.task.model_dump(),
    )
    engine = local_engine(team.policies, team.seats, recipe)
    return Cast(recipe, task, held_out, protocol, team, engine, progress)


def local_engine(
    policies: Mapping[str, Policy], seats: Mapping[str, str], recipe: Recipe
) -> LocalEngine:
    return LocalEngine(
        policies,
        seats,
        max_rows=recipe.engine.max_rows,
        cache_tokens=recipe.engine.cache_tokens or DEFAULT_CACHE_TOKENS,
    )


def lora_spec(agent: AgentSection) -> LoraSpec | None:
    if agent.lora is None:
        return None
    targets = agent.lora.targets
    return LoraSpec(
        agent.lora.rank, agent.lora.alpha, None if targets == ("all-linear",) else targets
    )


def model_path(
    agent: AgentSection,
    recipe: Recipe,
    protocol: TeamProtocol,
    seats: Mapping[str, str],
    progress: Progress,
) -> str:
    """The agent's model; a tiny one is taught first, by this recipe's task and protocol.

    Its problems follow ``tiny.seed``, not the run's seed, and its gate never looks at
    ``evaluate.data``: a base depends on nothing that its fingerprint leaves out.
    """
    if not is_tiny(agent.model):
        return agent.model
    template = TemplateSettings(**agent.template.model_dump())
    settings = TinySettings(**recipe.tiny.model_dump())
    section = recipe.task
    task = load_task(section.name, section.data, settings.seed, None, **section.options)
    held_out = (task, "eval" if recipe.evaluate.data is None else "train")
    evaluation = recipe.evaluate.model_copy(update={"problems": GATE_PROBLEMS})
    taught = recipe.model_copy(update={"evaluate": evaluation})
    cache = Path(recipe.team.cache) if recipe.team.cache else None

    def greedy_success(model: Any, tokenizer: Any) -> float:
        policy = Policy("base", model, tokenizer, 1.0)
        alone = Team(
            {"base": policy}, {"base": AgentSpec("base", "", template=template)},
            dict.fromkeys(seats, "base"),
        )  # fmt: skip
        engine = local_engine({"base": policy}, alone.seats, recipe)
        cast = Cast(taught, task, held_out, protocol, alone, engine)
        return cast.evaluate(greedy=True, key=Key(recipe.tiny.seed, "demonstrate")).avg_at_k

    with tensor_errors(cache or Path.home() / ".cache"):
        directory = tiny_directory(
            agent.model,
            settings,
            json.dumps(
                {
                    "task": {**section.model_dump(), "data": _identity(section.data)},
                    "gate": held_out[1],
                    "protocol": recipe.protocol.model_dump(),
                    "seats": len(seats),
                    "max_new_tokens": recipe.rollout.max_new_tokens,
                },
                sort_keys=True,
            ),
            lambda count, seed: demonstrate(
                task,
                protocol,
                list(seats),
                lambda problems: take(task, "train", problems, 0),
                count,
                settings.error,
                seed,
            ),
            template=template,
            held_out_success=greedy_success,
            cache=cache,
            progress=lambda done, total, what: progress(done, total, f"{agent.model}: {what}"),
        )
    return str(directory)


def _identity(data: str | None) -> str | None:
    """A file by its content, wherever it lies; anything else by its name."""
    if data is None or not Path(data).is_file():
        return data
    return hashlib.blake2b(Path(data).read_bytes(), digest_size=16).hexdigest()


# -- training ------------------------------------------------------------------------------------


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
        cast = self.cast
        return rollout_sync(
            cast.train_problems(count, offset),
            cast.recipe.rollout.samples,
            key,
            seats=cast.team.seats_for(cast.recipe.rollout.max_new_tokens),
            protocol=cast.protocol,
            engine=cast.engine,
            task=cast.task,
            progress=lambda done, total: cast.progress(done, total, "rollout"),
        )

    def publish(self, agent: str, version: int) -> None:
        self.cast.engine.publish(agent, version)

    def evaluate(self, *, greedy: bool, before: Sequence[float] | None) -> dict[str, Any]:
        # The same key each time: the same problems and the same uniforms.
        key = Key(self.cast.recipe.seed, "evaluate", draw=int(greedy))
        found = self.cast.evaluate(greedy=greedy, key=key)
        figures: dict[str, Any] = {
            "reward": found.avg_at_k,
            "interval": list(found.interval) if found.interval else None,
            "problems": len(found.problem_ids),
            "samples": found.samples,
            "per_problem": [sum(scores) / len(scores) for scores in found.scores_PK],
            "tokens": found.tokens,
        }
        if before is not None:
            changes = [new - old for new, old in zip(figures["per_problem"], before, strict=True)]
            gain = mean_estimate(changes, -1.0, 1.0)
            figures["difference"] = [gain.mean, gain.low, gain.high]
        return figures

    @property
    def certifies(self) -> Literal["fresh", "finite"]:
        return "fresh" if getattr(self.cast.task, "fresh", False) else "finite"

    def certify(self, key: Key, offset: int, problems: int, samples: int) -> list[Episode]:
        cast = self.cast
        return rollout_sync(
            draw(cast.task, "certify", problems, offset),
            samples,
            key,
            seats=cast.team.seats_for(cast.recipe.rollout.max_new_tokens),
            protocol=cast.protocol,
            engine=cast.engine,
            task=cast.task,
            progress=lambda done, total: cast.progress(done, total, "certificate"),
        )

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
        draw(cast.task, "certify", 1)
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
        checkpoints=Checkpoints(directory.checkpoints, recipe.checkpoint.keep),
        state=State(
            betas=dict.fromkeys(learners, recipe.trust_region.beta),
            versions=dict.fromkeys(learners, 0),
            certify=CertifyState(Spending(settings.certify.confidence, settings.certify.decisions)),
        ),
        watch=watch,
        evaluates_greedy=recipe.evaluate.greedy,
    )


def check_recipe_unchanged(directory: RunDirectory, recipe: Recipe) -> None:
    """A resumed run goes on under the recipe it was started with; ``stages`` may change.

    Raises UserError naming the first key that differs.
    """
    if not directory.recipe.is_file():
        return
    held = load_recipe(directory.recipe)
    changed = [line for line in differences(held, recipe) if not line.startswith("stages")]
    if changed:
        raise UserError(
            f"{directory.recipe}: the run was started with another recipe ({changed[0]}); resume "
            "with the same recipe and overrides"
        )


def tolerance_of(recipe: Recipe) -> Tolerance:
    """What engine and learner may differ by: rounding of the compute type."""
    if recipe.team.dtype == "bfloat16" or recipe.optimizer.autocast:
        return Tolerance(mean=0.05, largest=2.0)
    if recipe.team.dtype == "float64":
        return Tolerance(mean=1e-6, largest=1e-5)
    return Tolerance(mean=1e-4, largest=1e-3)
