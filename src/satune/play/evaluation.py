"""Evaluation: how often a team is right, with intervals by problem.

Intervals are normal approximations over problems (mean ± 1.96 standard errors, ddof 1, cut to the
range of the figure): problems are the independent units, the samples of one problem are not. With
fewer than two problems there is no interval. They describe; bounds that decide are in
core/certificates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist, fmean, stdev

from satune.play.conversation import plurality
from satune.play.rollout import Progress, rollout, run_alone
from satune.types import Engine, Episode, Key, Problem, Seat, Task, TeamProtocol, UserError

Z_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over ``problems`` with its 95% interval (None where it cannot be had)."""

    mean: float
    low: float | None
    high: float | None
    problems: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores [problem][sample] of one contestant, and its majority's score per problem.

    ``majority_P`` scores the answer that most of a problem's samples gave (ties to the earliest;
    none of them an answer: 0).
    """

    scores_PK: tuple[tuple[float, ...], ...]
    majority_P: tuple[float, ...] = ()

    @property
    def samples(self) -> int:
        return len(self.scores_PK[0])

    @property
    def avg_at_k(self) -> float:
        """Mean over problems of the mean score of their samples."""
        return fmean(fmean(row) for row in self.scores_PK)

    @property
    def majority(self) -> float:
        """Mean over problems of the majority answer's score."""
        return fmean(self.majority_P)

    def estimate(self) -> Estimate:
        """``avg_at_k`` with its 95% interval, by problem."""
        return mean_estimate([fmean(row) for row in self.scores_PK], 0.0, 1.0)

    def pass_at_k(self, k: int) -> float:
        """Mean over problems of the chance that one of ``k`` samples is fully right (score 1)."""
        return fmean(pass_at_k(len(row), sum(s >= 1.0 for s in row), k) for row in self.scores_PK)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores [problem][sample] of a team, and of each seat's last message if they were asked for.

    ``majority_P`` scores, per problem, the answer that most of its samples gave. ``pooled`` holds
    the last messages of all seats together, n·K of them for K conversations of n seats.
    """

    problem_ids: tuple[str, ...]
    scores_PK: tuple[tuple[float, ...], ...]
    majority_P: tuple[float, ...]
    seats: dict[str, Scores] = field(default_factory=dict)
    pooled: Scores | None = None
    episodes: tuple[Episode, ...] = ()

    @property
    def team(self) -> Scores:
        return Scores(self.scores_PK, self.majority_P)

    @property
    def samples(self) -> int:
        return self.team.samples

    @property
    def avg_at_k(self) -> float:
        """Mean over problems of the mean score of their samples."""
        return self.team.avg_at_k

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval of ``avg_at_k``, by problem."""
        estimate = self.estimate()
        if estimate.low is None or estimate.high is None:
            return None
        return estimate.low, estimate.high

    @property
    def majority(self) -> float:
        """Mean over problems of the majority answer's score."""
        return self.team.majority

    @property
    def oracle(self) -> Scores | None:
        """Of each conversation the best of its seats' last messages: what a perfect choice among
        them would score. It has no majority. None if seats were not graded."""
        if not self.seats:
            return None
        each = [scores.scores_PK for scores in self.seats.values()]
        return Scores(
            tuple(
                tuple(max(of_sample) for of_sample in zip(*of_problem, strict=True))
                for of_problem in zip(*each, strict=True)
            )
        )

    @property
    def tokens(self) -> int:
        """Tokens that the seats wrote, over all episodes."""
        return sum(turn.completion_tokens for e in self.episodes for turn in e.turns)

    def estimate(self) -> Estimate:
        """``avg_at_k`` with its interval."""
        return self.team.estimate()

    def pass_at_k(self, k: int) -> float:
        """Mean over problems of the chance that one of ``k`` samples is fully right (score 1)."""
        return self.team.pass_at_k(k)

    def seat(self, name: str) -> Estimate:
        """A seat's own ``avg_at_k``. Raises UserError if seats were not graded."""
        if name not in self.seats:
            raise UserError(f"evaluation: seat {name!r} was not graded; ask for per_seat")
        return self.seats[name].estimate()


async def evaluate_async(
    problems: Sequence[Problem],
    samples: int,
    key: Key,
    *,
    seats: Sequence[Seat],
    protocol: TeamProtocol,
    engine: Engine,
    task: Task,
    progress: Progress | None = None,
    concurrency: int | None = None,
    per_seat: bool = False,
) -> Evaluation:
    """Play ``samples`` episodes of each problem and score them. Their turns hold no ids.

    ``per_seat`` also grades each seat's last message by itself (a seat that said nothing scores
    0); not in an environment, where a message is no answer. Raises UserError for no problems, for
    ``per_seat`` in an environment, and as ``rollout``.
    """
    if not problems:
        raise UserError("evaluation: there are no problems; give at least one")
    if per_seat and getattr(task, "environment", None) is not None:
        raise UserError(f"evaluation: task {task.name} is played in an environment; drop per_seat")
    episodes = await rollout(
        problems,
        samples,
        key,
        seats=seats,
        protocol=protocol,
        engine=engine,
        task=task,
        progress=progress,
        concurrency=concurrency,
        keep_ids=False,
    )
    names = [seat.name for seat in seats] if per_seat else []
    return summarise(episodes, samples, task, names)


