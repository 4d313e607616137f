"""What must hold between the keys of a recipe, and why.

Each check yields ``(path, message)``: the dotted key at fault, and what is wrong with the mend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from satune.config.place_checks import (
    Fault,
    likelihoods_are_known_here,
    one_base_lies_on_one_device,
    shards_are_learners,
    vllm_is_given_models_that_it_knows,
)
from satune.config.schema import AgentSection, Recipe
from satune.engines.settings import ServerSettings
from satune.loading import address_in, holds_key, nearest
from satune.training.credit import CREDIT
from satune.training.schedules import SCHEDULES, Schedule
from satune.types import ServedModel

STILL_OR_FREE = (
    "to leave an agent as it is set its frozen to true, to train without a bound set "
    "trust_region.enabled to false"
)
"""What is meant by a δ of 0."""


def faults(recipe: Recipe) -> list[Fault]:
    """Everything that is wrong with a recipe whose keys are right one by one."""
    return [fault for check in CHECKS for fault in check(recipe)]


def _seats_name_agents(recipe: Recipe) -> Iterator[Fault]:
    agents = recipe.team.agents
    for seat, agent in recipe.team.given_seats().items():
        if agent not in agents:
            yield f"team.seats.{seat}", no_such("agent", agent, agents)


def _protocol_names_seats(recipe: Recipe) -> Iterator[Fault]:
    seats = recipe.team.given_seats()
    options = recipe.protocol.options
    judge = options.get("judge")
    if isinstance(judge, str) and judge not in seats:
        yield "protocol.judge", no_such("seat", judge, seats)
    roles = options.get("roles")
    if isinstance(roles, Mapping):
        for seat in roles:
            if seat not in seats:
                yield f"protocol.roles.{seat}", no_such("seat", str(seat), seats)


def no_such(kind: str, name: str, known: Iterable[str]) -> str:
    """That the team has no such agent or seat, and which it may be or there are."""
    names = list(known)
    near = nearest(name, names)
    mend = f"did you mean '{near}'?" if near else f"the {kind}s are {', '.join(names)}"
    return f"the team has no {kind} '{name}'; {mend}"


def _agents_are_sound(recipe: Recipe) -> Iterator[Fault]:
    for name, agent in recipe.team.agents.items():
        path = f"team.agents.{name}"
        if agent.temperature <= 0:
            yield (
                f"{path}.temperature",
                f"must be above 0 to train, got {agent.temperature:g}; greedy decoding is"
                " for evaluation (evaluate.greedy)",
            )
        if agent.delta is not None and agent.delta <= 0:
            yield f"{path}.delta", f"must be above 0, got {agent.delta:g}; {STILL_OR_FREE}"
        if agent.lora is not None and agent.lora.dropout != 0:
            yield (
                f"{path}.lora.dropout",
                f"must be 0, got {agent.lora.dropout:g}: with dropout the policy that is scored"
                " is not the one that was sampled; remove the key",
            )


def _served_agents_are_still(recipe: Recipe) -> Iterator[Fault]:
    for name, agent in recipe.team.agents.items():
        path = f"team.agents.{name}"
        if not isinstance(agent.model, ServedModel):
            if agent.server is not None:
                yield f"{path}.server", "is for a model at http://ADDRESS/v1#MODEL; remove the key"
        elif recipe.team.sharing == "shared":
            yield f"{path}.model", "is served, and served weights cannot be shared with the team"
        elif agent.lora is not None:
            yield f"{path}.lora", "a served model takes no adapter; remove the key"
        elif agent.template.chat is not None:
            yield f"{path}.template.chat", "its server renders a served model; remove the key"
        elif agent.attention is not None:
            yield f"{path}.attention", "its server computes a served model; remove the key"
        elif agent.device is not None:
            yield f"{path}.device", "its server computes a served model; remove the key"
        elif not agent.frozen:
            yield f"{path}.frozen", "a served model cannot be trained; set frozen to true"


def _hosts_are_sound(recipe: Recipe) -> Iterator[Fault]:
    hosted = {n: a.host for n, a in recipe.team.agents.items() if a.host is not None}
    for name, host in hosted.items():
        path = f"team.agents.{name}"
        if address_in(host) is None:
            yield f"{path}.host", f"expected http://ADDRESS or https://ADDRESS, got '{host}'"
        elif holds_key(host):
            # Not shown, and not written into a run's directory, which others are given.
            yield (
                f"{path}.host",
                "its address holds a user, a password or a query; give the token in an environment"
                " variable (host_token_env)",
            )
        if isinstance(recipe.team.agents[name].model, ServedModel):
            yield f"{path}.host", "is for an agent that its owner trains; a served model has none"
        if recipe.team.agents[name].trust_remote_code:
            yield f"{path}.trust_remote_code", "no code of it runs here; set it at the host alone"
    if not hosted:
        return
    names = ", ".join(hosted)
    if recipe.certify.accept == "certified" and recipe.certify.evidence != "fresh":
        yield (
            "certify.evidence",
            f"{recipe.certify.evidence} rests on ratios that the hosts of {names} report; a gate"
            " needs fresh, which looks at the rewards of texts alone",
        )
    if recipe.sharding is not None:
        yield "sharding", f"one process drives agents that live elsewhere ({names}); remove the key"
    if recipe.engine.name != "local":
        yield (
            "engine.name",
            f"'{recipe.engine.name}' serves no agent that lives elsewhere ({names})",
        )
    elif recipe.engine.options.get("order") == "throughput":
        yield (
            "engine.order",
            f"throughput is not for agents that live elsewhere ({names}), who decode in the order"
            " exact; set that or remove the key",
        )


def _servers_are_asked_one_way(recipe: Recipe) -> Iterator[Fault]:
    first: dict[str, tuple[str, ServerSettings]] = {}
    for name, agent in recipe.team.agents.items():
        if not isinstance(agent.model, ServedModel):
            continue
        settings = agent.server or ServerSettings()
        other, asked = first.setdefault(agent.model.address.rstrip("/").lower(), (name, settings))
        if asked != settings:
            yield (
                f"team.agents.{name}.server",
                f"'{other}' and '{name}' are at one address, which is asked in one way; give both"
                " the same server section",
            )


def _somebody_learns(recipe: Recipe) -> Iterator[Fault]:
    if all(agent.frozen for agent in recipe.team.agents.values()):
        yield "team.agents", "all agents are frozen, so nothing would train; unfreeze one of them"


def _every_agent_sits(recipe: Recipe) -> Iterator[Fault]:
    if recipe.team.sharing == "shared":
        return
    filled = set(recipe.team.given_seats().values())
    for name in recipe.team.agents:
        if name not in filled:
            yield (
                f"team.agents.{name}",
                "fills no seat, so it would never speak; give it one under team.seats or remove it",
            )


def _shared_agents_agree(recipe: Recipe) -> Iterator[Fault]:
    if recipe.team.sharing != "shared":
        return
    (first, ours), *others = recipe.team.agents.items()
    for name, theirs in others:
        for key in AgentSection.model_fields:
            if getattr(ours, key) != getattr(theirs, key):
                yield (
                    f"team.agents.{name}.{key}",
                    f"'{first}' and '{name}' share their weights and so must agree on {key},"
                    " but differ; make the two equal or set team.sharing to separate",
                )


def _groups_can_be_compared(recipe: Recipe) -> Iterator[Fault]:
    if recipe.rollout.samples == 1 and recipe.credit.name != "gae":
        yield (
            "rollout.samples",
            "advantages compare the samples of one problem, so 1 gives no signal;"
            " use at least 2 (the paper: 4 or 8)",
        )


def _values_have_a_critic(recipe: Recipe) -> Iterator[Fault]:
    critic, asked = recipe.critic, recipe.credit.name == "gae"
    if asked and critic.kind == "none":
        yield (
            "credit.name",
            "gae asks a critic, but there is none; set critic.kind to head or model",
        )
    if critic.kind != "none" and not asked and ":" not in recipe.credit.name:
        yield (
            "critic.kind",
            f"{critic.kind} would learn values that credit '{recipe.credit.name}' never asks for;"
            " set credit to gae or remove the key",
        )
    if critic.model is not None and critic.kind != "model":
        yield "critic.model", "is for critic.kind model; set that or remove the key"
    elif critic.model is not None and "://" in critic.model:
        yield "critic.model", "must be a model that can be trained here, got an address"
    if asked and recipe.credit.options["traces"] and not schedule_of(recipe).weighted:
        yield (
            "credit.traces",
            f"correct for the agents updated since the rollout, which schedule"
            f" '{recipe.schedule.name}' does not; use reuse or hybrid, or set traces to false",
        )


def _sampling_is_the_policy(recipe: Recipe) -> Iterator[Fault]:
    why = (
        "would make the policy's support depend on its weights, and ratios and KL would not be"
        " those of the policy that was sampled"
    )
    if recipe.rollout.top_p < 1:
        yield "rollout.top_p", f"{recipe.rollout.top_p:g} {why}; use 1"
    if recipe.rollout.top_k > 0:
        yield "rollout.top_k", f"{recipe.rollout.top_k} {why}; use 0"


def _batches_are_not_empty(recipe: Recipe) -> Iterator[Fault]:
    episodes = recipe.rollout.problems * recipe.rollout.samples
    if recipe.optimizer.mini_batches > episodes:
        yield (
            "optimizer.mini_batches",
            f"{recipe.optimizer.mini_batches} mini-batches cannot be cut from {episodes} episodes"
            f" (rollout.problems x rollout.samples); use at most {episodes}",
        )


def _overlong_buffer_fits(recipe: Recipe) -> Iterator[Fault]:
    if "overlong_buffer" not in recipe.credit.options or recipe.credit.name not in CREDIT:
        return
    buffer, limit = recipe.credit.options["overlong_buffer"], recipe.rollout.max_new_tokens
    if buffer >= limit:
        yield (
            "credit.overlong_buffer",
            f"must be below rollout.max_new_tokens ({limit}), got {buffer}",
        )


def _certificates_are_sound(recipe: Recipe) -> Iterator[Fault]:
    certify = recipe.certify
    if certify.accept == "certified" and certify.problems == 0:
        yield (
            "certify.accept",
            "certified needs certificates, but certify.problems is 0; give the problems of one"
            " (512 show a gain of a few hundredths)",
        )
    if certify.confidence >= 0.5:
        yield (
            "certify.confidence",
            f"is the run's probability of a false claim, got {certify.confidence:g}; give a small"
            " one such as 0.05",
        )
    needed = decisions(recipe)
    declared = certify.decisions
    if isinstance(declared, int) and certify.accept == "certified" and declared < needed:
        yield (
            "certify.decisions",
            f"{declared} declared, but the gate may need {needed}, and refuses every change once"
            " they are used up; give auto or a larger number",
        )


def schedule_of(recipe: Recipe) -> type[Schedule]:
    """The class of the recipe's schedule; of the user's own, which is not loaded here, what every
    schedule does."""
    return SCHEDULES.get(recipe.schedule.name, Schedule)


def decisions(recipe: Recipe) -> int:
    """The most tests that a run of the recipe can come to."""
    certify = recipe.certify
    agents = recipe.team.resolved().agents.values()
    steps = recipe.stages * sum(not agent.frozen for agent in agents)
    windows = recipe.stages if schedule_of(recipe).together else -(-steps // certify.every)
    return max(1, windows) * (1 + certify.backtracks * (certify.accept == "certified"))


def _overlap_has_two_sides(recipe: Recipe) -> Iterator[Fault]:
    if recipe.evaluate.drop_overlap and not (recipe.task.data and recipe.evaluate.data):
        yield (
            "evaluate.drop_overlap",
            "needs task.data and evaluate.data to compare; give both or remove the key",
        )


def _ahead_is_corrected(recipe: Recipe) -> Iterator[Fault]:
    """What is drawn ahead is learnt from by w alone, in one process."""
    if not recipe.rollout.ahead:
        return
    if recipe.schedule.name not in ("reuse", "hybrid"):
        yield (
            "rollout.ahead",
            f"needs the weights of schedule reuse or hybrid, got '{recipe.schedule.name}'; set one"
            " of them or remove the key",
        )
    if recipe.rollout.dynamic_sampling:
        yield (
            "rollout.dynamic_sampling",
            "draws until rewards differ, so that nobody knows ahead where the next batch begins;"
            " set it or rollout.ahead to its default",
        )
    if recipe.credit.name == "gae" and recipe.credit.options["traces"]:
        yield (
            "credit.traces",
            "correct for other agents than the one that learns, whose own turns are old too with"
            " rollout.ahead; set traces to false or remove that key",
        )
    if recipe.order.name == "greedy":
        yield (
            "order.name",
            "greedy predicts gains from what the present team wrote, which a batch of"
            " rollout.ahead is not; take another order or remove that key",
        )
    if recipe.sharding is not None:
        yield "rollout.ahead", "is for a run in one process; remove it or sharding"
    if any(agent.host is not None for agent in recipe.team.agents.values()):
        yield (
            "rollout.ahead",
            "needs the weights of every agent that learns here; remove it, or the host of each",
        )


CHECKS: tuple[Callable[[Recipe], Iterator[Fault]], ...] = (
    _seats_name_agents,
    _every_agent_sits,
    _protocol_names_seats,
    _agents_are_sound,
    _shared_agents_agree,
    _served_agents_are_still,
    _servers_are_asked_one_way,
    _hosts_are_sound,
    _somebody_learns,
    _groups_can_be_compared,
    _values_have_a_critic,
    _sampling_is_the_policy,
    _batches_are_not_empty,
    _overlong_buffer_fits,
    _certificates_are_sound,
    _overlap_has_two_sides,
    shards_are_learners,
    likelihoods_are_known_here,
    one_base_lies_on_one_device,
    _ahead_is_corrected,
    vllm_is_given_models_that_it_knows,
)
