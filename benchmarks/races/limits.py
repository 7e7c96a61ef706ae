"""What this machine can do at most, measured on the spot: `python -m benchmarks.races.limits BYTES OUTPUT`.

A matrix product's GFLOP/s (2048³, fp32, one thread), and the GB/s of a matrix-vector product over BYTES of weights: as
large as a model's, so that a model that fits the cache is held against the cache's bandwidth.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

SIZE = 2048


def best(work: Callable[[], object], repeats: int) -> float:
    """The least CPU seconds of one call."""
    seconds = []
    for _ in range(repeats):
        clock = time.process_time()
        work()
        seconds.append(time.process_time() - clock)
    return min(seconds)


def main() -> int:
    """Measure and write."""
    size, output = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    a, b, c = (torch.randn(SIZE, SIZE) for _ in range(3))
    gflops = 2 * SIZE**3 / best(lambda: torch.mm(a, b, out=c), 6) / 1e9
    weights, x = torch.randn(size // 4 // 512, 512), torch.randn(512)
    y = torch.empty(weights.shape[0])
    rounds = max(1, 10**8 // size)

    def read() -> None:
        for _ in range(rounds):
            torch.mv(weights, x, out=y)

    gbs = rounds * size / best(read, 10) / 1e9
    output.write_text(json.dumps({"gflops": gflops, "gbs": gbs}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
