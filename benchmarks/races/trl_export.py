"""TRL's side of benchmarks.trl_export: a step of each trainer on the files as they were downloaded (TRL 1.16).

python -m benchmarks.races.trl_export FOLDER MODEL
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "dataloader_pin_memory": False,
}
TRAINERS = {
    "KTO": (KTOTrainer, KTOConfig, "trl_unpaired"),
    "DPO": (DPOTrainer, DPOConfig, "trl_preference"),
    "reward": (RewardTrainer, RewardConfig, "trl_preference"),
    "SFT": (SFTTrainer, SFTConfig, "sft"),
}


def step(name: str, data: Dataset, model: Path, output: str) -> float:
    """One step of a trainer; returns the loss that it logged."""
    trainer, config, _ = TRAINERS[name]
    tokenizer = AutoTokenizer.from_pretrained(model)
    if name == "reward":
        network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
        network.config.pad_token_id = tokenizer.pad_token_id
    else:
        network = AutoModelForCausalLM.from_pretrained(model)
    arguments = config(output_dir=output, **COMMON)
    made = trainer(model=network, args=arguments, train_dataset=data, processing_class=tokenizer)
    made.train()
    return float(next(row["loss"] for row in made.state.log_history if "loss" in row))


def main() -> int:
    """The command line."""
    folder, model = Path(sys.argv[1]), Path(sys.argv[2])
    lines = []
    with tempfile.TemporaryDirectory() as output:
        for name, (_, _, view) in TRAINERS.items():
            for form, builder in (("jsonl", "json"), ("parquet", "parquet")):
                data = load_dataset(
                    builder, data_files=str(folder / f"{view}.{form}"), split="train", cache_dir=f"{output}/cache"
                )
                loss = step(name, data, model, output)
                lines.append(f"{name:6} {view:14} {form:7} {len(data):3} rows  loss {loss:.4f}")
    versions = ", ".join(f"{each} {version(each)}" for each in ("trl", "transformers", "datasets", "torch"))
    print("\n".join([versions, *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
