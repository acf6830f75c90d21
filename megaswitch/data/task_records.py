"""Public data sets whose records are more than a row of fields.

Each reader turns a record into rows, from the published files and from their flat copies alike.
What it does to the text is what the t5 library does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from megaswitch.data.records import Record

Rows = Iterator[Record]


def _padded(text: str) -> str:
    """Spaces around all punctuation."""
    return " ".join(re.sub(r"([^\w\s])", r" \1 ", text).split())


def _stsb(record: Record) -> Rows:
    """The similarity rounded to the nearest fifth, as text."""
    value = record.get("label", record.get("score"))
    similarity = -1.0 if value in (None, "") else float(str(value))
    known = similarity >= 0
    yield {**record, "similarity": f"{round(similarity * 5) / 5:.1f}" if known else None}


def _multirc(record: Record) -> Rows:
    """One row for each answer to each question, grouped by question."""

    def row(question: str, answer: str, paragraph: str, label: Any, group: object) -> Record:
        texts = (question, answer, paragraph)
        clean = (re.sub(r"</?b>", "", text.replace("<br>", " ")) for text in texts)
        keys = ("question", "answer", "paragraph")
        return {**dict(zip(keys, clean, strict=True)), "label": label, "group": group}

    passage = record.get("passage")
    if not isinstance(passage, dict):
        index = record["idx"]
        question, answer, paragraph = (record[k] for k in ("question", "answer", "paragraph"))
        group = f"{index['paragraph']}/{index['question']}"
        yield row(question, answer, paragraph, record.get("label"), group)
        return
    for question in passage["questions"]:
        for answer in question["answers"]:
            group = f"{record['idx']}/{question['idx']}"
            yield row(
                question["question"], answer["text"], passage["text"], answer.get("label"), group
            )


def _record(record: Record) -> Rows:
    """One row for each query, with its answers."""
    passage = record["passage"]
    text = passage["text"] if isinstance(passage, dict) else passage
    clean = re.sub(r"(\.|\?|\!|\"|\')\n@highlight\n", r"\1 ", text)
    clean = re.sub(r"\n@highlight\n", ". ", clean)
    if not isinstance(passage, dict):
        rows: Iterable[tuple[str, list[str]]] = [(record["query"], record.get("answers") or [])]
        entities = record["entities"]
    else:
        found = {text[e["start"] : e["end"] + 1] for e in passage["entities"]}  # end is inclusive
        entities = sorted(found)
        rows = [
            (query["query"], sorted({answer["text"] for answer in query.get("answers", [])}))
            for query in record["qas"]
        ]
    for query, answers in rows:
        yield {"query": query, "entities": entities, "passage": clean, "answers": answers}


def _wsc(record: Record) -> Rows:
    """The pronoun between stars; the referent as text."""
    spans = record.get("target", record)
    words = record["text"].split(" ")
    place, pronoun = int(spans["span2_index"]), str(spans["span2_text"])
    if not 0 <= place < len(words):
        raise ValueError(f"span2_index {place} lies outside the {len(words)} words of the text")
    # A pronoun may carry punctuation, and in two published records stand a word or two off.
    near = sorted(range(len(words)), key=lambda i: abs(i - place))[:5]
    wanted = pronoun.lower()
    place = next((i for i in near if re.sub(r"\W+$", "", words[i]).lower() == wanted), place)
    ending = re.search(r"\W*$", words[place])
    words[place] = f"*{pronoun}*" + (f" {ending[0]}" if ending and ending[0] else "")
    yield {**record, "marked": " ".join(words).strip(), "referent": spans["span1_text"]}


def _dpr(record: Record) -> Rows:
    """Definite pronoun resolution: the first such pronoun between stars."""
    pronoun = re.escape(record["pronoun"])
    marked = re.sub(rf" ({pronoun})( |\.|,)", r" *\1*\2", record["sentence"], count=1)
    yield {**record, "marked": marked, "referent": record["candidates"][int(record["label"])]}


def _squad(record: Record) -> Rows:
    """One row for each question, punctuation apart."""
    articles = record.get("data")
    if articles is None:
        answers = record.get("answers") or {}
        texts = answers["text"] if isinstance(answers, dict) and answers else list(answers)
        yield _question(record["question"], record["context"], texts)
        return
    for article in articles:
        for paragraph in article["paragraphs"]:
            for item in paragraph["qas"]:
                texts = [answer["text"] for answer in item.get("answers", [])]
                yield _question(item["question"], paragraph["context"], texts)


def _question(question: str, context: str, answers: Iterable[str]) -> Record:
    return {
        "question": _padded(question),
        "context": _padded(context),
        "answers": [_padded(answer) for answer in answers],
    }


def _web_questions(record: Record) -> Rows:
    """Of the published file, answers are a list in Lisp's notation."""
    answers = record.get("answers")
    if answers is None:
        listed = re.findall(r'\(description (?:"([^"]*)"|([^()]*))\)', record["targetValue"])
        answers = [quoted or plain.strip() for quoted, plain in listed]
    yield {"question": record.get("question") or record["utterance"], "answers": answers}


def _trivia_qa(record: Record) -> Rows:
    """One row for each question; all aliases are right answers."""
    for item in record.get("Data", [record]):
        answer = item.get("answer") or item.get("Answer") or {}
        value = answer.get("value") or answer.get("Value")
        aliases = [
            *(answer.get("aliases") or answer.get("Aliases") or []),
            *(answer.get("normalized_aliases") or answer.get("NormalizedAliases") or []),
        ]
        question = item.get("question") or item["Question"]
        answers = list(dict.fromkeys([value, *aliases])) if value else []
        yield {"question": question, "value": value, "answers": answers}


def _arc(record: Record) -> Rows:
    """Choices as texts, the answer as its place among them."""
    question, choices = record["question"], record.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, dict):
        labels, texts = choices["label"], choices["text"]
    else:
        labels, texts = ([c[key] for c in choices or []] for key in ("label", "text"))
    key = record.get("answerKey")
    if key and key not in labels:
        raise ValueError(f"answerKey {key!r} is none of {', '.join(map(str, labels))}")
    listed = " ".join(f"({label}) {text}" for label, text in zip(labels, texts, strict=True))
    answer = labels.index(key) if key else None
    yield {"question": question, "choices": list(texts), "listed": listed, "answer": answer}


READERS: dict[str, Callable[[Record], Rows]] = {
    "stsb": _stsb,
    "multirc": _multirc,
    "record": _record,
    "wsc": _wsc,
    "dpr": _dpr,
    "squad": _squad,
    "web_questions": _web_questions,
    "trivia_qa": _trivia_qa,
    "arc": _arc,
}
