from __future__ import annotations

import pytest

from satune.loading import check_options, load_object, model_in, nearest_hint
from satune.types import ServedModel, UserError

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Point:
    x: int

def double(v: int, times: int = 2) -> int:
    return v * times

LIMIT = 3
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "needs.py").write_text("import surely_not_installed_module\n")
    return tmp_path


def test_loads_functions_and_classes_from_files_and_modules(place):
    assert load_object("mine.py:double", place)(4) == 8
    assert load_object(f"{place}/mine.py:Point")(1).x == 1
    assert load_object("fractions:Fraction")(1, 2) == 0.5


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("mine.py", "write path/to/file.py:name"),
        ("mine.py:", "write path/to/file.py:name"),
        ("minn.py:double", r"minn.py: no such file; did you mean mine.py\?"),
        ("nowhere/mine.py:double", "no directory"),
        ("mine.py:doubel", "no 'doubel' in it .nearest: double"),
        ("mine.py:LIMIT", "LIMIT is a int, not a function or class"),
        ("broken.py:f", "broken.py, line 2: not valid Python"),
        ("surely.not_there:f", "no module surely"),
        ("fractions:Fractoin", "nearest: Fraction"),
    ],
)
def test_names_what_is_wrong(place, reference, message):
    with pytest.raises(UserError, match=message) as caught:
        load_object(reference, place)
    assert "\n" not in str(caught.value)


def test_an_error_inside_the_users_file_is_not_disguised(place):
    with pytest.raises(UserError, match="surely_not_installed_module") as caught:
        load_object("needs.py:f", place)
    # "line" counts from 1: the place in the user's file, not in what it calls.
    assert "needs.py, line " in str(caught.value)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_options_are_held_against_the_parameters():
    def function(talk, rounds, width=1):
        return rounds

    check_options("protocol f", function, {"rounds": 1}, skip=1)
    with pytest.raises(UserError, match=r"unknown option 'round' .nearest: rounds; "):
        check_options("protocol f", function, {"round": 1}, skip=1)
    with pytest.raises(UserError, match="unknown option 'talk'"):
        check_options("protocol f", function, {"talk": 1, "rounds": 2}, skip=1)
    with pytest.raises(UserError, match="option 'rounds' is needed"):
        check_options("protocol f", function, {}, skip=1)
    check_options("protocol f", lambda talk, **rest: None, {"anything": 1}, skip=1)


def test_nearest_lists_what_there_is():
    assert nearest_hint("relai", ["relay", "rows"]) == " (nearest: relay; there are: relay, rows)"
    assert nearest_hint("xyz", ["relay"]) == " (there are: relay)"


@pytest.mark.parametrize(
    ("text", "address", "name"),
    [
        ("http://localhost:8000/v1#m", "http://localhost:8000/v1", "m"),
        ("HTTPS://Host/v1/#org/name", "HTTPS://Host/v1/", "org/name"),
        ("http://[::1]:80/v1#m#2", "http://[::1]:80/v1", "m#2"),
    ],
)
def test_a_model_at_a_server_is_its_address_and_its_name(text, address, name):
    model = model_in(text)
    assert model == ServedModel(address, name)
    assert str(model) == text


@pytest.mark.parametrize("text", ["org/name", "runs/a#b", "tiny:llama-s", "./m.gguf", "http://["])
def test_any_other_model_is_what_is_written(text):
    assert model_in(text) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http://host/v1", "a model at host: give http://ADDRESS/v1#MODEL"),
        ("http://host/v1#", "a model at host: give http://ADDRESS/v1#MODEL"),
        ("https:///v1#m", "a model at no address: give http://ADDRESS/v1#MODEL"),
        ("http://u:secret@host/v1#m", "a model at host: its address holds a key or a query"),
        ("http://host/v1?key=secret#m", "a model at host: its address holds a key or a query"),
    ],
)
def test_a_model_at_a_server_needs_both_and_holds_no_key(text, message):
    with pytest.raises(UserError, match=message) as caught:
        model_in(text)
    assert "secret" not in str(caught.value)
