"""score_tokens: values by hand, chunking, gradients, memory."""

import math

import pytest
import torch
from torch import Tensor

from satune.core import logprobs
from satune.core.logprobs import Reference, exact_kl, score_tokens


def scene(tokens: int, hidden: int = 4, vocabulary: int = 7, seed: int = 0, dtype=torch.float64):
    """Hidden states, output matrix, an anchor's and a reference's, targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return (
        normal(tokens, hidden).requires_grad_(),
        normal(hidden, vocabulary).requires_grad_(),
        normal(tokens, hidden),
        normal(hidden, vocabulary),
        targets,
    )


def test_hand_computed():
    # One-hot hidden states read rows of a table of logits. At temperature 2 the logits (2 log 2, 0)
    # become (log 2, 0): probabilities 2/3 and 1/3, entropy log 3 - 2/3 log 2. The anchor is
    # uniform: KL(this||anchor) = log 2 - entropy, KL(anchor||this) = 1/2 log(9/8).
    table = torch.tensor([[2 * math.log(2), 0.0], [0.0, 0.0]], dtype=torch.float64)
    flat = Reference(torch.zeros(2, 2, dtype=torch.float64), lambda rows: rows @ table)
    scores = score_tokens(
        torch.eye(2, dtype=torch.float64),
        torch.tensor([1, 0]),
        lambda rows: rows @ table,
        temperature=2.0,
        entropy=True,
        anchor=flat,
        reverse=True,
        reference=flat,
    )
    entropy = math.log(3) - 2 / 3 * math.log(2)
    close = {"rel": 1e-12, "abs": 1e-15}
    assert scores.entropy_T is not None and scores.kl_T is not None
    assert scores.reverse_kl_T is not None and scores.reference_kl_T is not None
    assert scores.logprobs_T.tolist() == pytest.approx([-math.log(3), -math.log(2)], **close)
    assert scores.entropy_T.tolist() == pytest.approx([entropy, math.log(2)], **close)
    assert scores.kl_T.tolist() == pytest.approx([math.log(2) - entropy, 0.0], **close)
    assert scores.reverse_kl_T.tolist() == pytest.approx([0.5 * math.log(9 / 8), 0.0], **close)
    assert torch.equal(scores.reference_kl_T, scores.kl_T)


def test_only_what_was_asked_for():
    hidden, weight, other, table, targets = scene(3)
    plain = score_tokens(hidden, targets, lambda rows: rows @ weight)
    assert plain.entropy_T is plain.kl_T is plain.reverse_kl_T is plain.reference_kl_T is None
    reference = Reference(other, lambda rows: rows @ table)
    scores = score_tokens(hidden, targets, lambda rows: rows @ weight, reference=reference)
    assert scores.kl_T is None and scores.reference_kl_T is not None
    torch.testing.assert_close(scores.reference_kl_T, exact_kl(hidden @ weight, other @ table))


@pytest.mark.parametrize("chunk", [1, 3, 10, 11, 100])
def test_chunks_change_neither_values_nor_gradients(chunk):
    hidden, weight, other, table, targets = scene(11)
    # A sum with different factors, so that no term can stand in for another.
    mixes = torch.randn(5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(9))

    def run(chunk_tokens):
        scores = score_tokens(
            hidden,
            targets,
            lambda rows: rows @ weight,
            temperature=0.8,
            chunk_tokens=chunk_tokens,
            entropy=True,
            anchor=Reference(other, lambda rows: rows @ table),
            reverse=True,
            reference=Reference(other.flip(0), lambda rows: rows @ table),
        )
        columns = torch.stack(list(vars(scores).values()))
        return columns, torch.autograd.grad((mixes * columns).sum(), (hidden, weight))

    logits, others = hidden @ weight / 0.8, other @ table / 0.8
    log_p = logits.log_softmax(-1)
    whole = torch.stack(
        [
            log_p.gather(1, targets[:, None])[:, 0],
            -(log_p.exp() * log_p).sum(-1),
            exact_kl(logits, others),
            exact_kl(others, logits),
            exact_kl(logits, other.flip(0) @ table / 0.8),
        ]
    )
    gradients = torch.autograd.grad((mixes * whole).sum(), (hidden, weight))
    values, chunked = run(chunk)
    torch.testing.assert_close(values, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chunked, gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 2])
def test_gradcheck(chunk):
    hidden, weight, other, table, targets = scene(5, hidden=3, vocabulary=4)

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        scores = score_tokens(
            hidden,
            targets,
            lambda rows: rows @ weight,
            temperature=1.3,
            chunk_tokens=chunk,
            entropy=True,
            anchor=Reference(other, lambda rows: rows @ table),
            reverse=True,
        )
        assert scores.entropy_T is not None and scores.kl_T is not None
        assert scores.reverse_kl_T is not None
        return scores.logprobs_T + 2 * scores.entropy_T + 3 * scores.kl_T - scores.reverse_kl_T

    assert torch.autograd.gradcheck(total, (hidden, weight))


def test_the_anchor_receives_no_gradient():
    hidden, weight, other, table, targets = scene(4)
    other.requires_grad_()
    table.requires_grad_()
    scores = score_tokens(
        hidden,
        targets,
        lambda rows: rows @ weight,
        anchor=Reference(other, lambda rows: rows @ table),
        reverse=True,
        reference=Reference(other, lambda rows: rows @ table),
    )
    assert scores.kl_T is not None and scores.reverse_kl_T is not None
    assert scores.reference_kl_T is not None
    (scores.kl_T + scores.reverse_kl_T + scores.reference_kl_T).sum().backward()
    assert other.grad is None and table.grad is None
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


class Counting:
    """A projection that notes how many rows it was given each time."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.rows: list[int] = []

    def __call__(self, hidden: Tensor) -> Tensor:
        self.rows.append(hidden.shape[0])
        return hidden @ self.weight


