"""`python -m llmc.run`, for torchrun: `torchrun --nproc-per-node 2 -m llmc.run --model-path DIR ...` is `llmc run`."""

import sys

# `python -m` puts the current directory first; if that is a checkpoint's, its json.py or torch.py would be imported.
if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    sys.path.pop(0)

from llmc.compiler.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
