"""Whether the type that an agent computes in lets its steps be seen (THEORY §6, low precision)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from satune.agents.packing import PackedTurns
from satune.agents.rounding import Gauged
from satune.core.divergence import units_of, weighted_quantile
from satune.core.objectives import ObjectiveBatch, objective_loss
from satune.core.ratios import sum_by
from satune.core.settings import ObjectiveSettings, Per
from satune.core.trust_region import TrustRegionSettings

CLIPPED = (0.05, 0.8)
"""Share of the ratios that rounding alone moves out of the clip: above the first it is said, above
the second the run stops."""
FLOOR = (0.25, 1.0)
"""The KL that is measured where nothing moved, as a share of delta."""
STAIRCASE = (4.0, 16.0)
"""By what factor the KL of the rounded weights may miss that of the masters."""
MEND = (
    "compute in float32, train adapters (team.sharing: lora), or raise what is too small for the "
    "type (learning rate, delta); gauge.act: warn goes on all the same"
)


def figures_of(
    gauged: Gauged,
    packed: PackedTurns,
    objective: ObjectiveSettings,
    region: TrustRegionSettings,
    per: Per = "episode",
) -> dict[str, float]:
    """The figures of the event, in nats; ``per`` says what an advantage is of.

    ``token`` and ``episode``: the standard deviation that rounding gives log(new/old) of a token
    and of an episode's sum (between two cuts of a batch where the masters' own type is computed
    in); ``clipped``: the share of the objective's ratios that it alone moves out of the clip;
    ``floor``: the trust region's quantile, over its unit, of the KL where nothing moved; ``kl``,
    ``kl_rounded`` and ``kl_masters``: that of the step, as computed, of the rounded weights and of
    the masters.
    """
    error_T = gauged.cut_T if gauged.error_T is None else gauged.error_T
    error_E = sum_by(error_T, packed.episode_T, packed.episodes)
    unit_T, episode_U = units_of(region.unit, packed.episode_T, packed.turn_T, packed.episodes)

    def quantile(kl_T: Tensor) -> float:
        kl_U = sum_by(kl_T, unit_T, len(episode_U))
        return weighted_quantile(kl_U, torch.ones_like(kl_U), region.quantile)

    figures = {
        "token": _size(error_T),
        "episode": _size(error_E),
        "clipped": _clipped(error_T, packed, objective, per),
        "floor": quantile(gauged.floor_T),
        "kl": quantile(gauged.kl_T),
    }
    if gauged.rounded_kl_T is not None and gauged.masters_kl_T is not None:
        figures["kl_rounded"] = quantile(gauged.rounded_kl_T)
        figures["kl_masters"] = quantile(gauged.masters_kl_T)
    return figures


def findings(figures: Mapping[str, float], delta: float) -> tuple[list[str], bool]:
    """What rounding decides, a phrase each, and whether it is too much to go on."""
    said, swamped = [], False

    def judge(value: float, limits: Sequence[float], text: str) -> None:
        nonlocal swamped
        if not value <= limits[0]:
            said.append(text)
            swamped |= not value <= limits[1]

    judge(
        figures["clipped"], CLIPPED, f"it alone clips {figures['clipped']:.0%} of the ratios "
        f"(log-ratio of an episode off by {figures['episode']:.2g})",
    )  # fmt: skip
    judge(
        figures["floor"] / delta, FLOOR,
        f"a KL of {figures['floor']:.2g} is measured where nothing moved (delta {delta:g})",
    )  # fmt: skip
    if "kl_masters" in figures:
        masters, rounded = figures["kl_masters"], figures["kl_rounded"]
        # A step that stays far inside the region does no harm by being larger than meant.
        missed = masters / max(rounded, 1e-12)
        if rounded > max(masters, delta):
            missed = rounded / max(masters, 1e-12)
        judge(
            missed, STAIRCASE, f"a step of KL {masters:.2g} has KL {rounded:.2g} once its weights "
            "are rounded",
        )  # fmt: skip
    return said, swamped


def _size(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def _clipped(error_T: Tensor, packed: PackedTurns, objective: ObjectiveSettings, per: Per) -> float:
    """The share of ratios that the objective clips where log(new/old) is nothing but ``error_T``,
    whatever the sign of the advantage, of which there is one ``per`` episode, turn or token."""
    clipped = clippable = 0.0
    units = {"episode": packed.episodes, "turn": packed.turns, "token": packed.tokens}
    ones_U = torch.ones(units[per], dtype=torch.float64)
    for sign in (1.0, -1.0):
        batch = ObjectiveBatch(
            logprobs_T=error_T,
            anchor_logprobs_T=torch.zeros_like(error_T),
            episode_T=packed.episode_T,
            turn_T=packed.turn_T,
            unit_T=packed.units(per),
            advantages_U=sign * ones_U,
            weights_U=ones_U,
            episode_total=float(packed.episodes),
            token_total=float(max(packed.tokens, 1)),
        )
        plain = ObjectiveSettings(objective.name, objective.options, loss=objective.loss)
        _, metrics = objective_loss(batch, plain)
        clipped += float(metrics.get("clipped", 0.0))
        clippable = float(metrics.get("clippable", 0.0))
    return clipped / clippable if clippable else 0.0
