"""Sizes as expressions: numbers, names, + - * / // % and parentheses.

    evaluate("hidden / heads", {"hidden": 5120, "heads": 40}.__getitem__)      # 128

`/` between whole numbers must come out whole, because a size that is rounded is a mistake. The rules are ours and
small; nothing of Python is evaluated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

Number = int | float
MAX_LENGTH = 400
MAX_DEPTH = 30
LIMIT = 2**63

TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*)"
    r"|(?P<sign>//|[-+*/%()]))"
)


class ExpressionError(Exception):
    """What is wrong with text[start:end]."""

    def __init__(self, message: str, start: int, end: int, *, code: str = "E104", likely: str = "") -> None:
        super().__init__(message)
        self.message, self.start, self.end, self.code, self.likely = message, start, end, code, likely


class UnknownName(Exception):
    """Raised by a lookup; `evaluate` adds where in the text the name stands."""

    def __init__(self, message: str, *, code: str = "E105", likely: str = "") -> None:
        super().__init__(message)
        self.message, self.code, self.likely = message, code, likely


def evaluate(text: str, lookup: Callable[[str], Number]) -> Number:
    """The value of the expression, or ExpressionError. `lookup` gives the value of a name or raises UnknownName."""
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"an expression of more than {MAX_LENGTH} characters", 0, len(text))
    return _Parser(text, lookup).whole()


def names_in(text: str) -> list[str]:
    """The names that `evaluate` would look up, as far as the text is an expression."""
    return [match["name"] for match in TOKEN.finditer(text) if match["name"]] if len(text) <= MAX_LENGTH else []


class _Parser:
    """Recursive descent: sum = product {+|- product}, product = unary {*|/|//|% unary}, unary = - unary | atom."""

    def __init__(self, text: str, lookup: Callable[[str], Number]) -> None:
        self.text, self.lookup = text, lookup
        self.tokens = self.tokenize(text)
        self.at = self.depth = 0

    @staticmethod
    def tokenize(text: str) -> list[tuple[str, str, int, int]]:
        """(kind, word, start, end), the last one an ("end", "", ...)."""
        tokens, at, length = [], 0, len(text.rstrip())
        while at < length:
            match = TOKEN.match(text, at)
            if match is None:
                at += len(text[at:]) - len(text[at:].lstrip())
                raise ExpressionError(
                    f"{text[at]!r} cannot stand in an expression", at, at + 1, likely="use + - * / // % ( ) and sizes"
                )
            kind = match.lastgroup or ""
            tokens.append((kind, match[kind], match.start(kind), match.end(kind)))
            at = match.end()
        return [*tokens, ("end", "", length, length + 1)]

    def whole(self) -> Number:
        value = self.sum()
        kind, word, start, end = self.tokens[self.at]
        if kind != "end":
            raise ExpressionError(f"{word!r} is not expected here", start, end)
        return value

    def accept(self, *signs: str) -> str:
        kind, word, _, _ = self.tokens[self.at]
        if kind == "sign" and word in signs:
            self.at += 1
            return word
        return ""

    def sum(self) -> Number:
        start, value = self.start, self.product()
        while sign := self.accept("+", "-"):
            right = self.product()
            value = self.checked(value + right if sign == "+" else value - right, start)
        return value

    def product(self) -> Number:
        start, value = self.start, self.unary()
        while sign := self.accept("*", "/", "//", "%"):
            right = self.unary()
            value = self.checked(self.times(sign, value, right, start), start)
        return value

    def unary(self) -> Number:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExpressionError(f"nested more than {MAX_DEPTH} deep", self.start, self.start + 1)
        value = -self.unary() if self.accept("-") else self.atom()
        self.depth -= 1
        return value

    def atom(self) -> Number:
        kind, word, start, end = self.tokens[self.at]
        if self.accept("("):
            value = self.sum()
            if not self.accept(")"):
                raise ExpressionError("the parenthesis is not closed", start, end)
            return value
        self.at += 1
        if kind == "number":
            return self.checked(self.number(word, start, end), start)
        if kind == "name":
            try:
                return self.lookup(word)
            except UnknownName as error:
                raise ExpressionError(error.message, start, end, code=error.code, likely=error.likely) from None
        raise ExpressionError(f"a number or a size is missing before {word!r}" if word else
                              "a number or a size is missing at the end", start, end)  # fmt: skip

    @staticmethod
    def number(word: str, start: int, end: int) -> Number:
        if len(word) > 40:
            raise ExpressionError("a number of more than 40 characters", start, end)
        if not word.isdigit():
            return float(word)
        if word[0] == "0" and len(word) > 1:
            raise ExpressionError("a whole number does not start with 0", start, end)
        return int(word)

    def times(self, sign: str, a: Number, b: Number, start: int) -> Number:
        end = self.tokens[self.at - 1][3]
        if sign == "*":
            return a * b
        if b == 0:
            raise ExpressionError("division by zero", start, end)
        whole = isinstance(a, int) and isinstance(b, int)
        if sign == "/":
            if not whole:
                return a / b
            if a % b:
                raise ExpressionError(f"{a} / {b} is not a whole number", start, end, code="E106",
                                      likely="state the size itself, or use // to round down")  # fmt: skip
            return int(a) // int(b)
        if not whole:
            raise ExpressionError(f"{sign} needs whole numbers, found {a} and {b}", start, end)
        return a // b if sign == "//" else a % b

    @property
    def start(self) -> int:
        return self.tokens[self.at][2]

    def checked(self, value: Number, start: int) -> Number:
        if not abs(value) < LIMIT or math.isnan(value):
            raise ExpressionError("the value is larger than 2^63", start, self.tokens[self.at - 1][3], code="E106")
        return value
