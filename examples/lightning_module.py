"""Gradient alignment in a LightningModule: manual optimization, one path per view.

    pip install lightning
    python examples/lightning_module.py

Lightning wraps the optimizer; the paths are opened on what it wraps, ``self.optimizers().optimizer``, and the step is
taken through the wrapper, so that Lightning counts it. ``strategy="ddp"`` needs nothing more.
"""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import gradalign as ga


class Detector(lightning.LightningModule):
    """A detector trained on clean and augmented speech."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = ga.detectors.create("light")
        self.boost = ga.RawBoost(algo=4)
        self.criterion = torch.nn.CrossEntropyLoss()

    def configure_optimizers(self):
        """Return the wrapped optimizer and a scheduler, as for any other optimizer."""
        optimizer = ga.AlignedOptimizer(torch.optim.AdamW(self.parameters(), lr=1e-3), method="pcgrad")
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]

    def training_step(self, batch, index):
        """Take one step on a batch: (wave [B, T], labels [B])."""
        wave, labels = batch
        optimizer = self.optimizers()
        aligned = optimizer.optimizer
        aligned.zero_grad()
        for view in (wave, self.boost(wave)):
            with aligned.path():
                self.manual_backward(self.criterion(self.model(view), labels))
        aligned.align()
        self.clip_gradients(aligned, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()

    def on_train_epoch_end(self):
        """Step the scheduler and log what alignment saw."""
        self.lr_schedulers().step()
        self.log("conflict_rate", self.optimizers().optimizer.stats.conflict_rate)


def main() -> ga.AlignedOptimizer:
    """Train for two epochs of two steps and return the optimizer."""
    torch.manual_seed(0)
    data = TensorDataset(0.1 * torch.randn(8, 8000), torch.arange(8) % 2)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    detector = Detector()
    trainer.fit(detector, DataLoader(data, batch_size=4))
    assert trainer.global_step == 4
    return detector.optimizers().optimizer


if __name__ == "__main__":
    print(main().stats)
