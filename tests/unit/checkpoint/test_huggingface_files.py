"""Folders of Hugging Face models in and out: same numbers, same bits, no warnings."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
)
from transformers.utils import logging

import megaswitch
from megaswitch.checkpoint.conversion import Options
from megaswitch.checkpoint.huggingface_files import export_hf, import_hf
from megaswitch.checkpoint.manager import read_config
from megaswitch.data.tokenizer import Tokenizer
from megaswitch.log import UserError
from megaswitch.storage import location
from tests.unit.model.hf_reference import (
    SHAPE,
    STACK_TABLES,
    VOCAB,
    error,
    make_batch,
    randomize,
    routing_margin,
    run_hf,
    run_ours,
    switch,
    t5,
)

ALIASES = {*STACK_TABLES, "lm_head.weight"}
# fp32 round-off of a few layers, relative to the largest element.
LOGITS, GRADIENTS = 1e-5, 1e-4


def mt5():
    config = MT5Config(**SHAPE, num_layers=2, num_decoder_layers=3)
    model = MT5ForConditionalGeneration(config)
    model.lm_head.weight = nn.Parameter(torch.empty(VOCAB, config.d_model))
    return randomize(model, 0)


MODELS = {
    "t5-v1.0": lambda: t5(gated=False),
    "t5-v1.1, FLAN": lambda: t5(gated=True),
    "mt5": mt5,
    "switch": switch,
    "switch, every layer": lambda: switch(step=1, num_experts=3),
    "switch, untied": lambda: switch(tie_word_embeddings=False),
    "switch, full experts": lambda: switch(expert_capacity=2),
    "switch, dense decoder": lambda: switch(decoder_sparse_step=0),
}


def save(hf, folder: Path, kind: str) -> None:
    """Write a model as HF does, or did."""
    shards = {"sharded": "8KB"} if kind.startswith("sharded") else {}
    hf.save_pretrained(folder, max_shard_size=shards.get(kind, "5GB"))
    table = json.loads((folder / "config.json").read_text())
    if not table.get("scale_decoder_outputs", table["tie_word_embeddings"]):
        table["tie_word_embeddings"] = False  # as 4.x, whose files the hub has, wrote v1.1
        table.pop("scale_decoder_outputs", None)
        (folder / "config.json").write_text(json.dumps(table))
    if kind == "bin":  # with all aliases, as old files have them
        (folder / "model.safetensors").unlink()
        torch.save(hf.state_dict(), folder / "pytorch_model.bin")
    if kind == "bin, sharded":
        (folder / "model.safetensors").unlink()
        names = list(hf.state_dict())
        places = {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = f"pytorch_model-0000{number}-of-00002.bin"
            torch.save({n: hf.state_dict()[n].clone() for n in part}, folder / file)
            places |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def tied(hf) -> bool:
    return hf.lm_head.weight is hf.shared.weight


@pytest.fixture
def greedy():
    """Our and HF's greedy tokens for a batch."""

    def decode(hf, ours, batch):
        from megaswitch.train.generate import generate

        with torch.no_grad():
            theirs = hf.generate(
                batch.encoder, max_new_tokens=8, do_sample=False, use_cache=False,
                decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
            )  # fmt: skip
        found = generate(ours, batch.encoder, max_tokens=8).tokens
        return found, theirs[:, 1:]

    return decode


@pytest.mark.parametrize(("kind", "files"), [
    *((kind, "one file") for kind in MODELS),
    # Files are read before anything is known of the model, so two stand for all.
    *((kind, files) for kind in ("t5-v1.1, FLAN", "switch")
      for files in ("sharded", "bin", "bin, sharded")),
])  # fmt: skip
def test_an_imported_model_computes_what_hf_computes(kind, files, tmp_path, greedy):
    hf = MODELS[kind]()
    save(hf, tmp_path / "hf", files)
    import_hf(tmp_path / "hf", tmp_path / "ours", Options(shard_bytes=20_000))
    ours = megaswitch.load_model(tmp_path / "ours")
    batch = make_batch("right" if "full" not in kind else "none")
    assert routing_margin(hf, batch) > 1e-4  # no argmax that round-off could turn
    expected, _ = run_hf(hf, batch)
    found, _ = run_ours(ours, batch)
    assert error(found.logits, expected.logits) < LOGITS
    assert abs(found.loss - expected.loss) < LOGITS * abs(expected.loss)
    for name, gradient in expected.gradients.items():
        if name in STACK_TABLES:
            continue  # one table with ours
        assert error(found.gradients[name], gradient) < GRADIENTS, name
    if "full" not in kind:  # our cached generation drops nothing
        assert torch.equal(*greedy(hf, ours, make_batch("none")))


