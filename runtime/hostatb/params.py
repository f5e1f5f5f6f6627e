"""The `*Param` classes and enums of torch_atb, made from the ATB table.

What enters is `OPS` (fields, defaults, enums); what leaves is one class per operation that behaves as pybind's would:

    LinearParam(has_bias=False, out_data_type=AclDataType.ACL_FLOAT16, quant_mode=LinearParam.QuantMode.PER_TOKEN)
    RmsNormParam(layer_type=..., norm_param=RmsNormParam.NormParam(epsilon=1e-6))

Wrong keywords and wrong types raise TypeError naming the parameter. Source of the names: atb-operations.md 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from llmc.compiler.atb import OPS
from llmc.compiler.atb.core import ENUMS, AtbOp, Field, Param
from llmc.compiler.diagnostics import did_you_mean


def _enum(name: str, members: Mapping[str, int]) -> type[IntEnum]:
    made: type[IntEnum] = IntEnum(name.rpartition(".")[2], dict(members))  # type: ignore[misc]
    made.__qualname__ = name
    return made


TOP_ENUMS: dict[str, type[IntEnum]] = {name: _enum(name, members) for name, members in ENUMS.items()}

_SCALARS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "int"),
    "uint": ((int,), "non-negative int"),
    "float": ((float, int), "float"),
    "bool": ((bool,), "bool"),
    "str": ((str,), "str"),
}


class ParamStruct:
    """Base of every param class: keyword or positional construction, checked attributes, conversion to C++ names."""

    _fields: tuple[Field, ...] = ()
    _kinds: Mapping[str, type] = {}  # python field name -> enum or struct class
    _op: AtbOp | None = None  # None for nested structs

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        fields = {f.python_name: f for f in self._fields if f.bound}
        if len(args) > len(fields):
            raise TypeError(f"{type(self).__qualname__} takes at most {len(fields)} arguments, {len(args)} were given")
        given = dict(zip(fields, args, strict=False))
        for name in kwargs:
            if name not in fields:
                hint = did_you_mean(name, fields)
                raise TypeError(f"{type(self).__qualname__}: no parameter {name!r}" + (f"; {hint}" if hint else ""))
            if name in given:
                raise TypeError(f"{type(self).__qualname__}: {name} is given twice")
        given.update(kwargs)
        for name, f in fields.items():
            setattr(self, name, given[name] if name in given else self._default(f))

    def _default(self, f: Field) -> Any:
        kind = self._kinds.get(f.python_name)
        if f.kind == "struct" and kind:  # made by C++, whose defaults may differ from those of the Python class
            return kind(**{inner.python_name: inner.default for inner in f.fields if inner.python_default is not None})
        value = f.default if f.python_default is None else f.python_default
        if kind:
            return kind(value)
        return list(value or ()) if f.kind in ("ints", "floats") else value

    def __setattr__(self, name: str, value: Any) -> None:
        f = next((f for f in self._fields if f.bound and f.python_name == name), None)
        if f is None:
            hint = did_you_mean(name, [f.python_name for f in self._fields if f.bound])
            raise AttributeError(f"{type(self).__qualname__}: no parameter {name!r}" + (f"; {hint}" if hint else ""))
        object.__setattr__(self, name, self._checked(f, value))

    def _checked(self, f: Field, value: Any) -> Any:
        kind = self._kinds.get(f.python_name)
        if kind:
            if isinstance(value, kind):
                return value
            expected = kind.__qualname__
        elif f.kind in ("ints", "floats"):
            numbers = (int,) if f.kind == "ints" else (int, float)
            if (
                isinstance(value, Sequence)
                and not isinstance(value, str)
                and all(isinstance(v, numbers) for v in value)
            ):
                return list(value)
            expected = "list of int" if f.kind == "ints" else "list of float"
        elif f.kind == "pointer":
            return value
        else:
            types, expected = _SCALARS[f.kind]
            negative = f.kind == "uint" and isinstance(value, int) and value < 0
            if isinstance(value, types) and not isinstance(value, IntEnum) and not negative:
                return float(value) if isinstance(value, int) and f.kind == "float" else value
        raise TypeError(
            f"{type(self).__qualname__}: {f.python_name} must be {expected}, found {type(value).__name__} {value!r}"
        )

    def __repr__(self) -> str:
        inside = ", ".join(f"{f.python_name}={getattr(self, f.python_name)!r}" for f in self._fields if f.bound)
        return f"{type(self).__qualname__}({inside})"

    def values(self) -> dict[str, Any]:
        """C++ field name -> plain value: enums as ints, nested structs as dicts."""
        return {f.name: _plain(getattr(self, f.python_name)) for f in self._fields if f.bound}

    def cpp(self) -> tuple[AtbOp, Param]:
        """The table's entry and the parameter in C++ names, defaults filled in."""
        if self._op is None:
            raise TypeError(f"{type(self).__qualname__} is part of a parameter, not the parameter of an operation")
        return self._op, self._op.param(self.values())


def _plain(value: Any) -> Any:
    if isinstance(value, ParamStruct):
        return value.values()
    if isinstance(value, IntEnum):
        return int(value)
    return list(value) if isinstance(value, list) else value


def _kind(f: Field, owner: str, enums: Mapping[str, type[IntEnum]], structs: Mapping[str, type]) -> type | None:
    if f.kind == "struct":
        return structs[f.name]
    if f.kind == "dtype":
        return TOP_ENUMS["AclDataType"]
    if f.kind in _SCALARS or f.kind in ("ints", "floats", "pointer"):
        return None
    for name in (f.kind, f"{owner}.{f.kind}"):
        if found := enums.get(name) or TOP_ENUMS.get(name):
            return found
    raise KeyError(f"{owner}.{f.name}: no enum {f.kind!r} in the table")


def _struct(name: str, fields: Sequence[Field], op: AtbOp | None, enums: Mapping[str, type[IntEnum]]) -> type:
    owner = name.partition(".")[0]
    structs = {f.name: _struct(f"{owner}.{f.struct}", f.fields, None, enums) for f in fields if f.kind == "struct"}
    kinds = {f.python_name: k for f in fields if (k := _kind(f, owner, enums, structs))}
    inside: dict[str, Any] = {"_fields": tuple(fields), "_kinds": kinds, "_op": op, "__qualname__": name}
    inside.update({struct.__name__: struct for struct in structs.values()})
    if op:
        inside.update({enum.__name__: enum for enum in enums.values()})
    return type(name.rpartition(".")[2], (ParamStruct,), inside)


def param_class(op: AtbOp) -> type[ParamStruct]:
    """The class of one operation's parameters, nested enums and structs inside."""
    prefix = f"{op.param_class}."
    enums = {name: _enum(prefix + name, members) for name, members in op.enums.items()}
    enums.update({name[len(prefix) :]: enum for name, enum in TOP_ENUMS.items() if name.startswith(prefix)})
    return _struct(op.param_class, op.fields, op, enums)


BOUND: dict[str, type[ParamStruct]] = {op.param_class: param_class(op) for op in OPS.values() if op.bound}
UNBOUND: dict[str, type[ParamStruct]] = {op.param_class: param_class(op) for op in OPS.values() if not op.bound}
