"""Nothing is speech-only: handwritten digits, clean and distorted, as two paths of an image classifier.

    pip install scikit-learn
    python examples/image_classifier.py

The 1,797 digits that come with scikit-learn, 8 x 8 pixels. The second view is shifted, covered in part and noisy. It
prints, for plain training and for PCGrad, the share of steps whose gradients disagreed and the errors on unseen digits;
a few seconds for each.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import gradalign as ga


def distorted(images, generator):
    """Shift each image [B, 1, 8, 8] by up to a pixel, cover a square of 2 x 2 and add noise."""
    size, height, width = images.shape[0], images.shape[2], images.shape[3]
    row, column = torch.randint(-1, 2, (2, size, 1, 1), generator=generator)
    y = (torch.arange(height)[:, None] + row) % height
    x = (torch.arange(width)[None] + column) % width
    shifted = images[torch.arange(size)[:, None, None], 0, y, x][:, None]
    top, left = torch.randint(0, 7, (2, size, 1, 1), generator=generator)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    covered = (rows >= top) & (rows < top + 2) & (columns >= left) & (columns < left + 2)
    return shifted.masked_fill(covered[:, None], 0) + 0.2 * torch.randn(images.shape, generator=generator)


def network():
    """Return a small convolutional network: images [B, 1, 8, 8] -> logits [B, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def train(method, images, labels, epochs=6, batch_size=32):
    """Train on the clean and the distorted view; returns the network and what alignment saw."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = ga.AlignedOptimizer(torch.optim.Adam(model.parameters(), lr=3e-3), method=method)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(batch_size):
            optimizer.zero_grad()
            for view in (images[rows], distorted(images[rows], generator)):
                with optimizer.path():
                    criterion(model(view), labels[rows]).backward()
            optimizer.step()
    return model, optimizer.stats


def main() -> dict[str, tuple[float, float, float]]:
    """Train with both methods; returns the share of conflicts, the error on clean and the error on distorted digits."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    known, unseen = slice(0, 1200), slice(1200, None)
    found = {}
    for method in ("mean", "pcgrad"):
        print(f"training with {method} on 1,200 digits, each seen clean and distorted", flush=True)
        model, stats = train(method, images[known], labels[known])
        views = (images[unseen], distorted(images[unseen], torch.Generator().manual_seed(1)))
        with torch.no_grad():
            clean, hard = (float((model(view).argmax(1) != labels[unseen]).float().mean()) for view in views)
        found[method] = (stats.conflict_rate, clean, hard)
    return found


if __name__ == "__main__":
    # Images this small are less work than handing them to a second thread, which on a busy machine is waited for.
    torch.set_num_threads(1)
    for method, (conflicts, clean, hard) in main().items():
        print(f"{method:7} conflicts {conflicts:6.1%}   error on clean {clean:6.2%}, on distorted digits {hard:6.2%}")
