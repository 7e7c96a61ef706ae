"""TRL's side of PPO: trl.experimental.ppo of TRL 1.12, with its defaults but for bf16 (slower than fp32 on a CPU without
matrix units) and what the race fixes: temperature 1, batch, minibatches, answer length.

    python -m benchmarks.races.trl_ppo WORK SIZE WORKSPACE OUTPUT
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.races import work
from benchmarks.races.meter import Meter


class Clock(TrainerCallback):
    """Starts the meter when the first iteration has ended, stops it when the last has."""

    def __init__(self, meter: Meter, iterations: int) -> None:
        self.meter, self.iterations = meter, iterations

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An iteration has ended."""
        if state.global_step == 1:
            self.meter.start()
        elif state.global_step == 1 + self.iterations:
            self.meter.stop(work=self.iterations * work.PPO_BATCH)


def main() -> int:
    """Run PPO and write what was measured."""
    name, size, root, output = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    iterations = work.AMOUNTS[size].iterations
    policy, rewarder = root / "artifacts" / "sft" / "model", root / "artifacts" / "reward" / "model"
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    data = Dataset.from_dict({"input_ids": work.read_json(root / "race.json")["ppo_prompts"]})
    meter = Meter(output)
    with tempfile.TemporaryDirectory() as out:
        arguments = PPOConfig(
            output_dir=out,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            gradient_checkpointing=name != "ppo_kept",
            per_device_train_batch_size=work.PPO_BATCH,
            num_mini_batches=work.PPO_MINIBATCHES,
            num_ppo_epochs=work.PPO_EPOCHS,
            total_episodes=(1 + iterations) * work.PPO_BATCH,
            num_sample_generations=0,
            response_length=work.PPO_NEW,
            stop_token="eos",
            temperature=1.0,
            learning_rate=work.PPO_RATE,
            kl_coef=work.KL,
        )
        trainer = PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(policy),
            ref_model=AutoModelForCausalLM.from_pretrained(policy),
            reward_model=AutoModelForSequenceClassification.from_pretrained(rewarder, num_labels=1),
            value_model=AutoModelForSequenceClassification.from_pretrained(rewarder, num_labels=1),
            train_dataset=data,
            eval_dataset=data,
            callbacks=[Clock(meter, iterations)],
        )
        trainer.train()
    meter.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
