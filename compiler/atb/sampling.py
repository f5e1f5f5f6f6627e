"""Sort, Multinomial, TopkToppSampling (atb-operations.md 3.15)."""

from __future__ import annotations

from llmc.compiler.atb.core import AtbOp

OPS: tuple[AtbOp, ...] = ()
