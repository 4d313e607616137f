"""The screen and the sandbox, each alone against hostile code."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from satune.cli.main import app
from satune.tasks import sandbox
from satune.tasks.pool import Workers
from satune.tasks.sandbox import check, guards, screen
from satune.types import UserError

LINUX = sys.platform == "linux"
FORMAT = "def inputs_check(inputs):\n    return True\n"
# Without the screen the whole os module is in reach: an importer cut down stops nobody for long.
REACH = (
    "wrap = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == '_wrap_close'][0]\n"
    "os = wrap.__init__.__globals__\n"
    "sys = os['sys']\n"
    "load = sys.modules['_frozen_importlib']._gcd_import\n"
)

LIBC = (
    "libc = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'CDLL'][0](None)\n"
)


def hostile(body: str, reach: bool = True) -> str:
    """Check code whose one constraint does ``body`` and then says yes."""
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    return (
        (REACH if reach else "") + FORMAT
        + f"def bad(inputs):\n{indented}    return True\nconstraint_list = [bad]\n"
    )  # fmt: skip


ROWS = {
    "endless loop": hostile("while True: pass", reach=False),
    "endless sleep": hostile("load('time').sleep(1e6)"),
    "memory bomb": hostile("x = []\nwhile True: x.append(bytearray(1 << 20))", reach=False),
    "one large list": hostile("x = [0] * (1 << 34)", reach=False),
    "large power": hostile("x = 9 ** 9 ** 9 ** 9", reach=False),
    "fork bomb": hostile("while True: os['fork']()"),
    "one fork": hostile("os['fork']()"),
    "thread": hostile("load('_thread').start_new_thread(print, ())"),
    "daemon": hostile(
        "if os['fork']() == 0:\n    os['setsid']()\n    if os['fork']() == 0:\n"
        "        load('time').sleep(600)"
    ),
    "shell": hostile("assert os['system']('touch MARK') == 0"),
    "exec": hostile("os['execv']('/bin/true', ['true'])"),
    "file write": hostile("fd = os['open']('MARK', 0o101)\nos['write'](fd, b'x')"),
    "directory": hostile("os['mkdir']('MARK')"),
    "link": hostile("os['symlink']('/', 'MARK')"),
    "file read": hostile("os['open']('/etc/passwd', 0)"),
    "listing": hostile("os['listdir']('/')"),
    "removal": hostile("os['unlink']('VICTIM')"),
    "mode": hostile("os['chmod']('VICTIM', 0)"),
    "import of os": "import os\n" + hostile("os.getcwd()", reach=False),
    "import of subprocess": hostile("import subprocess", reach=False),
    "environment": hostile("assert 'SATUNE_SECRET' in os['environ']"),
    # Modules that are not loaded cannot be any more; the C library is there and needs none.
    "module for the network": hostile("load('_socket').socket()"),
    "network": hostile(LIBC + "assert libc.socket(2, 1, 0) >= 0"),
    "fork by the C library": hostile(LIBC + "assert libc.fork() >= 0"),
    "signal to its keeper": hostile("os['kill'](os['getppid'](), 9)\nos['kill'](-1, 9)"),
    "huge output": hostile("while True: print('x' * 100000)", reach=False),
    "exit": hostile("raise SystemExit(0)", reach=False),
    "exit of the system": hostile("sys.exit(0)"),
    "hard exit": hostile("os['_exit'](0)"),
    "abort": hostile("os['abort']()"),
    "forged verdict": hostile(
        "print('True')\nos['close'](1)\n"
        "for fd in range(3, 64):\n    try:\n        os['write'](fd, b'holds\\n')\n"
        "    except OSError:\n        pass\nos['_exit'](0)"
    ),
    "flooded verdict": hostile(
        "while True:\n  for fd in range(3, 64):\n    try:\n"
        "      os['write'](fd, b'holds\\n' * 9999)\n"
        "    except OSError:\n      pass"
    ),
    "deletion hook": hostile(
        "class D:\n    def __del__(self):\n        while True: pass\nd = D()\nd = None", reach=False
    ),
    "recursion": hostile("f = lambda: f()\nf()", reach=False),
    "recursion without limit": hostile("sys.setrecursionlimit(10**9)\nf = lambda: f()\nf()"),
    "handler": hostile("load('_signal').signal(15, 1)\nwhile True: pass"),
    "limits raised": hostile(
        "r = load('resource')\nr.setrlimit(r.RLIMIT_NOFILE, (99, 99))\n"
    ),
    "yes that never ends": FORMAT
    + "class Y:\n    def __bool__(self):\n        while True: pass\n"
    + "constraint_list = [lambda inputs: Y()]",
    "list that never ends": "import itertools\n" + FORMAT
    + "constraint_list = itertools.repeat(lambda inputs: True)",
    "format that raises": "def inputs_check(inputs): raise ValueError('no')\nconstraint_list = []",
    "no list": FORMAT,
    "no check": "constraint_list = []",
    "error that cannot be told": hostile(
        "class E(Exception):\n    def __str__(self): raise self\nraise E", reach=False
    ),
    "bad characters": "def inputs_check(i): return True\0",
    "surrogates": hostile("raise ValueError('\\ud800')", reach=False),
    "deep nesting": FORMAT + "constraint_list = [" + "-" * 100_000 + "1]",
}  # fmt: skip
NEEDS_TIME = {
    "endless loop", "endless sleep", "large power", "huge output", "deletion hook", "handler",
    "yes that never ends", "list that never ends", "flooded verdict", "error that cannot be told",
}  # fmt: skip
PASS_SCREEN = {  # nothing in their source is forbidden: the limits alone stop them
    "endless loop", "memory bomb", "one large list", "large power", "huge output", "exit",
    "recursion", "list that never ends", "format that raises", "no list", "no check", "surrogates",
}  # fmt: skip


def processes() -> set[int]:
    """The processes there are, beside those of the kernel and other sandboxes' parents."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes()
        except OSError:
            continue  # ended between listing and reading
        if b"sandbox_worker" in line:
            found.add(int(path.name))
    return found


