"""One server of vLLM: a process that is started here, or one at an address that was given."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import httpx

from satune.engines.failures import Refused
from satune.types import UserError

PYTHON = "SATUNE_VLLM_PYTHON"
"""The environment variable that names the interpreter of vLLM's environment."""
_BESIDE = Path(".venv-vllm/bin/python")
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


class Gone(Exception):
    """The server does not answer, or has given up."""


def interpreter() -> str:
    """The interpreter of vLLM's environment: the one that SATUNE_VLLM_PYTHON names, or that of
    ``make vllm``. Raises UserError where there is none."""
    said = os.environ.get(PYTHON)
    path = Path(said).expanduser() if said else _BESIDE
    if not path.is_file():
        where = f"${PYTHON}: {path}: no such file" if said else f"{_BESIDE} is not there"
        raise UserError(
            f"engine vllm: {where}; make vLLM's environment with `make vllm`, or name the "
            f"interpreter of yours in ${PYTHON}"
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
        self._log: Path | None = None
        self._cut = False
        self._client = httpx.Client(timeout=limit, trust_env=given is not None)

    @property
    def address(self) -> str:
        return self._address

    @property
    def started(self) -> bool:
        return self.starts > 0

    def launch(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """Start the process, or nothing where an address was given; ``wait`` waits for it."""
        self.starts += 1
        if self.given is not None or (self._process is not None and self._process.poll() is None):
            return
        port = _free_port()
        self._address = f"http://127.0.0.1:{port}"
        command = [
            interpreter(), str(_WORKER / "serve.py"), *arguments, *ARGUMENTS,
            "--host", "127.0.0.1", "--port", str(port),
        ]  # fmt: skip
        own = {k: v for k, v in os.environ.items() if k != "PYTHONHOME"}
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**own, **_SWITCHES, "PYTHONPATH": str(_WORKER), **environment},
                start_new_session=True,
            )
        weakref.finalize(self, _end, self._process)

    def wait(self) -> None:
        """Wait until it answers. Raises UserError where it ends before, or does not come in time,
        and Gone after ``cut``."""
        end = time.monotonic() + self._start_limit
        while time.monotonic() < end:
            if self._cut:
                raise Gone("nobody waits for it")
            if self._process is not None and self._process.poll() is not None:
                raise UserError(
                    f"{self.label}: vLLM did not start (exit code {self._process.returncode}): "
                    f"{self._last_words()}"
                )
            try:
                if self._client.get(f"{self._address}/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise UserError(
            f"{self.label}: no answer from vLLM at {self._address} within {self._start_limit:g} s; "
            "look whether it runs, or raise engine.start_seconds"
        )

    def lost(self) -> bool:
        """Whether it is gone for good: its process has ended, or it says that it is not well."""
        if self._process is not None and self._process.poll() is not None:
            return True
        try:
            return self._client.get(f"{self._address}/health", timeout=10).status_code != 200
        except httpx.HTTPError:
            return True

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What it answers. Raises Gone, and Refused for a status that is none of success."""
        try:
            response = self._client.post(f"{self._address}{path}", json=body)
        except httpx.HTTPError as error:
            raise Gone(f"{type(error).__name__}: {error}") from error
        return answer(response)

    def stop(self) -> None:
        """End the process, if it is this one's."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def cut(self) -> None:
        """Have whoever waits for it stop waiting."""
        self._cut = True

    def uncut(self) -> None:
        self._cut = False

    def _last_words(self) -> str:
        """The last line of its log that names an error, else the last one."""
        assert self._log is not None
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines()]
        lines = [line for line in lines if line]
        errors = [line for line in lines if "Error" in line and "Traceback" not in line]
        said = (errors or lines or ["it said nothing"])[-1]
        return said if len(said) <= 300 else f"{said[:300]}..."


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


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and what it has started."""
    stdin: IO[bytes] | None = process.stdin
    if stdin is not None:
        stdin.close()
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
