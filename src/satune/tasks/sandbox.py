"""Check code from data, run in a process of its own that can open, start and reach nothing.

``screen`` looks at the code before it runs and refuses what no check needs; ``check`` runs it in
the sandbox that ``sandbox_worker`` describes. Neither relies on the other.
"""

from __future__ import annotations

import ast
import collections
import functools
import itertools
import marshal
import math
import os
import re
import signal
import string
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from satune.types import UserError

WORKER = Path(__file__).with_name("sandbox_worker.py")
SECONDS = 20.0
MEMORY = 512 << 20
LARGEST_CODE = 200_000
"""Characters of a row's code that are looked at; what is longer is refused."""
_unsafe = False
_GRACE = 0.5  # for the keeper to start, to kill and to report

_MODULES = {m.__name__: m for m in (itertools, collections, math, re)}
_NAMES = frozenset(
    {
        "breakpoint", "compile", "copyright", "credits", "delattr", "dir", "eval", "exec", "exit",
        "getattr", "globals", "help", "id", "input", "license", "locals", "memoryview", "open",
        "quit", "setattr", "super", "vars",
    }
)  # fmt: skip
# A module inside a module leads on (re.enum.sys.modules); frames and code lead out of a function.
_INNER = frozenset(
    name for m in _MODULES.values() for name, v in vars(m).items() if isinstance(v, ModuleType)
)
# A class's ancestors and virtual children, which make things pass for what they are not.
_LINEAGE = frozenset({"mro", "register"})
_TUPLES = frozenset({"_asdict", "_fields", "_make", "_replace"})  # public, of named tuples
_ESCAPES = ("f_", "tb_", "gi_", "cr_", "ag_", "co_", "func_")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the format check and every constraint hold; ``detail`` says what failed.

    ``guards`` are the protections that were in force, as the runner reported them.
    """

    holds: bool
    detail: str
    guards: tuple[str, ...] = ()


def screen(code: str) -> str | None:
    """What is wrong with the code (one line), or None.

    Refused: code that does not parse; imports beside itertools, collections, math and re; names and
    attributes with a leading underscore or two; calls into the interpreter (eval, open, getattr and
    so on); frames and code objects; text that holds a double underscore. Refused as well is what
    looks up an attribute whose name stands in no place of the source: class patterns with positions
    (the class says which attributes these are), ``format`` of anything but a text that stands
    there; and what makes such a class: ``type`` of several arguments or handed on, a metaclass.
    """
    if len(code) > LARGEST_CODE:
        return f"{len(code)} characters are more than {LARGEST_CODE}"
    try:
        with warnings.catch_warnings():  # as in a row's own run: they change no verdict
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"not valid Python ({type(error).__name__})"
    asked = _asked_types(tree)
    for node in ast.walk(tree):
        found = _fault(node, asked)
        if found is not None:
            return f"line {getattr(node, 'lineno', 0)}: {found}"
    return None


def _asked_types(tree: ast.AST) -> set[int]:
    """The places (ids of nodes) where ``type`` asks for a type or is compared with one."""
    asked: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            asked.update(map(id, [node.left, *node.comparators]))
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        if node.func.id == "type" and len(node.args) == 1 and not starred and not node.keywords:
            asked.add(id(node.func))
        if node.func.id in ("isinstance", "issubclass"):
            asked.update(id(inner) for kinds in node.args[1:] for inner in ast.walk(kinds))
    return asked


def _fault(node: ast.AST, asked: set[int]) -> str | None:
    if isinstance(node, ast.Import):
        unknown = [alias.name for alias in node.names if alias.name not in _MODULES]
        return f"import of {unknown[0]}" if unknown else None
    if isinstance(node, ast.ImportFrom):
        module = _MODULES.get(node.module or "") if node.level == 0 else None
        if module is None:
            return f"import of {node.module or '.'}"
        public = getattr(module, "__all__", None) or dir(module)
        hidden = [a.name for a in node.names if a.name != "*" and a.name not in public]
        return f"import of {node.module}.{hidden[0]}" if hidden else None
    attributes = [node.attr] if isinstance(node, ast.Attribute) else []
    attributes += node.kwd_attrs if isinstance(node, ast.MatchClass) else []
    if isinstance(node, ast.Attribute) and node.attr in ("format", "format_map"):
        text = node.value.value if isinstance(node.value, ast.Constant) else None
        if node.attr == "format_map" or not isinstance(text, str):
            return f"{node.attr} of something else than a text that stands there"
        attributes += _looked_up(text)
    for name in attributes:
        if name in _INNER | _LINEAGE or (name.startswith(("_", *_ESCAPES)) and name not in _TUPLES):
            return f"attribute {name}"
    if isinstance(node, ast.MatchClass) and node.patterns:
        return "a class pattern with positions"
    if isinstance(node, ast.ClassDef) and any(k.arg in (None, "metaclass") for k in node.keywords):
        return "a metaclass"
    if isinstance(node, ast.Name) and node.id == "type" and id(node) not in asked:
        return "use of type beside type(x)"
    for name in _spelt(node):
        if name in _NAMES or name.startswith("__"):
            return f"use of {name}"
    if isinstance(node, (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)):
        return "asynchronous code"
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and "__" in node.value:
        return "text with a double underscore"
    return None


def _looked_up(text: str) -> list[str]:
    """The attributes that the fields of a text for ``format`` name, those in field widths too."""
    try:
        fields = list(string.Formatter().parse(text))
    except ValueError:
        return []  # no text for format, which will say so
    names = []
    for _, field, spec, _ in fields:
        names += re.split(r"[.\[]", field or "")[1:] + (_looked_up(spec) if spec else [])
    return names


def _spelt(node: ast.AST) -> Iterator[str]:
    """Every name in a node: variables, arguments, definitions, aliases, global statements."""
    if isinstance(node, (ast.Constant, ast.Attribute)):
        return
    for _, value in ast.iter_fields(node):
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, str):
                yield item


def check(code: str, inputs: str, *, seconds: float = SECONDS, memory: int = MEMORY) -> Verdict:
    """Run ``code``, which defines ``inputs_check`` and ``constraint_list``, on ``inputs``, the text
    of a literal; ``seconds`` of wall time, ``memory`` bytes of address space.

    Whatever the code does, this returns within ``seconds`` and a little, and nothing that it
    started or wrote is left. Raises OSError if no process can be started, UserError where the
    system has no filter of system calls and ``allow_unsafe`` was not called, or where its limits
    do not bind either (the superuser's).
    """
    named = [name for name in _MODULES if re.search(rf"\b{name}\b", code)]
    job = {
        "code": code, "inputs": inputs, "seconds": seconds, "memory": memory, "modules": named,
        "unsafe": _unsafe,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="satune-sandbox-") as directory:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-W", "ignore", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd=directory,
            start_new_session=True,
        )
        try:
            told, _ = process.communicate(marshal.dumps(job), timeout=seconds + _GRACE)
        except subprocess.TimeoutExpired:
            told = b""
        finally:
            _end(process)
    if not told:
        return Verdict(False, f"stopped after {seconds:g} s")
    outcome = marshal.loads(told)
    if outcome["said"] == "unsafe":
        raise UserError(
            "checks of code: the sandbox has no hold on them, even with --unsafe-checks, for the "
            "superuser of this system; run satune as another user"
            if _unsafe
            else "checks of code: this system has no filter of system calls (Linux on x86-64 and "
            "ARM has), so they are not run; --unsafe-checks runs them behind limits alone"
        )
    return _read(outcome["said"], tuple(outcome["guards"]), seconds)


def allow_unsafe(allowed: bool = True) -> None:
    """Whether checks may run where no system calls are filtered: the user's word, for this process
    and the worker processes that it starts from now on (see ``workers``)."""
    global _unsafe
    _unsafe = allowed


def unsafe_allowed() -> bool:
    return _unsafe


@functools.cache
def demand() -> None:
    """Raises UserError where ``check`` would, before any row's code is there; asked once."""
    guards()


def guards() -> tuple[str, ...]:
    """The protections that a sandbox has on this machine, found by running one."""
    return check("inputs_check = bool\nconstraint_list = []", "1", seconds=5.0).guards


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _read(said: str, guards: tuple[str, ...], seconds: float) -> Verdict:
    kind, _, rest = said.partition(" ")
    if kind == "holds":
        return Verdict(True, "format and all constraints hold", guards)
    details = {
        "format": "the format check fails",
        "constraint": f"constraint {rest.strip()} fails",
        "error": f"the check code failed: {rest}",
        "late": f"the check code ran longer than {seconds:g} s",
        "silent": f"the check code ended without a verdict ({rest})",
    }
    return Verdict(False, details[kind], guards)
