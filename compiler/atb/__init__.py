"""The ATB operations as data: names, fields, arity, dtype/format rows per chip, shape rules, limits.

`core.py` says what a row of the table is; one file per operation family fills it; `OPS` below is the table.
Lowering, verification, emission, hostatb and the docs all read it.
"""

from __future__ import annotations

from llmc.compiler.atb import attention, cache, collective, elementwise, linear, moe, norm, rope, sampling, shape
from llmc.compiler.atb.core import AtbError, AtbOp, Desc, Field, Param

FAMILIES = (linear, norm, rope, elementwise, attention, cache, shape, sampling, moe, collective)

OPS: dict[str, AtbOp] = {op.name: op for family in FAMILIES for op in family.OPS}

__all__ = ["FAMILIES", "OPS", "AtbError", "AtbOp", "Desc", "Field", "Param"]
