"""A checkpoint evaluated again: the figures of training's own validation, from corpora and text."""

import json
import shutil
from dataclasses import replace

import pytest

from megaswitch.checkpoint.manager import find_checkpoint
from megaswitch.config import load_config
from megaswitch.data.preprocess import preprocess
from megaswitch.data.text_to_text import preprocess_pairs
from megaswitch.log import UserError
from megaswitch.metrics_file import read_metrics
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.evaluate import Request, evaluate
from megaswitch.train.metrics import router_metrics
from megaswitch.train.trainer import Trainer


@pytest.fixture
def request_(text_run):
    return Request(checkpoint=text_run / "run", data=[f"{text_run}/valid"])


def run(request):
    return evaluate(request.plan(1), Mesh.start("cpu"))


def test_figures_are_those_of_validation_in_training(text_run, request_):
    evaluation = run(replace(request_, samples=30))
    (last,) = (m for m in read_metrics(text_run / "run/metrics.jsonl") if "valid/loss" in m)
    (figures,) = evaluation.sources.values()
    again = figures.metrics | router_metrics(figures.router)
    assert {f"valid/{key}": value for key, value in again.items()} == {
        key: value for key, value in last.items() if key.startswith("valid/")
    }
    assert evaluation.total == figures
    assert evaluation.step == 3


def test_text_gives_what_preprocessing_it_gives(text_run, request_):
    text = run(replace(request_, data=[f"{text_run}/texts.jsonl"]))
    corpus = run(request_)
    assert text.sources["texts"] == corpus.sources["valid"]
    assert text.available == {"texts": corpus.total.samples}


def test_a_field_gives_what_separate_files_give(text_run, tmp_path, request_):
    lines = (text_run / "texts.jsonl").read_text().splitlines()
    split = run(replace(request_, data=[f"{text_run}/texts.jsonl"], by="lang"))
    assert list(split.sources) == ["(no lang)", "a", "b"]
    for lang in ("a", "b"):
        kept = [line for line in lines if json.loads(line).get("lang") == lang]
        (tmp_path / f"{lang}.jsonl").write_text("\n".join(kept))
        preprocess([tmp_path / f"{lang}.jsonl"], tmp_path / lang, text_run / "spm.model")
    apart = run(replace(request_, data=[f"{tmp_path}/a", f"bee={tmp_path}/b"]))
    assert apart.sources["a"] == split.sources["a"]
    assert apart.sources["bee"] == split.sources["b"]
    assert split.total.samples == sum(f.samples for f in split.sources.values())


def test_what_is_asked_for_overrides_the_checkpoint(request_):
    plain = run(replace(request_, samples=8))
    other = run(replace(request_, samples=8, seed=6))
    assert other.total.metrics["loss"] != plain.total.metrics["loss"]
    smaller = run(replace(request_, samples=8, batch_size=2)).total
    assert smaller.metrics == pytest.approx(plain.total.metrics, rel=1e-5)
    for name, load in plain.total.router.items():
        assert smaller.router[name].tokens_per_expert == load.tokens_per_expert
        assert smaller.router[name].kept == load.kept
    shorter = run(replace(request_, samples=8, encoder_length=32, noise_density=0.3))
    assert shorter.config.data.encoder_length == 32
    assert shorter.total.router["encoder.1.ffn"].tokens == 8 * 32
    assert shorter.batch_size == 4  # rows of a group of 128 tokens
    assert run(replace(request_, samples=8, precision="bf16")).config.train.precision == "bf16"


def test_batches_that_cut_routing_groups_are_refused(request_):
    with pytest.raises(UserError, match=r"multiple of the 2 rows of a routing group .* use 4"):
        run(replace(request_, batch_size=3))


