"""Worker processes for graders that need a main thread or signals, or that may hang or die.

A worker is a fresh interpreter that imports what its ``build`` needs and nothing else, so that it
is safe beside torch's threads and does not run the caller's main module again. It talks to its
owner over a socket; what a grader prints goes to standard error. What the user allowed the owner's
checks of code (``sandbox.allow_unsafe``) it allows its own.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from satune.tasks import sandbox
from satune.types import UserError

Served = Callable[..., Any]
Build = Callable[[], Served]
FailureKind = Literal["timeout", "died", "exception"]

START_SECONDS = 120.0
"""How long a worker may take to start and build."""

_GRACE_SECONDS = 5
_inside = False


@dataclass(frozen=True, slots=True)
class Failure:
    """What came of a call that gave no result: it ran too long, its process died, or it raised."""

    kind: FailureKind
    text: str


def processes() -> int:
    """How many graders may compute at a time: one a core that this process may use, at most 8."""
    mine = getattr(os, "sched_getaffinity", None)
    return min(len(mine(0)) if mine is not None else os.cpu_count() or 1, 8)


class Workers:
    """Up to ``count`` processes; each calls ``build()`` once and then serves what that returned.

    ``build`` must be picklable and importable in a fresh interpreter: a function of a module, or a
    ``functools.partial`` of one. Arguments and results are pickled. A call that takes longer than
    ``seconds`` or whose process dies costs only itself: the process (with whatever it started) is
    killed, and the next call gets a new one. Processes start with the first call that needs one
    and end with ``close``, with the object, or with the program. Safe to share between threads.

    Inside a worker process a pool starts none of its own and calls directly: the limit of the
    outer pool holds.
    """

    def __init__(self, build: Build, count: int, seconds: float) -> None:
        if count < 1 or seconds <= 0:
            raise UserError(f"workers: {count} processes with {seconds} s a call; both must be > 0")
        self.count = count
        self.seconds = seconds
        self._build = build
        self._direct: Served | None = None
        self._lock = threading.Lock()
        # A slot holds an idle process, or None where one is still to be started.
        self._slots: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(count):
            self._slots.put(None)
        self._living: set[_Process] = set()
        self._closed = False
        self._finalizer = weakref.finalize(self, _end_all, self._living)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def call(self, *arguments: Any) -> Any:
        """The result of one call, or a Failure. Waits for a free process.

        Raises UserError if a worker cannot be built, and RuntimeError after ``close``.
        """
        if _inside:
            return self._call_here(arguments)
        process = self._slots.get()
        try:
            if self._closed:
                raise RuntimeError("the worker processes are closed")
            if process is None:
                process = self._start()
            result = process.call(arguments, self.seconds)
            if process.ended:
                self._drop(process)
            return result
        except BaseException:
            # An interrupt may have cut an exchange in half: what comes next would be its answer.
            if process is not None:
                self._drop(process)
            raise
        finally:
            self._slots.put(None if process is None or process.ended else process)

    def map(
        self,
        calls: Iterable[Sequence[Any]],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Any]:
        """The results (or Failures) of the calls, each a sequence of arguments, in their order.

        ``progress`` is told (done, of how many) in the calling thread as calls end.
        """
        jobs = list(calls)
        if _inside:
            return [self.call(*job) for job in jobs]
        with ThreadPoolExecutor(self.count) as threads:
            futures = [threads.submit(self.call, *job) for job in jobs]
            try:
                left = set(futures)
                while left:
                    _, left = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
                    if progress is not None:
                        progress(len(jobs) - len(left), len(jobs))
                    failed = next((f for f in futures if f.done() and f.exception()), None)
                    if failed is not None:
                        failed.result()
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                # Nobody waits for the calls under way any more; leaving would wait for them.
                _end_all(self._living)
                raise

    def close(self) -> None:
        """End the processes; a call that is under way comes back as a Failure."""
        self._closed = True
        self._finalizer()

    def _call_here(self, arguments: Sequence[Any]) -> Any:
        if self._direct is None:
            self._direct = self._build()
        try:
            return self._direct(*arguments)
        except Exception as error:
            return Failure("exception", _said(error))

    def _start(self) -> _Process:
        process = _Process()
        # Before it builds, which may take long: who ends the living must find this one as well.
        with self._lock:
            self._living.add(process)
        try:
            process.build(self._build)
        except BaseException:
            self._drop(process)
            raise
        if self._closed:
            self._drop(process)
            raise RuntimeError("the worker processes are closed")
        return process

    def _drop(self, process: _Process) -> None:
        process.end()
        with self._lock:
            self._living.discard(process)


class _Process:
    """One worker process and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        code = (
            f"import sys; sys.path[:] = {json.dumps(sys.path)}; "
            f"from satune.tasks.pool import serve; serve({theirs.fileno()})"
        )
        with theirs:
            # A session of its own: ctrl-C reaches the owner alone, and ending the worker ends
            # whatever it has started.
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
            )
        self._link = Connection(ours.detach())
        self.ended = False

    def build(self, build: Build) -> None:
        """Raises UserError if the worker cannot be built."""
        start = pickle.dumps((sandbox.unsafe_allowed(), build))
        answer = self._exchange(start, START_SECONDS)
        if isinstance(answer, Failure):
            raise UserError(f"worker process: it cannot be built: {answer.text}")

    def call(self, arguments: Sequence[Any], seconds: float) -> Any:
        return self._exchange(pickle.dumps((seconds, tuple(arguments))), seconds)

    def end(self) -> None:
        """Kill the process and what it started; may be called again, and from another thread."""
        self.ended = True
        if self._process.poll() is None:
            # Not before wait(): until then the id cannot belong to another process.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _exchange(self, message: bytes, seconds: float) -> Any:
        try:
            self._link.send_bytes(message)
            deadline = time.monotonic() + seconds
            while not self._link.poll(max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    self.end()
                    return Failure("timeout", f"no result within {seconds:g} s")
            return pickle.loads(self._link.recv_bytes())
        except (EOFError, OSError):
            # The socket closes a moment before the process is gone.
            self._wait_for_end()
            code = self._process.returncode
            how = (
                "" if code is None else f" (signal {-code})" if code < 0 else f" (exit code {code})"
            )
            self.end()
            return Failure("died", f"the worker process ended{how}")

    def _wait_for_end(self) -> None:
        deadline = time.monotonic() + 1.0
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)


def serve(descriptor: int) -> None:
    """The worker's side: build, then answer call after call until the owner is gone."""
    global _inside
    _inside = True
    link = Connection(descriptor)
    with open(os.devnull, "w") as nowhere:
        try:
            unsafe, build = pickle.loads(link.recv_bytes())
            sandbox.allow_unsafe(unsafe)
            served: Served = build()
            link.send_bytes(pickle.dumps(None))
        except Exception as error:
            link.send_bytes(pickle.dumps(Failure("exception", _said(error))))
            return
        while True:
            try:
                message = link.recv_bytes()
            except (EOFError, OSError):
                return
            seconds, arguments = pickle.loads(message)
            # The owner ends a call that takes too long; should the owner be gone itself, this does
            # (a thread of C, which needs neither Python's lock nor a signal).
            faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS, exit=True, file=nowhere)
            try:
                answer = pickle.dumps(served(*arguments))
            except Exception as error:
                answer = pickle.dumps(Failure("exception", _said(error)))
            faulthandler.cancel_dump_traceback_later()
            try:
                link.send_bytes(answer)
            except OSError:
                return


def _end_all(processes: set[_Process]) -> None:
    for process in list(processes):
        process.end()


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
