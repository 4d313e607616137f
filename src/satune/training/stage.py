"""One stage: a sweep over the agents, each updated on experience that accounts for those before it.

THEORY §6, line by line. Whatever changes the run's state is called from here.
"""

from __future__ import annotations

from satune.training.certification import judge
from satune.training.run import Training
from satune.training.schedules import experience_for, needs_rollout
from satune.training.sweep import sweep_order
from satune.training.update import improve
from satune.types import Key


def run_stage(training: Training) -> None:
    """Sweep once over the agents, from wherever a checkpoint left the sweep."""
    state, settings, learners = training.state, training.settings, training.learners
    stage = state.stage + 1

    if state.step == 0:
        state.batch = training.open_batch(stage)
        training.open_stage(*sweep_order(settings, learners, state, stage))

    for step in range(state.step + 1, len(state.order) + 1):
        agent = state.order[step - 1]

        if state.batch is None or needs_rollout(settings.schedule, state.batch, step):
            state.batch = training.roll_out(stage, step)
        experience = experience_for(settings.schedule, state.batch)

        outcome = improve(
            learners[agent],
            agent,
            experience,
            settings.update_of(agent),
            beta=state.betas[agent],
            cap=settings.schedule.cap,
            key=Key(settings.seed, "train", stage, step),
            progress=training.progress,
        )
        verdict = judge(
            agent,
            outcome,
            Key(settings.seed, "certify", stage, step),
            state=state,
            settings=settings,
            learners=learners,
            world=training.world,
            ledger=training.ledger,
        )
        del outcome  # it holds the agent as it was, which the next step need not keep in memory

        training.take(agent, verdict)
        training.record_update(stage, step, agent, verdict)
        state.step = step
        if step < len(state.order):
            training.save_step()

    training.close_stage()
