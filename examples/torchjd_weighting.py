"""A weighting of TorchJD as the method: any function of the Gram matrix of the paths' gradients will do.

    pip install torchjd
    python examples/torchjd_weighting.py

The gradients stay where they are: the weighting sees their K x K inner products only, and gives K weights. Those of the
names that gradalign knows (``method="upgrad"``, ...) are computed on the device in one launch instead.
"""

import torch
from torchjd.aggregation import UPGradWeighting

import gradalign as ga


def main() -> ga.AlignedOptimizer:
    """Take four steps on clean, augmented and once more augmented views, and return the optimizer."""
    torch.manual_seed(0)
    model, boost = ga.detectors.create("light"), ga.RawBoost(algo=4)
    optimizer = ga.AlignedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), method=UPGradWeighting())
    for _ in range(4):
        wave, labels = 0.1 * torch.randn(4, 8000), torch.arange(4) % 2
        optimizer.zero_grad()
        for view in (wave, boost(wave), boost(wave)):
            with optimizer.path():
                torch.nn.functional.cross_entropy(model(view), labels).backward()
        optimizer.step()
    return optimizer


if __name__ == "__main__":
    print(main().stats)
