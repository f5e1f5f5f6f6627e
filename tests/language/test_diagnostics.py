"""What a user is told: cases/language/NAME.yaml gives exactly NAME.expected. Needs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.compiler.diagnostics import CODES, MAX_REPORTED, Diagnostic, DiagnosticError, to_json
from llmc.compiler.language.build import build_model, load_model
from llmc.compiler.language.source import loads

CASES = Path(__file__).parents[1] / "cases" / "language"
NAMES = sorted(p.stem for p in CASES.glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_cases(monkeypatch):
    monkeypatch.chdir(CASES)


def loads_and_build(text: str) -> None:
    build_model(loads(text))


def diagnostics(name: str) -> DiagnosticError:
    with pytest.raises(DiagnosticError) as caught:
        load_model(f"{name}.yaml")
    return caught.value


@pytest.mark.parametrize("name", NAMES)
def test_case_gives_the_expected_text(name):
    assert f"{diagnostics(name)}\n" == Path(f"{name}.expected").read_text()


def test_base_of_the_cases_is_a_good_model():
    assert len(load_model("base/tiny.yaml").graph.nodes) == 2 + 2 * 5


def test_every_expected_text_has_its_case():
    assert {p.stem for p in CASES.glob("*.expected")} == set(NAMES)


def test_every_code_of_the_language_has_a_case():
    told = {d.code for name in NAMES for d in diagnostics(name).diagnostics}
    assert {code for code in CODES if code < "E303"} - told == {"E001"}  # files that cannot be read: test_source.py


def test_machine_form_has_the_same_places():
    found = to_json(diagnostics("unused_size").diagnostics)
    assert found == [
        {
            "code": "E110",
            "title": CODES["E110"],
            "message": "nothing uses the size 'hiden'",
            "file": "unused_size.yaml",
            "line": 2,
            "column": 9,
            "end_column": 14,
            "found": None,
            "needed": None,
            "likely": "did you mean 'hidden'?",
        }
    ]


def test_a_code_that_is_not_in_the_table_is_refused():
    with pytest.raises(KeyError, match="E999"):
        Diagnostic(code="E999", message="what")


def test_a_hundred_problems_are_enough():
    with pytest.raises(DiagnosticError) as caught:
        loads_and_build("".join(f"key{i}: {{a: 1}}\n" for i in range(20_000)))
    assert len(caught.value.diagnostics) == MAX_REPORTED


def test_a_very_long_line_is_cut_around_the_caret():
    with pytest.raises(DiagnosticError) as caught:
        loads_and_build("{" + ", ".join(f"key{i}: 1" for i in range(90)) + "}")
    lines = str(caught.value).splitlines()
    assert all(len(line) < 140 for line in lines)
    unknown = [i for i, line in enumerate(lines) if "E101" in line]
    assert len(unknown) == 90
    for i in unknown:
        key = lines[i].split("'")[1]
        assert lines[i + 1][lines[i + 2].index("^") :].startswith(f"{key}:")
