"""Text to token files, from compressed JSON lines to the shuffled corpus, beside SentencePiece.

The library is given the same documents, parsed and held in memory, and its ids are thrown away. The
text is the demo's, many times over; starting the processes is counted in.

Command: python tools/benchmarks/preprocess.py --output tools/benchmarks/preprocess.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from side_by_side import Lap, measure, ratio, record, summary

from megaswitch.data.preprocess import preprocess
from megaswitch.data.text_files import read_documents
from megaswitch.data.tokenizer import train_tokenizer

TEXT = Path(__file__).resolve().parents[2] / "examples" / "data" / "classics.jsonl.zst"
VOCAB_SIZE = 8_000
BATCH = 512  # documents


def main() -> None:
    """Compare one and two workers with the library on as many cores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=24, help="of the demo's 9 MB")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer([TEXT], folder / "spm.model", vocab_size=VOCAB_SIZE)
        texts = [document.text for document in read_documents(TEXT, reject=print)]
        inputs = []
        for number in range(arguments.copies):
            inputs.append(folder / f"{number}.jsonl.zst")
            inputs[-1].symlink_to(TEXT)
        variants = _variants(inputs, texts, folder)
        laps = measure({n: [f] for n, f in variants.items()}, rounds=arguments.rounds, warmup=0)
    megabytes = arguments.copies * sum(len(text.encode()) for text in texts) / 1e6
    first = {name: phases[0] for name, phases in laps.items()}
    results = _results(first, megabytes)
    record("tools/benchmarks/preprocess.py", {"text_mb": megabytes, **results}, arguments.output)


def _variants(
    inputs: Sequence[Path], texts: Sequence[str], folder: Path
) -> dict[str, Callable[[], Any]]:
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    batches = [list(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]

    def encode(**options: Any) -> None:
        for _ in inputs:
            for batch in batches:
                library.encode(batch, **options)

    def ours(workers: int) -> None:
        preprocess(inputs, folder / "corpus", folder / "spm.model", workers=workers)

    return {
        "library": lambda: encode(num_threads=1),
        "library, numpy": lambda: encode(num_threads=1, out_type="numpy"),
        "preprocess, 1 worker": lambda: ours(1),
        "library, 2 threads": lambda: encode(num_threads=2),
        "preprocess, 2 workers": lambda: ours(2),
    }


def _results(laps: dict[str, list[Lap]], megabytes: float) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, ours in laps.items():
        numbers = summary(ours) | ratio(ours, laps["library"])
        beside = laps["library, 2 threads" if "2" in name else "library"]
        walls = [a.wall / b.wall for a, b in zip(ours, beside, strict=True)]
        numbers["wall_ratio"] = statistics.median(walls)
        numbers["mb_per_cpu_second"] = megabytes / numbers["cpu_seconds"]
        numbers["mb_per_wall_second"] = megabytes / numbers["wall_seconds"]
        results[name] = numbers
        print(
            f"{name:24s} {numbers['mb_per_cpu_second']:6.1f} MB per CPU-second "
            f"(×{numbers['ratio']:.3f}), {numbers['mb_per_wall_second']:6.1f} MB/s "
            f"(time ×{numbers['wall_ratio']:.3f})"
        )
    return results


if __name__ == "__main__":
    main()
