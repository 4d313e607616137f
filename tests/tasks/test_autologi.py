from __future__ import annotations

import contextlib
import json
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark_rows import rows_of
from satune.tasks.autologi import AutoLogi
from satune.tasks.catalog import load_task
from satune.tasks.literals import find_literal, read_literal
from satune.types import UserError
from yardstick import at_most

CHECK = "def inputs_check(inputs):\n    return isinstance(inputs, list) and len(inputs) == 2"
RULES = (
    "def rising(inputs):\n    return inputs[0] < inputs[1]\n"
    "def small(inputs):\n    return inputs[1] < 10\n"
    "constraint_list = [rising, small]"
)


def row(**changes):
    code = {"Inputs_Check_code": CHECK, "Constraint_List_code": RULES, "Traverse_code": ""}
    return {"idx": 1, "prompt": "Two numbers.", "example": "[5, 4]", "code": code, "lang": "en",
            **changes}  # fmt: skip


def write(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def task(tmp_path):
    return AutoLogi(write(tmp_path / "rows.jsonl", row()), eval_fraction=0.0)


@pytest.fixture
def problem(task):
    return next(iter(task.problems("all")))


# What is read, and why
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("[1, 2]", "[1, 2]"),  # a list
        ("so [3, 4], no: [1, 2].", "[1, 2]"),  # the last list
        ("{'a': 1} then [1, 2]", "{'a': 1}"),  # a dictionary goes before a list
        ("{'a': 1} then {'b': {'c': 2}}", "{'b': {'c': 2}}"),  # the last one, whole
        ("[[1, 2], [3]]", "[[1, 2], [3]]"),  # brackets are balanced
        ("```json\n[1, 2]\n```", "[1, 2]"),  # a fenced block
        ("```\n[3]\n```\n```python\n[1, 2]\n```\n{'a': 1}", "[1, 2]"),  # the last block, first
        ("{'a': 1}\n```python\nprint(1)\n```", None),  # a block that is no literal hides the rest
        ("```python\ninputs = [1, 2]\n```", "[1, 2]"),  # the right side of an assignment
        ("```\n[1, 2]  # rising\n```", "[1, 2]"),  # Python's comments
        ("```\n[1, // one\n2]\n```", "[1, 2]"),  # the benchmark drops these too
        ('{"a": true, "b": null}', "{'a': True, 'b': None}"),  # JSON's words
        ('{"a": "true"}', "{'a': 'true'}"),  # not inside a string
        ('{"a": "http:\\/\\/x"}', "{'a': 'http:\\\\/\\\\/x'}"),  # Python's reading first
        ("```python\n[1, 2", None),  # cut off: neither block nor list
        ("{ thinking: [1, 2]", "[1, 2]"),  # a brace that is never closed hides nothing
        ("[__import__('os').system('true')]", None),  # no literal
        ("[1e999]", None),  # not finite
        ("[" * 60 + "]" * 60, None),  # too deep
        ("[" + "1, " * 10_000 + "]", None),  # too long
        ("{[]: 1}", None),  # no dictionary that Python knows
        ("[" + "9" * 5000 + "]", None),  # more digits than Python reads
        ("[0x" + "f" * 5000 + "]", None),  # a number that cannot be written in decimal
        ("-" * 9000 + "[1]", "[1]"),  # only the list is read
        ("[" + "-" * 9000 + "1]", None),  # the parser gives up, and says so
        ("[1, 2\0]", None),
        ("", None),
        ("no answer", None),
        ("(1, 2)", None),  # a tuple is neither dictionary nor list
        ("```\n(1, 2)\n```", "(1, 2)"),  # in a block any literal counts
        ("```\n{1, 2}\n```", "{1, 2}"),
        ("答案：{'甲': '红'}。", "{'甲': '红'}"),
    ],
)
def test_what_is_read(task, text, answer):
    assert task.extract(text) == answer


