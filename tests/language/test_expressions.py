"""Expressions over sizes. The oracle for values is Python's exact arithmetic. Needs nothing."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.compiler.language.expressions import MAX_DEPTH, MAX_LENGTH, ExpressionError, UnknownName, evaluate

SIZES = {"hidden": 5120, "heads": 40, "eps": 1e-5, "rope.theta": 10000.0}


def lookup(name: str) -> int | float:
    if name not in SIZES:
        raise UnknownName(f"unknown size {name!r}", likely="did you mean 'heads'?")
    return SIZES[name]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("hidden / heads", 128),
        ("hidden/heads", 128),
        ("2 * (hidden + heads) - 1", 10319),
        ("-heads + 41", 1),
        ("--heads", 40),
        ("10 - 3 - 2", 5),
        ("64 / 4 / 2", 8),
        ("7 // 2 * 2", 6),
        ("-7 // 2", -4),
        ("7 % 4", 3),
        ("rope.theta * 2", 20000.0),
        ("eps / 2", 5e-6),
        ("1e-5", 1e-5),
        (" 2.5 * 4 ", 10.0),
    ],
)
def test_values(text, value):
    assert evaluate(text, lookup) == value
    assert type(evaluate(text, lookup)) is type(value)


@pytest.mark.parametrize(
    ("text", "words", "at"),
    [
        ("", "missing at the end", 0),
        ("heads +", "missing at the end", 7),
        ("(heads", "not closed", 0),
        ("heads)", "not expected", 5),
        ("2 ** 3", "missing before", 3),
        ("heads[0]", "cannot stand", 5),
        ("f(heads)", "unknown size 'f'", 0),
        ("head", "unknown size 'head'", 0),
        ("hidden / 3", "5120 / 3 is not a whole number", 0),
        ("hidden / (heads - 40)", "division by zero", 0),
        ("hidden % 0", "division by zero", 0),
        ("2.5 // 2", "needs whole numbers", 0),
        ("09", "does not start with 0", 0),
        ("1 2", "not expected", 2),
        ("a.b.", "cannot stand", 3),
        ("9223372036854775807 + 1", "larger than 2", 0),
        ("1e308 * 1e308", "larger than 2", 0),
        ("1" * 41, "40 characters", 0),
        ("1 + é", "cannot stand", 4),
        ("x" * (MAX_LENGTH + 1), "more than 400", 0),
        ("(" * (MAX_DEPTH + 1), "nested", MAX_DEPTH),
        ("-" * 300 + "1", "nested", MAX_DEPTH),
    ],
)
def test_errors_point_at_the_word(text, words, at):
    with pytest.raises(ExpressionError, match=words) as caught:
        evaluate(text, lookup)
    assert caught.value.start == at
    assert caught.value.end > at or not text


def test_a_lookup_tells_its_hint():
    with pytest.raises(ExpressionError) as caught:
        evaluate("2 * heds", lookup)
    assert (caught.value.code, caught.value.likely) == ("E105", "did you mean 'heads'?")
    assert (caught.value.start, caught.value.end) == (4, 8)


trees = st.recursive(
    st.integers(0, 1000).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner).map(lambda t: f"({' '.join(t)})"),
        inner.map(lambda t: f"-{t}"),
    ),
    max_leaves=8,
)


def value_or_error(text: str) -> int | float | ExpressionError:
    try:
        return evaluate(text, lookup)
    except ExpressionError as error:
        return error


@given(trees)
def test_whole_numbers_agree_with_exact_fractions(text):
    try:
        exact = eval(re.sub(r"(\d+)", r"Fraction(\1)", text), {"Fraction": Fraction})
    except ZeroDivisionError:
        exact = None
    ours = value_or_error(text)
    if isinstance(ours, ExpressionError):
        # Refused only for a reason: by zero, too large, too deep, or a quotient that is not whole.
        assert exact is None or ours.code == "E106" or "nested" in ours.message
    else:
        assert isinstance(ours, int)
        assert ours == exact


@given(st.text(max_size=60))
def test_any_text_gives_a_number_or_an_expression_error(text):
    found = value_or_error(text)
    assert isinstance(found, (int, float)) or 0 <= found.start <= found.end
