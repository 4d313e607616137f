"""A whole run: before, the stages, after; from the beginning or from a checkpoint."""

from __future__ import annotations

import platform
from dataclasses import replace
from typing import Any

import torch

from satune.training.certification import decisions_missing, decisions_spent_ahead
from satune.training.ports import Host
from satune.training.run import Training
from satune.training.self_check import Tolerance, self_check
from satune.training.stage import run_stage
from satune.types import Key, UserError

CHECK_PROBLEMS = 4


def train(
    training: Training, *, tolerance: Tolerance, checkpoint: str | None = None
) -> dict[str, Any]:
    """Run to the last stage and return the summary, which is also written. With no stages at all
    the team is evaluated once and saved as it came.

    ``tolerance`` is the self-check's; ``checkpoint`` names one to go on from. Raises
    UserError for a failed self-check or a disk that refuses; the last good checkpoint then stays.
    """
    try:
        if checkpoint is None:
            _begin(training, tolerance)
        else:
            _go_on(training, checkpoint)
            self_check(training.learners, _check_episodes(training), tolerance)
        while training.state.stage < training.settings.stages:
            run_stage(training)
        return _finish(training)
    finally:
        try:
            training.ahead.stop()
        finally:
            training.finish_saving()


def _go_on(training: Training, checkpoint: str) -> None:
    """Put the run back to a checkpoint. A run that was finished there had its last evaluation in
    place of one between stages, which is made up for.

    Raises UserError, with nothing touched, where the checkpoint is of another team, or where too
    few tests are left for the gate of more stages or the run would end with steps that its gate has
    not tested."""
    settings = training.settings
    saved = training.store.read(checkpoint, training.world)
    held, agents = sorted(saved.state.versions), sorted(training.learners)
    where = training.directory.checkpoints / checkpoint
    if held != agents:
        raise UserError(
            f"{where}: holds agents {', '.join(held)}, the recipe has {', '.join(agents)}; resume "
            "with the recipe the run was started with"
        )
    untested = saved.state.certify.held if settings.certify.gated else {}
    if untested and saved.state.stage >= settings.stages:
        raise UserError(
            f"{where}: holds steps of {', '.join(untested)} that the gate has not tested, and "
            f"stages={settings.stages} would end the run with them; give at least "
            f"stages={saved.state.stage + 1}, or resume from another checkpoint"
        )
    learning = sum(not learner.frozen for learner in training.learners.values())
    missing = decisions_missing(settings, learning, saved.state)
    if missing is not None:
        raise UserError(f"{where}: {missing}")
    spent = decisions_spent_ahead(settings, learning, saved.state, training.ledger)
    if spent is not None:
        training.watch({"event": "note", "text": f"{training.ledger.path}: {spent}"})
    training.restore(checkpoint, saved)
    training.evaluate_between()


def _check_episodes(training: Training) -> list[Any]:
    key = Key(training.settings.seed, "train", stage=0)
    problems = min(CHECK_PROBLEMS, training.settings.problems)
    return training.supply.draw(key, 0, problems)


def _begin(training: Training, tolerance: Tolerance) -> None:
    learners = training.learners.values()
    for name in training.learners:
        training.publish(name)
    if training.settings.update.objective.reference_kl > 0:
        for learner in learners:
            if not learner.frozen:
                learner.keep_reference()
    report = self_check(training.learners, _check_episodes(training), tolerance)
    training.tell(
        {
            "event": "run",
            "seed": training.settings.seed,
            "stages": training.settings.stages,
            "agents": {name: list(seats) for name, seats in training.seats.items()},
            "self_check": report,
            "host": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "device": ", ".join(dict.fromkeys(each.device for each in learners)),
                "threads": torch.get_num_threads(),
            },
        }
    )
    # Only now is this a run's directory, and whatever is called recipe.yaml there the run's.
    training.save_recipe()
    if training.evaluates_greedy:
        training.evaluate(greedy=True)
    training.evaluate(greedy=False)
    if training.settings.stages:
        training.save("stage-0000")
        # A run that has learned something always has a checkpoint to go on from.
        training.commit()


def _finish(training: Training) -> dict[str, Any]:
    if training.settings.stages:
        if training.evaluates_greedy:
            training.evaluate(greedy=True)
        training.evaluate(greedy=False)
    training.world.save_team()
    state = training.state
    sampled = [e for e in state.evaluations if not e["greedy"]]
    greedy = [e for e in state.evaluations if e["greedy"]]
    summary: dict[str, Any] = {
        "reward_before": sampled[0]["reward"],
        "reward_after": sampled[-1]["reward"],
        "interval_before": sampled[0]["interval"],
        "interval_after": sampled[-1]["interval"],
        "problems": sampled[0]["problems"],
        "stages": state.stage,
        "seconds": state.totals["seconds"],
        "tokens": state.totals["sampled_tokens"],
        "episodes": state.totals["episodes"],
        "updates_accepted": state.totals["updates"],
        "team": str(training.directory.team),
    }
    spending = state.certify.spending
    # What was tested on other ways that the run went stays spent.
    spending = replace(spending, used=max(spending.used, training.ledger.used))
    if spending.used:
        summary["certificates"] = {
            "tests": spending.used,
            "confidence_spent": spending.spent,
            "episodes": state.totals["certify_episodes"],
            "tokens": state.totals["certify_tokens"],
            "seconds": state.totals["certify_seconds"],
        }
    wire = {n: h.wire for n, h in training.learners.items() if isinstance(h, Host)}
    if wire:
        summary["host"] = {"wire": {name: dict(counts) for name, counts in wire.items()}}
    if "difference" in sampled[-1]:
        summary["difference"] = sampled[-1]["difference"]
    if greedy:
        summary["greedy_before"] = greedy[0]["reward"]
        summary["greedy_after"] = greedy[-1]["reward"]
    # A run is finished when its summary is there, and a finished run has its last checkpoint.
    training.commit()
    training.directory.write_summary(summary)
    return summary
