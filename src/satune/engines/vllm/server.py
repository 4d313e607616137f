"""One server of vLLM: a process that is started here, or one at an address that was given."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from satune.engines.failures import Refused
from satune.engines.vllm.log import Log, may_pass
from satune.types import UserError

PYTHON = "SATUNE_VLLM_PYTHON"
"""The environment variable that names the interpreter of vLLM's environment."""
_BESIDE = Path(__file__).resolve().parents[4] / ".venv-vllm" / "bin" / "python"
"""Where ``make vllm`` puts it, in a checkout of satune."""
_WORKER = Path(__file__).parent / "worker"
_SWITCHES = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
ARGUMENTS = (
    "--generation-config", "vllm",
    "--logprobs-mode", "processed_logprobs",
    "--worker-extension-cls", "satune_worker.Extension",
    "--enable-prefix-caching",
)  # fmt: skip
"""What every server has to be started with, also one that is started otherwise."""
KEPT = 4.0
"""Seconds that an idle connection is kept: less than the server keeps it."""
DIRECT: dict[str, Any] = dict.fromkeys(("all://localhost", "all://127.0.0.1", "all://[::1]"))
"""A proxy from the environment does not know this machine's own servers."""
_FOREIGN = ("PYTHONHOME", "VLLM_API_KEY")
"""What the environment says of other interpreters and servers."""


class Gone(Exception):
    """The server does not answer, or has given up."""


class Cut(Exception):
    """Nobody waits for the server any more."""


def interpreter() -> str:
    """The interpreter of vLLM's environment: the one that SATUNE_VLLM_PYTHON names, or that of
    ``make vllm``. Raises UserError where there is none."""
    said = os.environ.get(PYTHON)
    path = Path(said).expanduser() if said else _BESIDE
    if not path.is_file():
        where = f"${PYTHON}: {path}: no such file" if said else "no environment of vLLM is known"
        raise UserError(
            f"engine vllm: {where}; make one with `make vllm`, or name the interpreter of yours in "
            f"${PYTHON}"
        )
    return str(path.absolute())


