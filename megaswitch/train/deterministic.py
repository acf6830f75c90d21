"""The same bits from the same run on the same GPUs, at the price of slower kernels."""

from __future__ import annotations

import os

import torch


def be_deterministic() -> None:
    """Let torch use deterministic kernels alone, in this process from now on.

    Must come before CUDA is used: cuBLAS reads its setting when it starts. An operation that has no
    deterministic kernel then raises a RuntimeError that names it. On the CPU all that MegaSwitch
    uses is deterministic anyway. NCCL's sums depend on the layout and its algorithm, which it
    chooses alike on the same machines; NCCL_ALGO=Ring fixes it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Nothing reads what it would fill.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
