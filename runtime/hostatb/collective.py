"""Kernels of the collective family; the contract is in `numeric.py`, the facts in `llmc.compiler.atb.collective`."""

from __future__ import annotations

from llmc.runtime.hostatb.numeric import Kernel

KERNELS: dict[str, Kernel] = {}
