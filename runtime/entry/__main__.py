"""Installed as `llmc.run`: the flags of `llmc run`, in a process of its own or as one rank of torchrun's."""

import sys

from llmc.compiler.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
