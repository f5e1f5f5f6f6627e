"""Linear and LinearSparse (atb-operations.md 3.2, 3.4)."""

from __future__ import annotations

from llmc.compiler.atb.core import AtbOp

OPS: tuple[AtbOp, ...] = ()
