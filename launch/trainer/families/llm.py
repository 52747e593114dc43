"""Decoder language models of transformers: Llama, Qwen3, mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from dist_layerlr.errors import ConfigError
from dist_layerlr.sharders import unwrap
from launch.trainer.data.base import Batch, Sample
from launch.trainer.families.checks import check_shape, misfit
from launch.trainer.families.plain import Plain, config_of, from_transformers
from launch.trainer.objectives import Objective
from launch.trainer.objectives.causal_lm import (
    IGNORED,
    LABELS,
    TOKENS,
    NextToken,
    Predicted,
    Routing,
)

IDS, POSITIONS = "input_ids", "position_ids"
"""Fields of a sample: (L,) int64. Positions begin at 0 in each document of a block."""
_ENDING = "ForCausalLM"


class LLM(Plain):
    """A ``...ForCausalLM`` of transformers, by the ``architectures`` of its config."""

    model_type = "llm"
    objective_class = NextToken
    companions: ClassVar[tuple[str, ...]] = (
        "generation_config.json",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "chat_template*",
    )

    def check_config(self, model_config: Mapping[str, Any]) -> None:
        """Refuse what is no causal language model; see ``Family.check_config``."""
        from_transformers(model_config, _ENDING, self.model_type)

    def build(self, model_config: Mapping[str, Any]) -> nn.Module:
        """Build the network; see ``Family.build``."""
        cls = from_transformers(model_config, _ENDING, self.model_type)
        model: nn.Module = cls(config_of(cls, model_config))
        return model

    def lora_targets(self, model_config: Mapping[str, Any]) -> tuple[str, ...] | str:
        """Return the projections of attention and feed-forward; see ``Family.lora_targets``.

        Experts that are one parameter of three dimensions are no modules, and stay as they are.
        """
        attention = ("q_proj", "k_proj", "v_proj", "o_proj")
        return (*attention, "gate_proj", "up_proj", "down_proj")

    def objective(self, settings: Mapping[str, Any], model_folder: Path) -> Objective:
        """Make the objective; see ``Family.objective``."""
        return NextToken(predict=self.predict, **settings)

    def predict(self, model: nn.Module, batch: Batch) -> Predicted:
        """Call the network on a batch, however wrapped.

        There is no attention mask: padding stands behind the tokens, which do not see it, and
        documents of a block are kept apart by positions that begin anew. A cache would have
        transformers take them for one document, so there is none.
        """
        config: Any = unwrap(model).config
        experts = _experts_of(config)
        more = {} if experts is None else {"output_router_logits": True}
        said = model(input_ids=batch[IDS], position_ids=batch[POSITIONS], use_cache=False, **more)
        if experts is None or not said.router_logits:
            return Predicted(logits=said.logits)
        weight = float(getattr(config, "router_aux_loss_coef", 0.0))
        logits = tuple(said.router_logits)
        return Predicted(
            logits=said.logits, routing=Routing(logits=logits, chosen=experts, weight=weight)
        )

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack the samples, what is missing of the longest filled up behind the tokens."""
        longest = max(len(one[IDS]) for one in samples)
        lengths = torch.tensor([len(one[IDS]) for one in samples], device=samples[0][IDS].device)
        ids = pad_sequence([one[IDS] for one in samples], batch_first=True)
        labels = [one[LABELS] for one in samples]
        # Counting on: a position that began anew would be taken for another document.
        counted = [_counted_on(one[POSITIONS], longest) for one in samples]
        return {
            IDS: ids,
            POSITIONS: torch.stack(counted),
            LABELS: pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            TOKENS: torch.arange(longest, device=lengths.device) < lengths[:, None],
        }

    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Count the tokens of a sample; see ``Family.tokens``."""
        return len(sample[IDS])

    def example(self, model_config: Mapping[str, Any], sizes: Mapping[str, int]) -> Sample:
        """Return a block of ``L`` tokens on the meta device; see ``HasExample``."""
        block = torch.empty(sizes["L"], dtype=torch.int64, device="meta")
        return {IDS: block, POSITIONS: block, LABELS: block}

    def fit_data(self, model_config: Mapping[str, Any], data: Any) -> None:
        """Refuse a tokenizer with ids that the embedding lacks; see ``FitsData``."""
        known, words = int(model_config["vocab_size"]), getattr(data, "vocabulary", 0)
        if words > known:
            raise ConfigError(
                f"Invalid data.tokenizer: it has {words} tokens, but the model's embedding has"
                f" {known} rows (vocab_size). Use the tokenizer of the model."
            )

    def check_sample(
        self, model_config: Mapping[str, Any], sample: Sample, label: str = "data sample"
    ) -> None:
        """Refuse other data than blocks of tokens, and blocks that are too long."""
        for name in (IDS, POSITIONS, LABELS):
            check_shape(sample, name, ("L",), label, "use data.kind='text'")
        length, most = len(sample[IDS]), model_config.get("max_position_embeddings")
        if most is not None and length > most:
            needed = f"at most ({most},), the model's max_position_embeddings"
            raise misfit(label, IDS, (length,), needed, "lower data.length")


def _counted_on(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Positions of one sample, going on behind its last token up to ``length``."""
    missing = length - len(positions)
    more = torch.arange(1, missing + 1, device=positions.device)
    return torch.cat([positions, positions[-1:] + more])


def _experts_of(config: Any) -> int | None:
    """Experts that a token is sent to; None for a model without routers."""
    several = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    return int(config.num_experts_per_tok) if several and several > 1 else None
