"""AllReduce, AllGather, ReduceScatter, Broadcast, LinearParallel (atb-operations.md 3.3, 3.17, 4)."""

from __future__ import annotations

from llmc.compiler.atb.core import AtbOp

OPS: tuple[AtbOp, ...] = ()
