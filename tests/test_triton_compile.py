"""Every Triton kernel, as its launcher specialises it, compiled to machine code without a GPU: no spills, no stack, no
constant in less than its precision.
"""

import math
import os
import re
import subprocess
from pathlib import Path

import inputs
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import filter_forms
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from gradalign.kernels import gradients, rawboost, rawboost_backward, weigh

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NUM_SAMPLES = 64600
BOOST = ("notch_bank", "notch_filters", "lnl", "isd", "ssi", "rawboost")
BACKWARD = ("lnl_backward", "isd_backward", "ssi_backward")
OPS = (*BOOST, *BACKWARD, "gram", "weigh", "combine_", "align_")
MODULES = dict.fromkeys(BOOST, rawboost) | dict.fromkeys(BACKWARD, rawboost_backward) | {"weigh": weigh}


def _launcher(op):
    return getattr(MODULES.get(op, gradients), op)


@pytest.fixture
def launches(monkeypatch):
    """The launches of the op's launchers, recorded instead of made: (kernel, arguments, options)."""
    recorded = []

    def record(kernel, programs, device, *args, **meta):
        assert programs > 0
        recorded.append((kernel, args, meta))

    for module in (rawboost, rawboost_backward, gradients, weigh):
        monkeypatch.setattr(module, "launch", record)
    return recorded


def _arguments(op, dtype):
    """The published workload, with and without what is optional, so that every branch of a kernel is compiled."""
    x, lengths, seeds = inputs.wave(NUM_SAMPLES, dtype), inputs.lengths(NUM_SAMPLES), inputs.seeds()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bank = torch.zeros(inputs.BATCH, 5, 491, dtype=wide)
    if op in BACKWARD:
        return [(x, *args) for args in _arguments(op.removesuffix("_backward"), dtype)]
    if op == "lnl":
        return [(x, bank, None), (x, bank, lengths)]
    if op == "isd":
        return [(x, lengths, seeds, None, 10.0, 2.0), (x, None, None, x, 10.0, 2.0)]
    if op == "ssi":
        level = torch.zeros(inputs.BATCH, dtype=torch.float64)
        return [
            (x, bank[:, 0], lengths, seeds, None, None, 10.0, 40.0),
            (x, bank[:, 0], None, None, x, level, 0.0, 0.0),
        ]
    if op == "rawboost":
        # Passes that the three steps on their own do not take: 4 with, 6 without impulses, 8 with two summands.
        drawn = (lengths, seeds, None, None, None)
        return [(x, bank, *drawn, algo, 10.0, 2.0, 10.0, 40.0) for algo in (4, 6, 8)]
    if op == "weigh":
        return [args for name, args in inputs.CASES[op](torch.float64) if len(args[0])]
    if op == "align_":
        cases = [args for name, args in inputs.CASES[op](dtype) if len(args[1]) == len(args[0])]
        # The dearest methods, one of them in every dtype, and addresses that forbid wide loads.
        odd = [torch.zeros(5001, dtype=dtype)[1:] for _ in range(2)]
        dear = ("gradvac", "cagrad", "alignedmtl") if dtype == torch.float32 else ("gradvac",)
        cases = [args for args in cases if args[2] in dear]
        return [*cases, (odd[:1], odd[1:], "mean", None, None, 0.5, False, 0.5)]
    if op in ("gram", "combine_"):
        # The block shrinks above 2 and above 4 paths; the last list has addresses that forbid wide loads.
        lists = [[torch.zeros(5000, dtype=dtype) for _ in range(k)] for k in (2, 4, 8)]
        lists.append([torch.zeros(5001, dtype=dtype)[1:] for _ in range(8)])
        weights = [torch.zeros(1, len(g), dtype=torch.float64) for g in lists]
        if op == "gram":
            return [(g, len(g), [0], 1) for g in lists]
        return [(g[:1], g[1:], w, [0]) for g, w in zip(lists, weights, strict=True)]
    return [args for name, args in inputs.CASES[op](dtype) if name == "three filters"]


