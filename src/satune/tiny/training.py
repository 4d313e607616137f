"""Teaches a tiny base model to imitate the players of demonstrated conversations."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from satune.agents.rendering import ChatRenderer
from satune.tiny.settings import TinySettings
from satune.types import Completion, Entry, EpisodeFailure, UserError, ids_of

CHECK_EVERY = 200
"""Steps between two looks at the greedy success, once the planned ones are done."""
MATRIX_RATE = 20 / 3
"""Learning rate of the weight matrices as a multiple of ``tiny.lr``."""
_BUCKET = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence to imitate: ids, and for each of them whether a seat wrote it."""

    ids: Sequence[int]
    own: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """``ids_ET`` padded on the right; ``target_E`` indexes the flattened positions whose next
    token is ``next_E``, a token of an own message."""

    ids_ET: Tensor
    position_E: Tensor
    next_E: Tensor


def rows_of(conversation: Sequence[Entry], renderer: ChatRenderer) -> list[Row]:
    """The sequences in which a seat would read and write a conversation, its own messages marked.

    They hold the ids that a rollout would feed and sample, each own message ended by EOS. Where
    the template is append-only that is one sequence, otherwise one a prompt that had to be
    rendered anew. What follows the last own message is left out.
    """
    view = renderer.view("tiny")
    end: int = renderer.tokenizer.eos_token_id  # type: ignore[assignment]
    rows: list[Row] = []
    ids = ids_of()
    own: tuple[bool, ...] = ()
    for at, entry in enumerate(conversation):
        if entry.kind != "own":
            continue
        completion = renderer.encode(entry.text) + ids_of([end])
        try:
            prompt = view.prompt(conversation[:at], len(completion)).ids
        except EpisodeFailure as failure:
            raise UserError(f"tiny agents: a demonstration does not fit: {failure}") from failure
        view.wrote(Completion(entry.text, "stop", 0, completion))
        assert prompt is not None
        if prompt[: len(ids)] != ids:
            rows.append(Row(ids, own))
            own = ()
        own += (False,) * (len(prompt) - len(own)) + (True,) * len(completion)
        ids = prompt + completion
    rows = [*rows, Row(ids, own)] if ids else rows
    return [_with_foreign(row, conversation, renderer) for row in rows]


def _with_foreign(row: Row, conversation: Sequence[Entry], renderer: ChatRenderer) -> Row:
    """The row with other seats' messages to be imitated as well.

    They play the same part, so what they wrote is as good a lesson, and a conversation of three
    seats holds three times as many.
    """
    pieces = renderer.tokenizer.convert_ids_to_tokens(list(row.ids))
    starts = [0, *accumulate(len(piece) for piece in pieces)]
    written, taught, past = "".join(pieces), list(row.own), 0
    for entry in conversation:
        text = entry.text or "".join(part.get("text", "") for part in entry.parts)
        spelt = "".join(renderer.tokenizer.convert_ids_to_tokens(list(renderer.encode(text))))
        at = written.find(spelt, past)
        if at < 0 or not spelt:
            continue
        past = at + len(spelt)
        if entry.kind == "foreign":
            for index in range(bisect_left(starts, at), bisect_right(starts, past) - 1):
                taught[index] = True
    return Row(row.ids, tuple(taught))


def batches(rows: Sequence[Row], size: int, pad: int, seed: int) -> Iterator[Batch]:
    """Shuffled batches without end, of rows of similar length so that little is padding."""
    rng = random.Random(seed)
    order = list(range(len(rows)))
    while True:
        rng.shuffle(order)
        epoch = []
        for start in range(0, len(order), size * _BUCKET):
            near = sorted(order[start : start + size * _BUCKET], key=lambda at: len(rows[at].ids))
            epoch += [near[first : first + size] for first in range(0, len(near), size)]
        rng.shuffle(epoch)
        for chosen in epoch:
            yield _collate([rows[at] for at in chosen], pad)


def _collate(rows: Sequence[Row], pad: int) -> Batch:
    width = max(len(row.ids) for row in rows)
    ids_ET = torch.tensor([[*row.ids, *[pad] * (width - len(row.ids))] for row in rows])
    own_ET = torch.tensor([row.own + (False,) * (width - len(row.own)) for row in rows])
    next_E = ids_ET[own_ET]
    position_E = own_ET.flatten().nonzero()[:, 0] - 1
    return Batch(ids_ET, position_E, next_E)


