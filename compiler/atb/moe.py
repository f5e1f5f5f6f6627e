"""Gating and other mixture-of-experts operations (atb-operations.md 3.16)."""

from __future__ import annotations

from llmc.compiler.atb.core import AtbOp

OPS: tuple[AtbOp, ...] = ()
