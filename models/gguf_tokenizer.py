"""The tokenizer in a GGUF's metadata: byte-level BPE from and to tokenizer.json, with chat template and special tokens."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from models.tokenizer import END, END_OF_TEXT, PAD, HuggingFaceTokenizer, Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {"llama-bpe": LLAMA3, "qwen2": QWEN2}
WHOLE = ("gpt-2", "default")  # byte-level BPE with its own split
DIGITS = "smollm"  # the same after every digit was set apart
# llama.cpp puts no blank before a text, and ours does unless there is one
TEMPLATE = (
    "{%- for message in messages -%}{{ '<|' + message['role'] + '|>' }}"
    "{%- if message['content'] and message['content'][0] != ' ' -%}{{ ' ' }}{%- endif -%}"
    "{{ message['content'] + '<|end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def read_tokenizer(metadata: dict[str, Any], where: str) -> HuggingFaceTokenizer:
    """The tokenizer that a GGUF's keys describe. Raises ValueError that names a key which is missing or not known."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"tokenizer.ggml.model is {kind!r}; gpt2 (byte-level BPE) is read")
    for key in ("tokens", "merges"):
        if f"tokenizer.ggml.{key}" not in metadata:
            raise ValueError(f"tokenizer.ggml.{key} is missing")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    pre = metadata.get("tokenizer.ggml.pre", "default")
    inner = tokenizers.Tokenizer(
        BPE(
            vocab={token: id for id, token in enumerate(tokens) if types[id] != UNUSED},
            merges=[_pair(merge) for merge in metadata["tokenizer.ggml.merges"]],
            ignore_merges=pre == "llama-bpe",
        )
    )
    inner.pre_tokenizer = _splitter(pre)
    if pre == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    for id, token in enumerate(tokens):
        if types[id] == CONTROL:
            inner.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif types[id] == USER_DEFINED:
            inner.add_tokens([AddedToken(token, normalized=False, special=False)])
    ids = {
        name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding", "eot")
    }
    if metadata.get("tokenizer.ggml.add_bos_token") and ids["bos"] is not None:
        bos = tokens[ids["bos"]]
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, ids["bos"])]
        )
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {name: tokens[at] for name, short in named.items() if (at := ids[short]) is not None}
    files = {"tokenizer.json": inner.to_str(pretty=True), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
    if template := metadata.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template
    stops = [at for name in ("eos", "eot") if (at := ids[name]) is not None]
    return HuggingFaceTokenizer(inner, files, {"eos_token_id": list(dict.fromkeys(stops))}, where)


def _pair(merge: str) -> tuple[str, str]:
    """A merge's two halves; the alphabet of byte-level BPE has no blank, so the one in the middle parts them."""
    first, _, second = merge.partition(" ")
    return first, second


def _splitter(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre in WHOLE:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if pre in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise ValueError(f"tokenizer.ggml.pre is {pre!r}; known are {', '.join([*WHOLE, DIGITS, *SPLITS])}")


def _pre_name(state: dict[str, Any]) -> str:
    """The name that llama.cpp has for a tokenizer.json's way to split. Raises ValueError when it is none of ours."""
    pre = state.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return DIGITS
    if kinds == ["Split", "ByteLevel"]:
        for name, pattern in SPLITS.items():
            if parts[0].get("pattern") == {"Regex": pattern}:
                return name
    raise ValueError(f"tokenizer.json: pre_tokenizer {kinds} has no name in llama.cpp that is known here")


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, tuple[str, Any]]:
    """A GGUF's keys for a tokenizer: key → (name of gguf.GGUFWriter's method, value).

    Ids above the tokenizer's own, up to the model's vocab_size, become unused tokens. Raises ValueError when the tokenizer
    is no byte-level BPE, or holds more tokens than the model.
    """
    state = json.loads(tokenizer.inner.to_str())
    if state["model"]["type"] != "BPE" or (state.get("decoder") or {}).get("type") != "ByteLevel":
        raise ValueError("tokenizer.json: byte-level BPE is exported to GGUF; this is another kind")
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}")
    tokens = [f"[PAD{id}]" for id in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, id in state["model"]["vocab"].items():
        tokens[id], types[id] = token, NORMAL
    for added in state["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    out: dict[str, tuple[str, Any]] = {
        "model": ("add_tokenizer_model", "gpt2"),
        "pre": ("add_tokenizer_pre", _pre_name(state)),
        "tokens": ("add_token_list", tokens),
        "types": ("add_token_types", types),
        "merges": ("add_token_merges", merges),
    }
    if isinstance(tokenizer, HuggingFaceTokenizer):
        bos = _adds_bos(state, tokenizer.named.get("bos_token"))
        named = {name: tokenizer.inner.token_to_id(text) for name, text in tokenizer.named.items()}
        template = tokenizer.template.source if tokenizer.template else None
    else:
        bos = False
        named = {"bos_token": tokenizer.special[END_OF_TEXT], "pad_token": tokenizer.special[PAD]}
        named["eos_token"] = tokenizer.special[END]
        template = TEMPLATE
    out["add_bos"] = ("add_add_bos_token", bos)
    if tokenizer.stop_ids:
        out["eos"] = ("add_eos_token_id", tokenizer.stop_id)
        if len(tokenizer.stop_ids) > 1:
            out["eot"] = ("add_eot_token_id", tokenizer.stop_ids[1])
    for name, short in (("bos_token", "bos"), ("pad_token", "pad"), ("unk_token", "unk")):
        if named.get(name) is not None:
            out[short] = (f"add_{short}_token_id", named[name])
    if template is not None:
        out["template"] = ("add_chat_template", template)
    return out


def _adds_bos(state: dict[str, Any], bos: str | None) -> bool:
    """Whether encoding a text puts the bos token before it."""
    single = (state.get("post_processor") or {}).get("single") or []
    first = single[0].get("SpecialToken", {}) if single else {}
    return bos is not None and first.get("id") == bos
