"""The ops, declared once each in pipeline order; `gradalign.reference` says what each computes.

>>> import torch
>>> from gradalign import ops
>>> clean, augmented = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])
>>> ops.gram([clean, augmented], 2, [0], 1).tolist()
[[[25.0, 3.0], [3.0, 1.0]]]
"""

from __future__ import annotations

import torch

from gradalign import _extension, reference
from gradalign._dispatch import Op


def _like_first(x, *_):
    return torch.empty_like(x)


notch_draws = Op(reference.notch_draws)
notch_bank = Op(reference.notch_bank)
lnl = Op(reference.lnl, fake=_like_first)
isd = Op(reference.isd, fake=_like_first)
ssi = Op(reference.ssi, fake=_like_first)
lnl_backward = Op(reference.lnl_backward, fake=_like_first)
isd_backward = Op(reference.isd_backward, fake=_like_first)
ssi_backward = Op(reference.ssi_backward, fake=_like_first)
lnl.differentiate(lnl_backward)
isd.differentiate(isd_backward)
ssi.differentiate(ssi_backward)
gram = Op(reference.gram)
combine_ = Op(reference.combine_, mutates=("out",))

for _op in (notch_draws, notch_bank, lnl, isd, ssi, gram, combine_):
    _extension.register(_op)

# The Triton kernels register themselves as a backend of the ops above.
import gradalign.kernels  # noqa: E402, F401