def test_nothing_is_left_behind(text_run, tmp_path, request_, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run(replace(request_, data=[f"{text_run}/texts.jsonl"], samples=2))
    with pytest.raises(UserError, match="no document has a value in the field 'nothing'"):
        run(replace(request_, data=[f"{text_run}/texts.jsonl"], by="nothing"))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def copy(text_run, tmp_path):
    """A checkpoint that may be damaged."""
    return shutil.copytree(find_checkpoint(text_run / "run"), tmp_path / "checkpoint")


def forget(checkpoint, name):
    """Take a file out of the checkpoint as if it had never been in it."""
    (checkpoint / name).unlink()
    state = json.loads((checkpoint / "state.json").read_text())
    del state["files"][name]
    (checkpoint / "state.json").write_text(json.dumps(state))


def test_text_needs_the_tokenizer_in_the_checkpoint(text_run, copy, request_):
    forget(copy, "tokenizer.model")
    assert run(replace(request_, checkpoint=copy, samples=2)).total.samples == 2
    with pytest.raises(UserError, match=r"has no tokenizer.model to read it with"):
        run(replace(request_, checkpoint=copy, data=[f"{text_run}/texts.jsonl"]))


def test_a_damaged_checkpoint_is_refused(copy, request_):
    (file,) = copy.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="does not match its checksum"):
        run(replace(request_, checkpoint=copy))


def test_data_of_another_tokenizer_is_refused(corpus, request_, copy):
    with pytest.raises(
        UserError, match=r"was made with another tokenizer .* than the checkpoint's"
    ):
        run(replace(request_, data=[str(corpus)]))
    forget(copy, "tokenizer.model")
    assert run(replace(request_, checkpoint=copy, data=[str(corpus)], samples=2)).total.samples


def test_ids_beyond_the_vocabulary_are_refused(request_, tmp_path):
    from megaswitch.data.indexed import IndexedWriter

    with IndexedWriter(tmp_path / "high", "<u2") as writer:
        writer.add_document(range(3, 1003))
    with pytest.raises(UserError, match="token id 1002, outside the model's vocabulary of 512"):
        run(replace(request_, data=[f"{tmp_path}/high"]))


def test_all_sources_that_cannot_be_opened_are_named(request_, tmp_path):
    from megaswitch.data.indexed import IndexedWriter

    for name in ("one", "two"):
        with IndexedWriter(tmp_path / name, "<u2") as writer:
            writer.add_document(range(3, 13))
    with pytest.raises(UserError, match=r"one' has 10 tokens, fewer.*\n.*two' has 10 tokens"):
        run(replace(request_, data=[f"{tmp_path}/one", f"{tmp_path}/two"]))


@pytest.fixture
def pairs(text_run, tmp_path):
    """The prefix of pairs of texts, and a request for a checkpoint trained on them."""
    words = (text_run / "texts.jsonl").read_text().split()[2:40]
    lines = [{"inputs": " ".join(words[n : n + 4]), "targets": words[n]} for n in range(30)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    preprocess_pairs([tmp_path / "p.jsonl"], tmp_path / "p", text_run / "spm.model")
    trained = load_config(text_run / "run" / "config.toml")
    data = replace(
        trained.data, train=str(tmp_path / "p"), valid=str(tmp_path / "p"),
        objective="text-to-text", decoder_length=16,
    )  # fmt: skip
    train = replace(trained.train, run_dir=str(tmp_path / "run"))
    assert Trainer.build(replace(trained, data=data, train=train), Mesh.start("cpu")).fit()
    return Request(checkpoint=tmp_path / "run", data=[f"{tmp_path}/p"])


def test_pairs_are_evaluated_as_training_validated_them(pairs, tmp_path, text_run):
    evaluation = run(pairs)
    (last,) = (m for m in read_metrics(tmp_path / "run/metrics.jsonl") if "valid/loss" in m)
    (name,) = evaluation.sources
    assert name == "p"
    assert evaluation.total.metrics["loss"] == last["valid/loss"]
    assert evaluation.decoder_length == 16
    assert run(replace(pairs, encoder_length=32)).config.data.decoder_length == 16


def test_pairs_and_texts_are_not_confused(pairs, request_, text_run):
    with pytest.raises(UserError, match=r"/p'.*'span-corruption', and these are pairs"):
        run(replace(request_, data=pairs.data))
    for other in (f"{text_run}/valid", f"{text_run}/texts.jsonl"):
        with pytest.raises(UserError, match=r"these are none; make pairs .* preprocess --pairs"):
            run(replace(pairs, data=[other]))
