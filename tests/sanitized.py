"""Run every GPU kernel on small batches, as compute-sanitizer's subject."""

from __future__ import annotations

import torch

from distbn_convert.kernels import gpu
from distbn_convert.kernels.gpu import launch, rule

from .kernel_cases import CASES, KINDS, Case, compute, force, make

# Some of each layout, dtype, partition and epilogue: every launch is slow under a sanitizer.
SOME = [CASES[place] for place in (1, 3, 5, 9, 13, 15, 16)]
# The rule's choices, with programs enough to wait for each other: cooperative, ticketed, and the
# second pipelined where that is enabled.
WAITING = [
    Case((12, 8, 112, 112), 4, dtype=torch.bfloat16, relu=True),
    Case((16, 1024, 24, 24), 4, channels_last=True, dtype=torch.bfloat16, relu=True),
]
NARROW = launch._NARROW

if __name__ == "__main__":
    for enabled in (rule.ENABLED, rule.WAITING):
        rule.ENABLED = enabled
        for case in WAITING:
            compute(gpu, case, make(case, torch.Tensor.cuda))
    for kind in KINDS:
        launch.select_kernel = force(kind)
        for case in SOME:
            launch._NARROW = 0 if case.wide else NARROW
            compute(gpu, case, make(case, torch.Tensor.cuda))
    torch.cuda.synchronize()
    print("every kernel ran")
