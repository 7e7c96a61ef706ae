"""LoRA (Hu et al. 2021): small updates beside frozen projections, in the file format of PEFT's adapters.

A projection W [out, in] becomes W + (alpha/r)·B·A with A [r, in] and B [out, r], r the rank. Where several of PEFT's
modules share one matrix product here (q, k and v; gate and up), each has an update of its own for its rows of W.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoint import new_folder, read_tensors, write_tensors
from models.distributed import like
from models.huggingface import GLM
from models.transformer import Block, Transformer

PARENTS = {  # PEFT's module names, and where they stand in a layer of transformers' models
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
GATE_UP = "gate_up_proj"  # GLM has one module for both: asked for one, it is updated
KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class LoraOptions:
    """Section `lora` of params.yaml, for all stages that start from a model.

    rank: 0 trains all weights; targets: PEFT's module names.
    """

    rank: int = 0
    alpha: float = 32.0
    targets: list[str] = field(default_factory=lambda: list(PARENTS))

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank must be 0 (all weights learn) or above, not {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, not {self.alpha}")
        unknown = [name for name in self.targets if name not in PARENTS]
        if unknown or not self.targets:
            raise ValueError(f"targets must name some of {', '.join(PARENTS)}, not {', '.join(unknown) or 'nothing'}")


class LoraLinear(nn.Module):
    """A frozen linear layer with an update for some of the modules that it holds.

    modules: their names and numbers of outputs, in the order of the rows of the weight; ranks: the rank of each that is
    updated. `weight` reads as the sum of both, so that whoever takes a layer's weight (the sampler, a saved model) gets
    what the layer computes.
    """

    def __init__(self, base: nn.Linear, modules: Mapping[str, int], ranks: Mapping[str, int], alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.modules_held, self.alpha = dict(modules), alpha
        like = base.weight
        self.a = nn.ParameterDict({n: nn.Parameter(like.new_zeros(r, base.in_features)) for n, r in ranks.items()})
        self.b = nn.ParameterDict({n: nn.Parameter(like.new_zeros(modules[n], r)) for n, r in ranks.items()})
        self.enabled = True
        self.kept: Tensor | None = None  # the base weight while the update is merged into it

    @property
    def frozen(self) -> Tensor:
        """The weight without the update."""
        return self.base.weight if self.kept is None else self.kept

    @property
    def weight(self) -> Tensor:
        """The weight in use [out, in]: the base's own while disabled, else with the update."""
        if not self.enabled:
            return self.frozen
        return self.base.weight if self.kept is not None else self.base.weight + self.delta()

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, which is never updated."""
        return self.base.bias

    def delta(self) -> Tensor:
        """The update (alpha/r)·B·A [out, in], zero in the rows of modules without one."""
        rows = [
            (self.b[name] @ self.a[name]) * self._scale(name)
            if name in self.a
            else self.base.weight.new_zeros(size, self.base.in_features)
            for name, size in self.modules_held.items()
        ]
        return torch.cat(rows)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in] → [N, out]."""
        if not self.enabled or self.kept is not None:
            return F.linear(x, self.weight, self.bias)
        parts = [
            F.linear(F.linear(x, self.a[name]), self.b[name]) * self._scale(name)
            if name in self.a
            else x.new_zeros(x.shape[0], size)
            for name, size in self.modules_held.items()
        ]
        return F.linear(x, self.base.weight, self.bias) + torch.cat(parts, dim=-1)

    def _scale(self, name: str) -> float:
        return self.alpha / self.a[name].shape[0]


def attach(model: Transformer, options: LoraOptions, generator: torch.Generator) -> None:
    """Freeze the model and put updates beside the projections that `options` names.

    A is drawn as PEFT does (uniform within ±1/sqrt(in)), B is 0: the model computes what it did before.
    Raises ValueError for rank 0, or a model that has updates already.
    """
    if not options.rank:
        raise ValueError("lora.rank is 0: there is nothing to attach")
    targets = list(options.targets)
    if model.config.family in GLM and {"gate_proj", "up_proj"} & {*targets}:
        targets.append(GATE_UP)
    _insert(model, {(i, n): options.rank for i in range(len(model.layers)) for n in targets}, options.alpha)
    with torch.no_grad():
        for layer in lora_layers(model):
            for a in layer.a.values():
                bound = a.shape[1] ** -0.5
                a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))


def _insert(model: Transformer, ranks: Mapping[tuple[int, str], int], alpha: float) -> None:
    """Put updates of zeros at (layer, module) with the given ranks, and freeze everything else."""
    _check_plain(model)
    model.requires_grad_(False)
    for i, block in enumerate(model.layers):
        for owner, attribute, modules in _projections(block, model.config.family):
            wanted = {name: ranks[i, name] for name in modules if (i, name) in ranks}
            if wanted:
                setattr(owner, attribute, LoraLinear(getattr(owner, attribute), modules, wanted, alpha))


def _check_plain(model: Transformer) -> None:
    if any(True for _ in lora_layers(model)):
        raise ValueError("the model has an adapter already: save the merged model and start from that")


