from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from satune.tasks import sources
from satune.tasks.rewards import (
    as_number,
    extract_exact,
    extract_numeric,
    reference,
    same_number,
)
from satune.tasks.rows import Rows
from satune.types import UserError

ROWS = [{"prompt": f"{i} + {i}?", "answer": str(2 * i), "level": i} for i in range(20)]

REWARDS = """
import asyncio
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch

def length(completions, **kwargs):
    return [len(c) / 10 for c in completions]

def level(prompts, completions, level, answer):
    assert len(prompts) == len(completions) == len(level) == 1
    return [float(answer[0] in completions[0] and prompts[0].startswith(str(level[0])))]

def chat(prompts, completions, **kwargs):
    assert prompts[0][-1]["role"] == "user"
    (message,) = completions[0]
    return [float(message["role"] == "assistant" and message["content"] == "yes")]

def signed(completions, **kwargs):
    return [-1.0 if "bad" in c else 1.0 for c in completions]

def nothing(completions, **kwargs):
    return [None]

def scalar(completions, **kwargs):
    return 1.0

def other(completions, difficulty):
    return [1.0]

async def later(completions, **kwargs):
    await asyncio.sleep(0)
    return [len(c) / 4 for c in completions]

async def far(completions, **kwargs):
    return [3.0]

def values(prompts, completions, **kwargs):
    # The completion is the expression of what is to be returned.
    return eval(completions[0])
"""


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "train.jsonl", ROWS)


@pytest.fixture
def rewards(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    return f"{tmp_path}/rewards.py"


def test_rows_become_problems_and_a_share_is_held_out(data):
    task = Rows(data, eval_fraction=0.25)
    kept, held = list(task.problems("train")), list(task.problems("eval"))
    assert (len(kept), len(held)) == (15, 5)
    assert sorted((p.text, p.answer) for p in kept + held) == sorted(
        (r["prompt"], r["answer"]) for r in ROWS
    )
    assert not {p.id for p in kept} & {p.id for p in held}
    task.validate()


def test_columns_can_have_other_names(tmp_path):
    data = write(tmp_path / "q.jsonl", [{"q": "1?", "a": 1, "name": "x"}, {"q": "2?", "a": 2}])
    task = Rows(data, prompt="q", answer="a", id="name", reward="numeric")
    assert {p.id for p in task.problems("all")} == {"x", "row-2"}


def test_parquet_reads_as_jsonl_does(tmp_path, data):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    path = tmp_path / "train.parquet"
    parquet.write_table(arrow.Table.from_pylist(ROWS), path)
    assert list(Rows(path).problems("train")) == list(Rows(data).problems("train"))
    with pytest.raises(UserError, match=r"train.parquet, row 1: no field 'question'"):
        Rows(path, prompt="question")


def test_saved_data_sets_read_as_jsonl_does(tmp_path, data):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert list(Rows(tmp_path / "saved").problems("all")) == list(Rows(data).problems("all"))


def test_hub_ids_name_a_set_and_a_split(monkeypatch, tmp_path):
    asked = []

    class Hub:
        @staticmethod
        def load_dataset(name, *configuration, split):
            asked.append((name, *configuration, split))
            return ROWS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_extra", lambda module, source: Hub)
    assert len(list(Rows("org/some-set").problems("all"))) == 20
    Rows("org/some-set:test")
    Rows("org/some-set:grid_mode:test")
    assert asked == [
        ("org/some-set", "train"),
        ("org/some-set", "test"),
        ("org/some-set", "grid_mode", "test"),
    ]


def test_a_missing_package_names_the_extra(monkeypatch, tmp_path):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(sources.importlib, "import_module", absent)
    with pytest.raises(
        UserError, match=r"needs pyarrow; install it with pip install 'satune\[data"
    ):
        Rows(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("text", "exact", "numeric"),
    [
        ("Paris", "Paris", None),
        ("I think.\nAnswer: Paris\n", "Paris", None),
        ("first 3\nthen 1,234", "then 1,234", "1234"),
        (r"so \boxed{42}, not 7", r"so \boxed{42}, not 7", "42"),
        ("2+2\n#### 4\n(of 9)", "(of 9)", "4"),
        ("the answer is -0.5 or 3", "the answer is -0.5 or 3", "-0.5"),
        ("1/2", "1/2", "1/2"),
        ("1/0", "1/0", None),
        ("", None, None),
        ("2+3\n#### 5", "5", "5"),
        ("#### ", "####", None),
        ("it is \u22125", "it is \u22125", "-5"),  # the sign for minus
        ("the answer is \u22120.5", "the answer is \u22120.5", "-0.5"),
        ("from 3\u20135", "from 3\u20135", "5"),  # a dash between two numbers is none
        ("\uff0d\uff11\uff12\uff0e\uff15", "\uff0d\uff11\uff12\uff0e\uff15", "-12.5"),
        ("**Answer:** $\\$1,250$ (of 9)", "** $\\$1,250$ (of 9)", "1250"),
        (r"so \boxed {-7}, not 7", r"so \boxed {-7}, not 7", "-7"),
        ("3 of 5x", "3 of 5x", "3"),  # 5x is no number
        ("f(4,x)", "f(4,x)", "4"),
        ("1,2,3x", "1,2,3x", None),  # nor is a piece of it
        ("The answer is" + " " * 40_000, "The answer is", None),
    ],
)
def test_extraction(text, exact, numeric):
    assert (extract_exact(text), extract_numeric(text)) == (exact, numeric)


@given(st.text() | st.text(alphabet="0123456789.,/-+$ answer:#{}\\boxed", max_size=80))
def test_extraction_never_raises(text):
    extract_exact(text)
    number = extract_numeric(text)
    assert number is None or as_number(number) is not None


def test_numbers_are_compared_by_exact_value():
    assert same_number("0.50", "1/2") and same_number("1,000", "1000") and same_number("$3", "3")
    assert not same_number("0.3333", "1/3") and not same_number("x", "x")


@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ("He has 2+3=<<2+3=5>>5 apples.\n#### 5", "5"),
        ("It falls by 3. #### \u22123", "\u22123"),
        ("so\n#### 1,234\n", "1,234"),
        ("5", "5"),
        ("#### 5", "#### 5"),  # no solution before it: taken as it is
        ("# A\n#### B\ntext", "# A\n#### B\ntext"),  # a heading, not an answer
        ("a ####", "a ####"),
    ],
)
def test_references_that_end_a_worked_solution(answer, final):
    assert reference(answer) == final


