"""Task files of a run: as corpora to train on, and as examples to score."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megaswitch.config import RunConfig
from megaswitch.data.indexed import TokenStore, companion
from megaswitch.data.task_pairs import preprocess_task
from megaswitch.data.tasks import Example, Task, find_task
from megaswitch.data.text_files import RejectionLog
from megaswitch.data.text_to_text import FIELDS
from megaswitch.data.tokenizer import Tokenizer
from megaswitch.files import sha256
from megaswitch.log import UserError, info, warn
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.task_metrics import check_metrics


@dataclass(frozen=True)
class TaskSet:
    """Examples of a task that are scored.

    Attributes:
        name: that its figures go by.
        task: whose examples they are.
        examples: all with known answers.
    """

    name: str
    task: Task
    examples: Sequence[Example]


def run_tasks(config: RunConfig) -> dict[str, Task]:
    """The tasks of a run by name, their metrics at hand. Needs no process group.

    Raises:
        UserError: naming all that are wrong.
    """
    tasks, problems = {}, []
    for name, definition in (config.data.tasks or {}).items():
        try:
            tasks[name] = find_task(definition)
            if config.data.valid and config.train.valid_metrics:
                check_metrics(name, tasks[name])
            for split in ("train", "valid"):
                sources = getattr(config.data, split)
                if isinstance(sources, dict) and name in sources:
                    task_files(sources[name])
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return tasks


def task_files(value: str) -> list[Path]:
    """The files that a source names: one, or all that match its pattern, in their order.

    Raises:
        UserError: there is none.
    """
    found = [Path(value)] if Path(value).is_file() else sorted(map(Path, glob.glob(value)))
    found = [path for path in found if path.is_file()]
    if not found:
        raise UserError(f"there is no task file '{value}'; give a file, or a pattern of several")
    return found


def prepare_tasks(config: RunConfig, mesh: Mesh) -> RunConfig:
    """The configuration with task files replaced by corpora, which lie in the run folder.

    They are made once, by rank 0, and named after what they were made from.

    Raises:
        UserError: on every rank, if a file cannot be read or holds no example.
    """
    if not config.data.tasks:
        return config
    made: dict[str, dict[str, str]] = {}
    with mesh.together():
        tasks = run_tasks(config)
        if mesh.rank == 0:
            for split in ("train", "valid"):
                sources = getattr(config.data, split)
                if isinstance(sources, dict):
                    made[split] = _corpora(sources, tasks, config)
    made = mesh.gather(made)[0]
    data = config.data
    train, valid = made.get("train", data.train), made.get("valid", data.valid)
    return replace(config, data=replace(data, train=train, valid=valid))


def _corpora(
    sources: Mapping[str, str], tasks: Mapping[str, Task], config: RunConfig
) -> dict[str, str]:
    assert config.data.tokenizer
    tokenizer = Path(config.data.tokenizer)
    folder = Path(config.train.run_dir) / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    prefixes = {}
    for name, value in sources.items():
        if name not in tasks:
            prefixes[name] = value
            continue
        files = task_files(value)
        made_from = [asdict(tasks[name]), sha256(tokenizer), *map(sha256, files)]
        key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
        prefix = folder / f"{name}-{key}"
        if not _complete(prefix):
            info(f"{name}: {', '.join(map(str, files))}")
            preprocess_task(files, prefix, tokenizer, tasks[name])
        prefixes[name] = str(prefix)
    return prefixes


def _complete(prefix: Path) -> bool:
    """Whether the corpora are there and readable; the index is written last."""
    try:
        stores = [TokenStore(companion(prefix, f"_{field}")) for field in FIELDS]
    except UserError:
        return False
    return stores[0].num_documents == stores[1].num_documents > 0


def held_out(config: RunConfig) -> list[TaskSet]:
    """What a run scores its model on: the first `train.valid_samples` examples of each task.

    Raises:
        UserError: a file cannot be read, or has no example with an answer.
    """
    valid = config.data.valid
    if not config.data.tasks or not isinstance(valid, dict) or not config.train.valid_metrics:
        return []
    return [
        read_examples(name, task, task_files(valid[name]), config.train.valid_samples)
        for name, task in run_tasks(config).items()
        if name in valid
    ]


def read_examples(name: str, task: Task, files: Sequence[Path], most: int | None = None) -> TaskSet:
    """The first examples with known answers out of some files.

    Args:
        name: of the task.
        task: what records mean.
        files: read in this order.
        most: examples; a group of examples is never cut. None: all.
    """
    rejections = RejectionLog()
    found: list[Example] = []
    for path in files:
        for example in task.examples(path, rejections):
            known = example.references if not task.train_if else example.label is not None
            if not known:
                continue
            full = most is not None and len(found) >= most
            if full and (example.group is None or example.group != found[-1].group):
                break
            found.append(example)
    if rejections.count:
        warn(f"task {name}: {rejections.summary()}")
    if not found:
        raise UserError(
            f"no example of task {name!r} in {', '.join(map(str, files))} has an answer "
            f"({rejections.summary()}); give a split with labels"
        )
    return TaskSet(name, task, found)


def load_tokenizer(config: RunConfig) -> Tokenizer:
    """The run's tokenizer."""
    assert config.data.tokenizer
    return Tokenizer(config.data.tokenizer)
