"""The machine: its thread count holds for everything that computes in the flow's process."""

from __future__ import annotations

import os
import subprocess
import sys


def test_torch_and_the_blas_that_decodes_use_the_recorded_threads() -> None:
    probe = (
        "import numpy, torch; from threadpoolctl import threadpool_info; from flows.machine import use_threads; "
        "use_threads(1); print(torch.get_num_threads(), *{pool['num_threads'] for pool in threadpool_info()})"
    )
    free = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", probe], env=free, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]
