"""Starting the processes of a run: here, and by a script that Slurm's commands would read."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_world
from command_line import ENVIRONMENT, Run, refused
from satune.commands.launch import Job, Launch
from satune.config.load import load_recipe, recipe_text
from satune.types import UserError

FAKE = """#!{python}
import json, os, sys
with open({log!r}, "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:]]) + "\\n")
if sys.argv[0].endswith("scontrol"):
    print("node-a\\nnode-b")
if sys.argv[0].endswith("srun"):
    os.environ["SLURM_NODEID"] = "1"
    os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture
def fakes(tmp_path: Path) -> tuple[Path, Path]:
    """A directory with stand-ins of srun and scontrol, and where they say what they were asked."""
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir()
    for name in ("srun", "scontrol"):
        path = folder / name
        path.write_text(FAKE.format(python=sys.executable, log=str(log)))
        path.chmod(0o755)
    return folder, log


def test_one_process_is_a_plain_training() -> None:
    command = Launch(["relay", "--out", "a b"], 1).command()
    assert command == [sys.executable, "-m", "satune", "train", "relay", "--out", "a b"]
    assert Launch(["relay"], 1).environment({"A": "1"}) == {"A": "1"}


def test_several_are_torchruns_and_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    launch = Launch(["relay"], 4)
    assert launch.command()[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert launch.command()[3:] == [
        "--standalone", "--nproc-per-node", "4", "-m", "satune", "train", "relay",
    ]  # fmt: skip
    assert launch.environment({})["OMP_NUM_THREADS"] == "4"
    assert launch.environment({"OMP_NUM_THREADS": "2"})["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (-2, 1)])
def test_fewer_than_one_are_refused(numbers: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="give 1 or more"):
        Launch([], *numbers)


def test_the_script_runs_torchrun_on_every_machine(
    fakes: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Carried out by bash, with stand-ins for Slurm's commands and for python."""
    folder, log = fakes
    python = folder / "python"
    python.write_text((folder / "srun").read_text())
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    words = ["relay", "seed=3", "--out", "runs/it's here", "--resume"]
    text = Launch(words, 8, 2).script(Job("relay", tmp_path / "log", 90, ["--partition=gpu"]))
    lines = text.splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH ")]
    # sbatch reads them up to the first command.
    assert lines[1 : 1 + len(directives)] == directives
    for wanted in ("--nodes=2", "--time=90", "--partition=gpu", "--ntasks-per-node=1"):
        assert f"#SBATCH {wanted}" in directives
    script = tmp_path / "job.sh"
    script.write_text(text)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node-[a-b]"}
    subprocess.run(["bash", str(script)], env=environment, check=True)
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    assert [name for name, _ in asked] == ["scontrol", "srun", "python"]
    assert asked[0][1] == ["show", "hostnames", "node-[a-b]"]
    assert shlex.join(asked[2][1]) == shlex.join(
        [
            "-m", "torch.distributed.run", "--nnodes", "2", "--master-port", "29500",
            "--rdzv-backend", "static", "--nproc-per-node", "8", "--master-addr", "node-a",
            "--node-rank", "1", "-m", "satune", "train", *words,
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--minutes", "9"], "launch: --minutes is for --slurm FILE; name the file"),
        (["--nodes", "2"], "launch: this machine is one node; --slurm FILE writes for several"),
        (["--processes", "0"], "launch: --processes is 0; give 1 or more"),
        (["--slurm", "job.sh", "--sbatch", "gpu"], "--sbatch 'gpu' is no option"),
        (["stages=none"], "stages: expected an integer"),
        (
            ["--hosts", "2", "--processes", "2"],
            "launch: --processes cuts each agent over processes",
        ),
        (["--hosts", "2", "--slurm", "job.sh", "--nodes", "2"], "launch: --nodes cuts each agent"),
        (["--srun"], "launch: --srun is for --hosts N inside a job"),
        (["--hosts", "2", "--srun"], "SLURM_JOB_NODELIST is not set; write the job's script by"),
        (["--hosts", "0"], "--hosts is 0, and 3 agents are there to be dealt out (first, second, "),
        (["--hosts", "2", "team.sharing=shared"], "launch: --hosts deals agents out, and team.sha"),
        (
            ["--hosts", "2", "sharding={}"],
            "sharding: one process drives agents that live elsewhere",
        ),
        (
            ["--processes", "2", "team.agents.first.device=cpu"],
            "team.agents.first.device: is for a run in one process",
        ),
        (["--hosts", "2", "--processes", "0"], "launch: --processes cuts each agent"),
        (["--hosts", "2", "engine.order=throughput"], "engine.order: throughput is not for agents"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], line: str, satune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert line in refused(satune("launch", "relay", *words))
    assert list(tmp_path.iterdir()) == []


def test_agents_on_devices_of_their_own_are_one_process(
    satune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("satune.commands.launch.usual_processes", lambda: 2)
    apart = "team.agents.first.device=cpu"
    for job, overrides, processes in (("one.sh", [apart], "1"), ("two.sh", [], "2")):
        assert satune("launch", "relay", *overrides, "--slurm", job)[0] == 0
        words = shlex.split(shlex.split((tmp_path / job).read_text().splitlines()[-1])[3])
        assert words[words.index("--nproc-per-node") + 1] == processes
        assert ("sharding={}" in words) == (processes == "2")


def test_a_script_is_written_once(
    satune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("launch", "relay", "--processes", "2", "--slurm", "jobs/relay.sh")
    assert satune(*words) == (0, "sbatch jobs/relay.sh\n", "")
    line = (tmp_path / "jobs" / "relay.sh").read_text().splitlines()[-1]
    inner = shlex.split(line)[3].removeprefix("exec ")
    assert shlex.split(inner)[-5:] == ["relay", "sharding={}", "--out", "runs/relay", "--resume"]
    assert "it is there already" in refused(satune(*words))
    # Slurm makes no folder for its log, and does not open it from where the script goes.
    script = (tmp_path / "jobs" / "relay.sh").read_text()
    assert f"#SBATCH --output={tmp_path}/runs/relay-%j.log\n" in script
    assert (tmp_path / "runs").is_dir()


def test_a_runs_own_recipe_goes_on_with_the_run_once_it_is_trusted(
    satune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def thing(*a, **b): ...\n")
    written = tmp_path / "written.yaml"
    written.write_text(
        "task: mine.py:thing\nprotocol: chain\nteam: {agents: {a: {model: org/a}, b: {model: "
        "'http://far.example/v1#m', frozen: true}}}\n"
    )
    run = tmp_path / "runs" / "big"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipe_text(load_recipe(written)))
    (run / "events.jsonl").touch()
    words = ["launch", "runs/big/recipe.yaml", "--processes", "1", "--slurm", "job.sh"]
    assert "would run mine.py:thing (task.name)" in refused(satune(*words))
    assert "--allow-address http://far.example/v1" in refused(satune(*words, "--trust"))
    spoken = ["--trust", "--allow-address", "http://far.example/v1"]
    assert satune(*words, *spoken) == (0, "sbatch job.sh\n", "")
    inner = shlex.split((tmp_path / "job.sh").read_text().splitlines()[-1])[3]
    assert shlex.split(inner)[-7:] == [
        "runs/big/recipe.yaml", "--out", "runs/big", "--resume", *spoken,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_launched_run_is_the_run(tmp_path: Path) -> None:
    recipe = tiny_world.build(tmp_path)
    words = ["launch", str(recipe), "stages=1", "--out", "run", "--processes", "2"]
    ended = subprocess.run(
        [sys.executable, "-m", "satune", *words],
        env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