@pytest.fixture(autouse=True)
def own_temporary_directory(tmp_path, monkeypatch):
    """Each sandbox's directory lies in one of the test's, so that what it leaves can be seen."""
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("SATUNE_SECRET", "do not read me")
    return tmp_path


@pytest.mark.skipif(not LINUX, reason="what is tested is what Linux guarantees")
@pytest.mark.parametrize("name", ROWS)
def test_hostile_code_is_stopped_by_the_sandbox_alone(name, tmp_path):
    place = tmp_path / "open"
    place.mkdir(mode=0o777)
    place.chmod(0o777)  # the user nobody could write here if nothing else forbade it
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(parent.stat().st_mode | 0o111)
    victim = place / "victim"
    victim.write_text("precious")
    victim.chmod(0o666)
    code = ROWS[name].replace("MARK", str(place / "mark")).replace("VICTIM", str(victim))
    before = processes()
    limit = 0.6 if name in NEEDS_TIME else 10.0
    start = time.monotonic()
    verdict = check(code, "[1]", seconds=limit, memory=128 << 20)
    took = time.monotonic() - start
    assert not verdict.holds, verdict
    assert took < limit + 30.0, (took, verdict)  # and not what the code asks for
    assert processes() <= before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["open"]
    assert [p.name for p in place.iterdir()] == ["victim"]
    assert victim.read_text() == "precious" and victim.stat().st_mode & 0o777 == 0o666
    assert "\n" not in verdict.detail and len(verdict.detail) < 800


