"""Megatron's `merge_datasets.py`, for fingers that remember it; see `megaswitch data merge`."""

import argparse
from pathlib import Path

from megaswitch.data.merge import merge
from megaswitch.log import UserError

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--input", type=Path, required=True, help="folder of the files to merge")
parser.add_argument("--output-prefix", type=Path, required=True)

if __name__ == "__main__":
    arguments = parser.parse_args()
    try:
        prefixes = [path.with_suffix("") for path in sorted(arguments.input.glob("*.idx"))]
        if not prefixes:
            raise UserError(f"'{arguments.input}' has no .idx files; give a folder that has.")
        merge(prefixes, arguments.output_prefix)
    except (UserError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
