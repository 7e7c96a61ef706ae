"""transformers' side of generation: `generate` with its default cache, in batches of the slots' number, sampling at
temperature 1 without filters.

    python -m benchmarks.races.transformers_generate WORK SIZE WORKSPACE OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.races import work
from benchmarks.races.meter import Meter


def continued(model: PreTrainedModel, prompts: list[list[int]], new: int, stop_id: int, pad_id: int) -> int:
    """Continue prompts of equal length; returns the number of tokens sampled, the stop token's included."""
    ids = torch.tensor(prompts)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new,
        eos_token_id=stop_id,
        pad_token_id=pad_id,
    )
    answers = out[:, ids.shape[1] :]
    stopped = answers == stop_id
    lengths = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, answers.shape[1])
    return int(lengths.sum())


def main() -> int:
    """Run one work and write what was measured."""
    name, size, root, output = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(1)
    race = work.read_json(Path(root) / "race.json")
    model = AutoModelForCausalLM.from_pretrained(Path(root) / "artifacts" / "sft" / "model").eval()
    width = work.WIDTH if name == "generate" else 1
    prompts = race["prompts"] if name == "generate" else race["prompts"][: work.AMOUNTS[size].prompts]
    continued(model, prompts[:width], 8, race["stop_id"], race["pad_id"])
    meter = Meter(output)
    meter.start()
    made = 0
    for at in range(0, len(prompts), width):
        made += continued(model, prompts[at : at + width], work.NEW, race["stop_id"], race["pad_id"])
    meter.stop()
    meter.write(work=made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
