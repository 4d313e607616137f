"""What needs no model loads no library for one: help, and a recipe that is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

from command_line import ENVIRONMENT

HEAVY = ("torch", "transformers", "peft", "scipy", "starlette", "uvicorn")
CASES = [
    # words, what is said, exit code
    ("--help", "quickstart", 0),
    ("train --help", "--resume-from", 0),
    ("eval --help", "--benchmark", 0),
    ("swap --help", "--tolerance", 0),
    ("host --help", "--agent", 0),
    ("serve --help", "--api-key-env", 0),
    ("chat --help", "--seats", 0),
    ("serve x --port 0 --api-key-env SATUNE_NO_KEY", "is not set; export it", 2),
    ("train relay objective.clp=0.1", "did you mean objective.clip?", 2),
    ("train relay rollout.samples=1", "use at least 2", 2),
    ("describe relay schedule=frech", "did you mean 'fresh'?", 2),
]
PROGRAM = f"""
import contextlib, io, json, sys
from satune.cli.main import main

ends = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["satune", *words.split()]
    said, code = io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    ends.append((said.getvalue(), code, [name for name in {HEAVY!r} if name in sys.modules]))
print(json.dumps(ends))
"""


def test_help_and_a_wrong_recipe_load_no_model_library() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([words for words, _, _ in CASES])],
        capture_output=True, text=True, env=ENVIRONMENT | {"COLUMNS": "200"}, check=True,
    )  # fmt: skip
    for case, (said, code, loaded) in zip(CASES, json.loads(ended.stdout), strict=True):
        words, expected, expected_code = case
        assert expected in said, words
        assert (code, loaded) == (expected_code, []), words
