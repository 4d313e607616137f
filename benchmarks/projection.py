"""The projection's Newton solver against bisection of the same accuracy: the same states, blocks,
moments, precision and threads, in turn within one run; then many states of a large vocabulary.

    python benchmarks/projection.py [--repeats 5] [--threads 1] [--states 4096] [--json]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from common import finish
from torch import Tensor

from satune.core import projection
from satune.core.projection import project

STATES_AT_ONCE = 64


def logits(states: int, vocabulary: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two policies of real spread: a few likely tokens, the newcomer 1 nat off on average."""
    generator = torch.Generator().manual_seed(seed)
    p_NV = 3.0 * torch.randn(states, vocabulary, generator=generator)
    return p_NV, p_NV + torch.randn(states, vocabulary, generator=generator)


def bisect(p_NV: Tensor, q_NV: Tensor, delta: float) -> Tensor:
    """lambda [N] where KL is within the solver's own tolerance of its own target."""
    found: list[Tensor] = []
    aim = delta * (1 - projection._MARGIN)
    for block in projection._blocks(p_NV, q_NV):
        log_p_NV, y_NV, _ = projection._prepared(*block)
        tilted = projection._Tilted(log_p_NV, y_NV, delta)
        low_N, high_N = torch.zeros_like(tilted.mass_N), torch.ones_like(tilted.mass_N)
        at_N = high_N
        while True:
            psi_N, mean_N, _ = tilted.at(at_N)
            kl_N = at_N * mean_N - psi_N
            settled_N = (kl_N - aim).abs() <= projection._TOLERANCE * aim
            if bool((settled_N | ((at_N == 1) & (kl_N <= delta))).all()):
                break
            below_N = kl_N < aim
            low_N = torch.where(below_N | settled_N, at_N, low_N)
            high_N = torch.where(below_N & ~settled_N, high_N, at_N)
            at_N = (low_N + high_N) / 2
        found.append(at_N)
    return torch.cat(found)


def compare(states: int, vocabulary: int, delta: float, repeats: int) -> dict[str, Any]:
    p_NV, q_NV = logits(states, vocabulary, seed=0)
    seconds: list[tuple[float, float]] = []
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        ours = project(p_NV, q_NV, delta)
        between = time.perf_counter()
        theirs_N = bisect(p_NV, q_NV, delta)
        ended = time.perf_counter()
        if not torch.allclose(ours.lambda_N, theirs_N, rtol=1e-7):
            raise RuntimeError("the two solvers disagree")
        if repeat:  # the first round only warms up
            seconds.append((between - started, ended - between))
    ratios = sorted(peer / own for own, peer in seconds)
    return {
        "states": states,
        "vocabulary": vocabulary,
        "delta": delta,
        "iterations": float(ours.iterations_N.double().mean()),
        "satune_seconds": statistics.median(own for own, _ in seconds),
        "peer_seconds": statistics.median(peer for _, peer in seconds),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
    }


def many(states: int, vocabulary: int, delta: float) -> dict[str, Any]:
    """Seconds in the solver for ``states`` states, whose logits come a few at a time as they would
    from a model's head."""
    seconds, iterations, largest = 0.0, 0, 0.0
    for start in range(0, states, STATES_AT_ONCE):
        p_NV, q_NV = logits(min(STATES_AT_ONCE, states - start), vocabulary, seed=start)
        started = time.perf_counter()
        found = project(p_NV, q_NV, delta)
        seconds += time.perf_counter() - started
        iterations += int(found.iterations_N.sum())
        largest = max(largest, float(found.kl_N.max()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "states": states,
        "vocabulary": vocabulary,
        "delta": delta,
        "seconds": seconds,
        "states_per_second": states / seconds,
        "iterations": iterations / states,
        "largest_kl": largest,
        "peak_memory": peak if sys.platform == "darwin" else peak * 1024,
    }


def show(row: Mapping[str, Any]) -> None:
    print(
        f"{row['states']:,} states × {row['vocabulary']:,}, delta {row['delta']:g}: satune "
        f"{row['satune_seconds']:.3f} s ({row['iterations']:.1f} iterations), bisection "
        f"{row['peer_seconds']:.3f} s, ratio {row['ratio']:.2f} "
        f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="projection: satune's solver against bisection")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--states", type=int, default=4096, help="of the large vocabulary")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--delta", type=float, default=0.01)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for states, vocabulary in ((4096, 384), (512, 32_000), (64, arguments.vocabulary)):
        rows.append(compare(states, vocabulary, arguments.delta, arguments.repeats))
        if not arguments.json:
            show(rows[-1])
    large = many(arguments.states, arguments.vocabulary, arguments.delta)
    if not arguments.json:
        print(
            f"{large['states']:,} states × {large['vocabulary']:,}: {large['seconds']:.1f} s, "
            f"{large['iterations']:.1f} iterations, largest KL {large['largest_kl']:.9f}, peak "
            f"memory of the process {large['peak_memory'] / 2**30:.2f} GiB"
        )
    finish(
        {
            "benchmark": "projection",
            "peer": "bisection",
            "threads": arguments.threads,
            "rows": rows,
            "large": large,
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
