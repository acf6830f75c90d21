"""Public tasks on literal records, as published and in flat copies."""

import json

import pytest

from megaswitch.data.tasks import builtin_tasks, find_task
from megaswitch.data.text_files import RejectionLog
from megaswitch.log import UserError
from megaswitch.train.task_metrics import check_metrics

SQUAD = {"question": "Who won?", "context": "Denver (AFC) won 24–10."}
MULTIRC = {
    "idx": 7,
    "passage": {
        "text": "<b>Sent 1: </b>A.<br>B.",
        "questions": [
            {"idx": 3, "question": "Q?", "answers": [{"text": "yes", "idx": 0, "label": 1}]}
        ],
    },
}
RECORD = {
    "passage": {
        "text": "A bird\n@highlight\nA potato!\n@highlight\nEnd",
        "entities": [{"start": 8, "end": 16}, {"start": 2, "end": 5}, {"start": 2, "end": 5}],
    },
    "qas": [{"query": "@placeholder flies", "idx": 0, "answers": [{"text": "bird"}]}],
    "idx": 1,
}
WSC = {
    "text": "Mitchell asked Tom if he could lend some money.",
    "target": {"span1_text": "Tom", "span1_index": 2, "span2_text": "he", "span2_index": 4},
    "label": True,
    "idx": 0,
}
ARC = {
    "question": {
        "stem": "Which?",
        "choices": [{"text": "sun", "label": "A"}, {"text": "moon", "label": "B"}],
    },
    "answerKey": "B",
}
TRIVIA = {"Data": [{"Question": "Who?", "Answer": {"Value": "Bob", "Aliases": ["Bob", "Robert"]}}]}