@pytest.mark.parametrize("name", ROWS)
def test_the_screen_alone_refuses_all_that_reaches_out(name):
    fault = screen(ROWS[name])
    assert (fault is None) == (name in PASS_SCREEN), fault
    assert fault is None or "\n" not in fault


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("import os", "line 1: import of os"),
        ("import re, os.path", "line 1: import of os.path"),
        ("from re import enum", "line 1: import of re.enum"),
        ("from . import re", "line 1: import of ."),
        ("import re\nre.enum.sys.exit()", "line 2: attribute enum"),
        ("import collections as c\nc._sys", "line 2: attribute _sys"),
        ("().__class__", "line 1: attribute __class__"),
        ("__builtins__", "line 1: use of __builtins__"),
        ("getattr(1, 'real')", "line 1: use of getattr"),
        ("e = eval", "line 1: use of eval"),
        ("'{0.__class__}'.format(1)", "line 1: attribute __class__"),
        ("f'{1}__'", "line 1: text with a double underscore"),
        ("def g(): yield\ng().gi_frame", "line 2: attribute gi_frame"),
        ("class A:\n    def __del__(self): pass", "line 2: use of __del__"),
        ("async def f(): pass", "line 1: asynchronous code"),
        ("def f(:", "not valid Python (SyntaxError)"),
        ("x = 1\0", "not valid Python"),
        ("x=1\n" * 60_000, "240000 characters are more than 200000"),
        ("def f(open): return open", "line 1: use of open"),
        ("try: 1/0\nexcept Exception as __x: __x", "line 2: use of __x"),
        ("match 1:\n    case object(__class__=c): pass", "line 2: attribute __class__"),
        ("global __builtins__", "line 1: use of __builtins__"),
        ("class A:\n  __slots__ = ()", "line 2: use of __slots__"),
        # attributes whose names stand nowhere in the source
        ("match 1:\n    case Made(found): pass", "line 2: a class pattern with positions"),
        ("match 1:\n    case int(found): pass", "line 2: a class pattern with positions"),
        ("match 1:\n    case [object(gi_frame=f)]: pass", "line 2: attribute gi_frame"),
        ("type('A', (), {})", "line 1: use of type beside type(x)"),
        ("type(*parts)", "line 1: use of type beside type(x)"),
        ("make = type", "line 1: use of type beside type(x)"),
        ("list(map(type, a, b, c))", "line 1: use of type beside type(x)"),
        ("class M(type): pass", "line 1: use of type beside type(x)"),
        ("class A(metaclass=M): pass", "line 1: a metaclass"),
        ("class A(**given): pass", "line 1: a metaclass"),
        ("int.mro()", "line 1: attribute mro"),
        ("collections.UserList.register(A)", "line 1: attribute register"),
        ("form = '{0._' + 'x}'\nform.format(1)", "line 2: format of something else than a text"),
        ("str.format('{0}', 1)", "line 1: format of something else than a text"),
        ("'{a}'.format_map({})", "line 1: format_map of something else"),
        ("'{0.gi_frame.f_globals}'.format(g)", "line 1: attribute gi_frame"),
        ("'{0:{1[a].gi_code}}'.format(1, g)", "line 1: attribute gi_code"),
        ("f'{1:{g.gi_frame}}'", "line 1: attribute gi_frame"),
        ("[g.gi_frame for g in a]", "line 1: attribute gi_frame"),
        ("x = '_' '_'", "line 1: text with a double underscore"),
        ("x.\U0001d4f0\U0001d4f2_frame", "line 1: attribute gi_frame"),  # letters that are g and i
    ],
)
def test_the_screen_names_line_and_cause(code, fault):
    assert (screen(code) or "").startswith(fault)


# A function's globals and a generator's frame, reached through patterns of a class made at run
# time. The names are put together, so that no text of the source holds them.
MADE = """
U = "_" + "_"
M = type("M", (type,), {U + "instancecheck" + U: lambda c, o: True})
A = M("A", (), {U + "match_args" + U: (U + "globals" + U,)})
def inputs_check(inputs):
    match inputs_check:
        case A(found):
            return U + "builtins" + U in found
constraint_list = []
"""
NAMED = """
import collections
names = collections.namedtuple("names", "gi_frame")
class A(collections.UserList, names):
    pass
def two():
    yield 1
A.register(type(two()))
def inputs_check(inputs):
    match two():
        case A(found):
            return str(found).startswith("<frame")
constraint_list = []
"""


@pytest.mark.parametrize("code", [MADE, NAMED], ids=["made by type", "a named tuple's child"])
def test_patterns_that_reach_attributes_work_without_the_screen_and_are_refused_by_it(code):
    verdict = check(code, "[1]")
    assert verdict.holds, verdict  # it is a hole, or the test would show nothing
    assert screen(code) is not None


@pytest.mark.parametrize(
    "code",
    [
        "type(x) is int or type(x) == type(y) or type(x)(y)",
        "isinstance(x, type) or issubclass(x, (int, type))",
        "'{} of {:>{w}}'.format(1, 2, w=3) + '{0.real}'.format(1) + format(1.0, '.2f')",
        "match x:\n    case [a, {'k': b}, *c] | (int() as a, b, c): pass\n    case A(left=b): pass",
        "class A(Exception): pass",
    ],
)
def test_the_screen_lets_pass_what_checks_use(code):
    assert screen(code) is None


