"""DeepSpeed with two groups of its client, ZeRO of any stage, and WarmupLR from the config."""

import sys

import deepspeed
import torch
from torch import nn


def main(stage: int, kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(
        [
            {"params": model[:3].parameters(), "lr": 1e-4},
            {"params": model[3].parameters(), "lr": 1e-2},
        ],
        weight_decay=0.0,
    )
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
    if kind == "warmup":
        config["scheduler"] = {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 2, "warmup_type": "linear"},
        }
    # Its op for shared memory would be compiled, which takes minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(5):
        features, labels = torch.randn(4, 8), torch.randint(0, 3, (4,))
        engine.backward(nn.functional.cross_entropy(engine(features), labels))
        engine.step()
    # Without it a rank may leave while another still sends to it, which ends that one with SIGABRT.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
