"""What ``pip install`` of a wheel leaves works where there is no repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FEW = [
    "stages=1", "rollout.problems=4", "rollout.samples=2", "evaluate.problems=4",
    "optimizer.mini_batches=1", "tiny.steps=4", "tiny.max_steps=4", "tiny.examples=64",
    "tiny.greedy_target=0",
]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """Of a command that finds nothing of the repository by its surroundings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what a checkout holds, so that nothing is left in this one."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    for name in ("src", "recipes"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", str(folder), str(copy)],
        check=True, env=environment(),
    )  # fmt: skip
    (built,) = folder.glob("satune-*.whl")
    return built


@pytest.mark.slow
def test_a_wheel_holds_every_module_asset_and_recipe(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src").rglob("*.py")}
    assets = {
        str(p.relative_to(ROOT / "src"))
        for p in (ROOT / "src/satune/report/assets").iterdir()
        if p.is_file()
    }
    assert len(assets) >= 3
    assert modules | assets <= held
    recipes = {str(p.relative_to(ROOT)) for p in (ROOT / "recipes").rglob("*.yaml")}
    installed = {name.partition("data/share/satune/")[2] for name in held if "data/share" in name}
    assert recipes == installed


@pytest.mark.slow
def test_installed_from_a_wheel_it_trains_and_reports_elsewhere(
    wheel: Path, tmp_path: Path
) -> None:
    own = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(own)], check=True)
    python = own / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps",
         str(wheel)],
        check=True, env=environment(),
    )  # fmt: skip
    # The dependencies are those of whoever runs the tests; an editable satune is not among them.
    site = next((own / "lib").glob("python3*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    around = environment(HOME=str(tmp_path), PATH=os.environ["PATH"])

    def satune(*words: str) -> str:
        ended = subprocess.run(
            [str(own / "bin" / "satune"), *words],
            cwd=elsewhere, env=around, capture_output=True, text=True,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        assert "Warning" not in ended.stderr, ended.stderr
        return ended.stdout

    where = subprocess.run(
        [str(python), "-c", "import satune; print(satune.__file__)"],
        cwd=elsewhere, env=around, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert Path(where.strip()).is_relative_to(own)

    said = satune("train", "relay", *FEW, "--out", "run", "--json")
    assert json.loads(said)["stages"] == 1
    satune("report", "run")
    page = (elsewhere / "run" / "report.html").read_text()
    script = (ROOT / "src/satune/report/assets/page.js").read_text().strip()
    assert script.splitlines()[-1] in page


@pytest.mark.wheel
@pytest.mark.timeout(1800)
def test_an_empty_environment_gets_all_that_the_quickstart_needs(
    wheel: Path, tmp_path: Path
) -> None:
    own = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(own)], check=True)
    # pip is set up as its user has it.
    subprocess.run(
        [str(own / "bin" / "python"), "-m", "pip", "install", "--quiet", str(wheel)],
        check=True, env=environment(),
    )  # fmt: skip
    around = environment(HOME=str(tmp_path), PATH=os.environ["PATH"])

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ended = subprocess.run(
        [str(own / "bin" / "satune"), "quickstart", "--out", "run", "--json"],
        cwd=elsewhere, env=around, capture_output=True, text=True,
    )  # fmt: skip

    assert ended.returncode == 0, ended.stderr
    assert "Warning" not in ended.stderr, ended.stderr
    shown = json.loads(ended.stdout)
    assert shown["reward_after"] > shown["reward_before"]
    assert shown["swap"]["verdict"] in ("accepted", "mixture")
    assert (elsewhere / shown["report"]).is_file()
