"""SelfAttention and PagedAttention; each has a file of its own."""

from __future__ import annotations

from llmc.runtime.hostatb.numeric import Kernel
from llmc.runtime.hostatb.paged_attention import paged_attention
from llmc.runtime.hostatb.self_attention import self_attention

KERNELS: dict[str, Kernel] = {"SelfAttention": self_attention, "PagedAttention": paged_attention}
