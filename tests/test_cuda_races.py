"""The CUDA kernels have no data races: they run on the host (see cuda_on_host), built so that every access to memory is
compared with those that no barrier, fence or atomic orders before it, whichever comes first in this run.

compute-sanitizer's racecheck, which `make gpu-check` runs, looks at shared memory alone, and at no fences.
"""

import re

import cuda_on_host
import inputs
import pytest
import torch

from gradalign._dispatch import ops

# What orders accesses is the same in every order of threads, but not which way each of them takes.
ORDERS = cuda_on_host.ORDERS

pytestmark = pytest.mark.skipif(bool(cuda_on_host.why_not()), reason=cuda_on_host.why_not())


@pytest.fixture(scope="module", autouse=True)
def backend():
    with cuda_on_host.as_backend(races=True):
        yield


# Of the two accesses, either may come second.
EITHER = r"(reads|writes) what thread \d+ of block \d+ (read|wrote)"
MISTAKES = {
    **dict.fromkeys(("barrier", "barrier_after_reading", "warp_barrier", "shuffle", "atomic", "blocks"), EITHER),
    "copies": r"reads what a copy of thread \d+ of block \d+ wrote",
    "copies_of_others": r"(reads what a copy of|copies to what) thread \d+ of block \d+ (read|wrote)",
    "neighbors": r"writes what thread \d+ of block \d+ wrote",
    **dict.fromkeys(
        ("fence_before", "fence_after", "scope_before", "scope_after"), "reads what thread 0 of block 0 wrote"
    ),
    "last_warp": r"reads what thread \d+ of block \d+ wrote",
}


@pytest.mark.parametrize("kernel", MISTAKES)
def test_mistakes_are_found(kernel):
    def run(right):
        # Three blocks at most wait for each other.
        data = torch.zeros(4 * 96)
        library = cuda_on_host.load(races=True)
        return library.cuda_on_host_run(kernel.encode(), right, 3, 0, data.data_ptr(), data.numel()).decode()

    lines = r"\(mistakes.cu:\d+ after mistakes.cu:\d+\)"
    for order in ORDERS:
        with cuda_on_host.schedule(order, races=True):
            assert run(True) == "", order
            error = run(False)
            assert re.search(rf": thread \d+ {MISTAKES[kernel]}, and nothing orders them {lines}$", error), (
                f"{order}: {error}"
            )
            # What failed leaves nothing behind.
            assert run(True) == "", order


@pytest.mark.parametrize("op", ops())
def test_kernels(op):
    # In float32 long utterances too, which are filtered by other kernels.
    samples = {torch.float32: (700, 25_000), torch.bfloat16: (700,), torch.float64: (700,)}
    for order, dtype in zip(ORDERS, samples, strict=True):
        with cuda_on_host.schedule(order, races=True):
            for _, args in inputs.CASES[op](dtype, samples=samples[dtype]):
                inputs.run(op, "cuda", args)


@pytest.mark.parametrize("num_filters", [5, 7])
def test_filters_longer_than_a_pass(num_filters):
    for order, dtype in zip(ORDERS, (torch.float32, torch.bfloat16, torch.float64), strict=True):
        x = inputs.wave(700, dtype)
        filters = torch.ones(inputs.BATCH, num_filters, 1301, dtype=torch.promote_types(dtype, torch.float32))
        with cuda_on_host.schedule(order, races=True):
            inputs.run("lnl", "cuda", (x, filters, None))
            inputs.run("lnl_backward", "cuda", (x, x, filters, None))


@pytest.mark.parametrize("num_paths", [2, 3, 8])
def test_align_when_its_queue_and_its_places_are_taken_again(num_paths):
    # More items of a parameter than a block holds, and more parameters than it holds weights of.
    for order, dtype in zip(ORDERS, (torch.float32, torch.bfloat16, torch.float64), strict=True):
        item = {2: 480, 3: 224, 8: 96}[num_paths] * 16 // dtype.itemsize
        sizes = [20 * item + 5, *[5 * item + 1] * 8, *[17] * 40, 63 * item + 7, *[item + 1] * 40]
        paths = [[torch.ones(n, dtype=dtype) for n in sizes] for _ in range(num_paths)]
        rho = torch.zeros(len(sizes), num_paths, num_paths, dtype=torch.float64)
        args = (paths[0], [g for path in paths[1:] for g in path], "gradvac", rho, None, 0.5, False, 0.5)
        with cuda_on_host.schedule(order, races=True):
            inputs.run("align_", "cuda", args)
