"""What a machine gives: multiplications by the rows at a time, and bandwidth.

    python benchmarks/machine.py [--threads 2]

The shapes are SmolLM2-135M's: hidden size 576, feed-forward 1,536, vocabulary 49,152.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

HIDDEN, INNER, VOCABULARY = 576, 1536, 49152
ROWS = (1, 8, 32, 64, 128, 512)


def seconds(work: Callable[[], object], repeats: int = 15) -> float:
    """The median of ``repeats``, after one to warm up."""
    work()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def rates(dtype: torch.dtype) -> list[tuple[int, float, float]]:
    """Rows, and GFLOP/s of a layer's largest matrix and of the head at so many rows."""
    layer, head = (torch.randn(out, HIDDEN).to(dtype) for out in (INNER, VOCABULARY))
    found = []
    for rows in ROWS:
        states = torch.randn(rows, HIDDEN).to(dtype)
        both = []
        for weights in (layer, head):
            spent = seconds(lambda w=weights, s=states: torch.nn.functional.linear(s, w))
            both.append(2 * rows * weights.numel() / spent / 1e9)
        found.append((rows, both[0], both[1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="what this machine gives")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads; rows, GFLOP/s of a layer, of the head")
    for dtype in (torch.float32, torch.bfloat16):
        for rows, layer, head in rates(dtype):
            print(f"{str(dtype).removeprefix('torch.'):<9} {rows:>4} {layer:>6.0f} {head:>6.0f}")
    weights = torch.randn(2**26)
    room = torch.empty_like(weights)
    spent = seconds(lambda: room.copy_(weights))
    print(f"copying 256 MiB: {2 * weights.numel() * 4 / spent / 1e9:.1f} GB/s read and written")


if __name__ == "__main__":
    main()
