"""`python -m llmc.run`, for torchrun: `torchrun --nproc-per-node 2 -m llmc.run --model-path DIR ...` is `llmc run`."""

import sys

from llmc.compiler.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
