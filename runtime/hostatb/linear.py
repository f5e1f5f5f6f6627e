"""Kernels of the linear family; the contract is in `numeric.py`, the facts in `llmc.compiler.atb.linear`."""

from __future__ import annotations

from llmc.runtime.hostatb.numeric import Kernel

KERNELS: dict[str, Kernel] = {}
