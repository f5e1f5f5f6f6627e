"""Elewise, Activation, SwigluQuant (atb-operations.md 3.12, 3.13, 3.16)."""

from __future__ import annotations

from llmc.compiler.atb.core import AtbOp

OPS: tuple[AtbOp, ...] = ()
