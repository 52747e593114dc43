"""transformers' Trainer as its documentation shows it: a tiny Llama, linear schedule, no plan."""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


def samples() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 64, (16, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def main(folder: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_bias=True,
        max_position_embeddings=16,
    )
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-3,
        weight_decay=0.1,
        warmup_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=samples())
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1])
