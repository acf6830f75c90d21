"""T5X checkpoints import to the same model as their twins of Hugging Face."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

import megaswitch
from megaswitch.checkpoint.conversion import Options
from megaswitch.checkpoint.huggingface import from_hf
from megaswitch.checkpoint.huggingface_config import config_from_hf
from megaswitch.checkpoint.manager import read_config
from megaswitch.checkpoint.t5x import import_t5x
from megaswitch.log import UserError
from tests.unit.checkpoint.t5x_reference import flax_tree, scanned, write_t5x
from tests.unit.model.hf_reference import SHAPE, switch, t5

ZSTD, GZIP, ZLIB = ({"id": name, "level": 1} for name in ("zstd", "gzip", "zlib"))


def models():
    return {
        "t5": t5(gated=False),
        "t5-v1.1": t5(gated=True),
        "switch": switch(),
        "switch-all-sparse": switch(step=1),
        "switch-untied": switch(tie_word_embeddings=False),
    }


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("t5", {"compressor": GZIP}),
        ("t5-v1.1", {"compressor": ZSTD, "inline": ("scale", "rel_embedding")}),
        ("switch", {"compressor": GZIP, "chunk": 3}),
        ("switch-all-sparse", {"compressor": None, "chunk": 1000}),
        ("switch-untied", {"compressor": ZLIB, "dtype": "bfloat16"}),
    ],
)
def test_the_twin_of_a_hugging_face_model_is_the_same_model(kind, options, tmp_path):
    hf = models()[kind]
    tree = flax_tree(hf.state_dict(), hf.config)
    write_t5x(tmp_path / "checkpoint_1", tree, **options)
    result = import_t5x(tmp_path / "checkpoint_1", tmp_path / "ours", Options(shard_bytes=9_000))
    model = megaswitch.load_model(tmp_path / "ours")
    expected = from_hf(hf.state_dict(), config_from_hf(hf.config.to_dict()))
    if options.get("dtype"):
        expected = {name: value.bfloat16().float() for name, value in expected.items()}
    assert result.parameters == sum(value.numel() for value in expected.values())
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    theirs = config_from_hf(hf.config.to_dict())
    for key in ("activation", "tie_embeddings", "num_heads", "d_kv", "d_ff", "relative_buckets"):
        assert getattr(model.config, key) == getattr(theirs, key)
    assert model.config.switch_layers() == theirs.switch_layers()


@pytest.mark.parametrize("gated", [False, True])
def test_scanned_layers_are_taken_apart(gated, tmp_path):
    hf = t5(gated=gated)
    tree = flax_tree(hf.state_dict(), hf.config)
    write_t5x(tmp_path / "apart", tree)
    write_t5x(tmp_path / "scanned", scanned(tree, SHAPE["num_heads"]), chunk=2)
    for name in ("apart", "scanned"):
        import_t5x(tmp_path / name, tmp_path / f"our-{name}", Options())
    apart, together = (megaswitch.load_model(tmp_path / f"our-{n}") for n in ("apart", "scanned"))
    assert apart.config == together.config
    for name, value in apart.state_dict().items():
        assert torch.equal(value, together.state_dict()[name]), name


def test_older_versions_name_bfloat16_as_integers(tmp_path):
    hf = t5(gated=False)
    tree = flax_tree(hf.state_dict(), hf.config)
    write_t5x(tmp_path / "new", tree, dtype="bfloat16")
    write_t5x(tmp_path / "old", tree, dtype="bfloat16")
    for header in (tmp_path / "old").glob("*/.zarray"):
        header.write_text(json.dumps(json.loads(header.read_text()) | {"dtype": "<u2"}))
    for name in ("new", "old"):
        import_t5x(tmp_path / name, tmp_path / f"our-{name}", Options())
    new, old = (megaswitch.load_model(tmp_path / f"our-{n}").state_dict() for n in ("new", "old"))
    assert all(torch.equal(new[name], old[name]) for name in new)


def test_a_preset_of_the_same_shape_says_the_rest(tmp_path, monkeypatch):
    hf = switch()
    config = config_from_hf(hf.config.to_dict())
    shape = {key: getattr(config, key) for key in (
        "vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_encoder_layers",
        "num_decoder_layers", "relative_buckets", "relative_max_distance",
    )}  # fmt: skip
    moe = {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2,
           "group_size": 8192, "eval_capacity_factor": 3.0}  # fmt: skip
    monkeypatch.setitem(megaswitch.config.PRESETS, "ours", shape | {"moe": moe})
    write_t5x(tmp_path / "checkpoint_1", flax_tree(hf.state_dict(), hf.config))
    result = import_t5x(tmp_path / "checkpoint_1", tmp_path / "ours", Options())
    assert "preset ours" in result.notes[0]
    config = read_config(tmp_path / "ours")
    assert config.model.moe.eval_capacity_factor == 3.0
    assert config.train.micro_batch_size == 16  # fills a group
    assert not megaswitch.config.check(config)


def changed(tree, what):
    match what:
        case "no embedding":
            del tree["token_embedder/embedding"]
        case "layer lost":
            del tree["encoder/layers_0/attention/query/kernel"]
        case "unknown array":
            tree["encoder/layers_0/extra_mlp/wi/kernel"] = np.ones((20, 28), np.float32)
        case "relative positions in each layer":
            tree["encoder/encoder/relpos_bias/rel_embedding"] = np.ones((3, 2, 8), np.float32)
        case "sparse layers elsewhere":
            for key in [k for k in tree if k.startswith("encoder/layers_3/mlp/")]:
                tree[key.replace("layers_3", "layers_2")] = tree.pop(key)
        case "other numbers of experts":
            for matrix in ("wi", "wo"):
                tree[f"encoder/layers_1/mlp/expert/{matrix}/kernel"] = np.ones((9, 20, 28), "f4")
        case "a matrix turned":
            key = "encoder/layers_0/attention/out/kernel"
            tree[key] = np.ascontiguousarray(tree[key].T)
    return tree


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no embedding", r"token_embedder/embedding of shape \[\]"),
        ("layer lost", "lacks encoder/layers_0/attention/query/kernel"),
        ("unknown array", "1 arrays that our model has no place for .*extra_mlp"),
        ("relative positions in each layer", "as umT5's"),
        ("sparse layers elsewhere", r"encoder's sparse layers are \[1, 2\] of 4"),
        ("other numbers of experts", r"the layers have \[4, 9\] experts"),
        ("a matrix turned", r"out/kernel has shape \[20, 24\], which does not make our \[20, 24\]"),
    ],
)
def test_other_models_are_refused(what, message, tmp_path):
    hf = switch()
    write_t5x(tmp_path / "x", changed(flax_tree(hf.state_dict(), hf.config), what))
    with pytest.raises(UserError, match=re.compile(message, re.DOTALL)):
        import_t5x(tmp_path / "x", tmp_path / "ours", Options())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]