def test_no_more_rows_are_projected_at_once_than_a_chunk_holds(monkeypatch):
    hidden, weight, _, _, targets = scene(50, vocabulary=8)
    # 8 x 4 bytes a row: 160 bytes hold 5 rows.
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 160)
    project = Counting(weight)
    score_tokens(hidden, targets, project).logprobs_T.sum().backward()
    # One row to learn the vocabulary, ten chunks forward, the same ten again backward.
    assert project.rows == [1] + [5] * 20


def test_one_chunk_is_not_computed_twice():
    hidden, weight, _, _, targets = scene(50)
    project = Counting(weight)
    score_tokens(hidden, targets, project, chunk_tokens=50).logprobs_T.sum().backward()
    assert project.rows == [50]


def test_the_graph_holds_no_more_than_hidden_states_between_forward_and_backward():
    hidden, weight, other, table, targets = scene(64, vocabulary=500)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        score_tokens(
            hidden,
            targets,
            lambda rows: rows @ weight,
            chunk_tokens=8,
            entropy=True,
            anchor=Reference(other, lambda rows: rows @ table),
            reverse=True,
        )
    # Chunks of logits would be 8 x 500 numbers each; hidden states are 64 x 4 in all.
    assert sum(kept) <= 8 * 500


def test_no_tokens():
    hidden, weight, other, table, _ = scene(0)
    scores = score_tokens(
        hidden,
        torch.zeros(0, dtype=torch.long),
        lambda rows: rows @ weight,
        entropy=True,
        anchor=Reference(other, lambda rows: rows @ table),
    )
    assert scores.kl_T is not None and scores.logprobs_T.shape == scores.kl_T.shape == (0,)
    assert scores.reverse_kl_T is None
    scores.logprobs_T.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 4)


def test_half_precision_logits_are_scored_in_float32():
    hidden, weight, _, _, targets = scene(6, dtype=torch.float32)
    scores = score_tokens(
        hidden.bfloat16(), targets, lambda rows: rows @ weight.bfloat16(), temperature=0.7
    )
    logits = (hidden.bfloat16() @ weight.bfloat16()).float() / 0.7
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert scores.logprobs_T.dtype == torch.float32
    torch.testing.assert_close(scores.logprobs_T, expected)


def test_entropy_of_a_masked_vocabulary_has_a_finite_gradient():
    # Two tokens of equal mass and one masked: entropy log 2, stationary in both live logits.
    hidden = torch.tensor([[0.0, 0.0]], dtype=torch.float64, requires_grad=True)

    def project(rows: Tensor) -> Tensor:
        return torch.cat([rows, torch.full((1, 1), -math.inf, dtype=rows.dtype)], dim=1)

    entropy = score_tokens(hidden, torch.tensor([0]), project, entropy=True).entropy_T
    assert entropy is not None and entropy.item() == pytest.approx(math.log(2), rel=1e-14)
    entropy.sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().max() < 1e-15


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"reverse": True}, "anchor"),
        ({"anchor": Reference(torch.zeros(2, 4), lambda rows: rows)}, "anchor has 2 rows"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        score_tokens(torch.zeros(3, 4), torch.zeros(3).long(), lambda rows: rows, **changes)


def test_unequal_lengths():
    with pytest.raises(ValueError, match="do not match"):
        score_tokens(torch.zeros(3, 4), torch.zeros(2).long(), lambda rows: rows)
