"""timm's own optimizer factory with layer decay, and the schedule that its users often put on it:
timm's, which reads `lr_scale`, or torch's, which does not."""

import sys

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler


def main(schedule: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=3, num_heads=2, num_classes=4
    )
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    if schedule == "timm":
        scheduler = CosineLRScheduler(optimizer, t_initial=8)
    else:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    for step in range(4):
        images, labels = torch.randn(4, 3, 32, 32), torch.randint(0, 4, (4,))
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule == "timm":
            scheduler.step(step + 1)
        else:
            scheduler.step()


if __name__ == "__main__":
    main(sys.argv[1])
