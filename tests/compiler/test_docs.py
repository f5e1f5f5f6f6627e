"""The pages of docs/: what is generated is up to date, what is shown as YAML is accepted. Needs nothing."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import pytest

from llmc.compiler.language.build import build_model
from llmc.compiler.language.source import loads
from llmc.compiler.reports.atb_docs import page

DOCS = Path(__file__).parents[2] / "docs"
BASE = "extends: llama2-7b\nname: example\n"  # what docs/language.md says that an addition is added to


def blocks(path: Path) -> list[str]:
    """The YAML that a page shows, out of its lists."""
    found = re.findall(r"^ *```yaml\n(.*?)^ *```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [dedent(block) for block in found]


EXAMPLES = [
    pytest.param(block if re.search("^name:", block, re.MULTILINE) else BASE + block, id=f"{path.stem}-{number}")
    for path in sorted(DOCS.glob("*.md"))
    for number, block in enumerate(blocks(path))
]


def test_atb_page_is_what_the_table_says():
    stored = (DOCS / "atb-operations.md").read_text(encoding="utf-8")
    assert stored == page(), "run: python -m llmc.compiler.reports.atb_docs > docs/atb-operations.md"


@pytest.mark.parametrize("example", EXAMPLES)
def test_yaml_in_the_pages_is_accepted(example):
    assert build_model(loads(example)).graph.outputs


def test_pages_have_examples():
    assert len(EXAMPLES) >= 14
