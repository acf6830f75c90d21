"""What `megaswitch doctor` tries in processes of their own, which may hang or die.

Each function prints its findings as one line of JSON. Nothing is imported that it does not need:
what fails here is what people call the doctor for.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def probe_torch() -> None:
    """Version, threads, backends and CUDA devices of torch."""
    import torch
    import torch.distributed as dist

    found: dict[str, Any] = {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": dist.is_available() and dist.is_nccl_available(),
        "cuda_build": torch.version.cuda,
        "devices": [],
    }
    if torch.cuda.is_available():
        found["nccl_version"] = ".".join(map(str, torch.cuda.nccl.version()))
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = (properties.major, properties.minor)
            found["devices"].append(
                {
                    "name": properties.name,
                    "memory_bytes": properties.total_memory,
                    "compute_capability": f"{capability[0]}.{capability[1]}",
                    "bf16": capability >= (8, 0),
                    "fp8": capability >= (8, 9),
                }
            )
    print(json.dumps(found))


def probe_launcher() -> None:
    """Read the launcher's environment as training would."""
    from megaswitch.parallel.launcher import world_size

    print(json.dumps({"ranks": world_size()}))


def check_core() -> None:
    """Call the compiled core and compare it with its oracles in Python."""
    import numpy as np

    from megaswitch import native
    from megaswitch.data import philox

    counter, key = (1, 2, 3, 4), (5, 6)
    same = tuple(native.philox4x32(counter, key)) == philox.philox4x32(counter, key)
    from megaswitch.data.span_corruption import corrupt, span_counts, span_shape

    raw_length, decoder_length = span_shape(64, 0.15, 3.0)
    noise, spans = span_counts(raw_length, 0.15, 3.0)
    raw = np.arange(3, 3 + raw_length, dtype=np.int64)
    shape: dict[str, Any] = {
        "noise_tokens": noise,
        "spans": spans,
        "sentinel_top": 256,
        "encoder_length": 64,
    }
    shape["decoder_length"] = decoder_length
    layout = native.SpanLayout(raw_length=raw_length, **shape)
    ours = native.corrupt(raw, layout, seed=7, sample_index=11)
    theirs = corrupt(raw, **shape, seed=7, sample_index=11)
    same = same and all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    if not same:
        sys.exit("the compiled core does not compute what its oracle in Python does")
    print(json.dumps({"path": sys.modules[native.SpanLayout.__module__].__file__}))


def train_one_step() -> None:
    """One step of switch-tiny on a CPU with all that belongs to it: data, model, checkpoint."""
    import numpy as np
    import torch

    from megaswitch.config import load_config
    from megaswitch.data.indexed import IndexedWriter, TokenizerInfo
    from megaswitch.metrics_file import read_metrics
    from megaswitch.parallel.mesh import Mesh
    from megaswitch.train.trainer import Trainer

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prefix, run = Path(folder, "tokens"), Path(folder, "run")
        info = TokenizerInfo("0" * 64, 2048, 100)
        with IndexedWriter(prefix, np.uint16, tokenizer=info) as writer:
            writer.add_document(np.random.default_rng(0).integers(3, 1900, 2000))
        options = ["--model.preset=switch-tiny", f"--data.train={prefix}"]
        options += ["--data.encoder_length=64", f"--train.run_dir={run}", "--train.device=cpu"]
        options += ["--train.steps=1", "--train.batch_size=8", "--train.log_interval=1"]
        Trainer.build(load_config(None, options), Mesh.start("cpu")).fit()
        (metrics,) = read_metrics(run / "metrics.jsonl")
    print(json.dumps({"loss": metrics["loss"]}))


def all_reduce(rank: int, rendezvous: str, seconds: float) -> None:
    """One of two processes that add their ranks up."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=seconds)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=limit
    )
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    if total.item() != 3.0:
        sys.exit(f"1 + 2 over two processes gave {total.item()}")
    dist.destroy_process_group()
    print(json.dumps({"sum": total.item()}))
