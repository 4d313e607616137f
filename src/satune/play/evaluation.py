"""Evaluation: every figure of answers that were played or graded is computed here.

Intervals of played answers are normal approximations over problems (mean ± 1.96 standard errors,
ddof 1, cut to the range of the figure): problems are the independent units, the samples of one
problem are not. With fewer than two problems there is no interval. They describe; bounds that
decide are in core/certificates. A figure of answers is one entry of ``FIGURES``, which reports,
events and tables show by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from satune.files.events import count_failures
from satune.play.conversation import together
from satune.play.grading import Graders
from satune.play.match import Match
from satune.play.rollout import rollout, run_alone
from satune.play.statistics import (
    Estimate,
    mean_components,
    mean_estimate,
    pass_at_k,
    places_by,
    score_interval,
)
from satune.types import Episode, EpisodeFailure, Key, Problem, Turn, UserError


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores [problem][sample] of one contestant, and its majority's score per problem.

    ``majority_P`` scores the answer that most of a problem's samples gave (ties to the earliest;
    none of them an answer: 0). ``failed`` counts the answers among them that have no grade, because
    their conversation or their grading failed: each scores 0.
    """

    scores_PK: tuple[tuple[float, ...], ...]
    majority_P: tuple[float, ...] = ()
    failed: int = 0

    @property
    def samples(self) -> int:
        """Samples a problem: the fewest that one has."""
        return min(map(len, self.scores_PK))

    @property
    def by_problem(self) -> list[float]:
        """Each problem's mean score over its samples."""
        return [fmean(row) for row in self.scores_PK]

    def at(self, places: Sequence[int]) -> Scores:
        """The scores of these problems alone; their failures are not counted apart."""
        majority = tuple(self.majority_P[i] for i in places) if self.majority_P else ()
        return Scores(tuple(self.scores_PK[i] for i in places), majority)

    @property
    def avg_at_k(self) -> float:
        """Mean over problems of the mean score of their samples."""
        return fmean(self.by_problem)

    @property
    def majority(self) -> float:
        """Mean over problems of the majority answer's score."""
        return fmean(self.majority_P)

    def estimate(self) -> Estimate:
        """``avg_at_k`` with its 95% interval, by problem."""
        return mean_estimate(self.by_problem, 0.0, 1.0)

    def pass_at_k(self, k: int) -> float:
        """Mean over problems of the chance that one of ``k`` samples is fully right (score 1)."""
        return fmean(pass_at_k(len(row), sum(s >= 1.0 for s in row), k) for row in self.scores_PK)


class Absent(Exception):
    """Raised by a figure that these scores do not have."""


def _majority(scores: Scores) -> float:
    if not scores.majority_P:
        raise Absent
    return scores.majority


def _failed(scores: Scores) -> int:
    if not scores.failed:
        raise Absent
    return scores.failed


FIGURES: dict[str, Callable[[Scores], Any]] = {
    "avg_at_k": lambda scores: scores.avg_at_k,
    "interval": lambda scores: scores.estimate().interval,
    "pass_at_k": lambda scores: scores.pass_at_k(scores.samples),
    "majority": _majority,
    "failed": _failed,
}
"""What is said of one contestant's scores, by name; a figure that raises Absent is left out."""


def figures_of(scores: Scores) -> dict[str, Any]:
    """Every figure of ``FIGURES`` that these scores have."""
    found: dict[str, Any] = {}
    for name, figure in FIGURES.items():
        try:
            found[name] = figure(scores)
        except Absent:
            continue
    return found


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A team's scores on problems, and those of each seat's last message if they were asked for.

    ``pooled`` holds the last messages of all seats together, n·K of them for K conversations of n
    seats.
    """

    problem_ids: tuple[str, ...]
    team: Scores
    seats: dict[str, Scores] = field(default_factory=dict)
    pooled: Scores | None = None
    episodes: tuple[Episode, ...] = ()

    @property
    def avg_at_k(self) -> float:
        """The team's: mean over problems of the mean score of their samples."""
        return self.team.avg_at_k

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
    def groups(self) -> dict[str, list[int]]:
        """The places of the problems of each ``group`` that the problems' metadata name."""
        first = self.episodes[:: self.team.samples]
        return places_by(episode.problem.metadata.get("group") for episode in first)

    @property
    def tokens(self) -> int:
        """Tokens that the seats wrote, over all episodes."""
        return sum(turn.completion_tokens for e in self.episodes for turn in e.turns)

    def seat(self, name: str) -> Estimate:
        """A seat's own ``avg_at_k``. Raises UserError if seats were not graded."""
        if name not in self.seats:
            raise UserError(f"evaluation: seat {name!r} was not graded; ask for per_seat")
        return self.seats[name].estimate()


