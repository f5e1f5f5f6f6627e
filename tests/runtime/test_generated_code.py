"""Programs that a model writes: what counts as passed, and what such a program cannot do."""

from __future__ import annotations

import json
import sys
from math import comb
from pathlib import Path

import pytest

from llmc.runtime.measure.generated_code import CodeEval, pass_at, passes

ADD = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        (ADD, True),
        (ADD.replace("+", "*"), False),
        (
            "from typing import List\nimport collections, datetime, hashlib, heapq, math, random, re, string\n" + ADD,
            True,
        ),
        (ADD + "\nopen('scratch.txt', 'w').write('x')\nprint(open('scratch.txt').read())", True),
        (ADD + "\nraise SystemExit(0)", False),
        ("import os\nos._exit(0)", False),
        ("def add(a, b)", False),
        ("add = lambda a, b: int(input())", False),
    ],
)
def test_only_a_program_whose_tests_end_well_has_passed(program, passed):
    assert passes(program, "assert add(2, 3) == 5") is passed


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "x = bytearray(3 << 30)",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import socket; socket.create_connection(('127.0.0.1', {port}))",
        "open({target!r}, 'w').write('x')",
        "open('big', 'wb').write(bytes(5 << 20)); open('big').read()[4 << 20]",
        "import ctypes; ctypes.CDLL(None)",
        "import os; os.kill(os.getppid(), 0)",
    ],
    ids=lambda program: program[:40],
)
def test_what_is_not_a_programs_business_ends_it(program, tmp_path):
    import socket

    target = tmp_path / "there.txt"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not passes(program.format(port=port, target=str(target)), "")
    assert not target.exists()


def test_no_variable_of_the_environment_reaches_a_program(monkeypatch):
    monkeypatch.setenv("SECRET_OF_A_TEST", "1")
    assert passes("import os", "assert 'SECRET_OF_A_TEST' not in os.environ")


def test_pass_at_k_is_the_share_of_draws_with_a_correct_program():
    for total, correct, k in [(20, 5, 1), (20, 5, 10), (4, 0, 2), (4, 4, 2)]:
        assert pass_at(k, total=total, correct=correct) == pytest.approx(1 - comb(total - correct, k) / comb(total, k))
    found, each = CodeEval().compute(
        references=["assert add(2, 3) == 5"], predictions=[[ADD, ADD.replace("+", "-")]], k=[1, 2, 3]
    )
    assert found == {"pass@1": 0.5, "pass@2": 1.0}
    assert each == {0: [True, False]}


def test_the_child_says_its_word_only_at_the_end(tmp_path):
    import subprocess

    from llmc.runtime.measure.generated_code import CHILD

    request = json.dumps({"program": "print('word')", "word": "w"}).encode()
    done = subprocess.run([sys.executable, "-I", str(CHILD)], input=request, capture_output=True, cwd=tmp_path)
    assert (done.stdout, Path(tmp_path).exists()) == (b"w", True)
