from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from satune.tasks.pool import Failure, Workers
from satune.types import UserError

SERVED = """
import os, signal, sys, time
from satune.tasks import pool

def build(log=None, fails=False):
    if log:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\\n")
    if fails:
        raise ValueError("no such thing")
    return serve

def serve(what, value=None):
    if what == "echo":
        return value
    if what == "pid":
        return os.getpid()
    if what == "sleep":
        time.sleep(value)
        return value
    if what == "hang":
        # Ignores what a polite end would use.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass
    if what == "backtrack":
        import re
        re.match("(a+)+$", "a" * 60 + "b")
    if what == "exit":
        os._exit(3)
    if what == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "raise":
        raise KeyError("two\\nlines")
    if what == "unpicklable":
        return lambda: None
    if what == "print":
        print(value)
        os.write(1, b"raw\\n")
        return value
    if what == "modules":
        return sorted(sys.modules)
    if what == "alarm":
        signal.signal(signal.SIGALRM, lambda *_: None)
        return signal.alarm(0)
    if what == "nested":
        inner = pool.Workers(build, 1, 1.0)
        return inner.call("pid") == os.getpid() and inner.map([("echo", 1), ("raise",)])
    if what == "child":
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        open(value, "w").write(str(child.pid))
        time.sleep(300)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A module of its own that worker processes can import."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "served_module.py").write_text(SERVED)
    sys.path.insert(0, str(folder))
    import served_module  # type: ignore[import-not-found]

    yield served_module
    sys.path.remove(str(folder))
    del sys.modules["served_module"]


@pytest.fixture(scope="module")
def pool(served):
    with Workers(served.build, 2, 60.0) as workers:
        yield workers


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie that nobody waits for has)."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_results_come_in_order_whatever_ends_first(pool):
    calls = [("sleep", 0.3), ("echo", "b"), ("sleep", 0.05), ("echo", {"d": [1, None]})]
    seen = []
    results = pool.map(calls, lambda done, total: seen.append((done, total)))
    assert results == [0.3, "b", 0.05, {"d": [1, None]}]
    assert seen[-1] == (4, 4)
    assert seen == sorted(seen)


@pytest.mark.parametrize("what", ["hang", "backtrack"])
def test_a_call_that_takes_too_long_costs_itself_only(served, what):
    with Workers(served.build, 1, 5.0) as workers:  # also what is quick has no more
        before = workers.call("pid")
        results = workers.map([("echo", 1), (what,), ("echo", 2)])
        assert results[0] == 1 and results[2] == 2
        assert results[1] == Failure("timeout", "no result within 5 s")
        assert gone(before)
        assert workers.call("pid") != before


@pytest.mark.parametrize(("what", "said"), [("exit", "exit code 3"), ("segfault", "signal 11")])
def test_a_process_that_dies_costs_its_call_only(pool, what, said):
    results = pool.map([("echo", 1), (what,), ("echo", 2), ("echo", 3)])
    assert results[0::2] == [1, 2] and results[3] == 3
    assert results[1] == Failure("died", f"the worker process ended ({said})")


def test_an_exception_comes_back_as_one_line_and_keeps_the_process(served):
    with Workers(served.build, 1, 5.0) as workers:
        pid = workers.call("pid")
        assert workers.call("raise") == Failure("exception", "KeyError: 'two\\nlines'")
        assert workers.call("unpicklable").kind == "exception"
        assert workers.call("no", "such", "signature").kind == "exception"
        assert workers.call("pid") == pid


def test_build_is_called_once_a_process_and_not_before_it_is_needed(served, tmp_path):
    log = tmp_path / "log"
    with Workers(functools.partial(served.build, str(log)), 2, 5.0) as workers:
        assert not log.exists()
        workers.map([("echo", i) for i in range(50)])
        pids = log.read_text().split()
        assert 1 <= len(pids) <= 2 and len(set(pids)) == len(pids)
        workers.call("echo", 1)
        assert log.read_text().split() == pids


def test_a_build_that_fails_is_the_callers_error(served):
    with (
        Workers(functools.partial(served.build, fails=True), 1, 5.0) as workers,
        pytest.raises(UserError, match="cannot be built: ValueError: no such thing"),
    ):
        workers.map([("echo", 1), ("echo", 2)])


def test_signals_work_as_calls_run_in_the_main_thread(pool):
    assert pool.call("alarm") == 0


def test_what_a_grader_prints_stays_off_standard_output(served, capfd):
    with Workers(served.build, 1, 5.0) as workers:
        assert workers.call("print", "spoken") == "spoken"
    out, err = capfd.readouterr()
    assert out == ""
    assert "raw" in err


def test_workers_do_not_import_what_they_do_not_need(pool):
    loaded = set(pool.call("modules"))
    assert not loaded & {"torch", "transformers", "numpy", "pydantic", "typer", "rich"}


def test_a_pool_inside_a_worker_calls_directly(pool):
    assert pool.call("nested") == [1, Failure("exception", "KeyError: 'two\\nlines'")]


def test_threads_share_a_pool(pool):
    wrong: list[object] = []

    def ask(start: int) -> None:
        for value in range(start, start + 50):
            if pool.call("echo", value) != value:
                wrong.append(value)

    threads = [threading.Thread(target=ask, args=(100 * i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nothing_is_left_running(served, tmp_path):
    workers = Workers(served.build, 1, 5.0)
    closed = workers.call("pid")
    workers.close()
    workers.close()
    assert gone(closed)
    with pytest.raises(RuntimeError, match="closed"):
        workers.call("pid")

    workers = Workers(served.build, 1, 5.0)
    dropped = workers.call("pid")
    del workers
    gc.collect()
    assert gone(dropped)

    with Workers(served.build, 1, 5.0) as workers:
        assert workers.call("child", str(tmp_path / "pid")).kind == "timeout"
        assert gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("ending", ["pass", "import os; os.kill(os.getpid(), 9)"])
def test_workers_end_with_the_program(served, tmp_path, ending):
    # Not under "if __name__": a worker must not run the caller's main module again.
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys; sys.path[:0] = {[str(Path(served.__file__).parent), 'src']!r}\n"
        "import served_module\n"
        "from satune.tasks.pool import Workers\n"
        "workers = Workers(served_module.build, 1, 5.0)\n"
        "print(workers.call('pid'), flush=True)\n"
        f"{ending}\n"
    )
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, cwd=root, timeout=60
    )
    assert ended.stderr == ""
    (pid,) = ended.stdout.split()
    assert gone(int(pid))


def test_an_interrupted_call_leaves_no_answer_behind(served):
    """Ctrl-C while an answer is awaited: the next call must not be given that answer."""
    with Workers(served.build, 1, 30.0) as workers:
        workers.call("echo", 0)
        main = threading.main_thread().ident
        assert main is not None
        timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), 2))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            workers.call("sleep", 20.0)
        assert workers.call("echo", "fresh") == "fresh"


def test_an_interrupted_map_does_not_wait_for_its_calls(served):
    with Workers(served.build, 2, 30.0) as workers:
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(0.6, lambda: os.kill(os.getpid(), 2)).start()
            workers.map([("sleep", 20.0)] * 4)
        assert time.monotonic() - started < 15.0
        assert workers.map([("echo", 1), ("echo", 2)]) == [1, 2]


def test_pools_need_a_process_and_time(served):
    with pytest.raises(UserError, match="both must be > 0"):
        Workers(served.build, 0, 1.0)
    with pytest.raises(UserError, match="both must be > 0"):
        Workers(served.build, 1, 0.0)
