"""vLLM's OpenAI-compatible server, for as long as whoever started it is there.

Runs in vLLM's environment: ``python serve.py ARGUMENTS`` takes the server's own arguments. Standard
input is a pipe from the process that started it; when that closes, for whatever reason, the server
and all that it started end.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time


def _end_with(pipe: int) -> None:
    while os.read(pipe, 1 << 10):
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(10)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    # A pipe of its own, which none of the server's processes inherits.
    pipe = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    sys.argv[0] = "vllm.entrypoints.openai.api_server"
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
