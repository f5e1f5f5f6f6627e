"""Kernels of the moe family; the contract is in `numeric.py`, the facts in `llmc.compiler.atb.moe`."""

from __future__ import annotations

from llmc.runtime.hostatb.numeric import Kernel

KERNELS: dict[str, Kernel] = {}
