"""The counts of the vendor's tables at the end of a run: what agrees, and how much is not judged and why."""

from __future__ import annotations

from collections import Counter

import pytest
from vendor_cases import summary

COUNTS = "vendor rows"  # the property that a test of one table leaves its counts in


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    total: Counter[str] = Counter()
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, value in report.user_properties:
            if name == COUNTS and isinstance(value, dict):
                total.update(value)
    if total:
        terminalreporter.section("vendor's operation cases")
        for line in summary(total):
            terminalreporter.line(line)
