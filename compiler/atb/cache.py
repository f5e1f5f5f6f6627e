"""ReshapeAndCache and KvCache (atb-operations.md 3.10, 3.11)."""

from __future__ import annotations

from llmc.compiler.atb.core import AtbOp

OPS: tuple[AtbOp, ...] = ()
