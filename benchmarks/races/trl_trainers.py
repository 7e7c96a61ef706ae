"""The peers' side of training: transformers' Trainer, TRL's SFTTrainer and RewardTrainer (TRL 1.16), with the defaults
that they document but for bf16, which is slower than fp32 on a CPU without matrix units.

    python -m benchmarks.races.trl_trainers WORK SIZE WORKSPACE OUTPUT
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.races import work
from benchmarks.races.meter import Meter

COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "learning_rate": 1e-4,
    "dataloader_pin_memory": False,
}


def timed(trainer: type[Trainer], meter: Meter, size: str, count: Callable[[dict[str, Any]], int]) -> type[Any]:
    """The trainer, metering the steps after the warm-up: from the first one's start to the last one's optimizer step."""
    amounts = work.AMOUNTS[size]

    class Timed(trainer):  # type: ignore[misc, valid-type]
        done = 0
        seen = 0

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if self.done == amounts.warmup:
                meter.start()
            self.done += 1
            if self.done > amounts.warmup:
                self.seen += count(inputs)
            return super().training_step(model, inputs, *args, **kwargs)

        def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
            if self.done == amounts.warmup + amounts.steps:
                meter.stop(work=self.seen)
            return super()._maybe_log_save_evaluate(*args, **kwargs)

    return Timed


def real_tokens(inputs: dict[str, Any]) -> int:
    """Tokens of a batch that are not padding."""
    mask = inputs.get("attention_mask")
    return inputs["input_ids"].numel() if mask is None else int(mask.sum())


def tokenizer_of(root: Path) -> Any:
    """The race's tokenizer."""
    return AutoTokenizer.from_pretrained(root / "artifacts" / "sft" / "model")


def steps(size: str, batch: int, out: str) -> dict[str, Any]:
    """Arguments for one race's number of steps."""
    amounts = work.AMOUNTS[size]
    return {
        **COMMON,
        "output_dir": out,
        "max_steps": amounts.warmup + amounts.steps,
        "per_device_train_batch_size": batch,
    }


def pretrain(size: str, root: Path, meter: Meter, out: str) -> None:
    """transformers' Trainer on windows of the stream."""
    shape, stream = work.SHAPES[size], work.read_json(root / "race.json")["stream"]
    windows = [stream[at : at + shape.context] for at in range(0, len(stream), shape.context)]
    data = Dataset.from_dict({"input_ids": windows, "labels": windows})
    model = LlamaForCausalLM(LlamaConfig(**shape.huggingface()))
    arguments = TrainingArguments(**steps(size, work.PRETRAIN_BATCH, out), weight_decay=0.1)
    timed(Trainer, meter, size, lambda inputs: inputs["input_ids"].numel())(
        model, arguments, train_dataset=data
    ).train()


def sft(size: str, root: Path, meter: Meter, out: str, **options: Any) -> None:
    """TRL's SFTTrainer, padded."""
    chats = work.read_json(root / "race.json")["conversations"]
    data = Dataset.from_dict(
        {
            "input_ids": [ids for ids, _ in chats],
            "completion_mask": [[int(at >= prompt) for at in range(len(ids))] for ids, prompt in chats],
        }
    )
    model = LlamaForCausalLM.from_pretrained(root / "artifacts" / "pretrain" / "model")
    arguments = SFTConfig(
        **steps(size, work.SFT_BATCH, out),
        max_length=work.SHAPES[size].context,
        completion_only_loss=True,
        **options,
    )
    trainer = timed(SFTTrainer, meter, size, real_tokens)
    trainer(model, arguments, train_dataset=data, processing_class=tokenizer_of(root)).train()


def sft_packed(size: str, root: Path, meter: Meter, out: str) -> None:
    """TRL's SFTTrainer, conversations packed into rows of the context by best fit, each attending to itself."""
    sft(size, root, meter, out, packing=True, packing_strategy="bfd")


def sft_kept(size: str, root: Path, meter: Meter, out: str) -> None:
    """As sft, but activations kept and not computed twice: off is not TRL's default."""
    sft(size, root, meter, out, gradient_checkpointing=False)


def sft_packed_kept(size: str, root: Path, meter: Meter, out: str) -> None:
    """As sft_packed, but activations kept and not computed twice: off is not TRL's default."""
    sft(size, root, meter, out, packing=True, packing_strategy="bfd", gradient_checkpointing=False)


def reward(size: str, root: Path, meter: Meter, out: str, **options: Any) -> None:
    """TRL's RewardTrainer on pairs."""
    pairs = work.read_json(root / "race.json")["pairs"]
    data = Dataset.from_dict(
        {
            "chosen_ids": [prompt + better for prompt, better, _ in pairs],
            "rejected_ids": [prompt + worse for prompt, _, worse in pairs],
        }
    )
    model = AutoModelForSequenceClassification.from_pretrained(root / "artifacts" / "reward" / "model", num_labels=1)
    arguments = RewardConfig(**steps(size, work.REWARD_BATCH, out), max_length=work.SHAPES[size].context, **options)
    trainer = timed(RewardTrainer, meter, size, lambda inputs: len(inputs["input_ids"]) // 2)
    trainer(model, arguments, train_dataset=data, processing_class=tokenizer_of(root)).train()


def reward_kept(size: str, root: Path, meter: Meter, out: str) -> None:
    """As reward, but activations kept and not computed twice: off is not TRL's default."""
    reward(size, root, meter, out, gradient_checkpointing=False)


WORKS = {f.__name__: f for f in (pretrain, sft, sft_packed, sft_kept, sft_packed_kept, reward, reward_kept)}


def main() -> int:
    """Run one work and write what was measured."""
    name, size, root, output = sys.argv[1:]
    torch.set_num_threads(1)
    meter = Meter(output)
    with tempfile.TemporaryDirectory() as out:
        WORKS[name](size, Path(root), meter, out)
    meter.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