# Task, record, the encoder's text, the answer. The texts are those of the t5 library's own examples
# and docstrings where it has the task.
CASES = [
    ("cola", {"sentence": "It goes.", "label": 1}, "cola sentence: It goes.", "acceptable"),
    ("sst2", {"sentence": "bad", "label": 0, "idx": 4}, "sst2 sentence: bad", "negative"),
    (
        "mrpc",
        {"sentence1": "a", "sentence2": "b", "label": 1},
        "mrpc sentence1: a sentence2: b",
        "equivalent",
    ),
    (
        "qqp",
        {"question1": "a?", "question2": "b?", "label": 1, "idx": 10},
        "qqp question1: a? question2: b?",
        "duplicate",
    ),
    (
        "qqp",
        {"id": "1", "qid1": "2", "qid2": "3", "question1": "a", "question2": "b",
         "is_duplicate": "0"},
        "qqp question1: a question2: b",
        "not_duplicate",
    ),
    (
        "stsb",
        {"sentence1": "a", "sentence2": "b", "label": 1.8},
        "stsb sentence1: a sentence2: b",
        "1.8",
    ),
    ("stsb", {"sentence1": "a", "sentence2": "b", "score": "3.25"}, None, "3.2"),
    (
        "mnli",
        {"premise": "p", "hypothesis": "h", "label": 2},
        "mnli hypothesis: h premise: p",
        "contradiction",
    ),
    (
        "mnli",
        {"sentence1": "p", "sentence2": "h", "gold_label": "neutral"},
        "mnli hypothesis: h premise: p",
        "neutral",
    ),
    (
        "qnli",
        {"question": "q", "sentence": "s", "label": "not_entailment"},
        "qnli question: q sentence: s",
        "not_entailment",
    ),
    (
        "rte",
        {"sentence1": "a", "sentence2": "b", "label": 0},
        "rte sentence1: a sentence2: b",
        "entailment",
    ),
    (
        "wnli",
        {"sentence1": "a", "sentence2": "b", "label": "1"},
        "wnli sentence1: a sentence2: b",
        "entailment",
    ),
    ("ax", {"premise": "p", "hypothesis": "h", "label": -1}, "mnli hypothesis: h premise: p", None),
    (
        "boolq",
        {"question": "q", "passage": "p", "label": True},
        "boolq passage: p question: q",
        "True",
    ),
    (
        "cb",
        {"premise": "p", "hypothesis": "h", "label": "contradiction"},
        "cb hypothesis: h premise: p",
        "contradiction",
    ),
    (
        "copa",
        {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "label": 1},
        "copa choice1: a choice2: b premise: p question: cause",
        "choice2",
    ),
    ("multirc", MULTIRC, "multirc question: Q? answer: yes paragraph: Sent 1: A. B.", "True"),
    (
        "multirc",
        {"paragraph": "P", "question": "Q", "answer": "A", "label": 0,
         "idx": {"paragraph": 0, "question": 1, "answer": 2}},
        "multirc question: Q answer: A paragraph: P",
        "False",
    ),
    (
        "record",
        RECORD,
        "record query: @placeholder flies entities: bird, highlight passage: A bird. A potato! End",
        "bird",
    ),
    (
        "record",
        {"passage": "This is the passage.", "query": "A @placeholder is a bird.",
         "entities": ["penguin", "potato", "pigeon"], "answers": ["penguin", "pigeon"]},
        "record query: A @placeholder is a bird. entities: penguin, potato, pigeon "
        "passage: This is the passage.",
        "penguin",
    ),
    (
        "superglue_rte",
        {"premise": "p", "hypothesis": "h", "label": "entailment"},
        "rte hypothesis: h premise: p",
        "entailment",
    ),
    (
        "wic",
        {"word": "w", "sentence1": "a", "sentence2": "b", "label": False, "start1": 0},
        "wic sentence1: a sentence2: b word: w",
        "False",
    ),
    ("wsc", WSC, "wsc: Mitchell asked Tom if *he* could lend some money.", "Tom"),
    (
        "dpr",
        {"sentence": "Bob asked Tom if he can lend some money.", "pronoun": "he",
         "candidates": ["Bob", "Tom"], "label": 1},
        "wsc: Bob asked Tom if *he* can lend some money.",
        "Tom",
    ),
    (
        "axb",
        {"sentence1": "p", "sentence2": "h", "label": "not_entailment"},
        "rte hypothesis: h premise: p",
        "not_entailment",
    ),
    ("axg", {"premise": "p", "hypothesis": "h", "label": 0}, "rte hypothesis: h premise: p",
     "entailment"),
    (
        "squad",
        {**SQUAD, "answers": {"text": ["Denver (AFC)", "Denver"]}},
        "question: Who won ? context: Denver ( AFC ) won 24 – 10 .",
        "Denver ( AFC )",
    ),
    (
        "squad",
        {"data": [{"paragraphs": [{"context": "A.", "qas": [
            {"question": "B?", "answers": [{"text": "A", "answer_start": 0}]}]}]}]},
        "question: B ? context: A .",
        "A",
    ),
    ("nq_open", {"question": "who", "answer": ["X", "Y"]}, "nq question: who", "X"),
    (
        "web_questions",
        {"utterance": "who", "targetValue": '(list (description "Jazmyn B") (description Bob))'},
        "wq question: who",
        "Jazmyn B",
    ),
    ("web_questions", {"question": "who", "answers": ["X"]}, "wq question: who", "X"),
    ("trivia_qa", TRIVIA, "trivia_qa question: Who?", "Bob"),
    (
        "trivia_qa",
        {"question": "Who?", "answer": {"value": "Bob", "normalized_aliases": ["bob"]}},
        "trivia_qa question: Who?",
        "Bob",
    ),
    (
        "anli",
        {"context": "p", "hypothesis": "h", "label": "n", "uid": "u"},
        "anli hypothesis: h premise: p",
        "neutral",
    ),
    (
        "anli",
        {"premise": "p", "hypothesis": "h", "label": 2},
        "anli hypothesis: h premise: p",
        "contradiction",
    ),
    (
        "winogrande",
        {"sentence": "_ ran.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        "winogrande sentence: _ ran. option1: Ann option2: Bea",
        "Bea",
    ),
    ("arc", ARC, "arc question: Which? choices: (A) sun (B) moon", "moon"),
    (
        "arc",
        {"question": "Which?", "choices": {"text": ["sun", "moon"], "label": ["1", "2"]},
         "answerKey": "1"},
        "arc question: Which? choices: (1) sun (2) moon",
        "sun",
    ),
    ("cnn_dailymail", {"article": "a", "highlights": "b"}, "summarize: a", "b"),
    ("xsum", {"document": "a", "summary": "b"}, "summarize: a", "b"),
    (
        "wmt_en_de",
        {"de": "Das ist gut.", "en": "That is good."},
        "translate English to German: That is good.",
        "Das ist gut.",
    ),
    (
        "wmt_de_en",
        {"translation": {"de": "Das ist gut.", "en": "That is good."}},
        "translate German to English: Das ist gut.",
        "That is good.",
    ),
    ("wmt_en_fr", {"en": "a", "fr": "b"}, "translate English to French: a", "b"),
    ("wmt_en_ro", {"en": "a", "ro": "b"}, "translate English to Romanian: a", "b"),
    ("pairs", {"inputs": "a", "targets": "b", "other": 1}, "a", "b"),
]  # fmt: skip


def read(task, tmp_path, text, suffix=".jsonl", *, training=False):
    path = tmp_path / f"file{suffix}"
    path.write_text(text, encoding="utf-8")
    rejections = RejectionLog()
    found = list(find_task(task).examples(path, rejections, training=training))
    return found, rejections


@pytest.mark.parametrize(("task", "record", "inputs", "targets"), CASES)
def test_texts_are_those_of_t5(task, record, inputs, targets, tmp_path):
    found, rejections = read(task, tmp_path, json.dumps(record))
    assert not rejections.count, rejections
    (example,) = found
    if inputs:
        assert example.inputs == inputs
    assert example.targets == targets


def test_every_public_task_has_a_case_and_its_metrics():
    assert {case[0] for case in CASES} == set(builtin_tasks())
    for name, task in builtin_tasks().items():
        check_metrics(name, task)


@pytest.mark.parametrize(
    ("task", "suffix", "text", "expected"),
    [
        ("cola", ".tsv", "gj04\t0\t*\tThey drank it \"dry.\n", [('They drank it "dry.', 0)]),
        ("cola", ".tsv", "index\tsentence\n3\tBill\n", [("Bill", None)]),
        ("sst2", ".tsv", "sentence\tlabel\nhide new\t0\nwarm\t1\n", [("hide new", 0), ("warm", 1)]),
        (
            "mrpc",
            ".txt",
            "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tA\tB\n",
            [("sentence1: A sentence2: B", 1)],
        ),
        ("sst2", ".csv", 'sentence,label\n"a, ""b""",1\n', [('a, "b"', 1)]),
        ("xsum", ".json", '[{"document": "d",\n "summary": "s"}]', [("d", None)]),
        ("mnli", ".jsonl", '{"premise":"p","hypothesis":"h","gold_label":"-"}', [("p", None)]),
    ],
)  # fmt: skip
def test_files_as_published(task, suffix, text, expected, tmp_path):
    found, rejections = read(task, tmp_path, text, suffix)
    assert not rejections.count, rejections
    assert [e.label for e in found] == [label for _, label in expected]
    assert all(e.inputs.endswith(end) for e, (end, _) in zip(found, expected, strict=True))


def test_what_is_trained_on(tmp_path):
    record = {"passage": "p", "query": "q", "entities": ["a", "b", "c"], "answers": ["a", "c"]}
    found, _ = read("record", tmp_path, json.dumps(record), training=True)
    assert [e.targets for e in found] == ["a", "c"]
    wrong = json.dumps({**WSC, "label": False})
    found, _ = read("wsc", tmp_path, f"{json.dumps(WSC)}\n{wrong}", training=True)
    assert [e.targets for e in found] == ["Tom"]
    found, _ = read("wsc", tmp_path, wrong)
    assert [(e.targets, e.label) for e in found] == [("Tom", 0)]
    found, _ = read("sst2", tmp_path, '{"sentence": "s", "label": -1}', training=True)
    assert found == []


def test_records_that_lack_something_are_passed_over_and_told(tmp_path):
    lines = ['{"sentence": "s", "label": 7}', '{"text": "s"}', '{"sentence": "s", "label": 1}']
    found, rejections = read("sst2", tmp_path, "\n".join(lines))
    assert [e.line for e in found] == [3]
    reasons = [r.reason for r in rejections.first]
    assert reasons[0] == "label=7 is none of negative, positive"
    assert "field 'sentence' among text" in reasons[1]


def test_ones_own_task_is_a_small_file(tmp_path):
    path = tmp_path / "mood.toml"
    path.write_text(
        'inputs = "mood: {review.text}"\nlabels = ["bad", "good"]\nlabel = "stars"\n'
        'label_values = { 1 = "bad", 5 = "good" }\nmetrics = ["accuracy"]\n'
    )
    record = '{"review": {"text": "fine {x.__class__} {sentence}"}, "stars": 5}'
    (example,), _ = read(str(path), tmp_path, record)
    assert (example.inputs, example.targets) == ("mood: fine {x.__class__} {sentence}", "good")
    assert example.choices == ("bad", "good")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('inputs = "{a}"\nmetrics = ["accuracy"]', "targets is not set"),
        (
            'inputs = "{a}"\nlabel = ["x"]\nmetrics = ["f1"]',
            "label: Input should be a valid string",
        ),
        ('inputs = "{a}"\nlabls = ["x"]\ntargets = "{b}"\nmetrics = ["f1"]', "did you mean labels"),
        ('inputs = "{a}"\ntargets = "{b}"\nrecords = "x"\nmetrics = ["f1"]', "records='x' is unk"),
        ('inputs = "{a}"\ntargets = "{b}"\ndecoding = "rank"\nmetrics = ["f1"]', "needs labels"),
        ("inputs = 3 4", "cannot be read"),
    ],
)
def test_wrong_task_files_are_refused(text, message, tmp_path):
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        find_task(str(tmp_path / "own.toml"))


def test_a_misspelt_task_is_recognised():
    with pytest.raises(UserError, match="did you mean sst2"):
        find_task("sst-2")
