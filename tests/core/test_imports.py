"""core is free of model libraries, and free of side effects when it is imported."""

import pkgutil
import subprocess
import sys

import satune.core

HEAVY = ("transformers", "ray", "vllm", "peft", "datasets")


def test_core_loads_no_model_library():
    modules = [
        f"satune.core.{module.name}" for module in pkgutil.iter_modules(satune.core.__path__)
    ]
    assert len(modules) >= 6
    program = (
        f"import sys, {', '.join(modules)}\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print(*found)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
