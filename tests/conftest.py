"""Groups by need: `pytest -m "not torch and not transformers"` runs in seconds on a machine with neither."""

from __future__ import annotations

from pathlib import Path

import pytest

NEEDS = {
    "conformance": ["torch"],
    "hostatb": ["torch"],
    "runtime": ["torch", "transformers"],
    "models": ["torch", "transformers"],
    "ranks": ["torch", "transformers", "processes"],
    "picture": ["browser"],
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        area = Path(item.path).relative_to(Path(__file__).parent).parts[0]
        for need in NEEDS.get(area, []):
            item.add_marker(need)