@pytest.mark.parametrize(
    ("answer", "score", "detail"),
    [
        ("[1, 2]", 1.0, "format and all constraints hold (read [1, 2])"),
        ("[2, 1]", 0.0, "constraint 1 rising fails (read [2, 1])"),
        ("[1, 12]", 0.0, "constraint 2 small fails (read [1, 12])"),
        ("[1]", 0.0, "the format check fails (read [1])"),
        ("['a', 1]", 0.0, "the check code failed: TypeError: '<' not supported"),
        ("none", 0.0, "no literal found in the answer"),
        (None, 0.0, "no literal found in the answer"),
    ],
)
def test_grades_say_what_failed(task, problem, answer, score, detail):
    grade = task.grade(problem, answer)
    assert grade.score == score and grade.detail.startswith(detail)


def test_code_that_reaches_out_is_not_run(tmp_path):
    bad = row(code={"Inputs_Check_code": "import os\n" + CHECK, "Constraint_List_code": RULES})
    task = AutoLogi(write(tmp_path / "rows.jsonl", bad))
    grade = task.grade(next(iter(task.problems("all"))), "[1, 2]")
    assert grade.score == 0.0
    assert grade.detail == "the row's code was not run: line 1: import of os"
    with pytest.raises(UserError, match=r"rows.jsonl, line 1: its code may not be run .*of os"):
        task.validate()


def test_equal_answers_are_equal_in_any_order(task):
    assert task.equal("{'a': 1, 'b': 2}", "{'b': 2, 'a': 1}")
    assert not task.equal("[1, 2]", "[2, 1]")


def test_languages_and_ids(tmp_path):
    path = write(tmp_path / "rows.jsonl", row(), row(lang="cn"), row(idx=2))
    assert {p.id for p in AutoLogi(path).problems("all")} == {"en-1", "cn-1", "en-2"}
    assert [p.id for p in AutoLogi(path, lang="cn").problems("all")] == ["cn-1"]
    with pytest.raises(UserError, match="no rows of lang 'de'; there are: cn, en"):
        AutoLogi(path, lang="de")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "line 2: field 'prompt' is no text"),
        ({"code": "x"}, "line 2: field 'code' is no object"),
        ({"code": {}}, "line 2, code: no field 'Inputs_Check_code'"),
        (
            {"code": {"Inputs_Check_code": 1, "Constraint_List_code": ""}},
            "line 2: Inputs_Check_code and Constraint_List_code must be text",
        ),
        ({}, "line 2: id 'en-1' stands already in"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, changes, message):
    path = write(tmp_path / "rows.jsonl", row(), row(**changes))
    with pytest.raises(UserError, match=message) as caught:
        AutoLogi(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "needs data"), ({"seconds": 0}, "seconds is 0"), ({"memory": 1}, "memory is 1")],
)
def test_bad_options_are_named(tmp_path, options, message):
    data = write(tmp_path / "rows.jsonl", row()) if options else None
    with pytest.raises(UserError, match=message):
        AutoLogi(data, **options)


def test_validation_fails_for_a_row_that_contradicts_itself(tmp_path):
    path = write(tmp_path / "rows.jsonl", row(accepted=["[2, 1]"]))
    with pytest.raises(UserError, match=r"line 1: accepted \[2, 1\]: constraint 1 rising fails"):
        AutoLogi(path).validate()
    path = write(tmp_path / "rows.jsonl", row(example="[1]"))
    with pytest.raises(UserError, match="line 1: its example is no legal input"):
        AutoLogi(path).validate()


def test_every_fixture_is_graded_as_it_says():
    task = load_task("autologi", rows_of("autologi_format_fixtures"))
    task.validate()
    for problem in list(task.problems("all"))[:2]:
        row = task._rows[problem.id]
        assert task.grade(problem, f"Thus:\n```python\n{row['accepted'][0]}\n```").score == 1.0
        assert task.grade(problem, f"so: {row['rejected_constraint'][0]}").score == 0.0


