"""A served team against its own evaluation: the same conversations in this process, and through the
endpoint in a process of its own, in turn within one run.

    python benchmarks/serving.py RUN [KEY=VALUE ...] [--clients 64] [--requests 500] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from satune.cli.common import quiet_libraries
from satune.commands.contestant import local_contestant
from satune.commands.evaluate import Wanted, chosen_protocol
from satune.engines.servers import Servers
from satune.play.keys import text_digest
from satune.play.match import Match
from satune.play.rollout import rollout
from satune.protocols.named import load_protocol
from satune.serve.served import Reading
from satune.tasks.catalog import load_task, take
from satune.types import Grade, Key, Problem, no_progress


class Ungraded(Reading):
    """Nothing is graded on either side."""

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        return Grade(0.0)


def offline(run: Path, overrides: list[str], clients: int) -> tuple[Match, Any]:
    """What an evaluation plays with, as many conversations at a time as there are clients; and the
    task."""
    contestant = local_contestant(str(run), None, 1, overrides, no_progress, Servers())
    own = dict(contestant.task)
    task = load_task(own.pop("name"), own.pop("data", None), contestant.seed, None, **own)
    seats = contestant.seats
    protocol = chosen_protocol(contestant, Wanted(), seats)
    options = {key: value for key, value in protocol.items() if key != "name"}
    function = load_protocol(protocol["name"], [seat.name for seat in seats], None, **options)
    match = Match(
        seats, function, contestant.engine, Ungraded(task), concurrency=clients, keep_ids=False
    )
    return match, task


async def play(match: Match, problems: list[Problem], seed: int) -> dict[str, str]:
    """Answers by the problem's text."""
    episodes = await rollout(match, problems, 1, Key(seed, "serve"), name=text_digest)
    return {episode.problem.text: episode.answer or "" for episode in episodes}


async def ask(
    address: str, problems: list[Problem], seed: int, clients: int
) -> tuple[dict[str, str], list[float]]:
    """Answers by the problem's text, and the seconds that each was waited for.

    What a client's library costs would be paid from the same cores (httpx: 3.7 ms a request, half
    of what a tiny team takes to answer), so these speak HTTP without one."""
    parts = urlsplit(address)
    left = iter(problems)
    found: dict[str, str] = {}
    waited: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        for problem in left:
            message = {"role": "user", "content": problem.text}
            body = json.dumps({"model": "team", "seed": seed, "messages": [message]}).encode()
            head = (
                f"POST {parts.path}/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            begun = time.perf_counter()
            writer.write(head.encode() + body)
            status, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
            length = next(int(f[15:]) for f in fields if f.startswith("content-length:"))
            reply = json.loads(await reader.readexactly(length))
            waited.append(time.perf_counter() - begun)
            assert status.split()[1] == "200", reply
            found[problem.text] = reply["choices"][0]["message"]["content"]
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return found, waited


def distinct(task: Any, count: int) -> list[Problem]:
    """So many problems of different texts; the texts of a small task come again, numbered."""
    drawn = take(task, "eval", count)
    seen: dict[str, int] = {}
    problems: list[Problem] = []
    for index, problem in enumerate(drawn):
        times = seen[problem.text] = seen.get(problem.text, 0) + 1
        text = problem.text if times == 1 else f"{problem.text}{' ' * (times - 1)}"
        problems.append(replace(Problem.of(f"p{index}", text), answer=problem.answer))
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    quiet_libraries()
    match, task = offline(given.run, given.overrides, given.clients)
    problems = distinct(task, given.requests)
    command = [sys.executable, "-m", "satune", "serve", str(given.run), "--port", "0"]
    server = subprocess.Popen(
        [*command, "--concurrency", str(given.clients), "--waiting", str(given.requests),
         *given.overrides],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        shares: list[float] = []
        waits: list[float] = []
        rates: list[float] = []
        different = 0
        for seed in range(given.repeats + 1):
            begun = time.perf_counter()
            expected = asyncio.run(play(match, problems, seed))
            alone = time.perf_counter() - begun
            begun = time.perf_counter()
            found, waited = asyncio.run(ask(address, problems, seed, given.clients))
            served = time.perf_counter() - begun
            different += sum(found[text] != answer for text, answer in expected.items())
            if seed:  # the first round warms both up
                shares.append(alone / served)
                rates.append(len(problems) / served)
                waits += waited
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
    waits.sort()
    result = {
        "clients": given.clients,
        "requests": given.requests,
        "repeats": given.repeats,
        "share_of_offline": statistics.median(shares),
        "requests_per_second": statistics.median(rates),
        "p50_seconds": waits[len(waits) // 2],
        "p95_seconds": waits[int(len(waits) * 0.95)],
        "different_answers": different,
    }
    if given.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:>20} {value:.4g}" if isinstance(value, float) else f"{name:>20} {value}")


if __name__ == "__main__":
    main()
