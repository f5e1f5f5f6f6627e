"""The JSON Schema for editors and the generated pages. Needs nothing; the oracle is the `jsonschema` package."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from llmc.compiler.language.build import build_model
from llmc.compiler.language.schema import authored, documentation, schema, schema_text
from llmc.compiler.language.source import loads

ROOT = Path(__file__).parents[2]
CASES = ROOT / "tests" / "cases" / "language"
MODELS = sorted([*(ROOT / "graphs").glob("*.yaml"), *(ROOT / "graphs" / "families").glob("*.yaml")])


@pytest.fixture(scope="module")
def validator():
    jsonschema.Draft202012Validator.check_schema(schema())
    return jsonschema.Draft202012Validator(schema())


def test_stored_schema_is_up_to_date():
    assert (ROOT / "graphs" / "schema.json").read_text() == schema_text(), (
        "run: python -m llmc.compiler.language.schema"
    )


def test_generated_tables_of_the_language_reference_are_up_to_date():
    page = (ROOT / "docs" / "language.md").read_text()
    assert documentation(page) == page, "run: python -m llmc.compiler.language.schema"
    assert all(f"### `{op.name}`" in page for op in authored())


def test_models_in_the_language_reference_are_good():
    page = (ROOT / "docs" / "language.md").read_text()
    models = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "\nname: " in f"\n{block}"]
    names = [build_model(loads(block)).name for block in models]
    assert names == ["llama2-13b", "tiny", "mine"]


@pytest.mark.parametrize("path", [*MODELS, CASES / "base" / "tiny.yaml"], ids=lambda p: p.stem)
def test_every_model_validates(path, validator):
    assert [e.message for e in validator.iter_errors(yaml.safe_load(path.read_text()))] == []


@pytest.mark.parametrize(
    "name",
    ["unknown_keys", "unknown_operator", "wrong_types", "rope_type", "rope_settings", "support", "policy_values",
     "root_is_a_list", "bad_names", "repeat_in_a_block", "op_and_block", "extends_a_list"],
)  # fmt: skip
def test_bad_files_do_not_validate(name, validator):
    assert not validator.is_valid(yaml.safe_load((CASES / f"{name}.yaml").read_text()))


def test_editors_are_told_where_the_schema_is():
    for path in MODELS:
        first = path.read_text().splitlines()[0]
        assert first.startswith("# yaml-language-server: $schema=")
        target = (path.parent / first.partition("$schema=")[2]).resolve()
        assert target == ROOT / "graphs" / "schema.json"
        assert "$defs" in json.loads(target.read_text())
