"""The same workloads under pytest-benchmark: pytest benchmarks --benchmark-enable."""

import pytest
import shapes
import torch

import gradalign as ga
from gradalign import _dispatch

CPU = torch.device("cpu")


def _backends(name, args):
    op = _dispatch.ops()[name]
    return [backend for backend in _dispatch.BACKENDS if not op.why_not(backend, *args)]


@pytest.mark.parametrize("name", shapes.WAVE_OPS)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_wave_op(benchmark, name, backend):
    args = shapes.arguments(name, 4, 16000, CPU, 0)
    if backend not in _backends(name, args):
        pytest.skip(f"{backend} does not serve {name} here")
    with ga.use_backends(backend):
        benchmark(_dispatch.ops()[name], *args)


@pytest.mark.parametrize("algo", shapes.ALGORITHMS)
def test_rawboost(benchmark, algo):
    boost = ga.RawBoost(algo=algo)
    benchmark(boost, shapes.wave(4, 16000, CPU, 0), seeds=shapes.seeds(4, CPU, 0))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gram(benchmark, backend):
    one, two = shapes.gradients(shapes.parameter_shapes("aasist"), 2, CPU, 0)
    args = ([*one, *two], 2, [0] * len(one), 1)
    if backend not in _backends("gram", args):
        pytest.skip(f"{backend} does not serve gram here")
    with ga.use_backends(backend):
        benchmark(_dispatch.ops()["gram"], *args)