@pytest.mark.parametrize(("kind", "dtype"), [
    *((kind, torch.float32) for kind in MODELS),
    *((kind, dtype) for kind in ("t5-v1.1, FLAN", "switch")
      for dtype in (torch.bfloat16, torch.float16)),
])  # fmt: skip
def test_in_and_out_again_is_the_same_bits(kind, dtype, tmp_path, caplog):
    hf = MODELS[kind]().to(dtype)
    save(hf, tmp_path / "hf", "sharded")
    import_hf(tmp_path / "hf", tmp_path / "ours", Options(shard_bytes=6_000))
    export_hf(tmp_path / "ours", tmp_path / "again", Options(shard_bytes=9_000))
    before, after = (
        {k: v for file in sorted((tmp_path / d).glob("*.safetensors"))
         for k, v in load_file(file).items()}
        for d in ("hf", "again")
    )  # fmt: skip
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 3
    for name, tensor in before.items():
        if name not in after:  # one that another name repeats
            assert name in ALIASES
            assert torch.equal(tensor, before["shared.weight"])
            continue
        assert after[name].dtype == dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    logging.enable_propagation()
    loaded, report = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # HF 5 forces every T5 to say that it is tied, and then says this of any v1.1, its own included.
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert all("so we will NOT tie them" in text for text in warnings), warnings
    assert loaded.dtype == dtype
    assert loaded.generation_config.decoder_start_token_id == 0
    assert tied(loaded) == tied(hf)


def test_types_are_changed_on_request_alone(tmp_path):
    switch().save_pretrained(tmp_path / "hf")
    for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        import_hf(tmp_path / "hf", tmp_path / kind, Options(dtype=kind))
        stored = load_file(tmp_path / kind / "shard-00001-of-00001.safetensors")
        name = "encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight"
        original = load_file(tmp_path / "hf" / "model.safetensors")[name]
        assert torch.equal(
            stored["model.encoder.layers.1.ffn.experts.wi.weight"][2], original.to(dtype)
        )
        export_hf(tmp_path / kind, tmp_path / f"{kind}-hf", Options(dtype="fp32"))
        assert json.loads((tmp_path / f"{kind}-hf/config.json").read_text())["dtype"] == "float32"


def test_numbers_that_fp16_lacks_are_refused(tmp_path):
    hf = t5(gated=False)
    with torch.no_grad():
        hf.shared.weight[3, 3] = 70_000.0
    hf.save_pretrained(tmp_path / "hf")
    with pytest.raises(
        UserError, match=r"shared.weight holds values up to 7e\+04.*use --dtype bf16"
    ):
        import_hf(tmp_path / "hf", tmp_path / "ours", Options(dtype="fp16"))
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_layers_are_those_of_the_tensors_as_in_switch_c(tmp_path):
    """Its published config.json says 12 decoder layers, none of them sparse, of 15 sparse ones."""
    hf = switch(layers=(3, 5), step=1, tie_word_embeddings=False)
    hf.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    table = json.loads(path.read_text()) | {"num_decoder_layers": 4, "decoder_sparse_step": 0}
    path.write_text(json.dumps(table | {"num_sparse_decoder_layers": 0}))
    result = import_hf(tmp_path / "hf", tmp_path / "ours", Options())
    assert sum("config.json says num_decoder_layers=4; the tensors make it 5" in n
               for n in result.notes) == 1  # fmt: skip
    ours = megaswitch.load_model(tmp_path / "ours")
    batch = make_batch("right")
    assert error(run_ours(ours, batch)[0].logits, run_hf(hf, batch)[0].logits) < LOGITS


def test_a_configuration_of_more_layers_than_there_are_is_refused(tmp_path):
    switch().save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_decoder_layers": 4}))
    with pytest.raises(UserError, match=r"missing \(\d+\): decoder.block.2"):
        import_hf(tmp_path / "hf", tmp_path / "ours", Options())


def test_object_stores_hold_sources_and_destinations(tmp_path):
    hf = switch()
    hf.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    cloud = location(f"memory://bucket-{random.random()}")
    for file in (tmp_path / "hf").iterdir():
        (cloud / "hf").mkdir(parents=True, exist_ok=True)
        (cloud / "hf" / file.name).write_bytes(file.read_bytes())
    import_hf(cloud / "hf", cloud / "ours", Options(shard_bytes=9_000))
    export_hf(cloud / "ours", location(f"file://{tmp_path}/again"), Options())
    export_hf(cloud / "ours", cloud / "out", Options())
    names = {path.name for path in (cloud / "out").iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in hf.state_dict().items())
    with pytest.raises(UserError, match="exists already"):
        import_hf(cloud / "hf", cloud / "ours", Options())
    with pytest.raises(UserError, match="pip install"):
        location("nosuchstore://bucket/x")


# ---------------------------------------------------------------- text


def with_sentinels_inside(model: bytes) -> bytes:
    """A SentencePiece model that ends with its sentinels, as mT5's does."""
    from sentencepiece import sentencepiece_model_pb2 as messages

    proto = messages.ModelProto.FromString(model)
    for number in reversed(range(100)):
        kind = messages.ModelProto.SentencePiece.USER_DEFINED
        proto.pieces.add(piece=f"▁<extra_id_{number}>", score=0.0, type=kind)
    return proto.SerializeToString()


