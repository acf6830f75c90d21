"""Megatron's `preprocess_data.py`, for fingers that remember it; see `megaswitch preprocess`."""

import argparse
from pathlib import Path

from megaswitch.data.preprocess import preprocess
from megaswitch.log import UserError

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--input", type=Path, nargs="+", required=True)
parser.add_argument("--output-prefix", type=Path, required=True)
parser.add_argument("--tokenizer-model", type=Path, required=True)
parser.add_argument("--append-eod", action="store_true", help="end documents with EOS, as T5 does")
parser.add_argument("--workers", type=int, default=1)

if __name__ == "__main__":
    arguments = parser.parse_args()
    try:
        preprocess(
            arguments.input,
            arguments.output_prefix,
            arguments.tokenizer_model,
            workers=arguments.workers,
            append_eos=arguments.append_eod,
        )
    except (UserError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
