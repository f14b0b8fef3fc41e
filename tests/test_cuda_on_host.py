"""CUDA on the host finds the mistakes it is there to find: each kernel of tests/cuda_on_host/mistakes.cu with its
mistake, and without it. tests/test_cuda.py runs the project's own kernels so.
"""

import re

import cuda_on_host
import inputs
import pytest
import torch

from gradalign._dispatch import ops

THREADS = 96
ORDERS = cuda_on_host.ORDERS

pytestmark = pytest.mark.skipif(bool(cuda_on_host.why_not()), reason=cuda_on_host.why_not())


@pytest.fixture(scope="module", autouse=True)
def backend():
    with cuda_on_host.as_backend():
        yield


def _run(kernel, right, order, blocks=4, num_bytes=0, size=4 * THREADS):
    """The data that a kernel leaves behind, and its error."""
    data = torch.zeros(size)
    with cuda_on_host.schedule(order):
        library = cuda_on_host.load()
        error = library.cuda_on_host_run(kernel.encode(), right, blocks, num_bytes, data.data_ptr(), size)
    return data, error.decode()


@pytest.mark.parametrize("kernel", ["barrier", "barrier_after_reading", "warp_barrier", "copies", "blocks"])
def test_what_is_not_ordered_gives_other_bits_in_another_order(kernel):
    for right in (True, False):
        results, errors = zip(*(_run(kernel, right, order) for order in ORDERS), strict=True)
        assert errors == ("",) * len(ORDERS)
        same = [bool((results[0].view(torch.int32) == other.view(torch.int32)).all()) for other in results[1:]]
        assert all(same) if right else not any(same), kernel


NAMED = {
    "wait_for_block": r"block 0: waits for what no running block does: threads 0-95 in __nanosleep \(mistakes.cu:\d+\)",
    "together": r"block 0: waits for what no running block does: threads 0-95 in __nanosleep \(mistakes.cu:\d+\)",
    "some_threads": r"never meet: threads 0-31 in __syncthreads \(mistakes.cu:\d+\); threads 32-95 ended",
    "two_barriers": r"never meet: threads 0-31 in __syncthreads \(mistakes.cu:\d+\); threads 32-95 in __syncthreads \(",
    "some_lanes": r"never meet: threads 0-6 in __shfl_down_sync \(mistakes.cu:\d+\); thread 7 ended; threads 8-38 in",
    "outside_of_mask": r"block \d+: thread \d+ is not in the mask of its own __syncwarp \(mistakes.cu:\d+\)",
    "unaligned_copy": r"thread \d+ copies 8 bytes between addresses that are no multiples of that",
    "unaligned": r"block \d+: thread 0 accesses an address that is no multiple of 16, at \(mistakes.cu:\d+\)",
    "beyond_tensor": r"block 4: thread 0 accesses memory that is nobody's, at 0x",
    "beyond_array": r"block \d+: thread 95 takes element 96 of an array that has fewer, at \(mistakes.cu:\d+\)",
    "beyond_dynamic_memory": r"block \d+: thread \d+ accesses memory that is nobody's, at 0x",
}


@pytest.mark.parametrize("kernel", NAMED)
def test_mistakes_are_errors(kernel):
    # Kernels that wait for another block are wrong only where that one does not run beside them.
    orders = ("ascending",) if kernel in ("wait_for_block", "together") else ORDERS
    for order in orders:
        blocks = {"beyond_tensor": 5, "together": 3}.get(kernel, 4)
        assert _run(kernel, True, order, blocks)[1] == ""
        error = _run(kernel, False, order, blocks)[1]
        assert error.startswith(f"mistakes::{kernel}_kernel<false>, block "), order
        assert re.search(NAMED[kernel], error), f"{order}: {error}"
        # What failed leaves nothing behind.
        assert _run(kernel, True, order, blocks)[1] == ""


def test_what_is_not_written_is_nan():
    assert bool((_run("unwritten", True, "ascending")[0] == 1).all())
    assert bool(_run("unwritten", False, "ascending")[0].isnan().all())
    assert bool(torch.empty(3, 5).isnan().all())


def test_no_more_blocks_together_than_multiprocessors():
    assert "together_kernel<true> cannot be launched with 4 blocks" in _run("together", True, "ascending", blocks=4)[1]


def test_more_shared_memory_only_on_demand():
    error = _run("barrier", True, "ascending", num_bytes=48 * 1024 + 16)[1]
    assert "cannot be launched with 4 blocks of 96 threads and 49168 bytes of dynamic shared memory" in error


def test_every_kernel_of_the_sources_runs_here():
    text = "".join(path.read_text() for path in (cuda_on_host.ROOT / "csrc" / "cuda").iterdir())
    cuda_on_host.launched()
    # Short utterances, and long ones, which are filtered by other kernels.
    for op in ops():
        for _, args in inputs.CASES[op](torch.float32, samples=(1, 700, 25_000)):
            inputs.run(op, "cuda", args)
    wanted = set(re.findall(r"__global__[^;{]*?\bvoid (\w+)\(", text))
    assert wanted
    assert wanted <= set(cuda_on_host.launched())
