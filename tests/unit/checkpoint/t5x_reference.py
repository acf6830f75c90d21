"""T5X checkpoints in the published layout, written by TensorStore and msgpack from HF's tensors.

Keys and orientations are those of `t5x/docs/models.md`'s checkpoints as HF's own scripts read them
(`convert_t5x_checkpoint_to_pytorch.py`, `convert_big_switch.py`), not taken from our importer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import tensorstore
from torch import Tensor

_KERNELS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def flax_tree(state: Mapping[str, Tensor], config: Any) -> dict[str, np.ndarray]:
    """T5X's unscanned arrays by key, from a state dict of HF's T5 or Switch."""
    tree = {"token_embedder/embedding": state["shared.weight"]}
    # In HF 5 every T5 has lm_head.weight in its state dict.
    if not getattr(config, "scale_decoder_outputs", config.tie_word_embeddings):
        tree["decoder/logits_dense/kernel"] = state["lm_head.weight"].T
    for stack in ("encoder", "decoder"):
        block = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        tree[f"{stack}/relpos_bias/rel_embedding"] = state[block].T
        tree[f"{stack}/{stack}_norm/scale"] = state[f"{stack}.final_layer_norm.weight"]
        layers = config.num_layers if stack == "encoder" else config.num_decoder_layers
        for i in range(layers):
            tree |= _layer(state, stack, i)
    return {key: value.float().contiguous().numpy() for key, value in tree.items()}


def _layer(state: Mapping[str, Tensor], stack: str, i: int) -> dict[str, Tensor]:
    here, there = f"{stack}/layers_{i}", f"{stack}.block.{i}.layer"
    attentions = [("SelfAttention", 0, "attention", "pre_attention_layer_norm")]
    if stack == "decoder":
        attentions = [
            ("SelfAttention", 0, "self_attention", "pre_self_attention_layer_norm"),
            ("EncDecAttention", 1, "encoder_decoder_attention", "pre_cross_attention_layer_norm"),
        ]
    tree = {}
    for theirs, number, name, norm in attentions:
        tree[f"{here}/{norm}/scale"] = state[f"{there}.{number}.layer_norm.weight"]
        for letter, kernel in _KERNELS.items():
            weight = state[f"{there}.{number}.{theirs}.{letter}.weight"]
            tree[f"{here}/{name}/{kernel}/kernel"] = weight.T
    ffn = f"{there}.{len(attentions)}"
    tree[f"{here}/pre_mlp_layer_norm/scale"] = state[f"{ffn}.layer_norm.weight"]
    experts: dict[str, list[Tensor]] = {}
    for name in state:
        path = name.removesuffix(".weight").split(".")
        if not name.startswith(f"{ffn}.") or "layer_norm" in name:
            continue
        if "experts" in path:
            experts.setdefault(path[-1], []).append(state[name])
        elif "classifier" in path:
            tree[f"{here}/mlp/router/router_weights/w/kernel"] = state[name].T
        else:
            tree[f"{here}/mlp/{path[-1]}/kernel"] = state[name].T
    for matrix, stack_of in experts.items():
        values = np.stack([weight.T.numpy() for weight in stack_of])
        tree[f"{here}/mlp/expert/{matrix}/kernel"] = Tensor.new_tensor(stack_of[0], values)
    return tree


def scanned(tree: Mapping[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
    """The same as T5X's scalable models have it: layers on axis 1, heads on one of their own."""
    result = {key: value for key, value in tree.items() if "/layers_" not in key}
    for stack in ("encoder", "decoder"):
        prefix = f"{stack}/layers_0/"
        for key in [k for k in tree if k.startswith(prefix)]:
            rest = key.removeprefix(prefix)
            layers = []
            while (name := f"{stack}/layers_{len(layers)}/{rest}") in tree:
                value = tree[name]
                if "attention/" in rest and rest.endswith("kernel"):
                    a, b = value.shape
                    out = "/out/" in rest
                    value = value.reshape((heads, -1, b) if out else (a, heads, -1))
                layers.append(value)
            result[f"{stack}/{stack}/{rest}"] = np.stack(layers, axis=1)
    return result


def write_t5x(
    folder: Path,
    tree: Mapping[str, np.ndarray],
    *,
    dtype: str = "float32",
    compressor: dict[str, Any] | None = None,
    chunk: int = 7,
    inline: tuple[str, ...] = (),
    version: int = 3,
) -> None:
    """Write `checkpoint_N`: a zarr array for each key, and the tree that names them.

    Args:
        folder: to be made.
        tree: arrays by key.
        dtype: stored.
        compressor: of chunks, as zarr names it.
        chunk: largest extent of a chunk, so that arrays have many, and ragged ones.
        inline: endings of keys whose arrays lie in the msgpack file.
        version: of T5X's format.
    """
    folder.mkdir(parents=True)
    target: dict[str, Any] = {}
    for key, value in tree.items():
        value = value.astype(tensorstore.dtype(dtype).numpy_dtype)
        *parents, name = key.split("/")
        node = target
        for parent in parents:
            node = node.setdefault(parent, {})
        if key.endswith(inline) and inline:
            packed = msgpack.packb((value.shape, value.dtype.name, value.tobytes()))
            node[name] = msgpack.ExtType(1, packed)
            continue
        path = "target." + key.replace("/", ".")
        metadata = {
            "shape": list(value.shape),
            "chunks": [min(n, chunk) for n in value.shape],
            "compressor": compressor,
        }
        spec = {"driver": "zarr", "dtype": dtype, "metadata": metadata}
        store = {"driver": "file", "path": str(folder / path)}
        array = tensorstore.open(
            {**spec, "kvstore": store, "store_data_equal_to_fill_value": True}, create=True
        ).result()
        array.write(value).result()
        # As published: the path of the machine that wrote it.
        node[name] = {**spec, "kvstore": {"driver": "gfile", "path": f"checkpoint_1/{path}"}}
    slots = {"v_row": msgpack.ExtType(1, msgpack.packb(((1,), "float32", b"\0" * 4)))}
    optimizer = {"target": target, "state": {"step": 1, "param_states": {"x": slots}}}
    content = {"version": version, "optimizer": optimizer}
    (folder / "checkpoint").write_bytes(msgpack.packb(content))
