"""What torchrun starts: training stages one after the other, in processes that join once. argv: a JSON list of jobs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from small_stages import run_stage

from models.distributed import join, leave

torch.set_num_threads(1)
ranks = join("cpu")
for name, where, params in json.loads(Path(sys.argv[1]).read_text()):
    run_stage(Path(sys.argv[2]), name, Path(where), params, ranks=ranks)
leave()