def imitation_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean cross-entropy (natural log) of the own tokens of a batch.

    No attention mask: padding stands on the right, where a causal model's own tokens cannot see it.
    """
    hidden_ETD = model.base_model(input_ids=batch.ids_ET, use_cache=False).last_hidden_state
    hidden_ED = hidden_ETD.flatten(0, 1)[batch.position_E]
    logits_EV = model.get_output_embeddings()(hidden_ED)  # type: ignore[misc]
    return nn.functional.cross_entropy(logits_EV, batch.next_E)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices [number, rows, columns], rows ≤ columns, with their singular values brought near 1
    (between .68 and 1.13) and the rest kept: five steps of an odd polynomial, Jordan et al. 2024.
    """
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x


class Muon:
    """Momentum whose update is orthogonalised, matrices of one shape together.

    It takes a third of AdamW's steps to the same arithmetic; torch has had one since 2.9 only, in
    bfloat16.
    """

    def __init__(self, matrices: Sequence[nn.Parameter]) -> None:
        shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
        for matrix in matrices:
            shapes.setdefault((matrix.shape[0], matrix.shape[1]), []).append(matrix)
        self._groups = [
            (group, torch.zeros(len(group), *shape, dtype=group[0].dtype))
            for shape, group in shapes.items()
        ]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Moves each matrix against its gradient, by ``lr`` a singular direction."""
        for group, momentum in self._groups:
            gradient = torch.stack([matrix.grad for matrix in group])  # type: ignore[misc]
            momentum.lerp_(gradient, 0.05)
            ahead = gradient.lerp(momentum, 0.95)
            rows, columns = ahead.shape[1:]
            flat = ahead if rows <= columns else ahead.mT
            update = orthogonalised(flat) * (max(1.0, rows / columns) ** 0.5)
            for matrix, change in zip(group, update if rows <= columns else update.mT, strict=True):
                matrix.sub_(change, alpha=lr)


def rate(step: int, settings: TinySettings) -> float:
    """Learning rate of a step (from 0): linear warm-up over a twentieth of the planned steps, then
    linear decay to a twentieth of the peak. Further steps go in rounds of CHECK_EVERY, each
    decaying from half the peak: at the lowest rate they would change little."""
    warm = max(1, settings.steps // 20)
    left = (settings.steps - step) / max(1, settings.steps - warm)
    if step >= settings.steps:
        left = 0.5 * (1 - (step - settings.steps) % CHECK_EVERY / CHECK_EVERY)
    return settings.lr * max(0.05, min((step + 1) / warm, left))


def imitate(
    model: PreTrainedModel,
    rows: Sequence[Row],
    pad: int,
    settings: TinySettings,
    *,
    success: Callable[[], float] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[int, float | None]:
    """Trains ``model`` in place on the own tokens of ``rows``.

    Args:
        pad: id that fills shorter rows.
        success: greedy success on held-out problems in [0, 1], measured after the planned steps
            and then every CHECK_EVERY further ones.
        progress: called with steps done, steps planned and a message.

    Returns:
        Steps taken and the last measured success (None if it was not measured).

    Raises:
        ValueError: the loss is not finite.
    """
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim != 2 or p is embedding]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(
        others, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    stream = batches(rows, settings.batch, pad, settings.seed)
    planned, step, reached = settings.steps, 0, None
    while True:
        model.train()
        while step < planned:
            adam.param_groups[0]["lr"] = rate(step, settings)
            loss = imitation_loss(model, next(stream))
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not torch.isfinite(norm):
                raise ValueError(f"tiny.lr: the loss left the finite at step {step}; lower tiny.lr")
            adam.step()
            muon.step(rate(step, settings) * MATRIX_RATE)
            model.zero_grad(set_to_none=True)
            step += 1
            if progress is not None and (step % 10 == 0 or step == planned):
                progress(step, planned, f"loss {loss.item():.3f}")
        model.eval()
        if success is not None:
            reached = success()
        if reached is None or reached >= settings.greedy_target or step >= settings.max_steps:
            return step, reached
        planned = min(step + CHECK_EVERY, settings.max_steps)
        if progress is not None:
            progress(step, planned, f"greedy success {reached:.2f}, going on")
