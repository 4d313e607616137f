"""reasoning-gym's data sets: held out by seed, the same in every process, graded safely."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from satune.tasks.catalog import load_task
from satune.tasks.gym import EVALUATED, PARSED, REFUSED, ReasoningGym, is_plain, last_answer
from satune.types import UserError


def some(task: ReasoningGym, split: str, count: int) -> list[tuple[str, str]]:
    return [(p.id, p.text) for p in itertools.islice(task.problems(split), count)]


def test_problems_are_a_function_of_seed_split_and_index() -> None:
    task, again = ReasoningGym("chain_sum", seed=3), ReasoningGym("chain_sum", seed=3)
    streams = {split: some(task, split, 130) for split in ("train", "eval", "certify")}
    assert again.problem_at("eval", 129).text == streams["eval"][129][1]
    assert some(ReasoningGym("chain_sum", seed=4), "train", 9) != streams["train"][:9]
    texts = [text for stream in streams.values() for _, text in stream]
    # 390 sums of 2 to 6 numbers of up to four digits: few of them are short enough to come twice.
    assert len(set(texts)) > 380
    assert len({identity for stream in streams.values() for identity, _ in stream}) == 390


def test_the_data_sets_own_options_reach_it() -> None:
    task = ReasoningGym("chain_sum", {"min_terms": 2, "max_terms": 2, "max_digits": 1})
    for _, text in some(task, "train", 20):
        said = text.split(": ", 1)[1].split(" =")[0]
        assert len(said.split()) == 3, said


def test_an_answer_is_what_stands_between_the_last_tags() -> None:
    task = ReasoningGym("chain_sum")
    problem = task.problem_at("eval", 0)
    gold = str(problem.answer)
    for text, score in (
        (f"First <answer>0</answer>, no: <answer> {gold} </answer>", 1.0),
        (f"<think><answer>{gold}</answer></think> I give up", 0.0),
        (f"<answer>{gold}", 0.0),
        (gold, 0.0),
        ("<answer>no</answer>", 0.0),
        ("", 0.0),
        (None, 0.0),
    ):
        assert task.grade(problem, text).score == score, text
    assert last_answer("</answer><answer>") is None
    whole = ReasoningGym("chain_sum", answer="message", instruction="")
    assert whole.problem_at("eval", 0).text + "\n\n" == problem.text.partition("Write")[0]
    assert whole.grade(whole.problem_at("eval", 0), gold).score == 1.0


def test_scorers_of_their_own_take_every_right_answer() -> None:
    """24 from four numbers has many ways; the scorer's .01 for any text is the scorer's."""
    task = ReasoningGym("puzzle24")
    problem = task.problem_at("train", 5)
    entry = task._entry("train", 5)
    right = str(entry["answer"])
    assert task.grade(problem, f"<answer>({right})</answer>").score == 1.0
    assert task.grade(problem, "<answer>1+1</answer>").score == 0.01


@pytest.mark.parametrize(
    ("dataset", "answer", "plain"),
    [
        ("countdown", "(3 + 4) * 12 / 2", True),
        ("countdown", "exec(chr(112))", False),
        ("countdown", "().__class__", False),
        ("countdown", "2 .real", False),
        ("puzzle24", "print", False),
        ("simple_integration", "x**2/2 + log(x) + C", True),
        ("simple_integration", "lambda: x", False),
        ("simple_integration", "exit()", False),
        ("n_queens", "[['Q', '_'], ['_', 'Q']]", True),
        ("n_queens", "__import__('os').abort()", False),
        ("string_insertion", "['A', 'B']", True),
        ("spiral_matrix", "1 2 3", True),
        ("spiral_matrix", "print(1)", False),
        ("spiral_matrix", "f'{x}'", False),
        ("chain_sum", "print(1)", True),
    ],
)
def test_what_a_scorer_would_evaluate_is_a_value_or_not_handed_to_it(
    dataset: str, answer: str, plain: bool
) -> None:
    assert is_plain(dataset, answer) is plain


def test_an_answer_that_would_run_code_scores_nothing_and_runs_nothing(tmp_path) -> None:
    task = ReasoningGym("n_queens")
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').write('x')"
    grade = task.grade(task.problem_at("eval", 0), f"<answer>{code}</answer>")
    assert (grade.score, grade.detail) == (0.0, "the answer is more than a value")
    assert not mark.exists()


def test_what_a_scorer_cannot_read_scores_nothing() -> None:
    task = ReasoningGym("prime_factorization")
    grade = task.grade(task.problem_at("eval", 0), "<answer>two by two</answer>")
    assert grade.score == 0.0 and "cannot read it" in grade.detail


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "chain_sun"}, "no dataset 'chain_sun' (nearest: chain_sum;"),
        ({"dataset": "composite"}, "dataset 'composite': it is made of others; name one of them"),
        ({"dataset": "chain_sum", "options": {"min_termz": 2}},
         "chain_sum has no option 'min_termz' (nearest: min_terms;"),
        ({"dataset": "chain_sum", "options": {"min_terms": -1}},
         "options of chain_sum: min_terms must be positive"),
        ({"dataset": "chain_sum", "options": {"seed": 1}}, "options: seed is satune's own"),
        ({"dataset": "chain_sum", "answer": "box"}, "answer is 'box'; choose tag or message"),
        ({}, "option 'dataset' is needed"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(options, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_task("reasoning_gym", None, 0, None, **options)
    said = str(caught.value)
    assert said.startswith("task reasoning_gym: ") and message in said and "\n" not in said


def test_every_data_set_that_evaluates_answers_is_known() -> None:
    """By its source: a release that adds one has to be looked at."""
    from reasoning_gym.factory import DATASETS

    # These evaluate what they made themselves, or parse answers with a reader of their own.
    own = {
        "basic_arithmetic",
        "bitwise_arithmetic",
        "number_sorting",
        "propositional_logic",
        "codeio",
    }
    found = set()
    for name, (made, _) in DATASETS.items():
        source = inspect.getsource(sys.modules[made.__module__])
        if any(call in source for call in (" eval(", "(eval(", "parse_expr(", "exec(")):
            found.add(name)
    assert found - own == EVALUATED | PARSED | {"polynomial_multiplication"}
    assert "polynomial_multiplication" in REFUSED


def test_data_sets_that_draw_without_their_seed_are_refused() -> None:
    """By their source: the random module's own functions are nobody's seed. Numpy's are seeded for
    each problem where they are used."""
    import reasoning_gym

    root = Path(reasoning_gym.__file__).parent
    drawing = re.compile(r"(?<![\w.])random\.(?!Random\b)\w+\(")
    found = {p.relative_to(root).parts for p in root.rglob("*.py") if drawing.search(p.read_text())}
    assert found == {("induction", "list_functions", "generators.py")}
    for name in ("list_functions", "codeio"):
        with pytest.raises(UserError, match=rf"dataset '{name}': .* without a seed"):
            ReasoningGym(name)


def test_one_thread_at_a_time_generates_and_what_is_printed_goes_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task, inside, most = ReasoningGym("chain_sum"), [0], [0]
    at = type(task._chunk("train", 0)).__getitem__

    def watched(self: Any, index: int) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.002)
        print("generating")
        inside[0] -= 1
        return at(self, index)

    monkeypatch.setattr(type(task._chunk("train", 0)), "__getitem__", watched)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: task.problem_at("train", index), range(40)))
    print("afterwards")
    said = capsys.readouterr()
    assert most == [1] and said.out == "afterwards\n" and said.err.count("generating") == 40


_PRINT = """
import json
from reasoning_gym.factory import DATASETS
from satune.tasks.gym import REFUSED, ReasoningGym
found = {}
for name in sorted(DATASETS.keys() - REFUSED.keys()):
    task = ReasoningGym(name, seed=1)
    found[name] = [[p.text, p.answer] for p in (task.problem_at("eval", i) for i in (0, 2))]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_all_data_sets_are_the_same_in_every_process() -> None:
    found = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        ended = subprocess.run(
            [sys.executable, "-c", _PRINT],
            env=environment, stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
        found.append(json.loads(ended.stdout))
    assert len(found[0]) > 90
    assert found[0] == found[1]


@pytest.mark.slow
def test_gold_answers_of_all_data_sets_score_one_and_may_be_handed_over() -> None:
    """Scored here: starting a process for each of them would take most of the time."""
    from reasoning_gym.factory import DATASETS

    golden = 0
    for name in sorted(DATASETS.keys() - REFUSED.keys()):
        task = ReasoningGym(name, seed=3)
        for split, index in itertools.product(("train", "eval", "certify"), range(8)):
            entry, gold = task._entry(split, index), task.problem_at(split, index).answer
            if gold is not None:
                golden += 1
                assert is_plain(name, gold), (name, gold)
                assert task._chunk(split, 0).score_answer(gold, entry) == 1.0, (name, gold)
    assert golden > 2000
