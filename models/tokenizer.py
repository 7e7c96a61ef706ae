"""Byte-level BPE with the special tokens of the chat template. Token ids, never strings, go from rollout to training."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

END_OF_TEXT, PAD, END = "<|endoftext|>", "<|pad|>", "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL = (END_OF_TEXT, PAD, END, *ROLES.values())
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|' + message['role'] + '|>' }}"
    "{%- if message['role'] == 'assistant' -%}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{%- else -%}{{ message['content'] + '<|end|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
Messages = Sequence[Mapping[str, str]]


class Tokenizer:
    """A trained tokenizer. What a user writes is never a special token: `<|end|>` in a message is five characters' text."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self.inner = inner
        self.inner.encode_special_tokens = True
        found = {token: inner.token_to_id(token) for token in SPECIAL}
        missing = [token for token, id in found.items() if id is None]
        if missing:
            raise ValueError(f"tokenizer.json lacks the special tokens {', '.join(missing)} of the chat template")
        self.special = {token: id for token, id in found.items() if id is not None}

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from texts. Raises ValueError when vocab_size cannot hold the 256 bytes and the special tokens."""
        if vocab_size < 256 + len(SPECIAL):
            raise ValueError(
                f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL)} special tokens need room"
            )
        inner = tokenizers.Tokenizer(BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """From a folder with tokenizer.json. Raises FileNotFoundError or ValueError."""
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: not a model or tokenizer folder")
        return cls(tokenizers.Tokenizer.from_file(str(path)))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja as transformers reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.inner.encode_special_tokens = False  # a property of this process, not of the file
        self.inner.save(str(folder / "tokenizer.json"))
        self.inner.encode_special_tokens = True
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END,
            "pad_token": PAD,
            "additional_special_tokens": list(ROLES.values()),
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")

    def generation_config(self) -> dict[str, Any]:
        """The content of generation_config.json: the ids that begin, end and pad, and how to sample."""
        return {
            "bos_token_id": self.end_of_text_id,
            "eos_token_id": self.stop_id,
            "pad_token_id": self.special[PAD],
            "do_sample": True,
            "temperature": 1.0,
            "max_new_tokens": 48,
        }

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.inner.get_vocab_size())

    @property
    def stop_id(self) -> int:
        """The token that ends a message."""
        return self.special[END]

    @property
    def end_of_text_id(self) -> int:
        """The token before each pretraining document."""
        return self.special[END_OF_TEXT]

    def encode(self, text: str) -> list[int]:
        """Text to ids, without special tokens."""
        return list(self.inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Many texts to ids, on all of the tokenizer's threads."""
        return [list(e.ids) for e in self.inner.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Ids to text, without the space that encoding puts before the first word."""
        return str(self.inner.decode(list(ids), skip_special_tokens=skip_special)).removeprefix(" ")

    def encode_chat(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        """A conversation by the chat template to ids. Raises ValueError for an unknown role."""
        ids = [token for token, _ in self.encode_chat_with_mask(messages)]
        return [*ids, self.special[ROLES["assistant"]]] if add_generation_prompt else ids

    def encode_chat_with_mask(self, messages: Messages) -> list[tuple[int, bool]]:
        """A conversation as (id, is it in the SFT loss): the assistant's words and its stop token are."""
        out: list[tuple[int, bool]] = []
        for message in messages:
            role = message["role"]
            if role not in ROLES:
                raise ValueError(f"role {role!r} is not known; known are {', '.join(ROLES)}")
            learned = role == "assistant"
            out.append((self.special[ROLES[role]], False))
            out += [(id, learned) for id in self.encode(message["content"])]
            out.append((self.stop_id, learned))
        return out
