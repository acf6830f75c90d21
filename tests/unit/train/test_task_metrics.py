"""Metrics on literal answers, against what their libraries and the leaderboards' scripts give."""

from pathlib import Path

import pytest
import sacrebleu
from rouge_score import rouge_scorer
from scipy import stats
from sklearn import metrics as sk

from megaswitch.data.tasks import Example, find_task
from megaswitch.log import UserError
from megaswitch.train import task_metrics
from megaswitch.train.task_metrics import METRICS, check_metrics, task_figures


def example(target=None, *, label=None, choices=(), references=None, group=None):
    if target is None and label is not None:
        target = choices[label]
    known = references or ([] if target is None else [target])
    return Example("in", target, tuple(known), tuple(choices), label, group, Path("f"), 1)


PAIR = ("no", "yes")
ANSWERS = ["yes", "no", "yes", "rubbish", "no", "yes"]
LABELS = [1, 0, 0, 1, 1, 1]
BINARY = [example(label=label, choices=PAIR) for label in LABELS]


def test_accuracy_and_exact_match():
    assert METRICS["accuracy"](ANSWERS, BINARY) == {"accuracy": 50.0}
    assert METRICS["exact_match"](["b"], [example("a", references=["a", "b"])]) == {
        "exact_match": 100.0
    }


def test_f1_counts_what_is_no_label_as_wrong():
    opposite = [1, 0, 1, 0, 0, 1]  # "rubbish" where the truth is 1
    assert METRICS["f1"](ANSWERS, BINARY)["f1"] == pytest.approx(
        100 * sk.f1_score(LABELS, opposite)
    )
    assert METRICS["f1"](["no"], [example(label=0, choices=PAIR)]) == {"f1": 0.0}


def test_several_classes():
    three = ("a", "b", "c")
    truth, found = [0, 1, 2, 2, 1], [0, 2, 2, 2, 0]
    examples = [example(label=label, choices=three) for label in truth]
    texts = [three[i] for i in found]
    assert METRICS["macro_f1"](texts, examples)["macro_f1"] == pytest.approx(
        100 * sk.f1_score(truth, found, average="macro")
    )
    assert METRICS["matthews"](texts, examples)["matthews"] == pytest.approx(
        100 * sk.matthews_corrcoef(truth, found)
    )


def test_correlations():
    texts, truth = ["1.0", "nonsense", "3.4", "5.0"], [0.8, 2.0, 3.0, 4.6]
    examples = [example(str(t)) for t in truth]
    numbers = [1.0, -1.0, 3.4, 5.0]
    assert METRICS["pearson"](texts, examples)["pearson"] == pytest.approx(
        100 * stats.pearsonr(truth, numbers)[0]
    )
    assert METRICS["spearman"](texts, examples)["spearman"] == pytest.approx(
        100 * stats.spearmanr(truth, numbers)[0]
    )
    assert METRICS["pearson"](["x", "y"], [example("1"), example("2")]) == {"pearson": 0.0}


def test_rouge_and_bleu():
    texts = ["the cat sat . it purred", "a dog"]
    truth = ["the cat sat down . it purred loudly", "the dog barks"]
    examples = [example(t) for t in truth]
    scorer = rouge_scorer.RougeScorer(["rouge2", "rougeLsum"])
    found = METRICS["rouge"](texts, examples)
    scores = [
        scorer.score(t.replace(" . ", " .\n"), p.replace(" . ", " .\n"))
        for t, p in zip(truth, texts, strict=True)
    ]
    for kind in ("rouge2", "rougeLsum"):
        assert found[kind] == pytest.approx(50 * sum(s[kind].fmeasure for s in scores))
    # By hand: 5 of 5 and 7 words are common, 1 of 2 and 3.
    assert found["rouge1"] == pytest.approx(50 * (2 * 5 / (5 + 7) + 2 * 1 / (2 + 3)))
    assert METRICS["bleu"](texts, examples)["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(texts, [truth], tokenize="intl").score
    )


def test_questions():
    examples = [
        example(references=["The Denver Broncos!", "Denver"]),
        example(references=["24–10"]),
        example(references=["Rome"]),
    ]
    found = METRICS["squad"](["denver  broncos", "24 - 10", "Rome, Italy"], examples)
    # Exact: 1, 0, 0. Overlap: 1; 0; 2·1/(2+1).
    assert found == {"em": pytest.approx(100 / 3), "f1": pytest.approx(100 * (1 + 2 / 3) / 3)}
    one = [example(references=["Spider-Man"])]
    assert METRICS["trivia_qa"](["spider man"], one)["em"] == 100.0
    assert METRICS["squad"](["spider man"], one)["em"] == 0.0


def test_questions_with_several_answers_each():
    examples = [
        example(label=label, choices=("False", "True"), group=group)
        for label, group in ((1, "a"), (0, "a"), (1, "b"), (1, "b"))
    ]
    found = METRICS["multirc"](["True", "False", "True", "False"], examples)
    assert found == {"f1a": pytest.approx(200 * 2 / (2 + 3)), "em": 50.0}


@pytest.mark.parametrize(
    ("prediction", "referent", "same"),
    [
        ("the bunny", "Bunny", True),
        ("fuzzy bunny", "bunny", True),
        ("Bob", "Bob's hat", False),
        ("cat", "dog", False),
    ],
)
def test_referents(prediction, referent, same):
    for label in (0, 1):
        found = METRICS["wsc"]([prediction], [example(referent, label=label)])
        assert found == {"accuracy": 100.0 * (same == bool(label))}


def test_the_score_is_the_mean_of_what_counts():
    found = task_figures(find_task("mrpc"), ANSWERS, BINARY)
    assert found["score"] == pytest.approx((found["f1"] + found["accuracy"]) / 2)
    one = [example(references=["a b"])]
    assert task_figures(find_task("squad"), ["a b c"], one)["score"] == 0.0


def test_a_missing_library_is_said_before_anything_runs(monkeypatch):
    monkeypatch.setitem(task_metrics._LIBRARIES, "bleu", ("no_such_library",))
    with pytest.raises(UserError, match=r"needs no_such_library.*megaswitch\[finetune\]"):
        check_metrics("wmt_en_de", find_task("wmt_en_de"))
