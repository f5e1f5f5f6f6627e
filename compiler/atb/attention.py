"""SelfAttention and PagedAttention (atb-operations.md 3.8, 3.9)."""

from __future__ import annotations

from llmc.compiler.atb.core import AtbOp

OPS: tuple[AtbOp, ...] = ()
