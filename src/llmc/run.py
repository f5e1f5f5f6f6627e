"""`python -m llmc.run`, for torchrun: `torchrun --nproc-per-node 2 -m llmc.run --model-path DIR ...` is `llmc run`.

Another command that runs on ranks is named: `torchrun ... -m llmc.run eval --model-path DIR ...`."""

import sys

# `python -m` puts the current directory first; if that is a checkpoint's, its json.py or torch.py would be imported.
if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    sys.path.pop(0)

from llmc.compiler.cli import COMMANDS, main

if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(main(words if words and words[0] in COMMANDS else ["run", *words]))
