"""Gather, Split, Concat, Slice, Transpose, Transdata, Fill, Cumsum, Softmax and other data movement (3.1, 3.14)."""

from __future__ import annotations

from llmc.compiler.atb.core import AtbOp

OPS: tuple[AtbOp, ...] = ()
