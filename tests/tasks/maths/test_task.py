r"""The maths tasks: the table of formats, real rows, damage, and texts meant to do harm."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark_rows import rows_of
from satune.play.grading import Graders
from satune.tasks.catalog import load_task
from satune.tasks.maths import worker
from satune.tasks.maths.boxes import as_decimal, last_box, same_plainly, tidy
from satune.tasks.maths.task import Aime24, Math500, Maths, damaged
from satune.tasks.pool import Failure
from satune.types import EpisodeFailure, Problem, UserError
from yardstick import at_most

pytest.importorskip("mpmath")

THINKS_SIXTY = r"<think>perhaps \boxed{60}</think> "


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    rows = [{"id": "one", "problem": "1 + 1?", "answer": "2"}]
    return Maths(write(tmp_path_factory.mktemp("maths") / "rows.jsonl", rows), eval_fraction=1.0)


# (reference, message, score, why). "kept" marks verdicts that a person might not share and that
# graders of this field have in common.
CASES: list[tuple[str, str, int, str]] = [
    # Where the answer stands
    ("5", r"\boxed{5}", 1, "plain"),
    ("5", r"first \boxed{3}, no: \boxed{5}", 1, "the last of several boxes"),
    ("5", r"first \boxed{5}, no: \boxed{3}", 0, "the last of several boxes"),
    ("5", r"\boxed{5}. Hence 7 apples remain for 8 people.", 1, "text after the box"),
    ("5", "The answer is 5.", 0, "no box"),
    ("5", r"\boxed{5", 0, "never closed"),
    ("5", r"\boxed{5} and then \boxed{6", 1, "the last balanced box"),
    ("5", r"\boxed{5} (as asked, in \boxed{})", 1, "an empty box says nothing"),
    ("5", r"\boxed{}", 0, "empty"),
    ("5", r"\boxed{\boxed{5}}", 1, "a box in a box"),
    ("5", r"\fbox{5}", 1, "the other box of the MATH solutions"),
    ("5", r"\boxed {5}", 1, "a space before the brace"),
    ("5", r"\\boxed{5}", 1, "escaped once too often"),
    ("5", r"$$\boxed{5}$$", 1, "in display mathematics"),
    ("5", r"**\boxed{5}**", 1, "in bold markdown"),
    ("5", r"\boxed{$5$}", 1, "dollars inside"),
    ("5", r"\boxed{5.}", 1, "a full stop inside"),
    ("5", "\\boxed{\n5\n}", 1, "line breaks inside"),
    ("60", THINKS_SIXTY + r"So \boxed{61}.", 0, "a box in a thought does not count"),
    ("60", THINKS_SIXTY + "So it is 60.", 0, "a box in a thought does not count"),
    ("61", THINKS_SIXTY + r"So \boxed{61}.", 1, "after the thought"),
    ("60", r"<think>\boxed{60} but let me check", 0, "a thought that never ended is no answer"),
    ("60", r"so 60</think> \boxed{60}", 1, "the template opened the thought"),
    (r"\frac{1}{1+\frac{1}{2}}", r"\boxed{\frac{1}{1+\frac{1}{2}}}", 1, "nested braces"),
    # Numbers
    ("70", r"\boxed{070}", 1, "leading zero"),
    ("70", r"\boxed{+70}", 1, "plus sign"),
    ("19", r"\boxed{\textbf{(019)}}", 1, "as the AIME solutions write it"),
    ("19", r"\boxed{\text{19}}", 1, "in \\text"),
    ("-3", "\\boxed{\u22123}", 1, "Unicode minus"),
    ("-3", r"\boxed{3}", 0, "sign"),
    ("3", r"\boxed{3.5}", 0, "no truncation"),
    ("3", r"\boxed{3.0}", 1, "same value"),
    ("3", r"\boxed{3.0000001}", 0, "plain numbers are compared exactly"),
    (".0000672", r"\boxed{0.0000673}", 0, "decimals are not rounded"),
    (".0000672", r"\boxed{6.72 \times 10^{-5}}", 1, "scientific notation"),
    ("1000", r"\boxed{10^3}", 1, "power"),
    ("10", r"\boxed{1e1}", 0, "kept: e is a letter"),
    ("58,500", r"\boxed{58500}", 1, "thousands separator in the reference"),
    ("58500", r"\boxed{58{,}500}", 1, "LaTeX thousands separator"),
    (r"\$32,\!348", r"\boxed{32348}", 1, "currency and thin space"),
    ("18.9", r"\boxed{\$18.90}", 1, "currency and trailing zero"),
    (r"\frac{1}{2}", r"\boxed{\dfrac{1}{2}}", 1, "dfrac"),
    (r"\frac{1}{2}", r"\boxed{\frac12}", 1, "no braces"),
    (r"\frac{1}{2}", r"\boxed{\tfrac{2}{4}}", 1, "not reduced, same value"),
    (r"\frac{1}{2}", r"\boxed{1/2}", 1, "slash"),
    (r"\frac{1}{2}", r"\boxed{0.5}", 1, "decimal"),
    (r"\frac{1}{3}", r"\boxed{0.333}", 0, "rounded too early"),
    (r"\frac{1}{3}", r"\boxed{0.3333333}", 1, "kept: six decimals agree"),
    (r"137 \frac{1}{2}", r"\boxed{137.5}", 1, "mixed number"),
    (r"1\frac{4}{5}", r"\boxed{\frac{9}{5}}", 1, "mixed number"),
    (r"\sqrt{51}", r"\boxed{\sqrt{52}}", 0, "another radicand"),
    (r"\frac{\sqrt{2}}{2}", r"\boxed{\frac{1}{\sqrt{2}}}", 1, "not rationalised, same value"),
    (r"\sqrt{2}", r"\boxed{1.414}", 0, "rounded too early"),
    ("52_8", r"\boxed{52_{8}}", 1, "base, braced"),
    ("52_8", r"\boxed{52}", 1, "base left out, as the question fixes it"),
    ("52_8", r"\boxed{52_9}", 0, "another base"),
    # Units
    ("50", r"\boxed{50\%}", 1, "kept: the percent sign as a unit"),
    (r"50\%", r"\boxed{0.5}", 1, "percent as a fraction"),
    (r"90^\circ", r"\boxed{90}", 1, "degrees left out"),
    ("90", r"\boxed{90^\circ}", 1, "degrees given"),
    (r"\frac{270}7\text{ degrees}", r"\boxed{\frac{270}{7}}", 1, "unit in words"),
    (r"15\mbox{ cm}^2", r"\boxed{15}", 1, "unit left out"),
    ("15", r"\boxed{15 \text{ apples}}", 1, "unit given"),
    # Pairs, sets, intervals
    ("(2,4)", r"\boxed{(4,2)}", 0, "a point has an order"),
    ("(2,4)", r"\boxed{\left( 2, 4 \right)}", 1, "left and right"),
    ("1,-2", r"\boxed{-2, 1}", 1, "solutions have none"),
    ("3, 5, 7", r"\boxed{3, 5}", 0, "one is missing"),
    ("12", r"\boxed{12, 13}", 0, "one too many"),
    ("12", r"\boxed{12 \text{ or } 13}", 0, "no hedging"),
    (r"\{1\pm\sqrt{5},-2\}", r"\boxed{\{-2, 1+\sqrt{5}, 1-\sqrt{5}\}}", 1, "plus-minus in a set"),
    (r"1 \pm \sqrt{19}", r"\boxed{1+\sqrt{19}, 1-\sqrt{19}}", 1, "plus-minus written out"),
    (r"1 \pm \sqrt{19}", r"\boxed{1+\sqrt{19}}", 0, "half of plus-minus"),
    ("(3,4]", r"\boxed{(3,4)}", 0, "open and closed ends"),
    (r"(2,\infty)", r"\boxed{(2,+\infty)}", 1, "signed infinity"),
    (r"x \in [-2,7]", r"\boxed{[-2,7]}", 1, "the set alone"),
    (r"(5,\infty)", r"\boxed{x > 5}", 0, "kept: an inequality is no set"),
    (r"(2,12) \cup (12,102)", r"\boxed{(12,102) \cup (2,12)}", 1, "order of a union"),
    (r"\infty", r"\boxed{\text{infinite}}", 0, "kept: a word is no value"),
    # Equations and expressions
    ("x=5", r"\boxed{5}", 1, "name left out"),
    ("5", r"\boxed{x=5}", 1, "name given"),
    ("5", r"\boxed{x=6}", 0, "name given, value wrong"),
    ("y = 2x + 3", r"\boxed{2x+3}", 1, "kept: the right side alone"),
    ("y = 2x + 3", r"\boxed{y - 2x = 3}", 1, "rearranged"),
    ("y = 2x + 3", r"\boxed{y = 3x + 2}", 0, "another line"),
    ("x^3+3x-6", r"\boxed{-6+3x+x^3}", 1, "order of terms"),
    ("p - q", r"\boxed{q - p}", 0, "sign"),
    ("xy", r"\boxed{yx}", 1, "order of factors"),
    ("2k", r"\boxed{2n}", 0, "another name"),
    ("6 - 5i", r"\boxed{-5i + 6}", 1, "complex"),
    ("6 - 5i", r"\boxed{6 + 5i}", 0, "its conjugate"),
    (
        r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}",
        r"\boxed{\begin{bmatrix} 0.2 \\ -3.6 \end{bmatrix}}",
        1,
        "matrix: brackets and decimals",
    ),
    (
        r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}",
        r"\boxed{\begin{pmatrix} -18/5 \\ 1/5 \end{pmatrix}}",
        0,
        "matrix: order",
    ),
    # Words and choices
    (r"\text{Evelyn}", r"\boxed{Evelyn}", 1, "a name without \\text"),
    (r"\text{Evelyn}", r"\boxed{\text{Carla}}", 0, "another name"),
    (r"\text{east}", r"\boxed{\text{East}}", 1, "kept: case is ignored"),
    (r"\text{(C)}", r"\boxed{C}", 1, "choice without parentheses"),
    (r"\text{(C)}", r"\boxed{\textbf{(C)}}", 1, "choice in bold"),
    (r"\text{(C)}", r"\boxed{\text{(D)}}", 0, "another choice"),
    # What must not slip through
    ("7", r"\boxed{garbage 7 \frac{}}", 0, "no number is fished out of what cannot be read"),
    ("5", r"\boxed{5 \neq 6}", 0, "no answer"),
    ("5", r"\boxed{4+\text{one}}", 0, "half in words"),
    ("12", r"\boxed{9^{9^{9^{9}}}}", 0, "does not end in time"),
]


@pytest.mark.parametrize(("gold", "message", "score", "why"), CASES)
def test_formats(task, gold, message, score, why):
    grade = task.grade(Problem.of("p", "?", gold), message)
    assert grade.score == score, f"{why}: {grade.detail}"


def test_the_table_is_large_enough():
    assert len(CASES) >= 45 and len({case[:2] for case in CASES}) == len(CASES)


# -- real rows -----------------------------------------------------------------------------------

REAL = [
    ("aime24", "aime24", 30),
    ("aime25", "aime25", 30),
    ("math500", "math500", 343),
    ("maths", "deepscaler_train_2k", 2000),
    ("maths", "aime_1983_2023_train", 975),
]


@pytest.mark.parametrize(("name", "file", "rows"), REAL)
def test_every_real_answer_scores_1_in_a_box(name, file, rows):
    task = load_task(name, rows_of(file))
    problems = list(task.problems("all"))
    assert len(problems) == rows
    wrong = [
        (problem.id, problem.answer)
        for problem in problems
        if task.grade(problem, f"Thus the answer is $\\boxed{{{problem.answer}}}$.").score != 1.0
    ]
    assert wrong == []


def damages(answer: str) -> list[str]:
    """Answers that a person would call different from this one."""
    found = [damaged(answer)]
    plain = as_decimal(answer)
    if plain is not None and plain.denominator == 1:
        found += [str(plain + 1), str(plain - 1), f"{plain}.5", f"{plain}0" if plain else "10"]
    if plain:
        found.append(answer.removeprefix("-") if answer.startswith("-") else f"-{answer}")
    if answer in (r"\text{(A)}", r"\text{(B)}", r"\text{(C)}", r"\text{(D)}", r"\text{(E)}"):
        found += [rf"\text{{({other})}}" for other in "ABCDE" if other != answer[7]]
    return found


@pytest.mark.parametrize(("name", "file", "rows"), REAL)
def test_every_damaged_real_answer_scores_0(name, file, rows):
    task = load_task(name, rows_of(file))
    # The non-numeric answers of the large set take a while: its first 400 rows here.
    problems = list(task.problems("all"))[:400]
    wrong = [
        (problem.id, problem.answer, damage)
        for problem in problems
        for damage in damages(str(problem.answer))
        if task.grade(problem, f"Thus the answer is $\\boxed{{{damage}}}$.").score != 0.0
    ]
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "file", "rows"), REAL)
def test_the_real_rows_pass_their_own_check(name, file, rows):
    load_task(name, rows_of(file)).validate()


@pytest.mark.parametrize(
    ("name", "file"), [("aime24", "aime24"), ("aime25", "aime25"), ("math500", "math500")]
)
def test_reference_solutions_are_right(name, file):
    """The last box of a whole reference solution; those of AIME 2025 hold \\textbf{(019)} twice."""
    task = load_task(name, rows_of(file))
    solutions = {}
    for line in rows_of(file).read_text().splitlines():
        row = json.loads(line)
        solutions[row["id"]] = row["solution"]
    boxed = [p for p in task.problems("eval") if task.extract(solutions[p.id])]
    assert len(boxed) >= (343 if name == "math500" else 20)
    assert [p.id for p in boxed if task.grade(p, solutions[p.id]).score != 1.0] == []


# -- loading -------------------------------------------------------------------------------------

UPSTREAM = {
    "MATH-500": {"unique_id": "test/1", "problem": "2?", "answer": "2", "solution": r"\boxed{3}"},
    "AIME_2024, capitals": {"ID": "2024-I-1", "Problem": "2?", "Solution": "so 2", "Answer": 2},
    "aime_2024": {"id": 60, "problem": "2?", "solution": r"\boxed{2}", "answer": "2", "year": "2"},
    "AIME2025, question": {"question": "2?", "answer": "002"},
    "aime24, solution only": {"id": 0, "problem": "2?", "solution": r"thus \boxed{2}"},
    "DeepScaleR": {"problem": "2?", "answer": "2", "solution": ""},
    "verl": {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "2?"}],
        "reward_model": {"ground_truth": "2", "style": "rule"},
    },
    "a list of one": {"problem": "2?", "final_answer": ["2"]},
    "a float": {"problem": "2?", "answer": 2.0},
    "boxed already": {"problem": "2?", "answer": r"\boxed{2}"},
    "null beside": {"problem": "2?", "answer": None, "expected_answer": "$2$"},
}


@pytest.mark.parametrize("form", UPSTREAM)
def test_upstream_formats_are_read(tmp_path, form):
    row = UPSTREAM[form]
    task = Maths(write(tmp_path / "rows.jsonl", [row]), eval_fraction=1.0)
    (problem,) = task.problems("eval")
    identity = row.get("unique_id", row.get("ID", row.get("id")))
    assert problem.id == ("maths-0" if identity is None else str(identity))
    assert problem.text.startswith("2?\n\n") and r"\boxed{}" in problem.text
    assert task.grade(problem, r"\boxed{2}").score == 1.0
    assert task.grade(problem, r"\boxed{3}").score == 0.0


def test_parquet_is_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    rows = [{"problem": f"{i}?", "answer": float(i)} for i in range(4)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    problems = list(Math500(tmp_path / "rows.parquet").problems("eval"))
    assert [p.answer for p in problems] == ["0", "1", "2", "3"]
    assert [p.id for p in problems] == [f"math500-{i}" for i in range(4)]


def test_splits(tmp_path):
    rows = [{"problem": f"{i}?", "answer": i} for i in range(20)]
    path = write(tmp_path / "rows.jsonl", rows)
    training = Maths(path, eval_fraction=0.25)
    assert len(list(training.problems("train"))) == 15
    assert list(training.problems("certify")) == list(training.problems("eval"))
    held_out = Aime24(path)
    assert len(list(held_out.problems("eval"))) == len(list(held_out.problems("all"))) == 20
    with pytest.raises(UserError, match="no rows for 'train'; change eval_fraction"):
        held_out.problems("train")


def test_the_instruction_can_be_replaced(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"problem": "1?", "answer": 1}])
    assert next(Aime24(path, instruction="").problems("eval")).text == "1?"
    assert next(Aime24(path, instruction="Go.").problems("eval")).text == "1?\n\nGo."
    assert "0 to 999" in next(Aime24(path).problems("eval")).text


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("maths", [{"problem": "1?", "answer": 1}, {"answer": 1}], "line 2: no problem; name it"),
        ("maths", [{"problem": " ", "answer": 1}], "line 1: the problem is ' '; give a text"),
        ("maths", [{"problem": "1?", "level": 1}], "the fields are: problem, level"),
        ("maths", [{"problem": "1?", "answer": ""}], "line 1: no answer"),
        ("maths", [{"problem": "1?", "answer": "x" * 3000}], "the answer has 3000 characters"),
        ("aime24", [{"problem": "1?", "answer": "1000"}], "AIME has integers from 0 to 999"),
        ("aime25", [{"problem": "1?", "answer": "1/2"}], "for other problems: task maths"),
        (
            "maths",
            [{"id": 1, "problem": "1?", "answer": 1}] * 2,
            "line 2: id '1' stands already in .*line 1",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, name, rows, message):
    with pytest.raises(UserError, match=message):
        load_task(name, write(tmp_path / "rows.jsonl", rows))


def test_a_missing_library_is_one_line(monkeypatch, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"problem": "1?", "answer": 1}])
    monkeypatch.setattr(worker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"task math500: .*pip install 'satune\[math\]'"):
        Math500(path)


def test_validate_names_the_row(tmp_path):
    rows = [{"problem": "1?", "answer": "1"}, {"problem": "2?", "answer": r"5 \neq 6"}]
    path = write(tmp_path / "rows.jsonl", rows)
    Maths(write(tmp_path / "good.jsonl", rows[:1])).validate()
    task = Maths(path)
    # "6" lies behind the reference: a task that reads boxes otherwise would not notice.
    task.extract = lambda text: "1"
    with pytest.raises(UserError, match=r"rows.jsonl, line [12]: the answer"):
        task.validate()


# -- equality, and texts meant to do harm --------------------------------------------------------

VOTED = ["1/2", r"\frac12", "0.5", "5", "05", "x=5", r"(5,\infty)", "x>5", "1,2", "2,1", "(1,2)"]


def test_votes_do_not_depend_on_the_order(task):
    for a in VOTED:
        assert task.equal(a, a)
        for b in VOTED:
            assert task.equal(a, b) == task.equal(b, a), (a, b)
    assert task.equal(r"\frac12", "0.5") and task.equal("5", "x=5") and task.equal("1,2", "2,1")
    # A set answers an inequality, not the other way round; among votes both ways count.
    assert task.equal(r"(5,\infty)", "x>5") and task.equal("x>5", r"(5,\infty)")
    assert not task.equal("5", "05.1") and not task.equal("(1,2)", "(2,1)")


def test_a_process_that_dies_costs_one_grade(task):
    problem = Problem.of("p", "?", r"\frac{1}{2}")
    assert task.grade(problem, r"\boxed{\frac{2}{4}}").score == 1.0
    process = next(iter(task._workers._living))
    process.end()
    # The world's failure: a rollout asks again about the same text.
    with pytest.raises(EpisodeFailure, match="worker: the worker process ended") as ended:
        task.grade(problem, r"\boxed{\frac{3}{6}}")
    assert not ended.value.policy
    assert task.grade(problem, r"\boxed{\frac{3}{6}}").score == 1.0


@pytest.mark.parametrize("kind", ["timeout", "exception"])
def test_a_comparison_without_a_result_is_the_policys_failure(task, monkeypatch, kind):
    monkeypatch.setattr(task._workers, "call", lambda *answers: Failure(kind, "no result"))
    problem = Problem.of("p", "?", r"\frac{1}{2}")
    with pytest.raises(EpisodeFailure, match="grader: no result") as ended:
        asyncio.run(Graders(task, seconds=60).grade(problem, r"\boxed{\frac{5}{10}}", []))
    assert ended.value.policy
    # Among votes they are two answers.
    assert not task.equal(r"\frac{5}{10}", r"\frac{1}{2}")


PIECES = [
    r"\boxed{", r"\boxed", r"\fbox{", "}", "{", r"\{", r"\}", "\\", r"\\", "$", "$$", r"\frac{",
    r"\frac", r"\sqrt[", r"\left(", r"\right]", r"\text{", r"\textbf{(", r"\begin{pmatrix}",
    r"\end{pmatrix}", "&", r"\pm", "^", "^{", "_", "_{", "=", "<", ">", ",", "(", ")", "[", "]",
    "1", "23", "0.5", "-", "+", "*", "/", "!", "%", r"\%", "x", "i", "e", r"\pi", r"\infty",
    r"\int", r"\sum_{", r"\cup", " ", "\n", "\x00", "\u2212", "\ud800", "é", "∞", "<think>",
    "</think>", "answer", "inf", "nan", "1e999", "0x1F", "1_000", "9" * 50,
]  # fmt: skip


def harmful(rng: random.Random) -> str:
    """A random text of LaTeX pieces, or a sound answer with characters changed."""
    if rng.random() < 0.5:
        text = "".join(rng.choices(PIECES, k=rng.randrange(1, 30)))
        return text if rng.random() < 0.5 else f"\\boxed{{{text}}}"
    characters = list(rng.choice(CASES)[1])
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(characters) + 1)
        characters[at : at + rng.randrange(3)] = rng.choice(PIECES)
    return "".join(characters)


def check_extractors(count: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        text, gold = harmful(rng), rng.choice(CASES)[0]
        with at_most(60, text):
            found = last_box(text)
            if found is not None:
                same_plainly(gold, found)
                assert same_plainly(found, found) is bool(tidy(found))


def check_grader(task: Maths, count: int, seed: int) -> None:
    rng = random.Random(seed)
    compared = 0
    for _ in range(count):
        problem, text = Problem.of("p", "?", rng.choice(CASES)[0]), harmful(rng)
        grade = task.grade(problem, text)
        assert grade.score in (0.0, 1.0)
        compared += grade.detail.startswith("read ")
    # The rest has no box: those texts are the extraction's, which has a test of its own.
    assert compared > count / 8


def test_any_text_is_read_without_harm():
    check_extractors(2000, seed=1)


def test_any_text_is_graded_without_harm(task):
    check_grader(task, 300, seed=2)


@pytest.mark.slow
def test_a_hundred_thousand_texts_are_read_without_harm():
    check_extractors(100_000, seed=3)


@pytest.mark.slow
def test_a_hundred_thousand_texts_are_graded_without_harm(task):
    check_grader(task, 100_000, seed=4)


LONG = [
    r"\boxed{" * 50_000,
    r"\boxed{" * 20_000 + "}" * 20_000,
    "\\" * 200_000,
    "{" * 200_000 + "}" * 200_000,
    "\\boxed" + " " * 200_000,
    ("\\boxed" + " " * 100) * 2000,
    "<think>" * 50_000 + "</think>" * 50_000,
    r"\boxed{" + r"\, " * 50_000 + "}",
    r"\boxed{" + "1" * 200_000 + "}",
    r"\boxed{" + r"\textbf{" * 50_000 + "}" * 50_001,
    r"\boxed{" + "9," * 50_000 + "}",
    r"\boxed{" + "1" * 900 + " " * 900 + "_}",
    r"\boxed{7_" + " " * 1900 + "x}",
    r"\boxed{7_" + "\\ " * 900 + "x}",
    r"\boxed{" + "(" * 900 + "7" + " " * 900 + "x}",
]


@pytest.mark.parametrize("index", range(len(LONG)))
def test_long_texts_are_cheap(task, index):
    with at_most(60):
        grade = task.grade(Problem.of("p", "?", "8"), LONG[index])
    assert grade.score == 0.0


@given(st.text(), st.text())
def test_texts_of_any_kind(a, b):
    same = same_plainly(a, b)
    assert same == same_plainly(b, a)
    assert last_box(a) is None or last_box(a) in a
    if a.strip() and "}" not in a and "{" not in a and "\\" not in a and "<" not in a:
        assert last_box(f"so \\boxed{{{a}}}") == a.strip()