def test_gsm8k_rows_need_no_columns_named(tmp_path):
    rows = [
        {"question": "2+3?", "answer": "He has 2+3=<<2+3=5>>5 apples.\n#### 5"},
        {"question": "1000*2?", "answer": "Thousands.\n#### 2,000"},
    ]
    data = write(tmp_path / "gsm8k.jsonl", rows)
    for options in ({}, {"prompt": "question", "answer": "answer"}):  # as the README names them
        for reward in ("numeric", "exact"):
            task = Rows(data, reward=reward, **options)
            task.validate()
            five = next(p for p in task.problems("all") if p.text == "2+3?")
            assert five.answer == "5"
            texts = ("2+3=5\n#### 5", "Answer: 5", "2+3=6\n#### 6", "5 apples, not 6")
            assert [task.grade(five, t).score for t in texts] == [1.0, 1.0, 0.0, 0.0]


def test_gold_references_of_gsm8ks_form_in_the_shared_case():
    path = Path(__file__).resolve().parents[3] / "shared" / "cases" / "15_gsm8k_row.jsonl"
    if not path.is_file():
        pytest.skip(f"no cases at {path}")
    task = Rows(path, prompt="question", answer="answer", reward="numeric")
    task.validate()
    (problem,) = task.problems("all")
    solution = json.loads(path.read_text())["answer"]
    assert task.grade(problem, solution).score == 1.0
    assert task.grade(problem, solution.replace("#### 5", "#### 4")).score == 0.0


def test_built_in_rewards(data):
    task = Rows(data, reward="numeric")
    problem = next(p for p in task.problems("all") if p.answer == "8")
    scores = [task.grade(problem, a).score for a in ("it is 8.0", "8 or 9", "", None)]
    assert scores == [1.0, 0.0, 0.0, 0.0]
    assert Rows(data).grade(problem, "Answer: 8").score == 1.0


def test_reward_functions_get_prompts_completions_and_columns(data, rewards):
    task = Rows(data, reward=f"{rewards}:level")
    problem = next(p for p in task.problems("all") if p.answer == "8")
    assert task.grade(problem, "it is 8").score == 1.0
    assert task.grade(problem, "it is 9").score == 0.0
    assert Rows(data, reward=f"{rewards}:length").grade(problem, "12345").score == 0.5
    task.validate()