def _projections(block: Block, family: str) -> Iterator[tuple[nn.Module, str, dict[str, int]]]:
    """The linear layers of a block: who holds it under which name, and the modules that it computes with their sizes."""
    a = block.attention
    yield a, "qkv", {"q_proj": a.heads * a.head_dim, **dict.fromkeys(("k_proj", "v_proj"), a.kv_heads * a.head_dim)}
    yield a, "o", {"o_proj": a.o.out_features}
    if family in GLM:
        yield block, "gate_up", {GATE_UP: block.gate_up.out_features}
    else:
        yield block, "gate_up", dict.fromkeys(("gate_proj", "up_proj"), block.gate_up.out_features // 2)
    yield block, "down", {"down_proj": block.down.out_features}


def lora_layers(model: nn.Module) -> Iterator[LoraLinear]:
    """The layers of a model that have an update."""
    return (module for module in model.modules() if isinstance(module, LoraLinear))


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within it the model is its base, bit for bit: the updates are left out, merged or not."""
    layers = list(lora_layers(model))
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add each update to its weight, so that a forward pass costs what the base's does; `unmerge` takes it back."""
    for layer in lora_layers(model):
        if layer.kept is None:
            merged = layer.base.weight + layer.delta()
            layer.kept, layer.base.weight.data = layer.base.weight.data, merged


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Undo `merge`: the base's weights are the same bits as before (they were kept, not computed back)."""
    for layer in lora_layers(model):
        if layer.kept is not None:
            layer.base.weight.data, layer.kept = layer.kept, None


class Learned:
    """The parameters of a module that learn, as one part of a checkpoint; what is frozen is read from its folder again."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that learn, by name: as they are now, for shard puts others in their place."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        """The parameters by name."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of state_dict, of whole tensors. Raises ValueError when other parameters learned then."""
        parameters = self.parameters
        if state.keys() != parameters.keys():
            raise ValueError(f"the checkpoint is of other parameters: {sorted(state.keys() ^ parameters.keys())[:3]}")
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(like(state[name], p))


def what_learns(model: Transformer, options: LoraOptions, generator: torch.Generator) -> nn.Module | Learned:
    """The part of a stage's checkpoint: the model itself for rank 0, else the updates that are attached to it here."""
    if not options.rank:
        return model
    attach(model, options, generator)
    return Learned(model)


# -- PEFT's files ------------------------------------------------------------------------------------------------------


def save_adapter(model: Transformer, folder: str | os.PathLike[str], base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT reads them; `base` names the model they belong to.

    The folder is whole or absent. Raises ValueError when the model has no adapter.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for i, block in enumerate(model.layers):
        for layer in lora_layers(block):
            for name in layer.a:
                ranks[name] = layer.a[name].shape[0]
                for letter, matrix in (("A", layer.a[name]), ("B", layer.b[name])):
                    tensors[
                        f"base_model.model.model.layers.{i}.{PARENTS.get(name, 'mlp')}.{name}.lora_{letter}.weight"
                    ] = matrix
    if not tensors:
        raise ValueError("the model has no adapter to save")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": next(iter(ranks.values())),
        "lora_alpha": next(lora_layers(model)).alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_folder(Path(folder)) as draft:
        (draft / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tensors(draft / "adapter_model.safetensors", tensors)


def load_adapter(model: Transformer, folder: str | os.PathLike[str]) -> None:
    """Attach the adapter of a folder that PEFT or save_adapter wrote.

    Raises FileNotFoundError, or ValueError that names the file and what is not supported or does not fit.
    """
    _check_plain(model)
    path = Path(folder) / "adapter_config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: not an adapter folder")
    config = json.loads(path.read_text(encoding="utf-8"))
    _check_config(path, config)
    file = Path(folder) / "adapter_model.safetensors"
    shapes = {
        (i, name): (getattr(owner, attribute).in_features, size)
        for i, block in enumerate(model.layers)
        for owner, attribute, modules in _projections(block, model.config.family)
        for name, size in modules.items()
    }
    found: dict[tuple[int, str, str], Tensor] = {}
    for key, tensor in read_tensors(file).items():
        match = KEY.fullmatch(key)
        if match is None or (int(match[1]), match[2]) not in shapes:
            raise ValueError(f"{file}: {key} has no place in this model")
        found[int(match[1]), match[2], match[3]] = tensor
    for i, name in _sites(found):
        _check_pair(file, f"layer {i}, {name}", found.get((i, name, "A")), found.get((i, name, "B")), *shapes[i, name])
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    ranks = {(i, name): found[i, name, "A"].shape[0] for i, name in _sites(found)}
    if set(ranks.values()) != {config["r"]}:
        raise ValueError(f"{file}: the ranks are {sorted(set(ranks.values()))}, {path} says r = {config['r']}")
    _insert(model, ranks, alpha=scale * config["r"])
    with torch.no_grad():
        for i, block in enumerate(model.layers):
            for layer in lora_layers(block):
                for name in layer.a:
                    layer.a[name].copy_(found[i, name, "A"])
                    layer.b[name].copy_(found[i, name, "B"])


def _sites(found: Iterable[tuple[int, str, str]]) -> list[tuple[int, str]]:
    return sorted({(i, name) for i, name, _ in found})


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')}; LORA is supported")
    for key, plain in (("bias", "none"), ("use_dora", False), ("fan_in_fan_out", False)):
        if config.get(key, plain) != plain:
            raise ValueError(f"{path}: {key} is {config[key]!r}; {plain!r} is supported")
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(key):
            raise ValueError(f"{path}: {key} is set; one rank and alpha for all modules is supported")


def _check_pair(file: Path, where: str, a: Tensor | None, b: Tensor | None, inputs: int, outputs: int) -> None:
    if a is None or b is None:
        raise ValueError(f"{file}: {where} has lora_{'A' if b is None else 'B'} alone")
    if a.shape[1:] != (inputs,) or b.shape != (outputs, a.shape[0]):
        shapes = f"A {list(a.shape)} and B {list(b.shape)}"
        raise ValueError(f"{file}: {where}: {shapes} do not fit a projection of {inputs} to {outputs}")
