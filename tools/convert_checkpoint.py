"""Megatron's `convert_checkpoint.py`, for fingers that remember it; see `megaswitch convert`."""

import argparse

from megaswitch.checkpoint.conversion import Options
from megaswitch.checkpoint.huggingface_files import export_hf, import_hf
from megaswitch.checkpoint.t5x import import_t5x
from megaswitch.log import UserError
from megaswitch.storage import location

WAYS = {
    ("hf", "megaswitch"): import_hf,
    ("t5x", "megaswitch"): import_t5x,
    ("megaswitch", "hf"): export_hf,
}
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--loader", choices=["hf", "t5x", "megaswitch"], required=True)
parser.add_argument("--saver", choices=["megaswitch", "hf"], required=True)
parser.add_argument("--load-dir", type=location, required=True)
parser.add_argument("--save-dir", type=location, required=True)

if __name__ == "__main__":
    arguments = parser.parse_args()
    if not (way := WAYS.get((arguments.loader, arguments.saver))):
        parser.error(f"{arguments.loader} to {arguments.saver} takes two steps, via megaswitch")
    try:
        way(arguments.load_dir, arguments.save_dir, Options())
    except (UserError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
