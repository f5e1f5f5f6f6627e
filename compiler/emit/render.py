"""Rows and a template -> text."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """Text of `templates/<template>` with these values; an unknown name in the template is an error."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    def source(name: str) -> str:
        return files("llmc.templates").joinpath(name).read_text(encoding="utf-8")

    return Environment(
        loader=FunctionLoader(source),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
