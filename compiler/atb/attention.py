"""SelfAttention and PagedAttention; each has a file of its own (atb-operations.md 3.8, 3.9)."""

from __future__ import annotations

from llmc.compiler.atb.core import AtbOp
from llmc.compiler.atb.paged_attention import PAGED_ATTENTION
from llmc.compiler.atb.self_attention import SELF_ATTENTION

OPS: tuple[AtbOp, ...] = (SELF_ATTENTION, PAGED_ATTENTION)
