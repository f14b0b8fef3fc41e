"""Gradient alignment in a loop with Accelerate: one path per view.

    pip install accelerate
    accelerate launch examples/accelerate_loop.py

Accelerate wraps the optimizer; the paths are opened on what it wraps, ``optimizer.optimizer``. On several GPUs its DDP
averages each path's gradients over the ranks, and nothing more is needed.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import gradalign as ga


def main() -> ga.AlignedOptimizer:
    """Train for two epochs of two steps and return the optimizer."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model, boost = ga.detectors.create("light"), ga.RawBoost(algo=4)
    optimizer = ga.AlignedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), method="pcgrad")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
    data = DataLoader(TensorDataset(0.1 * torch.randn(8, 8000), torch.arange(8) % 2), batch_size=4)
    model, optimizer, data, scheduler = accelerator.prepare(model, optimizer, data, scheduler)
    aligned = optimizer.optimizer

    for _ in range(2):
        for wave, labels in data:
            optimizer.zero_grad()
            for view in (wave, boost(wave)):
                with aligned.path():
                    accelerator.backward(torch.nn.functional.cross_entropy(model(view), labels))
            aligned.align()
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
    return aligned


if __name__ == "__main__":
    print(main().stats)
