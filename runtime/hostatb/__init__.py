"""The interface of torch_atb on PyTorch: same names, same checks, same arithmetic, on a CPU or a CUDA device.

    from llmc.runtime import hostatb as atb
    atb.use_chip("Ascend910B")                                   # rules and rounding of that chip; default "host"
    op = atb.Operation(atb.LinearParam(has_bias=False))
    y, = op.forward([x, weight])

Exported beside the functions below: every `*Param` class that torch_atb binds, and the enums (AclDataType, QuantType).
Operations that exist in C++ only are in `hostatb.unbound`. A refusal raises AtbError, which says operation, graph,
tensor, what was found and what was expected. `set_format(tensor, "nz")` stands for torch_npu.npu_format_cast.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from llmc.compiler.atb.core import AtbError
from llmc.runtime.hostatb.builder import Builder
from llmc.runtime.hostatb.graph import GraphBuilder
from llmc.runtime.hostatb.numeric import format_of, set_format
from llmc.runtime.hostatb.operation import Operation, Prof, current_chip, set_buffer_size, use_chip
from llmc.runtime.hostatb.params import BOUND, TOP_ENUMS, UNBOUND

unbound = SimpleNamespace(**UNBOUND)

_ENUMS = {name: enum for name, enum in TOP_ENUMS.items() if "." not in name}
# torch_atb exports the members too: torch_atb.ACL_FLOAT16 is torch_atb.AclDataType.ACL_FLOAT16.
_GENERATED: dict[str, Any] = {**{m.name: m for enum in _ENUMS.values() for m in enum}, **_ENUMS, **BOUND}

__all__ = [
    "AtbError",
    "Builder",
    "GraphBuilder",
    "Operation",
    "Prof",
    "current_chip",
    "format_of",
    "set_buffer_size",
    "set_format",
    "unbound",
    "use_chip",
]


def __getattr__(name: str) -> Any:
    if name in _GENERATED:
        return _GENERATED[name]
    raise AttributeError(f"hostatb (like torch_atb) has no {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_GENERATED])
