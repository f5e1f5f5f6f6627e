"""The bytes of a GGUF file: enters a path, leaves metadata and a table of tensors whose values stay in the mapped file.

Every count and length is compared with what is left of the file before anything of that size is made. The `gguf`
package has a reader too; it believes what a header announces, and makes a numpy object of each token of a vocabulary
(1.4 kB and 30 us: seconds for a real one). Sizes of blocks, and what they mean, are the package's.

Source: docs/gguf.md of ggml. Little-endian: magic, u32 version, u64 tensors, u64 keys; then the keys (string, u32 type,
value) and the table (string, u32 axes, u64 sizes from the fastest, u32 type, u64 offset), then aligned values. A string
is u64 bytes and UTF-8; an array is u32 type, u64 count and values.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gguf
    import numpy

VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_AXES = 4  # GGML_MAX_DIMS
# No published header comes near; a sparse file can be of any size, and each value of a header becomes an object.
MAX_HEADER_BYTES = 1 << 29
MAX_VALUES = 1 << 24
MAX_DEPTH = 4  # of arrays in arrays; nobody writes two

# What holds numbers as they are is read as such, the rest as blocks of bytes.
PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


class Damaged(ValueError):
    """The file cannot be what it says; `str(error)` is the reason."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """`shape`: sizes from the fastest, as in the file. `data`: values, or [rows, bytes of a row's blocks]."""

    name: str
    shape: tuple[int, ...]
    tensor_type: gguf.GGMLQuantizationType
    data: numpy.ndarray

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


def read(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata and tensors. `Damaged` for everything that does not add up."""
    import numpy

    with path.open("rb") as file:
        head = file.read(24)
    if len(head) < 24 or head[:4] != b"GGUF":
        raise Damaged("it has no GGUF header")
    version, tensors, keys = struct.unpack("<IQQ", head[4:])
    if version & 0xFFFF == 0:
        raise Damaged("it is big-endian; only little-endian files are read")
    if version not in VERSIONS:
        raise Damaged(f"it is of version {version}; known are {', '.join(map(str, VERSIONS))}")
    content = numpy.memmap(path, mode="r")
    cursor = Cursor(content.data[:MAX_HEADER_BYTES], 24)
    meta = _keys(cursor, keys)
    table = _table(cursor, tensors)
    alignment = meta.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise Damaged(f"general.alignment is {str(alignment)[:40]}; expected a power of two")
    start = -(-cursor.at // alignment) * alignment
    return meta, _tensors(content, start, table)


class Cursor:
    """A place in the header, which moves on. What would pass the end is `Damaged`."""

    def __init__(self, data: memoryview, at: int) -> None:
        self.data, self.at, self.values = data, at, 0

    def announced(self, count: int, size: int, what: str) -> None:
        """`count` things of at least `size` bytes are to follow."""
        left = len(self.data) - self.at
        if count * size > left:
            raise Damaged(f"{what} announces {count}, and {left} bytes follow")
        self.values += count
        if self.values > MAX_VALUES:
            raise Damaged(f"its header holds more than {MAX_VALUES} values")

    def numbers(self, form: str, count: int, what: str) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{form}")
        if layout.size > len(self.data) - self.at:
            raise Damaged(f"{what} lies behind its end")
        values = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return values

    def string(self, what: str) -> str:
        (length,) = self.numbers("Q", 1, f"the length of {what}")
        left = len(self.data) - self.at
        if length > left:
            raise Damaged(f"{what} announces {length} bytes, and {left} follow")
        text = bytes(self.data[self.at : self.at + length])
        self.at += length
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            raise Damaged(f"{what} is not UTF-8: {text[:40]!r}") from None


def _keys(cursor: Cursor, count: int) -> dict[str, Any]:
    cursor.announced(count, 8 + 4 + 1, "the number of keys")  # the smallest key: an empty name, a type, a byte
    meta: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.string("the name of a key")
        if name in meta:
            raise Damaged(f"the key {name[:60]!r} is there twice")
        (kind,) = cursor.numbers("I", 1, f"the type of {name[:60]!r}")
        meta[name] = _value(cursor, kind, f"{name[:60]!r}", 0)
    return meta


def _value(cursor: Cursor, kind: int, what: str, depth: int) -> Any:
    if kind in SCALARS:
        return cursor.numbers(SCALARS[kind], 1, what)[0]
    if kind == STRING:
        return cursor.string(what)
    if kind != ARRAY:
        raise Damaged(f"{what} has the unknown type {kind}")
    if depth == MAX_DEPTH:
        raise Damaged(f"{what} has arrays in arrays, {MAX_DEPTH} deep")
    (inner,) = cursor.numbers("I", 1, what)
    (count,) = cursor.numbers("Q", 1, what)
    if inner in SCALARS:
        cursor.announced(count, struct.calcsize(f"<{SCALARS[inner]}"), what)
        return list(cursor.numbers(SCALARS[inner], count, what))
    cursor.announced(count, 8 if inner == STRING else 12, what)
    return [_value(cursor, inner, what, depth + 1) for _ in range(count)]


def _table(cursor: Cursor, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Name -> sizes, type, offset."""
    cursor.announced(count, 8 + 4 + 4 + 8, "the number of tensors")
    table: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = cursor.string("the name of a tensor")
        if name in table:
            raise Damaged(f"the tensor {name[:60]!r} is there twice")
        (axes,) = cursor.numbers("I", 1, f"{name[:60]!r}")
        if axes > MAX_AXES:
            raise Damaged(f"{name[:60]!r} announces {axes} axes; at most {MAX_AXES} are known")
        sizes = cursor.numbers("Q", axes, f"{name[:60]!r}")
        (kind,) = cursor.numbers("I", 1, f"{name[:60]!r}")
        (offset,) = cursor.numbers("Q", 1, f"{name[:60]!r}")
        table[name] = sizes, kind, offset
    return table


def _tensors(
    content: numpy.memmap, start: int, table: Mapping[str, tuple[tuple[int, ...], int, int]]
) -> dict[str, StoredTensor]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    left = len(content) - start
    tensors: dict[str, StoredTensor] = {}
    total = 0
    for name, (sizes, number, offset) in table.items():
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise Damaged(f"{name[:60]!r} has the unknown type {number}") from None
        values, size = GGML_QUANT_SIZES[kind]  # of one block
        row = sizes[0] if sizes else 1
        if 0 in sizes:
            raise Damaged(f"{name[:60]!r} has an axis of size 0")
        if row % values:
            raise Damaged(f"{name[:60]!r} has rows of {row} values; {kind.name} has blocks of {values}")
        count = math.prod(sizes) // values * size
        if offset + count > left:
            raise Damaged(f"{name[:60]!r} ends at byte {offset + count} of the {max(left, 0)} that hold values")
        total += count
        if total > left:
            raise Damaged("its tensors lie on each other")
        data = content[start + offset : start + offset + count]
        rows = tuple(reversed(sizes[1:]))
        if kind.name in PLAIN:
            data = data.view(PLAIN[kind.name]).reshape(*rows, row)
        else:
            data = data.reshape(*rows, row // values * size)
        tensors[name] = StoredTensor(name=name, shape=sizes, tensor_type=kind, data=data)
    return tensors
