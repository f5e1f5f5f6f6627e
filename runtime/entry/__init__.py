"""`python -m llmc.run`, for torchrun: `torchrun --nproc-per-node 2 -m llmc.run --model-path DIR ...` is `llmc run`."""
