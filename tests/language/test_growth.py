"""Long and deep files: work grows with their length, and what has no use at such a size is refused. Needs nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml

from llmc.compiler.diagnostics import DiagnosticError
from llmc.compiler.language import build as build_module
from llmc.compiler.language import definitions, expressions, reading
from llmc.compiler.language.build import Model, build_model, load_model
from llmc.compiler.language.definitions import MAX_RULES, MAX_SIZES
from llmc.compiler.language.source import loads

TINY = (Path(__file__).parents[1] / "cases" / "language" / "base" / "tiny.yaml").read_text()


def text(**changes) -> str:
    whole = yaml.safe_load(TINY)
    for key, value in changes.items():
        whole[key] = {**whole[key], **value} if isinstance(value, dict) and key in whole else value
    return yaml.safe_dump(whole, sort_keys=False, width=10**9)


def refused(text: str) -> DiagnosticError:
    with pytest.raises(DiagnosticError) as caught:
        build_model(loads(text))
    return caught.value


def build(**changes) -> Model:
    return build_model(loads(text(**changes)))


COUNT = 400
SHAPES = {
    "chain": lambda i: f"s{i - 1} + 1" if i else 1,
    "chain from behind": lambda i: f"s{i + 1} + 1" if i < COUNT - 1 else 1,
    "diamonds": lambda i: f"s{i - 1} - s{i - 2} + s{i - 1} - 1" if i > 1 else 1 + i,
    "diamonds from behind": lambda i: f"s{i + 1} + s{i + 2} - s{i + 1}" if i < COUNT - 2 else 1,
    "star": lambda i: f"s{COUNT - 1} * 2" if i < COUNT - 1 else 1,
    "wide": lambda i: " + ".join(f"s{max(0, i - k)}" for k in range(1, 40)) + f" - s{i - 1} * 38" if i > 39 else 1,
    "circle": lambda i: f"s{(i + 1) % COUNT}",
    "chain to a circle": lambda i: f"s{i + 1}" if i < COUNT - 1 else f"s{COUNT - 2}",
    "chain to a mistake": lambda i: f"s{i + 1}" if i < COUNT - 1 else "1 / 0",
    "chain to an unknown name": lambda i: f"s{i + 1}" if i < COUNT - 1 else "nobody",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_each_size_is_evaluated_once_for_itself_and_once_for_all_others(shape, monkeypatch):
    evaluated: list[str] = []
    evaluate = expressions.evaluate

    def counted(text, lookup):
        evaluated.append(text)
        return evaluate(text, lookup)

    monkeypatch.setattr(definitions, "evaluate", counted)
    monkeypatch.setattr(reading, "evaluate", counted)
    with contextlib.suppress(DiagnosticError):
        build(sizes={f"s{i}": SHAPES[shape](i) for i in range(COUNT)})
    assert len(evaluated) <= 2 * COUNT + 20


def test_a_chain_of_sizes_may_have_any_length_and_order():
    count = 3_000
    back = {f"s{i}": f"s{i + 1} + 1" for i in range(count - 1)}
    model = build(sizes={**back, f"s{count - 1}": 1, "max_positions": "s0"})
    assert model.graph.sizes["max_positions"] == count


@pytest.mark.parametrize("where", ["circle", "chain to a circle", "chain to a mistake", "chain to an unknown name"])
def test_a_mistake_at_the_end_of_a_long_chain_is_told_once(where):
    sizes = {f"s{i}": SHAPES[where](i) for i in range(COUNT)}
    error = refused(text(sizes={**sizes, "hidden": "s0"}))
    assert len(error.diagnostics) == 1
    assert len(str(error)) < 800


def test_more_sizes_than_any_model_has_are_refused():
    error = refused(text(sizes={f"s{i}": 1 for i in range(MAX_SIZES + 1)}))
    assert error.code == "E004"
    assert f"at most {MAX_SIZES}" in str(error)


def test_more_rules_than_any_model_has_are_refused():
    error = refused(text(policy=[{"nodes": "head", "dtype": "float32"}] * (MAX_RULES + 1)))
    assert f"at most {MAX_RULES}" in str(error)


@pytest.mark.parametrize("steps", [2, 10, 60, 300])
def test_aliases_count_as_deep_as_what_they_stand_for(steps):
    """Each level is an alias of the one before, a few lists deep: within the limits on values, and of any depth."""
    lines = ["a0: &a0 x", *(f"a{i}: &a{i} [[[[*a{i - 1}]]]]" for i in range(1, steps + 1))]
    error = refused("\n".join(lines))
    assert error.code == ("E102" if steps == 2 else "E004")
    assert steps == 2 or "nested more than 40 deep" in str(error)


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("9" * 200_000, "the number is too large"),
        ("-" + "9" * 200_000, "the number is too large"),
        ("0." + "0" * 200_000 + "1", "a number of 200003 characters"),
        ("1e" + "9" * 200_000, "the number is too large"),
        ("1 + " + "9" * 200_000, "an expression of more than 400 characters"),
        ("1 + " + "9" * 200, "a number of more than 40 characters"),
        ("(" * 200_000, "an expression of more than 400 characters"),
        ("(" * 200 + "1" + ")" * 199, "nested more than 30 deep"),
        ("-" * 300 + "1", "nested more than 30 deep"),
    ],
    ids=lambda value: value[:12],
)
@pytest.mark.parametrize(
    "line",
    [
        "sizes: {{{keep}, layers: {cell}}}",
        "graph: {{head: {{out: {cell}}}}}",
        "graph: {{layers: {{repeat: {cell}}}}}",
        "config: {{a: {{is: {cell}}}}}",
    ],
)
def test_numbers_and_expressions_of_any_length_are_one_short_message(line, cell, words, tmp_path):
    (tmp_path / "base.yaml").write_text(TINY)
    keep = "vocab: 32, hidden: 8, ffn: 16, max_positions: 64, eps: 1e-5"
    path = tmp_path / "mine.yaml"
    path.write_text("extends: base\n" + line.format(keep=keep, cell=cell))
    with pytest.raises(DiagnosticError) as caught:
        load_model(path)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1_500


def test_a_value_that_is_carried_far_is_followed_once():
    """x goes through all iterations, and every one of them reads it."""
    lookups = 0

    class Counted(dict):
        def get(self, *args):
            nonlocal lookups
            lookups += 1
            return super().get(*args)

    count = 1_000
    repeat = {
        "repeat": count,
        "carry": {"x": "embed", "y": "embed"},
        "nodes": {"a": {"op": "add", "a": "x", "b": "y"}},
        "next": {"x": "x", "y": "a"},
    }
    layers = yaml.safe_load(TINY)["graph"]["layers"]
    whole = text(graph={"r": repeat, "layers": {**layers, "carry": {"x": "r.y"}}})
    language = definitions.Language(loads(whole))
    expansion = build_module._Expansion(language, every_layer=True)
    expansion.made_by = Counted()
    assert len(expansion.graph().nodes) > count
    assert lookups < 10 * count


def test_values_that_repeats_carry_are_bounded():
    names = [f"x{i}" for i in range(3_000)]
    repeat = {"repeat": 200, "carry": dict.fromkeys(names, "embed"), "nodes": {"a": {"op": "silu", "x": "x0"}}}
    nodes = {"r": {**repeat, "next": {name: name for name in names}}}
    with pytest.raises(DiagnosticError, match="pass on more than 100000 values"):
        build_module._Expansion(definitions.Language(loads(text(graph=nodes))), every_layer=True).graph()


def test_a_repeat_of_too_many_nodes_is_refused_before_rules_are_asked_about_them(monkeypatch):
    monkeypatch.setattr(build_module, "is_named", None)
    whole = text(sizes={"layers": 9_000}, policy=[{"nodes": "*", "dtype": "float32"}] * MAX_RULES)
    with pytest.raises(DiagnosticError, match="more than 10000 nodes"):
        build_model(loads(whole), every_layer=False)


@pytest.mark.parametrize("value", [0.5, "hidden * 1.5", 2**40])
def test_the_longest_context_is_a_whole_number(value):
    error = refused(text(sizes={"max_positions": value}))
    assert "max_positions must be a whole number" in str(error)