def test_chats_are_given_as_messages_and_read_as_one_prompt(tmp_path, rewards):
    chats = [
        [{"role": "user", "content": "one"}],
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
         {"role": "user", "content": [{"type": "text", "text": "c"}]}],
    ]  # fmt: skip
    data = write(tmp_path / "chat.jsonl", [{"prompt": chat} for chat in chats])
    task = Rows(data, reward=f"{rewards}:chat", eval_fraction=0)
    one, two, three = task.problems("train")
    assert [p.text for p in (one, two)] == ["one", "be brief\n\ntwo"]
    assert three.text == "user:\na\n\nassistant:\nb\n\nuser:\nc"
    assert [task.grade(two, a).score for a in ("yes", "no")] == [1.0, 0.0]


@pytest.mark.parametrize(
    "returned",
    [
        "[0.5]", "(0.5,)", "[Fraction(1, 2)]", "[Decimal('0.5')]", "[np.float32(0.5)]",
        "[np.float16(0.5)]", "np.array([0.5])", "np.array([0.5], dtype=object)",
        "[np.array(0.5)]", "torch.tensor([0.5])", "[torch.tensor(0.5)]",
        "torch.tensor([0.5], dtype=torch.bfloat16, requires_grad=True)",
    ],
)  # fmt: skip
def test_rewards_are_numbers_of_any_kind(data, rewards, returned):
    task = Rows(data, reward=f"{rewards}:values")
    grade = task.grade(next(task.problems("all")), returned)
    assert grade.score == 0.5 and type(grade.score) is float


@pytest.mark.parametrize(
    ("returned", "score"),
    [
        ("[True]", 1.0),
        ("[np.bool_(True)]", 1.0),
        ("np.array([1])", 1.0),
        ("torch.tensor([0])", 0.0),
    ],
)
def test_rewards_that_are_whole(data, rewards, returned, score):
    task = Rows(data, reward=f"{rewards}:values")
    assert task.grade(next(task.problems("all")), returned).score == score


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[float('nan')]", "its value is nan; return a finite number"),
        ("[np.float32('inf')]", "its value is inf; return a finite number"),
        ("[Decimal('NaN')]", r"its value is Decimal\('NaN'\)"),
        ("[Fraction(10) ** 400]", r"its value Fraction\(10000.*lies outside \[0, 1\]"),
        ("['0.5']", "its value is '0.5'"),
        ("[0.5j]", "its value is 0.5j"),
        ("[[0.5]]", r"its value is \[0.5\]"),
        ("torch.tensor([[0.5]])", r"its value is \[0.5\]"),
        ("np.zeros(0)", "for one completion"),
        ("np.zeros(200)", "for one completion"),
        ("np.array(0.5)", r"it returned array\(0.5\) for one completion"),
        ("'5'", "it returned '5' for one completion"),
        ("{'a': 1}", "for one completion"),
    ],
)
def test_other_values_are_one_line(data, rewards, returned, message):
    task = Rows(data, reward=f"{rewards}:values")
    with pytest.raises(UserError, match=message) as caught:
        task.grade(next(task.problems("all")), returned)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_coroutine_is_awaited_inside_a_loop_and_outside(data, rewards):
    task = Rows(data, reward=f"{rewards}:later")
    problem = next(task.problems("all"))
    assert task.grade(problem, "abc").score == 0.75

    async def inside() -> float:
        return task.grade(problem, "ab").score

    assert asyncio.run(inside()) == 0.5
    with pytest.raises(UserError, match=r"its value 3.0 lies outside \[0, 1\]"):
        Rows(data, reward=f"{rewards}:far").grade(problem, "x")


def test_what_is_only_thought_is_not_shown_to_a_function(data, rewards):
    task = Rows(data, reward=f"{rewards}:length")
    problem = next(task.problems("all"))
    assert task.grade(problem, "<think>12345").score == 0.0
    # A message that says something is handed over whole, tags included: 7 + 8 + 1 characters.
    with pytest.raises(UserError, match=r"its value 1\.6 lies"):
        task.grade(problem, "<think></think>1")


