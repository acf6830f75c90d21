"""Megatron's checkpoint tools, for fingers that remember them; see `megaswitch reshard`."""

import sys

from megaswitch.cli import main

FLAGS = {
    "--target-tensor-parallel-size": "--parallel.tp",
    "--target-pipeline-parallel-size": "--parallel.pp",
    "--target-expert-parallel-size": "--parallel.ep",
    "--load-dir": "",
    "--save-dir": "",
}

if __name__ == "__main__":
    words = [part for word in sys.argv[1:] for part in word.split("=", 1)]
    given = dict(zip(words[::2], words[1::2], strict=False))
    if len(words) % 2 or not {"--load-dir", "--save-dir"} <= given.keys() <= FLAGS.keys():
        sys.exit(f"usage: reshard_checkpoint.py with values of {' '.join(FLAGS)}\n{__doc__}")
    layout = [f"{FLAGS[flag]}={value}" for flag, value in given.items() if FLAGS[flag]]
    sys.argv = ["megaswitch", "reshard", given["--load-dir"], given["--save-dir"], *layout]
    main()
