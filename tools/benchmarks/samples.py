"""Span-corrupted samples per CPU-second: the C++ core beside its Python oracle.

Command: python tools/benchmarks/samples.py --output tools/benchmarks/samples.json
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from side_by_side import compare, record

from megaswitch.data.indexed import IndexedWriter
from megaswitch.data.loader import SpanCorruptionLoader
from megaswitch.data.span_corruption import corrupt, span_counts

ROWS = 256


def main() -> None:
    """Compare on T5's shape: 512 encoder and 114 decoder tokens from 568 of text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "tokens"
        with IndexedWriter(prefix, np.uint16) as writer:
            writer.add_document(np.random.default_rng(0).integers(3, 32_000, 4_000_000))
        loader = SpanCorruptionLoader(prefix, seed=0, vocab_size=32_128, encoder_length=512)
        noise, spans = span_counts(loader.tokens_per_sample, 0.15, 3.0)

        def oracle() -> None:
            for index in range(ROWS):
                start = loader.sample_start(index)
                corrupt(
                    loader.store.tokens(start, loader.tokens_per_sample),
                    noise_tokens=noise,
                    spans=spans,
                    sentinel_top=loader.sentinel_top,
                    encoder_length=loader.encoder_length,
                    decoder_length=loader.decoder_length,
                    seed=0,
                    sample_index=index,
                )

        results = compare({"oracle": oracle, "C++": lambda: loader.batch(range(ROWS))})
    for result in results.values():
        result["samples_per_cpu_second"] = ROWS / result["cpu_seconds"]
    record("tools/benchmarks/samples.py", results, arguments.output)


if __name__ == "__main__":
    main()