def test_a_range_is_rescaled_and_needed(data, rewards):
    task = Rows(data, reward=f"{rewards}:signed", reward_range=[-1, 1])
    problem = next(iter(task.problems("train")))
    assert [task.grade(problem, a).score for a in ("bad", "good")] == [0.0, 1.0]
    with pytest.raises(UserError, match=r"its value -1.0 lies outside \[0, 1\]; set reward_range"):
        Rows(data, reward=f"{rewards}:signed").grade(problem, "bad")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "its value is None"),
        ("scalar", "it returned 1.0 for one completion"),
        ("other", "it asks for 'difficulty'; the rows have prompt, answer, level"),
        ("missing", "no 'missing' in it"),
    ],
)
def test_bad_reward_functions_are_named(data, rewards, name, message):
    with pytest.raises(UserError, match=message):
        task = Rows(data, reward=f"{rewards}:{name}")
        task.grade(next(iter(task.problems("train"))), "x")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b'{"prompt": "a", "answer": "b"}\n{"prompt": ', {}, "line 2: damaged row"),
        (b'{"prompt": "a", "answer": "\xff"}', {}, r"line 1: damaged row \(not UTF-8\)"),
        (b'\n{"quest": "a"}\n', {}, "line 2: no field 'prompt'; the fields there are: quest"),
        (b'{"prompt": "a"}', {}, "line 1: no field 'answer'; the fields there are: prompt"),
        (b'{"prompt": "", "answer": "b"}', {}, "line 1: field 'prompt' is empty"),
        (b'{"prompt": "a", "answer": null}', {}, "line 1: field 'answer' is empty"),
        (b'{"prompt": 3, "answer": "b"}', {}, "neither text nor a list of messages"),
        (b'{"prompt": [{"role": "user"}], "answer": "b"}', {}, "without role and content"),
        (b'{"prompt": "a", "answer": "b"}', {"reward": "numeric"}, "'b', which is no number"),
        (b'{"prompt": "a", "answer": "b"}', {"reward": "exakt"}, "unknown reward 'exakt'"),
        (b'{"prompt": "a", "answer": "b"}', {"reward_range": [0, 2]}, "drop reward_range"),
        (b'{"prompt": "a", "answer": "b"}', {"eval_fraction": 2}, "eval_fraction is 2"),
        (b"\n\n", {}, "holds no rows"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, content, options, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Rows(path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.json", b"[" * 100_000, "r.json: not a whole JSON list .nested too deeply.; mend"),
        (
            "r.json",
            b"[" + b"[" * 200 + b"]" * 200 + b"]",
            "not a whole JSON list .nested too deeply",
        ),
        ("r.json", b'[{"prompt": ' + b"7" * 5000 + b"}]", "an integer of more than 4300 digits"),
        (
            "r.json",
            b'[{"prompt": "a"},\n{"prompt"]',
            "r.json, line 2: not a whole JSON list .Expect",
        ),
        ("r.json", b'[{"prompt": "\xff"}]', "r.json: not a whole JSON list .not UTF-8"),
        ("r.jsonl", b'{"answer": ' + b"7" * 5000 + b"}", "line 1: damaged row .an integer of more"),
        ("r.jsonl", b'{"a": ' * 900 + b"1" + b"}" * 900, "line 1: damaged row .nested too deeply"),
        ("r.jsonl", b"\xef\xbb\xbf\n", "it holds no rows"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Rows(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_byte_order_mark_before_rows_of_either_form(tmp_path):
    row = {"id": "a", "prompt": "1+1?", "answer": "2"}
    for name, content in (("l.json", json.dumps([row])), ("r.jsonl", json.dumps(row))):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert [p.id for p in Rows(tmp_path / name).problems("all")] == ["a"]


def test_rows_whose_id_is_null_are_numbered(tmp_path):
    rows = [{"prompt": f"q{i}", "answer": "1", "id": i or None} for i in (1, 0, 0)]
    task = Rows(write(tmp_path / "r.jsonl", rows), eval_fraction=0)
    assert [p.id for p in task.problems("all")] == ["1", "row-2", "row-3"]


def test_missing_files_name_the_nearest(tmp_path, data):
    with pytest.raises(UserError, match=r"trian.jsonl: no such file; did you mean train.jsonl\?"):
        Rows(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match="no directory"):
        Rows(tmp_path / "nowhere" / "train.jsonl")
    with pytest.raises(UserError, match="it needs data"):
        Rows()


def test_validate_names_the_row_whose_answer_cannot_be_recognised(tmp_path):
    data = write(tmp_path / "r.jsonl", [ROWS[0], {"prompt": "p", "answer": "two\nlines"}])
    with pytest.raises(UserError, match=r"r.jsonl, line 2: the answer 'two\\nlines'"):
        Rows(data).validate()
