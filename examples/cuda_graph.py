"""A whole training step as one CUDA graph: augmentation, both paths, alignment and the optimizer's step.

    python examples/cuda_graph.py

A large model's step is thousands of kernels, and a GPU often waits for the host to launch them one by one; a graph is
launched once. It reads its inputs where they lay when it was recorded, so each batch is copied there. Every replay
augments with other seeds, and a step whose gradients are not finite is skipped on the device. Without a GPU the same
step runs as it is.
"""

from collections.abc import Callable

import torch

import gradalign as ga


def record(step: Callable[[], None]) -> Callable[[], None]:
    """Take three steps on a side stream, in which PyTorch and the optimizer allocate, and record the next one."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def main(device: str = "cuda" if torch.cuda.is_available() else "cpu") -> ga.AlignedOptimizer:
    """Train for four steps, on a GPU after three to warm up, and return the optimizer."""
    torch.manual_seed(0)
    on_gpu = device == "cuda"
    model, boost = ga.detectors.create("light").to(device), ga.RawBoost(algo=4)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=on_gpu, capturable=on_gpu)
    optimizer = ga.AlignedOptimizer(inner, method="pcgrad")
    batches = [(0.1 * torch.randn(4, 8000), torch.arange(4) % 2) for _ in range(4)]
    wave, labels = (tensor.to(device) for tensor in batches[0])

    def step() -> None:
        optimizer.zero_grad()
        for view in (wave, boost(wave)):
            with optimizer.path():
                torch.nn.functional.cross_entropy(model(view), labels).backward()
        optimizer.step()

    run = record(step) if on_gpu else step
    for batch in batches:
        wave.copy_(batch[0])
        labels.copy_(batch[1])
        run()
    return optimizer


if __name__ == "__main__":
    print(main().stats)