# Fuzzing

PIECES = [
    "```", "```json\n", "\n", "{", "}", "[", "]", "(", ")", "'", '"', "a", ":", ",", "1", "-", "=",
    "true", "null", "//", "#", "\\", "\0", "é", "\ud800", "inputs = ", "1e999", "0x", "9" * 400,
    "[1, 2]", "{'a': [3]}", "__import__", "*", "**", "[" * 30, "]" * 30, " " * 50, "lambda: ",
]  # fmt: skip


def scrambled(rng: random.Random) -> str:
    text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(40)))
    return text * rng.choice((1, 1, 1, 1, 1, 50))


def read_many(count: int) -> None:
    rng = random.Random(count)
    for _ in range(count):
        text = scrambled(rng)
        with at_most(60, text):
            found = find_literal(text)
            if found is not None:
                with contextlib.suppress(ValueError):
                    assert repr(read_literal(found))


@pytest.mark.timeout(60)
def test_no_text_breaks_the_reader():
    read_many(2_000)


@pytest.mark.slow
def test_no_text_of_many_breaks_the_reader():
    read_many(100_000)


@pytest.mark.parametrize(
    "text",
    ["{" * 10**6, "[" * 10**6 + "]" * 10**6, "```" * 10**6, "```\n" * 500_001, "```" + " " * 10**6,
     "'" * 19_999, '"\\' * 9_999, "[" + "'a' " * 4_990 + "]", "[" + "~" * 19_990 + "]",
     "```\n" + "=" * 19_990 + "\n```", "[" + "1+" * 9_000 + "1]"],
    ids=range(11),
)  # fmt: skip
@pytest.mark.timeout(30)
def test_long_texts_take_their_length_in_time(text):
    with at_most(100):
        found = find_literal(text)
        if found is not None:
            with contextlib.suppress(ValueError):
                read_literal(found)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
))  # fmt: skip
def test_what_python_and_json_write_is_read_back(value):
    assert read_literal(repr(value)) == value
    assert read_literal(json.dumps(value, ensure_ascii=False)) == value


BODIES = [
    "return inputs == {}", "while True: pass", "return 1 / 0", "return [0] * 10 ** 9", "return",
    "raise SystemExit", "return not inputs", "print(inputs)", "return inputs[{}]", "inputs.pop()",
    "return sorted(inputs) == inputs", "return len(inputs) > {}", "def f(): return f()\n    f()",
    "inputs.append(inputs)\n    return inputs", "yield {}", "return lambda: {}", "import {}",
    "return ().__class__.__base__.__subclasses__()[{}]", "x = '\\ud800'; raise ValueError(x)",
]  # fmt: skip


def check_many(count: int) -> None:
    from satune.tasks.sandbox import check

    rng = random.Random(count)
    for _ in range(count):
        functions = "".join(
            f"def f{i}(inputs):\n    {rng.choice(BODIES).replace('{}', str(rng.randrange(9)))}\n"
            for i in range(rng.randrange(3))
        )
        names = ", ".join(f"f{i}" for i in range(rng.randrange(4)))
        code = f"{functions}inputs_check = {rng.choice(['f0', 'bool', 'len', '1'])}\n"
        code += f"constraint_list = [{names}]"
        inputs = rng.choice(["[1, 2]", "[]", "{'a': 1}", "0", "x", "", "[1" * 50, "'\\ud800'"])
        start = time.monotonic()
        verdict = check(code, inputs, seconds=0.5, memory=128 << 20)
        assert time.monotonic() - start < 30
        assert isinstance(verdict.holds, bool) and "\n" not in verdict.detail


def test_no_code_breaks_the_sandbox():
    check_many(60)


@pytest.mark.slow
def test_no_code_of_many_breaks_the_sandbox():
    check_many(1_000)
