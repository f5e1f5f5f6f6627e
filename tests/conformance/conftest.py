"""The counts of the vendor's data at the end of a run: what agrees, and how much is not judged and why."""

from __future__ import annotations

from collections import Counter

import pytest
from vendor_cases import summary

from llmc.compiler.atb import OPS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    cases = _total(terminalreporter, "vendor rows")
    if cases:
        terminalreporter.section("vendor's operation cases")
        for line in summary(cases):
            terminalreporter.line(line)
    nodes = _total(terminalreporter, "layer nodes")
    if nodes:
        terminalreporter.section("vendor's layer graphs")
        lacking = {op: count for op, count in sorted(nodes.items()) if op not in OPS}
        names = ", ".join(f"{op} {count}" for op, count in lacking.items())
        terminalreporter.line(f"{nodes.total() - sum(lacking.values())} of {nodes.total()} operations are modelled")
        terminalreporter.line(f"not modelled: {names or 'none'}")


def _total(terminalreporter: pytest.TerminalReporter, name: str) -> Counter[str]:
    """Sum of the counts that tests have recorded as this property."""
    total: Counter[str] = Counter()
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for key, value in report.user_properties:
            if key == name and isinstance(value, dict):
                total.update(value)
    return total
