"""The operators of the language: one file a family, one list. Schema, docs, completion and `llmc ops` read OPS."""

from __future__ import annotations

from llmc.compiler.ops import attention, collective, elementwise, embedding, linear, norm, rope
from llmc.compiler.ops.core import Attr, NoRule, Op, WeightSlot

FAMILIES = (embedding, linear, norm, rope, attention, elementwise, collective)

OPS: dict[str, Op] = {op.name: op for family in FAMILIES for op in family.OPS}

__all__ = ["FAMILIES", "OPS", "Attr", "NoRule", "Op", "WeightSlot"]