def _compile(kernel, args, meta, arch):
    """One launch's kernel, with the text of every stage in `asm`."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = {"debug": False, "enable_fp_fusion": True, **meta}
    bound, specialization, more = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **options
    )
    parsed, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, more)
    return triton.compile(ASTSource(kernel, signature, constexprs, attrs), target=target, options=parsed.__dict__)


def _usage(compiled, folder):
    """Return (registers per thread, bytes of stack, bytes of local memory)."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    return tuple(map(int, found.groups()))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_spills(op, arch, launches, tmp_path, record_property):
    # notch banks and weights are computed in float64.
    dtypes = (
        (torch.float32,) if op.startswith("notch") or op == "weigh" else (torch.float32, torch.bfloat16, torch.float64)
    )
    for dtype in dtypes:
        launches.clear()
        for args in _arguments(op, dtype):
            _launcher(op)(*args)
        assert launches
        for kernel, args, meta in launches:
            registers, stack, local = _usage(_compile(kernel, args, meta, arch), tmp_path)
            record_property(f"{kernel.__name__}, {dtype}", registers)
            # A kernel whose registers overflow keeps the rest on the stack or in local memory.
            assert stack == 0, (kernel.__name__, dtype, registers)
            assert local == 0, (kernel.__name__, dtype, registers)


@pytest.mark.parametrize("form", filter_forms.FORMS, ids=lambda form: form.name)
def test_toeplitz_forms_of_the_filters_run_on_tensor_cores(form, launches, monkeypatch, tmp_path, record_property):
    monkeypatch.setattr(filter_forms, "launch", rawboost.launch)
    filter_forms.toeplitz(inputs.wave(NUM_SAMPLES, torch.float32), torch.zeros(inputs.BATCH, 6, 491)[:, :5], form)
    [(kernel, args, meta)] = launches
    compiled = _compile(kernel, args, meta, 90)
    registers, *memory = _usage(compiled, tmp_path)
    record_property("registers", registers)
    assert memory == [0, 0], registers
    # Three products a branch, each of so many instructions deep.
    deep = form.depth // (16 if form.precision == "bf16x3" else 8)
    assert compiled.asm["ptx"].count("wgmma.mma_async") == 5 * 3 * deep


def _constants(ttir):
    """Its finite floating-point constants: (value, bits)."""
    pattern = r"arith\.constant (?:dense<)?(-?\d+\.\d+(?:[eE][+-]?\d+)?)>? : (?:tensor<[\dx]+x)?f(32|64)\b"
    return [(float(value), int(bits)) for value, bits in re.findall(pattern, ttir)]


@pytest.mark.parametrize("op", OPS)
def test_no_constant_is_rounded_to_float32(op, launches):
    """Triton, its interpreter too, takes a constant for float32 where it meets no tensor, in tl.minimum and tl.maximum,
    and where it is compared.
    """
    for args in _arguments(op, torch.float64):
        _launcher(op)(*args)
    # The random numbers of the other ops are float32 by definition.
    wide = op.startswith("notch") or op == "weigh"
    for kernel, args, meta in launches:
        for value, bits in _constants(_compile(kernel, args, meta, 90).asm["ttir"]):
            # Such as 0.5 and 2^-32, the same in both.
            short = (math.frexp(value)[0] * 2**16).is_integer()
            rounded = torch.tensor(value, dtype=torch.float64).float().item() == value
            assert short or (not rounded if bits == 64 else not wide), (kernel.__name__, meta, value, bits)


def test_no_product_is_fused_into_a_sum_over_lanes(launches):
    """Lanes that hold the same number would round it differently, and go on with different ones."""
    for args in _arguments("weigh", torch.float64):
        weigh.weigh(*args)
    many = [launch for launch in launches if launch[0] is weigh.weigh_many_kernel]
    assert many
    for kernel, args, meta in many:
        ptx = _compile(kernel, args, meta, 90).asm["ptx"]
        # What is not marked as rounded is left to ptxas to fuse.
        assert not re.search(r"\bfma\.|\b(mul|add|sub)\.f64", ptx), meta


def test_every_kernel_is_compiled(launches):
    from triton.runtime.jit import JITFunction

    for op in OPS:
        for args in _arguments(op, torch.float32):
            _launcher(op)(*args)
    defined = {
        name
        for module in (rawboost, rawboost_backward, gradients, weigh)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert defined == {kernel.__name__ for kernel, *_ in launches}
