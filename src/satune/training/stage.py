"""One stage: a sweep over the agents, each updated on experience that accounts for those before it.

THEORY §6, line by line.
"""

from __future__ import annotations

from dataclasses import replace

from satune.training.certification import judge
from satune.training.run import Training
from satune.training.schedules import experience_for
from satune.training.sweep import sweep_order
from satune.training.update import improve
from satune.types import Key


def run_stage(training: Training) -> None:
    """Sweep once over the agents, from wherever a checkpoint left the sweep."""
    state, settings = training.state, training.settings
    stage = state.stage + 1

    if state.batch is None:
        state.batch = training.roll_out(stage, step=1)
        state.order, scores = sweep_order(
            settings,
            training.learners,
            state.batch.episodes,
            stage,
            last=state.order,
            accepted=state.accepted,
        )
        state.accepted = {}
        training.open_stage(scores)

    for step in range(state.step + 1, len(state.order) + 1):
        agent = state.order[step - 1]

        if training.wants_rollout(state.batch, step):
            state.batch = training.roll_out(stage, step)
        experience = experience_for(settings.schedule, state.batch)

        outcome = improve(
            training.learners[agent],
            agent,
            experience,
            replace(settings.update, trust_region=training.region(agent)),
            beta=state.betas[agent],
            cap=settings.schedule.cap,
            key=Key(settings.seed, "train", stage, step),
        )
        outcome = judge(training, agent, outcome, Key(settings.seed, "certify", stage, step))

        state.betas[agent] = outcome.beta
        state.accepted[agent] = outcome.accepted
        state.batch.reweight(outcome.log_ratio_E)
        training.take(agent, outcome.accepted, last=step == len(state.order))
        training.record_update(stage, step, agent, outcome)
        del outcome  # it holds the agent as it was, which the next step need not keep in memory
        state.step = step
        if step < len(state.order):
            training.save_step()

    training.close_stage()
