"""Run every GPU kernel on small batches, as compute-sanitizer's subject."""

from __future__ import annotations

import torch

from distbn_convert.kernels import gpu
from distbn_convert.kernels.gpu import launch

from .kernel_cases import CASES, KINDS, compute, force, make

if __name__ == "__main__":
    for kind in KINDS:
        launch.select_kernel = force(kind)
        for case in CASES:
            compute(gpu, case, make(case, torch.Tensor.cuda))
    torch.cuda.synchronize()
    print("every kernel ran")
