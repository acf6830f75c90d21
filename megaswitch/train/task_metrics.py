"""Scores of answers. Every figure is in percent, the higher the better.

Definitions are those of the public leaderboards, by way of the t5 library's evaluation.
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from megaswitch.data.tasks import Example, Task
from megaswitch.log import UserError

Figures = dict[str, float]
Metric = Callable[[Sequence[str], Sequence[Example]], Figures]


def task_figures(task: Task, predictions: Sequence[str], examples: Sequence[Example]) -> Figures:
    """All figures of the task's metrics, and their mean as `score`.

    Args:
        task: whose answers they are.
        predictions: texts.
        examples: as many, all with known answers.
    """
    figures: Figures = {}
    for name in task.metrics:
        figures |= METRICS[name](predictions, examples)
    chosen = [figures[name] for name in task.score or figures]
    return {**figures, "score": fmean(chosen)}


def check_metrics(name: str, task: Task) -> None:
    """Refuse metrics that are unknown, or whose library is not installed.

    Raises:
        UserError: with what to install.
    """
    if unknown := [metric for metric in task.metrics if metric not in METRICS]:
        raise UserError(
            f"task {name!r} has metrics={unknown}; they must be among {', '.join(METRICS)}"
        )
    possible = {f for metric in task.metrics for f in FIGURES.get(metric, (metric,))}
    if wrong := [figure for figure in task.score if figure not in possible]:
        raise UserError(
            f"task {name!r} has score={wrong}; its metrics give {', '.join(sorted(possible))}"
        )
    for metric in task.metrics:
        for library in _LIBRARIES.get(metric, ()):
            _library(library, metric)


def accuracy(predictions: Sequence[str], examples: Sequence[Example]) -> Figures:
    """Share of answers that are the target."""
    right = [
        p.strip() == (e.targets or "").strip() for p, e in zip(predictions, examples, strict=True)
    ]
    return {"accuracy": 100 * fmean(right)}


def exact_match(predictions: Sequence[str], examples: Sequence[Example]) -> Figures:
    """Share of answers that are one of the references."""
    right = [
        p.strip() in {r.strip() for r in e.references}
        for p, e in zip(predictions, examples, strict=True)
    ]
    return {"exact_match": 100 * fmean(right)}


def f1(predictions: Sequence[str], examples: Sequence[Example]) -> Figures:
    """F1 of class 1; an answer that is no label counts as the wrong one."""
    return {"f1": _binary_f1(*_classes(predictions, examples))}


def macro_f1(predictions: Sequence[str], examples: Sequence[Example]) -> Figures:
    """Mean over all classes of their F1."""
    from_library = _library("sklearn.metrics", "macro_f1")
    found, labels = _classes(predictions, examples)
    every = list(range(len(examples[0].choices)))
    value = from_library.f1_score(labels, found, labels=every, average="macro", zero_division=0)
    return {"macro_f1": 100 * float(value)}


def matthews(predictions: Sequence[str], examples: Sequence[Example]) -> Figures:
    """Matthews correlation."""
    found, labels = _classes(predictions, examples)
    value = _library("sklearn.metrics", "matthews").matthews_corrcoef(labels, found)
    return {"matthews": 100 * float(value)}


def pearson(predictions: Sequence[str], examples: Sequence[Example]) -> Figures:
    """Correlation of numbers; an answer that is none counts as -1."""
    return {"pearson": _correlation("pearsonr", predictions, examples)}


def spearman(predictions: Sequence[str], examples: Sequence[Example]) -> Figures:
    """Correlation of ranks; an answer that is no number counts as -1."""
    return {"spearman": _correlation("spearmanr", predictions, examples)}


def rouge(predictions: Sequence[str], examples: Sequence[Example]) -> Figures:
    """ROUGE-1, -2 and -Lsum, mean F-measure; a full stop between spaces ends a sentence."""
    kinds = ["rouge1", "rouge2", "rougeLsum"]
    scorer = _library("rouge_score.rouge_scorer", "rouge").RougeScorer(kinds)
    found = [
        scorer.score(*(text.replace(" . ", " .\n") for text in (e.targets or "", p)))
        for p, e in zip(predictions, examples, strict=True)
    ]
    return {kind: 100 * fmean(scores[kind].fmeasure for scores in found) for kind in kinds}


def bleu(predictions: Sequence[str], examples: Sequence[Example]) -> Figures:
    """SacreBLEU of the corpus, with its international tokenization, as T5's."""
    targets = [e.targets or "" for e in examples]
    score = _library("sacrebleu", "bleu").corpus_bleu(
        list(predictions), [targets], tokenize="intl", smooth_method="exp"
    )
    return {"bleu": float(score.score)}


def squad(predictions: Sequence[str], examples: Sequence[Example]) -> Figures:
    """Exact match and F1 of words without case, punctuation and articles; of the best reference."""
    return _best_reference(predictions, examples, lambda text: _plain(text, "", string.punctuation))