async def evaluate_async(
    match: Match, problems: Sequence[Problem], samples: int, key: Key, *, per_seat: bool = False
) -> Evaluation:
    """Play ``samples`` episodes of each problem and score them. Their turns hold no ids.

    ``per_seat`` also grades each seat's last message by itself (a seat that said nothing scores
    0); not in an environment, where a message is no answer. Raises UserError for no problems, for
    ``per_seat`` in an environment, and as ``rollout``.
    """
    if not problems:
        raise UserError("evaluation: there are no problems; give at least one")
    if per_seat and match.acting:
        raise UserError(
            f"evaluation: task {match.task.name} is played in an environment; drop per_seat"
        )
    episodes = await rollout(
        replace(match, keep_ids=False), problems, samples, key, label="evaluation"
    )
    names = [seat.name for seat in match.seats] if per_seat else []
    return await summarise(episodes, samples, match, names)


def evaluate(
    match: Match, problems: Sequence[Problem], samples: int, key: Key, *, per_seat: bool = False
) -> Evaluation:
    """``evaluate_async`` in an event loop of its own."""
    return run_alone(
        lambda: evaluate_async(match, problems, samples, key, per_seat=per_seat), [match.engine]
    )


async def summarise(
    episodes: Sequence[Episode], samples: int, match: Match, seats: Sequence[str] = ()
) -> Evaluation:
    """The evaluation of whole groups of ``samples`` episodes, as ``rollout`` orders them, with rows
    for ``seats``: each one's last message, graded as if it were the answer.

    A text is graded once a problem, several texts and votes at a time.
    """
    groups = [episodes[i : i + samples] for i in range(0, len(episodes), samples)]
    graders = Graders(match.task, match.grading_seconds)
    names = [seat.name for seat in match.seats]
    last = {seat: [[_last(e, seat) for e in group] for group in groups] for seat in seats}
    # A team's answer is mostly some seat's last message.
    scores: dict[tuple[str, str | None], float | None] = {
        (e.problem.id, e.answer): e.reward for e in episodes if e.failure is None
    }
    problems = {episode.problem.id: episode.problem for episode in episodes}
    asked = {
        (group[0].problem.id, text): None
        for of_seat in last.values()
        for group, texts in zip(groups, of_seat, strict=True)
        for text in texts
    }
    missing = [at for at in asked if at not in scores]

    async def score(at: tuple[str, str | None]) -> float | None:
        try:
            return (await graders.grade(problems[at[0]], at[1], names)).score
        except EpisodeFailure:  # counted: None is what did not get a grade
            return None

    async def elected(texts: Sequence[str | None]) -> int | None:
        try:
            return await graders.elect([text or "" for text in texts])
        except EpisodeFailure:  # what cannot be counted elects nobody
            return None

    async def voted(
        scores_PK: Sequence[Sequence[float | None]], texts_PK: Sequence[Sequence[str | None]]
    ) -> Scores:
        winners = await together([elected(texts) for texts in texts_PK])
        given_PK = tuple(tuple(0.0 if s is None else s for s in row) for row in scores_PK)
        return Scores(
            given_PK,
            tuple(
                0.0 if winner is None else row[winner]
                for winner, row in zip(winners, given_PK, strict=True)
            ),
            failed=sum(s is None for row in scores_PK for s in row),
        )

    def of(texts_PK: Sequence[Sequence[str | None]]) -> list[list[float | None]]:
        return [
            [scores[group[0].problem.id, text] for text in texts]
            for group, texts in zip(groups, texts_PK, strict=True)
        ]

    scores |= dict(zip(missing, await together([score(at) for at in missing]), strict=True))
    # By conversation, then by seat: a tie goes to the earliest conversation.
    pooled = [[_last(e, seat) for e in group for seat in seats] for group in groups]
    # In an environment the reward is the game's, and the same last action may earn another.
    team = await voted(
        [[None if e.failure is not None else e.reward for e in group] for group in groups],
        [[episode.answer for episode in group] for group in groups],
    )
    return Evaluation(
        problem_ids=tuple(group[0].problem.id for group in groups),
        team=team,
        seats={seat: await voted(of(texts), texts) for seat, texts in last.items()},
        pooled=await voted(of(pooled), pooled) if seats else None,
        episodes=tuple(episodes),
    )


