"""TRL's side of PPO with a value head on the policy: PPOTrainer.step of TRL 0.11.4, generation and the reward model's
scores before it as its examples do.

    python -m benchmarks.races.trl_ppo_step WORK SIZE WORKSPACE OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

from benchmarks.races import work
from benchmarks.races.meter import Meter


def main() -> int:
    """Run PPO and write what was measured."""
    size, root, output = sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    iterations = work.AMOUNTS[size].iterations
    policy = root / "artifacts" / "sft" / "model"
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    rewarder = AutoModelForSequenceClassification.from_pretrained(root / "artifacts" / "reward" / "model", num_labels=1)
    rewarder.eval()
    config = PPOConfig(
        batch_size=work.PPO_BATCH,
        mini_batch_size=work.PPO_BATCH // work.PPO_MINIBATCHES,
        ppo_epochs=work.PPO_EPOCHS,
        learning_rate=work.PPO_RATE,
        adap_kl_ctrl=False,
        init_kl_coef=work.KL,
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(policy))
    reference = AutoModelForCausalLMWithValueHead.from_pretrained(str(policy))
    trainer = PPOTrainer(config, model, reference, tokenizer)
    prompts = [torch.tensor(ids) for ids in work.read_json(root / "race.json")["ppo_prompts"]]
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": work.PPO_NEW}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    meter = Meter(output)
    for iteration in range(1 + iterations):
        if iteration == 1:
            meter.start()
        answers = trainer.generate(prompts, batch_size=work.PPO_BATCH, return_prompt=False, **sampling, **ends)
        sequences = [torch.cat([p, a]) for p, a in zip(prompts, answers, strict=True)]
        ids = pad_sequence(sequences, batch_first=True, padding_value=tokenizer.pad_token_id)
        with torch.no_grad():
            scores = rewarder(ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits[:, 0]
        trainer.step(prompts, answers, list(scores))
    meter.stop(work=iterations * work.PPO_BATCH)
    meter.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
