"""Whatever a file holds, it is a model or a UserError. Needs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc.compiler.diagnostics import DiagnosticError, to_json
from llmc.compiler.language.build import Model, build_model
from llmc.compiler.language.source import loads

GRAPHS = Path(__file__).parents[2] / "graphs"
TINY = (Path(__file__).parents[1] / "cases" / "language" / "base" / "tiny.yaml").read_bytes()
FAMILY = (GRAPHS / "families" / "llama.yaml").read_bytes()
WHOLE = FAMILY.replace(
    b"sizes:\n", b"name: t\nsizes:\n  vocab: 16\n  hidden: 8\n  ffn: 8\n  layers: 2\n  heads: 2\n  max_positions: 8\n"
)
VARIANT = (GRAPHS / "llama2-13b.yaml").read_bytes().replace(b"40", b"2")
TEXTS = {"tiny": TINY, "family": WHOLE, "variant": VARIANT}

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def model_or_user_error(data: bytes | str) -> Model | None:
    """Any other exception fails the test."""
    try:
        return build_model(loads(data, "fuzz.yaml"))
    except DiagnosticError as error:
        to_json(error.diagnostics)
        return None


@pytest.mark.parametrize("name", TEXTS)
def test_the_texts_are_good_before_they_are_changed(name):
    assert model_or_user_error(TEXTS[name]) is not None


@pytest.mark.parametrize("name", TEXTS)
@fuzz
@given(data=st.data())
def test_changed_bytes(name, data):
    text = bytearray(TEXTS[name])
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    model_or_user_error(bytes(text))


@pytest.mark.parametrize("name", TEXTS)
@fuzz
@given(data=st.data())
def test_moved_lines(name, data):
    """Lines deleted, repeated, moved, or indented differently."""
    lines = TEXTS[name].decode().splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        at, to = data.draw(st.integers(0, len(lines) - 1)), data.draw(st.integers(0, len(lines) - 1))
        match data.draw(st.sampled_from(["delete", "repeat", "move", "indent"])):
            case "delete" if len(lines) > 1:
                del lines[at]
            case "repeat":
                lines.insert(to, lines[at])
            case "move":
                lines.insert(to, lines.pop(at))
            case _:
                lines[at] = " " * data.draw(st.integers(0, 8)) + lines[at].strip()
    model_or_user_error("\n".join(lines))


words = st.sampled_from(
    ["op", "block", "repeat", "linear", "rope", "attention", "x", "a", "parts", "weight", "out", "hidden", "carry",
     "next",     "nodes", "graph", "sizes", "blocks",
     "{i}", "null", "head", "layers", "layers.x", "*", "1e-5", "hidden / 3", "-1",
     "tp", "row", "policy", "support", "config", "is", "or", "text", "theta", "scaling", "type", "yarn", "name"]
)  # fmt: skip
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), words, st.text(max_size=5))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=5)),
    max_leaves=12,
)
KEYS = [
    "name",
    "sizes",
    "dtype",
    "rope",
    "config",
    "inputs",
    "blocks",
    "graph",
    "outputs",
    "policy",
    "support",
    "extends",
]  # fmt: skip


@fuzz
@given(st.dictionaries(st.sampled_from(KEYS), trees, max_size=6))
def test_random_trees(tree):
    model_or_user_error(yaml.safe_dump(tree))


@pytest.mark.parametrize("key", KEYS)
@settings(max_examples=25, deadline=None)
@given(tree=trees)
def test_a_model_with_one_random_key(key, tree):
    whole = yaml.safe_load(TINY)
    model_or_user_error(yaml.safe_dump({**whole, key: tree}))


@pytest.mark.parametrize(
    "path", [("graph", "head"), ("graph", "layers"), ("blocks", "mlp"), ("graph", "layers", "nodes")]
)
@settings(max_examples=40, deadline=None)
@given(tree=trees, name=words)
def test_a_model_with_one_random_node(path, tree, name):
    whole = yaml.safe_load(TINY)
    inner = whole
    for key in path:
        inner = inner[key]
    inner[name] = tree
    model_or_user_error(yaml.safe_dump(whole))


@fuzz
@given(st.one_of(st.binary(max_size=80), st.text(max_size=80)))
def test_random_text(data):
    model_or_user_error(data)