USUAL = """
import re
import math
from collections import Counter, defaultdict
from itertools import permutations, combinations

def inputs_check(inputs):
    if not isinstance(inputs, dict) or set(inputs) != {'a', 'b', 'c'}:
        return False
    return all(isinstance(v, list) and len(v) == 2 for v in inputs.values())

def helper(inputs, k):
    return sorted(inputs[k], key=lambda x: -x)

def first(inputs):
    counts = Counter(v for values in inputs.values() for v in values)
    return counts.most_common(1)[0][1] <= 2 and math.prod(helper(inputs, 'a')) > 0

def second(inputs):
    print('looking at', inputs)
    return re.fullmatch(r'\\d+', str(inputs['b'][0])) is not None

class Rule:
    def holds(self, inputs):
        return any(p[0] < p[1] for p in permutations(inputs['c']))

def third(inputs):
    groups = defaultdict(list)
    groups[1].append(inputs)
    return Rule().holds(inputs) and "\\N{BULLET}" and len(list(combinations('abc', 2))) == 3

constraint_list = [first, second, third]
"""


def test_what_rows_use_goes_through_both():
    assert screen(USUAL) is None
    assert check(USUAL, "{'a': [1, 2], 'b': [3, 4], 'c': [5, 6]}").holds
    wrong = check(USUAL, "{'a': [0, 2], 'b': [3, 4], 'c': [5, 6]}")
    assert wrong.detail == "constraint 1 first fails"
    assert check(USUAL, "{'a': [1, 2], 'b': ['x', 4], 'c': [5, 6]}").detail == (
        "constraint 2 second fails"
    )
    assert check(USUAL, "{'a': [1, 2], 'b': [3, 4], 'c': [5, 5]}").detail == (
        "constraint 3 third fails"
    )
    assert check(USUAL, "[]").detail == "the format check fails"


def test_yes_and_no_are_what_python_calls_true_and_false():
    code = FORMAT + "constraint_list = [lambda inputs: inputs[0]]"
    for inputs, holds in (("[1]", True), ("['']", False), ("[None]", False), ("[[0]]", True)):
        assert check(code, inputs).holds is holds


@pytest.mark.skipif(not LINUX, reason="what is tested is what Linux guarantees")
def test_the_guards_are_reported():
    held = guards()
    assert {"limit NPROC", "limit NOFILE", "limit FSIZE", "limit CPU", "limit AS"} <= set(held)
    if os.uname().machine in ("x86_64", "aarch64"):
        assert "system calls" in held
    if os.geteuid() == 0:
        assert "user nobody" in held


NO_FILTER = "\nSYSTEM_CALLS = {}\n\n\nclass Instruction("


@pytest.fixture
def unfiltered(monkeypatch, tmp_path):
    """A sandbox on a machine whose system calls cannot be filtered."""
    source = sandbox.WORKER.read_text(encoding="utf-8")
    changed = source.replace("\n\n\nclass Instruction(", f"\n{NO_FILTER}")
    assert changed != source
    worker = tmp_path / "sandbox_worker.py"
    worker.write_text(changed, encoding="utf-8")
    monkeypatch.setattr(sandbox, "WORKER", worker)
    sandbox.demand.cache_clear()
    yield
    sandbox.allow_unsafe(False)
    sandbox.demand.cache_clear()


@pytest.mark.skipif(not LINUX, reason="elsewhere nothing is filtered anyway")
def test_without_a_filter_nothing_runs_unless_the_user_says_so(unfiltered):
    code = FORMAT + "constraint_list = []"
    for asked in (sandbox.demand, sandbox.guards, lambda: check(code, "1")):
        with pytest.raises(UserError, match=r"no filter of system calls.*--unsafe-checks runs"):
            asked()
    sandbox.allow_unsafe()
    # The worker of a superuser has become "nobody" by then, whom the limits bind.
    verdict = check(code, "1")
    assert verdict.holds and "system calls" not in verdict.guards
    sandbox.demand()


def said_unsafe():
    return sandbox.unsafe_allowed


def test_worker_processes_know_what_the_user_allowed():
    for allowed in (True, False):
        sandbox.allow_unsafe(allowed)
        try:
            with Workers(said_unsafe, 1, 30.0) as pool:
                assert pool.call() is allowed
        finally:
            sandbox.allow_unsafe(False)


def test_commands_that_grade_take_the_users_word():
    runner = CliRunner()
    for command in ("grade", "eval", "train", "swap"):
        shown = runner.invoke(app, [command, "--help"], terminal_width=200)
        assert "--unsafe-checks" in shown.output, command
    try:
        runner.invoke(app, ["grade", "relay", "nowhere.jsonl", "--unsafe-checks"])
        assert sandbox.unsafe_allowed()
    finally:
        sandbox.allow_unsafe(False)
