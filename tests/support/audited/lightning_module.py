"""A LightningModule with two groups, trained by Lightning's own Trainer."""

import sys

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU())
        self.head = nn.Linear(16, 3)
        self.unused = nn.Linear(16, 5)
        self.unused.requires_grad_(False)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        features, labels = batch
        return nn.functional.cross_entropy(self.head(self.backbone(features)), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            [
                {"params": self.backbone.parameters(), "lr": 1e-4},
                {"params": self.head.parameters(), "lr": 1e-2},
            ]
        )


def main(folder: str) -> None:
    lightning.seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(32, 8), torch.randint(0, 3, (32,)))
    trainer = lightning.Trainer(
        max_steps=4,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=8))


if __name__ == "__main__":
    main(sys.argv[1])
