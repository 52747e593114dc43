"""Tiny language models: Llama, a Qwen3 with its head tied to the embedding, one with experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from launch.trainer.tiny.folders import ModelFolder, save_all
from launch.trainer.tiny.tokenizers import qwen_tokenizer

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}


def _folder(name: str, **more: Any) -> ModelFolder:
    import transformers

    tokenizer = qwen_tokenizer(["a red cat runs left"])
    # The base class's own choice of end and padding; ids of the model's config are its default.
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config_class = getattr(transformers, f"{name}Config")
    config = config_class(**_SIZES, vocab_size=len(tokenizer), **ends, **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    return ModelFolder(components={"model": model, "tokenizer": tokenizer}, save=save_all)


def llama() -> ModelFolder:
    """Make a Llama with a head of its own."""
    return _folder("Llama", tie_word_embeddings=False)


def qwen3() -> ModelFolder:
    """Make a Qwen3 whose head is its embedding."""
    return _folder("Qwen3", tie_word_embeddings=True)


def qwen3_moe() -> ModelFolder:
    """Make a Qwen3 with four experts in each layer."""
    return _folder("Qwen3Moe", **_EXPERTS, tie_word_embeddings=False, router_aux_loss_coef=0.01)


FOLDERS: dict[str, Callable[[], ModelFolder]] = {
    "llm": llama,
    "llm_qwen3": qwen3,
    "llm_moe": qwen3_moe,
}
