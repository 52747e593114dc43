"""Planted: a name in two optimizers, one in none, one that no gradient reaches, one that rounding
holds still, and a schedule that gives all groups one rate."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Planted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16, bias=False)
        self.twice = nn.Linear(16, 16, bias=False)
        self.forgotten = nn.Linear(16, 16, bias=False)
        self.unreached = nn.Linear(16, 16, bias=False)
        self.rounded = nn.Linear(16, 3, bias=False)
        # 1 + 1e-4 is 1 in bfloat16: an update of this size is lost.
        self.rounded.weight.data.fill_(1.0)
        self.rounded.to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.forgotten(self.twice(self.first(x)).relu())
        return self.rounded(hidden.to(torch.bfloat16)).float()


class Unreadable(Planted):
    """What looks at its modules fails; its training does not."""

    def named_modules(self, *_: Any, **__: Any) -> Iterator[Any]:
        raise RuntimeError("nobody may look")


def main(kind: str) -> None:
    torch.manual_seed(0)
    model = Unreadable() if kind == "unreadable" else Planted()
    used = [model.twice, model.unreached, model.rounded]
    one = torch.optim.AdamW(
        [
            {"params": model.first.parameters(), "lr": 1e-3},
            {"params": [p for module in used for p in module.parameters()], "lr": 1e-4},
        ],
        weight_decay=0.0,
    )
    other = torch.optim.SGD(model.twice.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(one, max_lr=1e-4, total_steps=20)
    for _ in range(4):
        model(torch.randn(4, 8)).square().mean().backward()
        one.step()
        other.step()
        one.zero_grad()
        other.zero_grad()
        schedule.step()
    held = [p for module in model.children() for p in module.parameters()]
    total = sum(p.detach().double().sum() for p in held)
    print(f"trained to {float(total)!r}", flush=True)
    raise SystemExit(7)


if __name__ == "__main__":
    main(sys.argv[1])
