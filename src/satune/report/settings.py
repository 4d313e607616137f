"""Where a run's figures go beside its own directory, as ``log`` in a recipe says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from satune.ranges import MayChange, Text, Whole

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]


@dataclass(frozen=True, slots=True)
class LogSettings:
    """The trackers in ``report_to`` are sent every figure of the run's events, under ``project``;
    conversations too where ``report_conversations`` is above 0: so many of every rollout to learn
    from and of every evaluation."""

    report_to: Annotated[tuple[TrackerName, ...], MayChange()] = ()
    report_conversations: Annotated[Whole, MayChange()] = 0
    project: Annotated[Text, MayChange()] = "satune"