TEXTS = [
    "baba dodu  <extra_id_0> kilo<extra_id_1>, mo",
    "  naïve ２ ½ 漢字 😀\tx\n",
    "<extra_id_99> la <extra_id_100>",
    "",
]


@pytest.mark.parametrize("inside", [False, True])
def test_the_tokenizer_comes_along_and_means_the_same(inside, text_run, tmp_path):
    """From a run to HF and back; HF's tokenizer gives our ids."""
    model = (text_run / "spm.model").read_bytes()
    (tmp_path / "spm.model").write_bytes(with_sentinels_inside(model) if inside else model)
    options = Options(tokenizer=tmp_path / "spm.model")
    export_hf(text_run / "run", tmp_path / "hf", options, capacity="dropless")
    ours, theirs = Tokenizer(tmp_path / "spm.model"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(theirs) == ours.vocab_size == 500
    assert theirs.convert_tokens_to_ids("<extra_id_0>") == 499
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text).input_ids == [*ids, 1], text
        assert Tokenizer(text_run / "spm.model").encode(text) == ids
        words = theirs.decode(ids).replace("<", " <").replace(">", "> ").split()
        assert words == ours.decode(ids).replace("<", " <").replace(">", "> ").split()
    import_hf(tmp_path / "hf", tmp_path / "ours", Options())
    kept = (tmp_path / "ours" / "tokenizer.model").read_bytes()
    assert kept == (tmp_path / "spm.model").read_bytes()


def test_a_tokenizer_of_another_model_is_refused(text_run, tmp_path):
    switch().save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match="has 500 ids and the model 101"):
        import_hf(tmp_path / "hf", tmp_path / "ours", Options(tokenizer=text_run / "spm.model"))


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("capacity", "said", "slots"),
    [(None, "--capacity dropless", 0), ("dropless", "", 2**31 - 1), (7, "", 7)],
)
def test_capacity_of_groups_is_given_up_on_request_alone(text_run, tmp_path, capacity, said, slots):
    if said:
        with pytest.raises(UserError, match=said):
            export_hf(text_run / "run", tmp_path / "hf", Options(), capacity=capacity)
        assert not list(tmp_path.iterdir())
        return
    export_hf(text_run / "run", tmp_path / "hf", Options(), capacity=capacity)
    assert json.loads((tmp_path / "hf/config.json").read_text())["expert_capacity"] == slots


def test_training_begins_at_an_imported_model(run_options, tmp_path):
    from megaswitch.config import load_config
    from megaswitch.metrics_file import read_metrics
    from megaswitch.parallel.mesh import Mesh
    from megaswitch.train.trainer import Trainer

    mesh = Mesh.start("cpu")
    config = load_config(None, [*run_options, "--train.steps=30", "--train.valid_samples=32"])
    assert Trainer.build(config, mesh).fit()
    export_hf(tmp_path / "run", tmp_path / "hf", Options(), capacity="dropless")
    import_hf(tmp_path / "hf", tmp_path / "imported", Options())
    steps = [f"--train.run_dir={tmp_path}/next", "--train.steps=2", "--train.valid_interval=2"]
    steps.append(f"--train.init_from={tmp_path}/imported")
    trainer = Trainer.build(load_config(None, [*run_options, *steps]), mesh)
    assert trainer.state.step == 0
    assert trainer.fit()
    first, second = (read_metrics(tmp_path / d / "metrics.jsonl") for d in ("run", "next"))
    assert second[0]["loss"] < first[0]["loss"] - 0.3
    again = Trainer.build(load_config(None, [*run_options, *steps, "--train.steps=3"]), mesh)
    assert again.state.step == 2
    again.fit()
    other = ["--model.d_ff=32", f"--train.run_dir={tmp_path}/wide"]
    wide = load_config(None, [*run_options, *steps, *other])
    with pytest.raises(UserError, match=r"model.d_ff was 64 and is 32"):
        Trainer.build(wide, mesh)
    assert read_config(tmp_path / "next").model.moe.capacity_mode == "group"


def test_files_of_the_hubs_cache_are_links(tmp_path):
    """snapshots/REVISION links to blobs beside it; that is no way out."""
    t5(gated=False).save_pretrained(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        os.symlink(f"../../blobs/{file.name}", snapshot / file.name)
    assert import_hf(snapshot, tmp_path / "ours", Options()).parameters


def test_a_model_of_odd_vocabulary_in_one_old_file_with_a_head_twice(tmp_path):
    """A v1.1 model whose head happens to equal the embedding stays untied."""
    hf = t5(gated=True)
    with torch.no_grad():
        hf.lm_head.weight.copy_(hf.shared.weight)
    save(hf, tmp_path / "hf", "one file")
    state = {k: v.clone() for k, v in hf.state_dict().items()}
    save_file(state, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    import_hf(tmp_path / "hf", tmp_path / "ours", Options())
    ours = megaswitch.load_model(tmp_path / "ours")
    assert not ours.config.tie_embeddings
    batch = make_batch("none")
    assert error(run_ours(ours, batch)[0].logits, run_hf(hf, batch)[0].logits) < LOGITS
