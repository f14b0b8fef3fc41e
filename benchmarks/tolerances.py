"""The tolerance table of tests and benchmarks: relative error in the maximum norm against the float64 reference."""

import torch

# float16 and bfloat16: half a unit in the last place of the stored result, with room for one rounding of the input.
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# The random numbers are float32 by definition; with float64 waveforms two backends' noise differs by their log, sin and
# cos.
DRAWN = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Weights are float64 whatever the gradients are; the iterative methods end this close to each other, not bit for bit.
WEIGHED = 1e-8


def max_norm_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max|found - expected| / max|expected|, 0 where both are empty or the same, NaN where a NaN is found."""
    if expected.numel() == 0:
        return 0.0
    difference = (found.double().cpu() - expected.double().cpu()).abs().max()
    scale = expected.double().abs().max().cpu()
    return 0.0 if difference == 0 else float(difference / scale)
