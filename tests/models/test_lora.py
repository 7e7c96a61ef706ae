"""LoRA against its definition, against full-weight gradients, and against peft and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_stages import Killed, make_workspace, run_stage

from models import lora
from models.checkpoint import load_model, model_hash, save_model
from models.critic import Critic
from models.episodes import Models, roll_out
from models.layout import dense_layout, packed_layout
from models.lora import LoraOptions, attach, disabled, lora_layers, merge, unmerge
from models.optim import Optimizer
from models.ppo_options import PPOOptions
from models.reward import RewardModel, load_reward_model
from models.rollout import generate, sequence_logprobs
from models.tokenizer import Tokenizer
from models.transformer import Transformer

IDS = torch.tensor([5, 9, 11, 200, 7, 8, 250])
LAYOUT = packed_layout([4, 1, 2])


def copy_of(model: Transformer) -> Transformer:
    copy = Transformer(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def shake(model: Transformer, seed: int = 1) -> None:
    """Give the updates weights as if they had learned something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model):
            for matrix in layer.b.values():
                matrix.normal_(0, 0.1, generator=generator)


@pytest.fixture
def adapted(model: Transformer) -> Transformer:
    """The fixture `model` with updates of rank 3 on all modules."""
    made = copy_of(model)
    attach(made, LoraOptions(rank=3, alpha=6.0), torch.Generator().manual_seed(0))
    shake(made)
    return made


def test_a_fresh_adapter_changes_nothing(model: Transformer) -> None:
    base = model(IDS, LAYOUT)
    attach(model, LoraOptions(rank=4), torch.Generator().manual_seed(0))
    assert torch.equal(model(IDS, LAYOUT), base)


def test_rows_that_are_read_pass_through_the_updates(adapted: Transformer) -> None:
    """The last layer's projections are taken apart for them, updates included, merged or not."""
    rows = torch.tensor([0, 3, 6])
    expected = adapted(IDS, LAYOUT)[rows]
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    learned = [p for p in adapted.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected.square().sum(), learned)
    got = adapted(IDS, LAYOUT, rows)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for name, a, b in zip(names, torch.autograd.grad(got.square().sum(), learned), gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=name)
    merge(adapted)
    torch.testing.assert_close(adapted(IDS, LAYOUT, rows), expected, atol=1e-5, rtol=1e-5)


def test_with_adapters_off_the_model_is_its_base_bit_for_bit(model: Transformer, adapted: Transformer) -> None:
    base = model(IDS, LAYOUT)
    asked = {"stop_id": 2, "max_new_tokens": 8, "seeds": [1, 2], "width": 2}
    answers = generate(model, [[7, 8], [9]], **asked)
    before = adapted(IDS, LAYOUT)
    assert (before - base).abs().max() > 0.1
    for step in (None, merge, unmerge):
        if step is not None:
            step(adapted)
        with disabled(adapted):
            assert torch.equal(adapted(IDS, LAYOUT), base)
            assert generate(adapted, [[7, 8], [9]], **asked) == answers
            with disabled(adapted):
                pass
            assert torch.equal(adapted(IDS, LAYOUT), base), "leaving an inner block does not switch them on"
        torch.testing.assert_close(adapted(IDS, LAYOUT), before, atol=2e-5, rtol=1e-5)
    assert torch.equal(adapted(IDS, LAYOUT), before)


