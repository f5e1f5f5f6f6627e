"""RmsNorm and LayerNorm (atb-operations.md 3.5, 3.6)."""

from __future__ import annotations

from llmc.compiler.atb.core import AtbOp

OPS: tuple[AtbOp, ...] = ()