class Server:
    """``given``: the address of a server that others start. ``limit`` is what an answer may take,
    and ``start_limit`` what may pass until the server is there, in seconds.

    ``starts`` counts how often it was started, or found again after it was gone."""

    def __init__(self, label: str, given: str | None, limit: float, start_limit: float) -> None:
        self.label = label
        self.given = given
        self.starts = 0
        self._limit = limit
        self._start_limit = start_limit
        self._address = (given or "").rstrip("/")
        self._process: subprocess.Popen[bytes] | None = None
        self._ending: Callable[[], Any] = lambda: None
        self._answered = False
        self._log: Log | None = None
        self._model = ""
        self._cut = False
        limits = httpx.Limits(keepalive_expiry=KEPT)
        self._client = httpx.Client(
            timeout=limit, limits=limits, trust_env=given is not None, mounts=DIRECT
        )

    @property
    def address(self) -> str:
        return self._address

    @property
    def started(self) -> bool:
        return self.starts > 0

    @property
    def answered(self) -> bool:
        """Whether it has, since it was started last."""
        return self._answered

    def launch(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """Start the process, or nothing where an address was given; ``wait`` waits for it. Raises
        UserError where the system does not start it."""
        self._answered = False
        if self.given is not None:
            self.starts += 1
            return
        port = _free_port()
        self._address = f"http://127.0.0.1:{port}"
        command = [
            interpreter(), str(_WORKER / "serve.py"), *arguments, *ARGUMENTS,
            "--host", "127.0.0.1", "--port", str(port),
        ]  # fmt: skip
        own = {k: v for k, v in os.environ.items() if k not in _FOREIGN}
        own.setdefault("VLLM_RPC_BASE_PATH", meeting_place(log.parent))
        self._model = arguments[arguments.index("--model") + 1]
        self._log = Log(log)
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**own, **_SWITCHES, "PYTHONPATH": str(_WORKER), **environment},
                    start_new_session=True,
                )
        except OSError as error:
            raise UserError(
                f"{self.label}: vLLM did not start: {error.filename or log}: {error.strerror}; "
                f"look at ${PYTHON}, or give another TMPDIR"
            ) from error
        self._ending = weakref.finalize(self, _end, self._process)
        self.starts += 1

    def wait(self) -> None:
        """Wait until it answers. Raises Gone where it ends and may not do so again, UserError where
        it ends for a cause of its own before it has answered, or does not come in time, and Cut
        after ``cut``."""
        end = time.monotonic() + self._start_limit
        while time.monotonic() < end:
            if self._cut:
                raise Cut
            if self._process is not None and self._process.poll() is not None:
                raise self._ended(self._process.returncode)
            if self._answers():
                return
            time.sleep(0.2)
        raise UserError(
            f"{self.label}: no answer from vLLM at {self._address} within {self._start_limit:g} s; "
            "look whether it runs, or raise engine.start_seconds"
        )

    def _ended(self, code: int) -> Gone | UserError:
        how = f"was killed (signal {-code})" if code < 0 else f"ended (exit code {code})"
        if self._answered:
            return Gone(f"it {how}")
        assert self._log is not None
        if may_pass(code, self._log):
            errors = self._log.errors()
            return Gone(f"it {how} while it started" + (f": {errors[-1]}" if errors else ""))
        said = self._log.last()
        mend = "; engine.memory and engine.devices say what it has" if "memory" in said else ""
        return UserError(
            f"{self.label}: vLLM did not start (exit code {code}): {said}{mend}{self.log()}"
        )

    def _answers(self) -> bool:
        """Whether it is there. A server of others may have the port that was chosen for this one,
        which then ends."""
        try:
            if self._client.get(f"{self._address}/health", timeout=5).status_code != 200:
                return False
            if self.given is None and not self._answered:
                found = self._client.get(f"{self._address}/v1/models", timeout=5).json()["data"]
                if all(model.get("root") != self._model for model in found):
                    return False
        except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError):
            return False
        self._answered = True
        return True

    def well(self) -> bool:
        """Whether it is there and says that it can answer."""
        if self._process is not None and self._process.poll() is not None:
            return False
        try:
            return self._client.get(f"{self._address}/health", timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What it answers. Raises Gone, and Refused for a status that is none of success."""
        try:
            response = self._client.post(f"{self._address}{path}", json=body)
        except httpx.HTTPError as error:
            raise Gone(f"{type(error).__name__}: {error}") from error
        return answer(response)

    def stop(self) -> None:
        """End the process, if it is this one's."""
        self._ending()
        self._process = None

    def cut(self) -> None:
        """Have whoever waits for it stop waiting."""
        self._cut = True

    def uncut(self) -> None:
        self._cut = False

    def log(self) -> str:
        """Where a copy of its log lies, for the end of a line; empty where there is none."""
        kept = None if self._log is None else self._log.kept()
        return "" if kept is None else f"; its log: {kept}"


def answer(response: httpx.Response) -> Any:
    """The data of a response. Raises Gone for a server that has given up, Refused for any other
    status that is none of success."""
    try:
        data = response.json() if response.content else None
    except ValueError:
        data = response.text
    if response.status_code >= 500:
        raise Gone(f"status {response.status_code}: {Refused(response.status_code, data).said}")
    if response.status_code >= 300:
        raise Refused(response.status_code, data)
    return data


def meeting_place(directory: Path) -> str:
    """Where the processes of a server meet, by sockets with names of 36 letters: there, or where a
    socket's whole path may not be so long (107 bytes), in the system's own place."""
    return str(directory) if len(os.fsencode(directory)) + 37 <= 107 else "/tmp"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and what it has started."""
    if process.stdin is not None:
        process.stdin.close()
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