def test_an_update_is_b_times_a_in_the_rows_of_its_module(model: Transformer) -> None:
    """The fused weight of q (64 rows), k (32) and v (32): updates for q and v leave the rows of k alone."""
    attach(model, LoraOptions(rank=2, alpha=5.0, targets=["q_proj", "v_proj"]), torch.Generator().manual_seed(0))
    shake(model)
    layer = model.layers[0].attention.qkv
    base = layer.base.weight.detach().numpy()
    expected = base.copy()
    for name, start, stop in (("q_proj", 0, 64), ("v_proj", 96, 128)):
        a, b = layer.a[name].detach().numpy(), layer.b[name].detach().numpy()
        expected[start:stop] += 5.0 / 2 * np.einsum("or,ri->oi", b, a)
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, atol=1e-6)
    assert np.array_equal(layer.weight.detach().numpy()[64:96], base[64:96])
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    got = layer(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(got, x @ expected.T, atol=1e-4)
    assert not isinstance(model.layers[0].gate_up, lora.LoraLinear)


def test_gradients_are_those_of_the_full_weight_through_the_two_factors(
    model: Transformer, adapted: Transformer
) -> None:
    """dA = (alpha/r)·Bᵀ·dW and dB = (alpha/r)·dW·Aᵀ, with dW the gradient of a plain model that has the summed weight."""
    plain = copy_of(model)
    with torch.no_grad():
        for layer, other in zip(plain.layers, adapted.layers, strict=True):
            layer.attention.qkv.weight.copy_(other.attention.qkv.weight)
            layer.attention.o.weight.copy_(other.attention.o.weight)
            layer.gate_up.weight.copy_(other.gate_up.weight)
            layer.down.weight.copy_(other.down.weight)
    for net in (plain, adapted):
        net(IDS, LAYOUT).square().sum().backward()
    rows = {"gate_proj": slice(0, 96), "up_proj": slice(96, 192)}
    for layer, full in zip(adapted.layers, plain.layers, strict=True):
        for name, part in rows.items():
            a, b, grad = layer.gate_up.a[name], layer.gate_up.b[name], full.gate_up.weight.grad[part]
            torch.testing.assert_close(a.grad, 2.0 * b.t() @ grad, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(b.grad, 2.0 * grad @ a.t(), atol=1e-3, rtol=1e-3)


def test_only_the_updates_learn(model: Transformer, adapted: Transformer) -> None:
    optimizer = Optimizer(adapted, weight_decay=0.1)
    adapted(IDS, LAYOUT).sum().backward()
    optimizer.step(0.1, 1.0)
    with disabled(adapted):
        assert torch.equal(adapted(IDS, LAYOUT), model(IDS, LAYOUT))
    count = sum(p.numel() for p in optimizer.parameters)
    per_layer = 3 * (3 * 64 + 64 + 2 * 32 + 64 + 64 + 2 * 64 + 2 * 96 + 96 + 64)  # r·(in + out) of the seven modules
    assert count == 2 * per_layer


def test_what_is_sampled_has_the_log_probabilities_of_the_training_code(adapted: Transformer) -> None:
    """The sampler reads the summed weights, training computes base and update apart."""
    asked = [[7, 8, 9], [30], [40, 41]] * 4
    answers = generate(adapted, asked, stop_id=2, max_new_tokens=12, seeds=list(range(12)), width=4)
    again = sequence_logprobs(adapted, asked, [a.ids for a in answers])
    for answer, scored in zip(answers, again, strict=True):
        assert answer.logprobs == pytest.approx(scored, abs=2e-5)


def test_peft_loads_what_we_save_and_gives_the_same_logits(
    model: Transformer, adapted: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    save_model(model, tmp_path / "base", tokenizer)
    lora.save_adapter(adapted, tmp_path / "adapter", "base")
    save_model(adapted, tmp_path / "merged", tokenizer)
    ours = adapted.logits(adapted(IDS, dense_layout(1, len(IDS))))
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS[None]).logits[0], ours, atol=1e-4, rtol=0)
        merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")(IDS[None]).logits[0]
        torch.testing.assert_close(merged, ours, atol=1e-4, rtol=0)


def test_we_load_what_peft_saves(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    save_model(model, tmp_path / "base", tokenizer)
    for rslora in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(
            r=4, lora_alpha=12, target_modules=["q_proj", "up_proj", "down_proj"], use_rslora=rslora,
            init_lora_weights=False, task_type="CAUSAL_LM",
        )  # fmt: skip
        theirs = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
        theirs.save_pretrained(tmp_path / "adapter")
        ours = load_model(tmp_path / "base")
        lora.load_adapter(ours, tmp_path / "adapter")
        with torch.no_grad():
            expected = theirs(IDS[None]).logits[0]
            got = ours.logits(ours(IDS, dense_layout(1, len(IDS))))
            assert (expected - model.logits(model(IDS, dense_layout(1, len(IDS))))).abs().max() > 0.1
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_a_saved_adapter_is_the_same_and_its_bytes_too(
    model: Transformer, adapted: Transformer, tmp_path: Path
) -> None:
    for name in "ab":
        lora.save_adapter(adapted, tmp_path / name, "artifacts/sft/model")
    again = copy_of(model)
    lora.load_adapter(again, tmp_path / "a")
    assert torch.equal(again(IDS, LAYOUT), adapted(IDS, LAYOUT))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    with pytest.raises(ValueError, match="has an adapter already"):
        lora.load_adapter(again, tmp_path / "a")
    with pytest.raises(ValueError, match="no adapter to save"):
        lora.save_adapter(model, tmp_path / "c", "")


def test_a_bad_adapter_is_refused_by_name(model: Transformer, adapted: Transformer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json is missing"):
        lora.load_adapter(model, tmp_path / "none")
    folder = tmp_path / "adapter"
    lora.save_adapter(adapted, folder, "base")
    path, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config, tensors = json.loads(path.read_text()), load_file(file)
    for change, message in (
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"use_dora": True}, "use_dora is True"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern is set"),
        ({"r": 8}, r"the ranks are \[3\], .* says r = 8"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            lora.load_adapter(copy_of(model), folder)
    path.write_text(json.dumps(config))
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != name}, "layer 1, down_proj has lora_B alone"),
        (tensors | {name: torch.zeros(3, 5)}, r"A \[3, 5\] and B \[64, 3\] do not fit a projection of 96 to 64"),
        (
            tensors | {name.replace(".1.", ".2."): tensors[name] + 1},
            r"layers.2.mlp.down_proj.lora_A.weight has no place",
        ),
    ):
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            lora.load_adapter(copy_of(model), folder)


def test_options_that_make_no_sense_are_refused() -> None:
    for bad, message in (
        ({"rank": -1}, "rank must be 0"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"targets": ["q_proj", "qkv"]}, "targets must name some of .*, not qkv"),
        ({"targets": []}, "not nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            LoraOptions(**bad)


def test_the_reference_of_ppo_is_the_policy_with_its_updates_off(model: Transformer, adapted: Transformer) -> None:
    judge = RewardModel(copy_of(model)).initialize(torch.Generator().manual_seed(5)).eval()
    asked = [[7, 8, 9], [30], [40, 41], [50, 51, 52, 53]]
    options = PPOOptions(batch_size=4, max_new_tokens=8)
    rollout = roll_out(Models(adapted, Critic(judge), None, judge), asked, [1, 2, 3, 4], options, beta=0.1, stop_id=2)
    ids = [answer.ids for answer in rollout.answers]
    for logp, net in ((rollout.logp, adapted), (rollout.ref_logp, model)):
        for i, expected in enumerate(sequence_logprobs(net, asked, ids)):
            assert logp[i][rollout.mask[i]].tolist() == pytest.approx(expected, abs=2e-5)
    assert all(layer.enabled for layer in lora_layers(adapted))


SFT = {
    "sft": {"steps": 8, "batch_size": 6, "checkpoint_every": 3, "log_every": 1, "learning_rate": 0.01},
    "lora": {"rank": 2},
}
PPO = {
    "ppo": {
        "iterations": 5, "batch_size": 8, "max_new_tokens": 6, "checkpoint_every": 2, "ema_decay": 0.9,
        "kl_target": 0.5, "ptx_conversations": 4, "learning_rate": 0.01,
    },
    "lora": {"rank": 2},
}  # fmt: skip


@pytest.mark.parametrize(("stage", "params"), [("sft", SFT), ("ppo", PPO)])
def test_a_stage_with_an_adapter_writes_the_merged_model_and_resumes_bit_for_bit(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path, stage: str, params: dict[str, dict[str, object]]
) -> None:
    make_workspace(tmp_path, model, tokenizer)
    whole, _ = run_stage(tmp_path, stage, tmp_path / "whole", params)
    base = load_model(tmp_path / "artifacts/sft/model")
    lora.load_adapter(base, whole / "model/adapter")
    merged = load_model(whole / "model")
    torch.testing.assert_close(base(IDS, LAYOUT), merged(IDS, LAYOUT), atol=2e-5, rtol=1e-5)
    assert (merged(IDS, LAYOUT) - model(IDS, LAYOUT)).abs().max() > 1e-3

    with pytest.raises(Killed):
        run_stage(tmp_path, stage, tmp_path / "again", params, killed_after=4)
    again, events = run_stage(tmp_path, stage, tmp_path / "again", params)
    assert any(event["event"] == "resumed" for event in events)
    assert model_hash(again / "model") == model_hash(whole / "model")
    size = sum(f.stat().st_size for f in (tmp_path / "whole/checkpoints").iterdir()) / 2
    assert size < sum(p.numel() for p in model.parameters()) * 4 * (1 if stage == "sft" else 2), "the base is not in it"


def test_a_reward_model_with_an_adapter_is_written_merged_and_resumes_bit_for_bit(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    make_workspace(tmp_path, model, tokenizer)
    params: dict[str, dict[str, object]] = {
        "reward": {"epochs": 2, "batch_size": 6, "checkpoint_every": 3, "log_every": 1, "learning_rate": 0.01},
        "lora": {"rank": 2, "targets": ["q_proj", "down_proj"]},
    }
    whole, _ = run_stage(tmp_path, "reward", tmp_path / "whole", params)
    learned, base = load_reward_model(whole / "model"), load_model(tmp_path / "artifacts/sft/model")
    before, after = (dict(m.named_parameters()) for m in (base, learned.trunk))
    changed = {name.split(".", 2)[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"attention.qkv.weight", "down.weight"}
    rows = base.config.num_attention_heads * base.config.head_dim  # of q; k and v have no update
    assert torch.equal(before["blocks.0.attention.qkv.weight"][rows:], after["blocks.0.attention.qkv.weight"][rows:])

    with pytest.raises(Killed):
        run_stage(tmp_path, "reward", tmp_path / "again", params, killed_after=4)
    again, events = run_stage(tmp_path, "reward", tmp_path / "again", params)
    assert any(event["event"] == "resumed" for event in events)
    assert model_hash(again / "model") == model_hash(whole / "model")
    size = sum(f.stat().st_size for f in (tmp_path / "whole/checkpoints").iterdir()) / 2
    assert size < sum(p.numel() for p in model.parameters()) * 4, "the base is not in it"
