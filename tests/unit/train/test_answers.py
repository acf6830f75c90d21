"""Answers by rank are those of brute force, whatever the batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import megaswitch
from megaswitch.data.tasks import Example, Task
from megaswitch.data.tokenizer import Tokenizer
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.answers import Answerer

CPU = torch.device("cpu")
RANK = Task(inputs="{a}", choices="c", metrics=["accuracy"])
WRITE = Task(inputs="{a}", targets="{b}", metrics=["exact_match"])


@pytest.fixture
def model(text_run):
    return megaswitch.load_model(text_run / "run").double()


@pytest.fixture
def tokenizer(text_run):
    return Tokenizer(text_run / "spm.model")


@pytest.fixture
def examples(text_run):
    words = (text_run / "texts.jsonl").read_text().split('"')[3].split()
    rows = [(words[i : i + 3 + i % 5], words[i + 1 : i + 3 + i % 3]) for i in range(11)]
    return [
        Example(" ".join(text), choices[0], (), tuple(choices), 0, None, Path("f"), 1)
        for text, choices in rows
    ]


def answerer(model, tokenizer, batch_size, **lengths):
    lengths = {"encoder_length": 64, "decoder_length": 8, **lengths}
    return Answerer(
        model=model, mesh=Mesh(0, 1, CPU, None), tokenizer=tokenizer, precision=torch.float32,
        batch_size=batch_size, **lengths,
    )  # fmt: skip


def brute_force(model, tokenizer, example, choice):
    """log p(choice, EOS | inputs) of one row alone, without a limit to the experts."""
    moe = replace(model.config.moe, capacity_mode="dropless")
    alone = SwitchTransformer(replace(model.config, moe=moe)).double().eval()
    alone.load_state_dict(model.state_dict())
    encoder = torch.tensor([[*tokenizer.encode(example.inputs), 1]])
    target = torch.tensor([[*tokenizer.encode(choice), 1]])
    decoder = torch.cat([torch.zeros(1, 1, dtype=torch.long), target[:, :-1]], 1)
    with torch.no_grad():
        log_p = torch.log_softmax(alone(encoder, decoder).logits, -1)
    return log_p.gather(2, target[..., None]).sum().item()


@pytest.mark.parametrize("batch_size", [1, 4, 200])
def test_rank_equals_brute_force(model, tokenizer, examples, batch_size):
    """Choices differ in number and length; of 200 examples at a time, choices go one by one."""
    found = answerer(model, tokenizer, batch_size).answers(RANK, examples)
    assert len(found) == len(examples)
    for example, answer in zip(examples, found, strict=True):
        expected = [brute_force(model, tokenizer, example, c) for c in example.choices]
        assert answer.scores == pytest.approx(expected, abs=1e-9)
        best = max(range(len(expected)), key=expected.__getitem__)
        assert answer.prediction == example.choices[best]
        assert answer.score == answer.scores[best]


def test_written_answers_are_those_of_generate(model, tokenizer, examples):
    found = answerer(model, tokenizer, 3).answers(WRITE, examples)
    for example, answer in zip(examples, found, strict=True):
        tokens = torch.tensor([[*tokenizer.encode(example.inputs), 1]])
        alone = megaswitch.generate(model, tokens, max_tokens=8)
        assert answer.prediction == tokenizer.decode(alone.tokens[0].tolist())
        assert answer.score == pytest.approx(alone.scores.item(), abs=1e-4)


def test_long_inputs_lose_their_end_as_in_training(model, tokenizer, examples):
    short = answerer(model, tokenizer, 4, encoder_length=4).answers(RANK, examples)
    kept = [tokenizer.decode(tokenizer.encode(e.inputs)[:3]) for e in examples]
    cut = [replace(e, inputs=text) for e, text in zip(examples, kept, strict=True)]
    again = answerer(model, tokenizer, 4).answers(RANK, cut)
    same = [tokenizer.encode(e.inputs) == tokenizer.encode(o.inputs)[:3]
            for e, o in zip(cut, examples, strict=True)]  # fmt: skip
    assert sum(same) > 5
    for ours, theirs, comparable in zip(short, again, same, strict=True):
        if comparable:
            assert ours.scores == pytest.approx(theirs.scores, abs=1e-9)


def test_equal_choices_take_the_first(model, tokenizer, examples):
    twice = [replace(examples[0], choices=("x", "x"))]
    (answer,) = answerer(model, tokenizer, 1).answers(RANK, twice)
    assert answer.prediction == "x"
    assert answer.score == answer.scores[0]
