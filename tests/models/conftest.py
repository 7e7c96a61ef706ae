"""A real tiny decoder with random weights, and a real tokenizer trained on a few sentences."""

from __future__ import annotations

import pytest
import torch

from models.config import ModelConfig
from models.tokenizer import Tokenizer
from models.transformer import Transformer

SENTENCES = [
    "hello there, how are you?",
    "I am fine, thank you!",
    "what do you like to eat?",
    "你好，今天天气很好。",
] * 20


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(SENTENCES, 300)


@pytest.fixture
def model() -> Transformer:
    """64-dimensional, grouped-query, with weights large enough that its distributions are far from flat."""
    torch.set_num_threads(1)
    config = ModelConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=48,
        vocab_size=300,
    )
    made = Transformer(config).initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return made.eval()
