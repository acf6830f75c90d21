"""On a GPU: Megatron-Core's MoE layer beside ours, top-1 of 64 experts, 65,536 tokens, bf16.

Needs `pip install megatron-core`; what of it cannot run is told. Both are dropless.
Command: python tools/benchmarks/megatron_layer.py --output megatron.json
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from clocks import compare_on_gpu
from side_by_side import record
from switch_gpu import config_of, layers

D_MODEL, D_FF, EXPERTS, TOKENS = 1024, 4096, 64, 128 * 512


def megatron_step() -> Callable[[], None]:
    """Forward and backward of Megatron-Core's layer, with its grouped GEMM."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29611"}
    dist.init_process_group("nccl", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=D_MODEL,
        num_attention_heads=16,
        ffn_hidden_size=D_FF,
        num_moe_experts=EXPERTS,
        moe_router_topk=1,
        moe_grouped_gemm=True,
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        activation_func=torch.nn.functional.relu,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    spec = get_moe_module_spec(use_te=True, num_experts=EXPERTS, moe_grouped_gemm=True)
    layer = MoELayer(config, spec.submodules).cuda().train()
    x = torch.randn(512, 128, D_MODEL, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        layer.zero_grad()
        layer(x)[0].sum().backward()

    return step


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dense, switch = layers(config_of(D_MODEL, D_FF, "relu", EXPERTS, "dropless"))
    steps: dict[str, Any] = {"dense": dense, "switch, dropless": switch}
    try:
        steps["Megatron-Core"] = megatron_step()
    except Exception as error:
        print(f"Megatron-Core cannot run here: {type(error).__name__}: {error}")
    record("tools/benchmarks/megatron_layer.py", compare_on_gpu(steps), arguments.output)


if __name__ == "__main__":
    main()