def evaluate(
    problems: Sequence[Problem],
    samples: int,
    key: Key,
    *,
    seats: Sequence[Seat],
    protocol: TeamProtocol,
    engine: Engine,
    task: Task,
    progress: Progress | None = None,
    concurrency: int | None = None,
    per_seat: bool = False,
) -> Evaluation:
    """``evaluate_async`` in an event loop of its own."""
    return run_alone(
        lambda: evaluate_async(
            problems,
            samples,
            key,
            seats=seats,
            protocol=protocol,
            engine=engine,
            task=task,
            progress=progress,
            concurrency=concurrency,
            per_seat=per_seat,
        ),
        [engine],
    )


def summarise(
    episodes: Sequence[Episode], samples: int, task: Task, seats: Sequence[str] = ()
) -> Evaluation:
    """The evaluation of whole groups of ``samples`` episodes, as ``rollout`` orders them, with rows
    for ``seats``: each one's last message, graded as if it were the answer."""
    groups = [episodes[i : i + samples] for i in range(0, len(episodes), samples)]
    # Grading may start a process, and a team's answer is mostly some seat's last message.
    graded = {(e.problem.id, e.answer): e.reward for e in episodes}

    def score(problem: Problem, text: str | None) -> float:
        at = (problem.id, text)
        if at not in graded:
            graded[at] = task.grade(problem, text).score
        return graded[at]

    def of(texts_PK: Sequence[Sequence[str | None]]) -> Scores:
        return voted(
            [
                [score(group[0].problem, text) for text in texts]
                for group, texts in zip(groups, texts_PK, strict=True)
            ],
            texts_PK,
        )

    def voted(
        scores_PK: Sequence[Sequence[float]], texts_PK: Sequence[Sequence[str | None]]
    ) -> Scores:
        winners = [plurality([text or "" for text in texts], task) for texts in texts_PK]
        return Scores(
            tuple(map(tuple, scores_PK)),
            tuple(
                0.0 if winner is None else scores[winner]
                for winner, scores in zip(winners, scores_PK, strict=True)
            ),
        )

    last = {seat: [[_last(e, seat) for e in group] for group in groups] for seat in seats}
    # By conversation, then by seat: a tie goes to the earliest conversation.
    pooled = [[_last(e, seat) for e in group for seat in seats] for group in groups]
    # In an environment the reward is the game's, and the same last action may earn another.
    team = voted(
        [[episode.reward for episode in group] for group in groups],
        [[episode.answer for episode in group] for group in groups],
    )
    return Evaluation(
        problem_ids=tuple(group[0].problem.id for group in groups),
        scores_PK=team.scores_PK,
        majority_P=team.majority_P,
        seats={seat: of(texts) for seat, texts in last.items()},
        pooled=of(pooled) if seats else None,
        episodes=tuple(episodes),
    )


def pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n - correct, k) / C(n, k): the unbiased estimate, from ``n`` samples of which
    ``correct`` are right, of the chance that at least one of ``k`` is (Chen et al. 2021, §2.1).

    Raises UserError unless 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise UserError(f"evaluation: pass@{k} needs k from 1 to the number of samples, {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def paired_difference(before: Evaluation, after: Evaluation) -> Estimate:
    """Mean of after minus before over the problems, each by the mean of its samples, with a 95%
    interval of the paired differences. The numbers of samples may differ.

    Raises UserError if the two do not hold the same problems.
    """
    old = {i: fmean(r) for i, r in zip(before.problem_ids, before.scores_PK, strict=True)}
    new = {i: fmean(r) for i, r in zip(after.problem_ids, after.scores_PK, strict=True)}
    unpaired = sorted(set(old) ^ set(new))
    if unpaired:
        raise UserError(
            f"evaluation: {len(unpaired)} problems are in one of the two only, "
            f"first {unpaired[0]!r}; evaluate both on the same problems"
        )
    return mean_estimate([new[i] - old[i] for i in old], -1.0, 1.0)


def mean_estimate(values: Sequence[float], lowest: float, highest: float) -> Estimate:
    """Mean of independent values in [lowest, highest] and its normal 95% interval, cut to it."""
    mean = fmean(values)
    if len(values) < 2:
        return Estimate(mean, None, None, len(values))
    half = Z_95 * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, max(lowest, mean - half), min(highest, mean + half), len(values))


def greedy(seats: Sequence[Seat]) -> list[Seat]:
    """The seats with greedy decoding (temperature 0)."""
    return [replace(s, sampling=replace(s.sampling, temperature=0.0)) for s in seats]


def _last(episode: Episode, seat: str) -> str | None:
    """The seat's last message in a conversation; None if it said nothing."""
    return next((turn.text for turn in reversed(episode.turns) if turn.seat == seat), None)