def report(evaluation: Evaluation) -> dict[str, Any]:
    """The rows of a report, each with what it cost a problem.

    All rows come from the same K conversations a problem. ``team`` and each of ``seats`` have K
    answers, a seat's being its last message (one that never spoke has no row); ``pooled`` has the
    seats' last messages together, n·K of them; ``oracle`` takes the best of each conversation.
    ``budget`` says beside each row how many answers it chose from, how many conversations were
    played for them, and the tokens read and written in those (seats: by that seat; null where the
    server did not count). ``failures`` counts the conversations that failed, by whose failure it
    was and its kind; ``failed`` in a row its answers without a grade. Both score 0. ``groups`` has
    the team's figures on the problems of each group that they name.
    """
    episodes = evaluation.episodes
    turns = [turn for episode in episodes for turn in episode.turns]
    k = evaluation.team.samples
    whole = {"conversations": k, **_read_and_written(turns)}
    found: dict[str, Any] = {
        "problems": len(evaluation.problem_ids),
        "k": k,
        "team": figures_of(evaluation.team),
        "seats": {name: figures_of(scores) for name, scores in evaluation.seats.items()},
        "tokens": whole["completion_tokens"],
        "budget": {
            "team": {"answers": k, **whole},
            "seats": {
                name: {
                    "answers": k,
                    "conversations": k,
                    **_read_and_written([turn for turn in turns if turn.seat == name]),
                }
                for name in dict.fromkeys(turn.seat for turn in turns)
            },
        },
        "failures": count_failures(episodes),
    }
    if evaluation.pooled is not None and evaluation.oracle is not None:
        found["pooled"] = figures_of(evaluation.pooled)
        found["oracle"] = figures_of(evaluation.oracle)
        for name in ("pooled", "oracle"):
            found["budget"][name] = {"answers": len(evaluation.seats) * k, **whole}
    if evaluation.groups:
        found["groups"] = {
            name: {"problems": len(places), **figures_of(evaluation.team.at(places))}
            for name, places in evaluation.groups.items()
        }
    found["cut_by_length"] = sum(t.finish_reason == "length" for t in turns) / max(1, len(turns))
    found["environment_tokens"] = sum(episode.environment_tokens for episode in episodes)
    found["per_problem"] = [
        {"id": id, "scores": list(scores), "majority": majority}
        for id, scores, majority in zip(
            evaluation.problem_ids,
            evaluation.team.scores_PK,
            evaluation.team.majority_P,
            strict=True,
        )
    ]
    return found


def summary_of_graded(
    scores: Scores, missing: int, components: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """The figures of responses that were written elsewhere; problems may have different numbers of
    them. ``missing`` counts problems without any, which are in no figure but
    ``score_with_missing``, where each counts 0."""
    figures = figures_of(scores)
    rows = scores.by_problem
    found: dict[str, Any] = {
        "rows": len(rows),
        "responses": sum(map(len, scores.scores_PK)),
        "score": figures.pop("avg_at_k"),
        "interval": score_interval(rows),
        "missing": missing,
        "failed": scores.failed,
        "components": mean_components(components),
    }
    if missing:
        found["score_with_missing"] = sum(rows) / (len(rows) + missing)
    if max(map(len, scores.scores_PK)) > 1:
        # pass@k needs k samples of every problem.
        fewest = scores.samples
        ks = sorted({2**e for e in range(20) if 2**e <= fewest} | {fewest})
        found["pass_at"] = {str(k): scores.pass_at_k(k) for k in ks}
        found["majority"] = figures["majority"]
    said = ("interval", "pass_at_k", "majority", "failed")
    return found | {name: value for name, value in figures.items() if name not in said}


def paired_difference(before: Evaluation, after: Evaluation) -> Estimate:
    """Mean of after minus before over the problems, each by the mean of its samples, with a 95%
    interval of the paired differences. The numbers of samples may differ.

    Raises UserError if the two do not hold the same problems.
    """
    old = dict(zip(before.problem_ids, before.team.by_problem, strict=True))
    new = dict(zip(after.problem_ids, after.team.by_problem, strict=True))
    unpaired = sorted(set(old) ^ set(new))
    if unpaired:
        raise UserError(
            f"evaluation: {len(unpaired)} problems are in one of the two only, "
            f"first {unpaired[0]!r}; evaluate both on the same problems"
        )
    return mean_estimate([new[i] - old[i] for i in old], -1.0, 1.0)


def _last(episode: Episode, seat: str) -> str | None:
    """The seat's last message in a conversation; None if it said nothing."""
    return next((turn.text for turn in reversed(episode.turns) if turn.seat == seat), None)


def _read_and_written(turns: Sequence[Turn]) -> dict[str, int | None]:
    """Tokens read and written; None where a message was written and no token counted."""
    known = all(turn.completion_tokens or not turn.text for turn in turns)
    return {
        "prompt_tokens": sum(turn.prompt_tokens for turn in turns) if known else None,
        "completion_tokens": sum(turn.completion_tokens for turn in turns) if known else None,
    }
