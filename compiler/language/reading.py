"""Typed reading of a source tree: each reader reports what is wrong and returns something harmless.

    reader.whole(sizes.items["heads"], "heads")     # 40; or a diagnostic "heads must be a whole number", and None

Expressions find the names of sizes through `lookup`, which the language gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from llmc.compiler.diagnostics import Place, Report, did_you_mean
from llmc.compiler.language.expressions import ExpressionError, Number, evaluate
from llmc.compiler.language.source import List, Map, Scalar, Value, show

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

TOLD = ""  # code of an error whose cause is reported elsewhere


@dataclass(frozen=True, kw_only=True)
class Ref:
    """An edge as written: `qkv.q`."""

    text: str
    place: Place


class Reader:
    """Readers of single values. `root` is where a missing value is said to be missing."""

    def __init__(self, root: Map, report: Report) -> None:
        self.root, self.report = root, report
        self.cache: dict[str, Number | ExpressionError] = {}
        self.told: set[str] = set()

    def lookup(self, name: str) -> Number:
        """The value of a size, or UnknownName."""
        raise NotImplementedError

    def mapping(self, value: Value | None, what: str, *, empty: bool = False) -> Map:
        if isinstance(value, Map) and (value.items or empty):
            return value
        if value is not None:
            found = "nothing in it" if isinstance(value, Map) else show(value)
            self.report.add("E103", f"{what} must be a mapping", value.place, found=found)
        return Map(items={}, keys={}, place=self.root.place)

    def listed(self, value: Value | None, what: str) -> tuple[Value, ...]:
        if value is None:
            return ()
        if not isinstance(value, List) or not value.items:
            found = "an empty list" if isinstance(value, List) else show(value)
            self.report.add("E103", f"{what} must be a list, as [a, b]", value.place, found=found)
            return ()
        return value.items

    def known_keys(self, value: Map, known: Iterable[str], what: str, required: Iterable[str] = ()) -> None:
        known = dict.fromkeys(known)
        for key in value.items:
            if key not in known:
                self.report.add("E101", f"{what} has no key '{key}'", value.keys[key], likely=did_you_mean(key, known))
        for key in required:
            if key not in value.items:
                self.report.add("E102", f"{what} needs the key '{key}'", value.place)

    def name_ok(self, name: str, place: Place, what: str) -> bool:
        if NAME.fullmatch(name) and len(name) <= 64:
            return True
        self.report.add("E109", f"{name[:40]!r} cannot be the name of {what}", place,
                        needed="letters, digits and _, not a digit first, at most 64")  # fmt: skip
        return False

    def text(self, value: Value | None, what: str) -> str:
        if isinstance(value, Scalar) and isinstance(value.value, str) and value.value.strip():
            return value.value
        if value is not None:
            self.report.add("E103", f"{what} must be text", value.place, found=show(value))
        return ""

    def choice(self, value: Value | None, known: Iterable[str], what: str) -> str:
        known = list(known)
        if value is None or (isinstance(value, Scalar) and value.value in known):
            return value.text if isinstance(value, Scalar) else ""
        word = value.text if isinstance(value, Scalar) else ""
        self.report.add("E103", f"{what} must be one of {', '.join(known)}", value.place, found=show(value),
                        likely=did_you_mean(word, known) if word else "")  # fmt: skip
        return ""

    def boolean(self, value: Value, what: str) -> bool:
        if isinstance(value, Scalar) and isinstance(value.value, bool):
            return value.value
        self.report.add("E103", f"{what} must be true or false", value.place, found=show(value))
        return False

    def number(self, value: Value | None, what: str) -> Number | None:
        """The value of an expression; each distinct text is evaluated once."""
        if value is None:
            return None
        if not isinstance(value, Scalar) or isinstance(value.value, bool) or value.value is None:
            self.report.add("E103", f"{what} must be a number or an expression", value.place, found=show(value))
            return None
        if isinstance(value.value, (int, float)):
            return value.value
        known = self.cache.get(value.text)
        if known is None:
            try:
                known = evaluate(value.text, self.lookup)
            except ExpressionError as error:
                known = error
            self.cache[value.text] = known
        if not isinstance(known, ExpressionError):
            return known
        # An unknown size and a circle are told once, not at every use.
        if known.code != TOLD and not (known.code in ("E105", "E202") and known.message in self.told):
            self.told.add(known.message)
            place = value.within(known.start, known.end)
            self.report.add(known.code, f"{what}: {known.message}", place, likely=known.likely)
        return None

    def whole(self, value: Value | None, what: str, limit: int = 2**31 - 1) -> int | None:
        """A whole number of at least 1."""
        number = self.number(value, what)
        if number is None or value is None:
            return None
        if not isinstance(number, int) or not 1 <= number <= limit:
            self.report.add(
                "E106", f"{what} must be a whole number from 1 to {limit}", value.place, found=_equals(value, number)
            )
            return None
        return number

    def positive(self, value: Value | None, what: str) -> Number | None:
        number = self.number(value, what)
        if number is not None and value is not None and number <= 0:
            self.report.add("E106", f"{what} must be larger than 0", value.place, found=_equals(value, number))
            return None
        return number

    def ref(self, value: Value | None, what: str) -> Ref:
        text = self.text(value, what)
        place = value.place if value is not None else self.root.place
        if text and not all(NAME.fullmatch(word) for word in text.split(".")):
            self.report.add(
                "E109", f"{what}: {text[:40]!r} is not an edge", place, needed="the name of a node, or node.output"
            )
        return Ref(text=text, place=place)

    def read_refs(self, value: Value | None, what: str) -> dict[str, Ref]:
        found = {}
        for key, item in self.mapping(value, what).items.items():
            if self.name_ok(key, item.place, f"a key of {what}"):
                found[key] = self.ref(item, f"{what}.{key}")
        return found


def _equals(value: Value, number: Number) -> str:
    """`heads = 0`, or the number alone where it was written as one."""
    text = value.text if isinstance(value, Scalar) else ""
    return text if isinstance(value, Scalar) and isinstance(value.value, (int, float)) else f"{text} = {number}"
