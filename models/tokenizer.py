"""Tokenizers: our own byte-level BPE, and any Hugging Face tokenizer.json with its chat template.

Token ids, never strings, go from rollout to training. What a user writes is never a special token.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from models.chat_template import BEGIN, BREAK, CLOSE, ChatTemplate, Messages

END_OF_TEXT, PAD, END = "<|endoftext|>", "<|pad|>", "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL = (END_OF_TEXT, PAD, END, *ROLES.values())
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|' + message['role'] + '|>' }}"
    "{%- if message['role'] == 'assistant' -%}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{%- else -%}{{ message['content'] + '<|end|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Our own tokenizer, trained here. `<|end|>` in a message is seven characters' text and no special token.

    special: the ids of the special tokens by their text; stop_ids: the tokens that end an answer, the usual one first.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self.inner = inner
        self.inner.encode_special_tokens = True
        found = {token: inner.token_to_id(token) for token in SPECIAL}
        missing = [token for token, id in found.items() if id is None]
        if missing:
            raise ValueError(f"tokenizer.json lacks the special tokens {', '.join(missing)} of the chat template")
        self.special = {token: id for token, id in found.items() if id is not None}
        self.stop_ids = [self.special[END]]

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
        """From a folder with tokenizer.json: ours, or a HuggingFaceTokenizer. Raises FileNotFoundError or ValueError."""
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            hint = "; tokenizer.model alone is not read" if (path.parent / "tokenizer.model").exists() else ""
            raise FileNotFoundError(f"{path} is missing: not a model or tokenizer folder{hint}")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # what the library raises has no type of its own
            raise ValueError(f"{path} is damaged or of a newer format: {error}") from error
        template = path.parent / "chat_template.jinja"
        ours = template.exists() and template.read_text(encoding="utf-8") == CHAT_TEMPLATE
        return Tokenizer(inner) if ours else HuggingFaceTokenizer.read(path.parent, inner)

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
        return self.stop_ids[0]

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


class HuggingFaceTokenizer(Tokenizer):
    """Any tokenizer.json with the files beside it, which save writes back as they were read.

    template: its chat template, None where the folder has none (a base model that only completes).
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, files: Mapping[str, str], generation: Mapping[str, Any], where: str
    ) -> None:
        self.inner, self.files, self.where = inner, dict(files), where
        self.inner.encode_special_tokens = True
        added = inner.get_added_tokens_decoder()
        self.special = {token.content: id for id, token in added.items() if token.special}
        breakable = sorted((text for text in self.special if len(text) > 1), key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, breakable)) or r"(?!)")
        config = {
            **json.loads(files.get("special_tokens_map.json", "{}")),
            **json.loads(files["tokenizer_config.json"]),
        }
        self.named = {name: text for name in NAMED if (text := _text(config.get(name))) is not None}
        source = files.get("chat_template.jinja", _template(config.get("chat_template")))
        self.template = None if source is None else ChatTemplate(source, self.named)
        self.generation = dict(generation)
        self.stop_ids = self._stops()

    @classmethod
    def read(cls, folder: Path, inner: tokenizers.Tokenizer) -> HuggingFaceTokenizer:
        """The files of a folder whose tokenizer.json is `inner`. Raises ValueError that names a file which is no JSON."""
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
        files = {name: (folder / name).read_text(encoding="utf-8") for name in names if (folder / name).exists()}
        files.setdefault("tokenizer_config.json", "{}")
        generation: dict[str, Any] = {}
        for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
            try:
                content = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else {}
            except ValueError as error:
                raise ValueError(f"{folder / name} is no JSON: {error}") from error
            if name == "config.json":
                content = {
                    key: content[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in content
                }
            if name in ("config.json", "generation_config.json"):
                generation |= {key: value for key, value in content.items() if value is not None}
        return cls(inner, files, generation, str(folder))

    def _stops(self) -> list[int]:
        """The tokens that end an answer: the one after the assistant's words in the template, then those of the folder."""
        given = self.generation.get("eos_token_id", [])
        stops = [given] if isinstance(given, int) else list(given)
        eos = self.inner.token_to_id(self.named.get("eos_token", ""))
        if eos is not None and eos not in stops:
            stops.append(eos)
        if self.template is not None:
            asked: Messages = [{"role": "user", "content": "a"}]
            try:
                text = self.template.render([*asked, {"role": "assistant", "content": "b"}])
                start = len(self.template.render(asked, add_generation_prompt=True))
            except ValueError:
                return stops
            known = set(self.special.values())
            ending = [id for id, _, end in self._encode_marked(text) if id in known and end > start]
            stops = [*ending[:1], *(id for id in stops if id not in ending[:1])]
        return stops

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files that were read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")

    def generation_config(self) -> dict[str, Any]:
        """What the folder's generation_config.json said, with every stop token."""
        out = {k: v for k, v in self.generation.items() if k not in ("transformers_version", "_from_model_config")}
        if self.stop_ids:
            out["eos_token_id"] = self.stop_ids if len(self.stop_ids) > 1 else self.stop_ids[0]
        for name in ("bos", "pad"):
            id = self.inner.token_to_id(self.named.get(name + "_token", ""))
            if id is not None:
                out.setdefault(name + "_token_id", id)
        return out

    @property
    def vocab_size(self) -> int:
        """The highest token id, and one."""
        return max(self.inner.get_vocab().values()) + 1

    @property
    def stop_id(self) -> int:
        """The token that ends a message. Raises ValueError where the folder names none."""
        if not self.stop_ids:
            raise ValueError(f"{self.where}: no stop token is known; set eos_token_id in generation_config.json")
        return self.stop_ids[0]

    @property
    def end_of_text_id(self) -> int:
        """The token before each document: bos_token, or eos_token where there is none."""
        id = self.inner.token_to_id(self.named.get("bos_token", self.named.get("eos_token", "")))
        if id is None:
            raise ValueError(f"{self.where}/tokenizer_config.json names neither bos_token nor eos_token")
        return int(id)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Ids to text."""
        return str(self.inner.decode(list(ids), skip_special_tokens=skip_special))

    def encode_chat(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        """A conversation by the chat template to ids. Raises ValueError without a template, or when it refuses."""
        template = self._template()
        text = template.render(self._defused(messages), add_generation_prompt)
        return [id for id, _, _ in self._encode_marked(text)]

    def encode_chat_with_mask(self, messages: Messages) -> list[tuple[int, bool]]:
        """A conversation as (id, is it in the SFT loss): what the assistant says up to and with its stop token.

        A stop token is added when the template ends without one (GLM-4, where the next message's first token stops).
        Raises ValueError as encode_chat does, and when the template leaves open what the assistant says.
        """
        text, starts = self._template().render_with_starts(self._defused(messages))
        out: list[tuple[int, bool]] = []
        stops, begun, open_ = set(self.stop_ids), 0, False
        for id, _, end in self._encode_marked(text):
            if begun < len(starts) and end > starts[begun]:
                if open_:
                    raise ValueError(f"{self.where}: the chat template puts no stop token between two answers")
                begun, open_ = begun + 1, True
            out.append((id, open_))
            open_ = open_ and id not in stops
        return [*out, (self.stop_id, True)] if open_ else out

    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise ValueError(
                f"{self.where}: the tokenizer has no chat template; add chat_template.jinja (or chat_template in "
                "tokenizer_config.json) to chat with this model"
            )
        return self.template

    def _defused(self, messages: Messages) -> list[dict[str, str]]:
        """The messages with BREAK inside what reads like a special token."""
        private = dict.fromkeys(map(ord, (BEGIN, CLOSE, BREAK)))
        return [
            {
                **message,
                "content": self._marks.sub(
                    lambda found: found[0][0] + BREAK + found[0][1:], message["content"].translate(private)
                ),
            }
            for message in messages
        ]

    def _encode_marked(self, text: str) -> list[tuple[int, int, int]]:
        """Rendered text as (id, start, end) with its special tokens; it is cut at every BREAK, which makes no token."""
        out: list[tuple[int, int, int]] = []
        at = 0
        self.inner.encode_special_tokens = False
        try:
            for piece in text.split(BREAK):
                found = self.inner.encode(piece, add_special_tokens=False)
                out += [(id, at + a, at + b) for id, (a, b) in zip(found.ids, found.offsets, strict=True)]
                at += len(piece) + 1
        finally:
            self.inner.encode_special_tokens = True
        return out


def _text(token: Any) -> str | None:
    """A token in tokenizer_config.json: its text, or a dict with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _template(value: Any) -> str | None:
    """The key chat_template of tokenizer_config.json: a template, or a list of named ones."""
    if isinstance(value, list):
        named = {item["name"]: item["template"] for item in value}
        return named.get("default")
    return value