def trivia_qa(predictions: Sequence[str], examples: Sequence[Example]) -> Figures:
    """Likewise; punctuation, of more kinds, separates words."""
    kinds = string.punctuation + "‘’´`_"
    return _best_reference(predictions, examples, lambda text: _plain(text, " ", kinds))


def multirc(predictions: Sequence[str], examples: Sequence[Example]) -> Figures:
    """F1 over all answers, and the share of questions of which all answers are right."""
    found, labels = _classes(predictions, examples)
    groups: dict[str | None, list[bool]] = defaultdict(list)
    for example, ours, truth in zip(examples, found, labels, strict=True):
        groups[example.group].append(ours == truth)
    return {
        "f1a": _binary_f1(found, labels),
        "em": 100 * fmean(all(right) for right in groups.values()),
    }


def wsc(predictions: Sequence[str], examples: Sequence[Example]) -> Figures:
    """Whether naming the referent, or not, agrees with the label."""
    right = [
        _same_referent(p, e.targets or "") == bool(e.label)
        for p, e in zip(predictions, examples, strict=True)
    ]
    return {"accuracy": 100 * fmean(right)}


METRICS: dict[str, Metric] = {
    metric.__name__: metric
    for metric in (
        *(accuracy, exact_match, f1, macro_f1, matthews, pearson, spearman),
        *(rouge, bleu, squad, trivia_qa, multirc, wsc),
    )
}
# Where a metric's figures have other names than it.
FIGURES = {
    "rouge": ("rouge1", "rouge2", "rougeLsum"),
    "squad": ("em", "f1"),
    "trivia_qa": ("em", "f1"),
    "multirc": ("f1a", "em"),
    "wsc": ("accuracy",),
}
_LIBRARIES = {
    **dict.fromkeys(("macro_f1", "matthews"), ("sklearn.metrics",)),
    **dict.fromkeys(("pearson", "spearman"), ("scipy.stats",)),
    "rouge": ("rouge_score.rouge_scorer",),
    "bleu": ("sacrebleu",),
}
_DETERMINERS = {
    *("a", "an", "few", "her", "his", "each", "every", "many", "much", "my", "our", "some"),
    *("that", "the", "their", "these", "this", "those", "which", "whose", "your"),
}


def _library(name: str, metric: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"metric {metric!r} needs {name.split('.')[0]}, which is not installed; run `pip "
            "install megaswitch[finetune]`, or leave the metric out"
        ) from error


def _classes(
    predictions: Sequence[str], examples: Sequence[Example]
) -> tuple[list[int], list[int]]:
    """Classes that were answered, -1 for what is none, and the right ones."""
    found = [
        e.choices.index(p.strip()) if p.strip() in e.choices else -1
        for p, e in zip(predictions, examples, strict=True)
    ]
    return found, [-2 if e.label is None else e.label for e in examples]


def _binary_f1(found: Sequence[int], labels: Sequence[int]) -> float:
    found = [p if p in (0, 1) else 1 - t for p, t in zip(found, labels, strict=True)]
    hits = sum(p == t == 1 for p, t in zip(found, labels, strict=True))
    return 200 * hits / max(found.count(1) + list(labels).count(1), 1)


def _correlation(kind: str, predictions: Sequence[str], examples: Sequence[Example]) -> float:
    ours = [_number(p) for p in predictions]
    truth = [_number(e.targets or "") for e in examples]
    if len(set(ours)) < 2 or len(set(truth)) < 2:
        return 0.0  # of a constant it is not defined
    return 100 * float(getattr(_library("scipy.stats", kind), kind)(truth, ours)[0])


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0


def _plain(text: str, instead: str, punctuation: str) -> str:
    kept = "".join(instead if c in punctuation else c for c in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def _best_reference(
    predictions: Sequence[str], examples: Sequence[Example], plain: Callable[[str], str]
) -> Figures:
    """Figures over questions; one that stands several times, for several answers, counts once."""
    exact, overlap = [], []
    for prediction, example in zip(predictions, examples, strict=True):
        ours = plain(prediction)
        references = [plain(r) for r in example.references]
        exact.append(max(ours == r for r in references))
        overlap.append(max(_word_f1(ours, r) for r in references))
    return {"em": 100 * fmean(exact), "f1": 100 * fmean(overlap)}


def _word_f1(ours: str, reference: str) -> float:
    a, b = ours.split(), reference.split()
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else 0.0


def _same_referent(prediction: str, referent: str) -> bool:
    """Whether both name the same: one's words are all among the other's, and both own or none."""
    ours, theirs = (
        [word for word in text.strip().lower().split(" ") if word not in _DETERMINERS]
        for text in (prediction, referent)
    )
    if any("'" in word for word in ours) != any("'" in word for word in theirs):
        return False
    # Without a word left, the empty text is one, as it is for t5.
    a, b = set(ours or [""]), set(theirs or [""])
    return a <= b or b <= a
