"""The generated code: clean under ruff, with places, and the same bytes every time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmc.compiler.artifact import files_of
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model

CATALOGUE = ["llama-7b", "llama-13b", "llama-33b", "llama-65b", "llama2-7b", "llama2-13b", "llama2-70b", "smollm2-135m"]
MODES = [(attention, dtype) for attention in ("paged", "flash") for dtype in ("float16", "bfloat16")]


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Path:
    """The generated modules of every catalogue model in every mode, in one folder."""
    folder = tmp_path_factory.mktemp("generated")
    for model in CATALOGUE:
        for attention, dtype in MODES:
            files = files_of(compile_model(model, Options(attention=attention, dtype=dtype)))
            for name, text in files.items():
                (folder / f"{model.replace('-', '_')}_{attention}_{dtype}_{name}").write_text(text)
    return folder


@pytest.mark.parametrize("command", [["format", "--check"], ["check"]], ids=" ".join)
def test_generated_code_is_clean_under_ruff(generated, command):
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--isolated", "--no-cache", str(generated)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_statement_of_a_layer_ends_with_its_place_in_the_yaml(generated):
    text = (generated / "llama2_13b_paged_float16_decode.py").read_text()
    ends = [line for line in text.splitlines() if "# " in line and "graphs/families/llama.yaml:" in line]
    assert len(ends) >= text.count("graph.add_operation(") - 2  # the two gathers of the rope tables serve all layers


def test_the_same_input_gives_the_same_bytes_in_another_process_with_another_hash_seed():
    script = (
        "import hashlib\n"
        "from llmc.compiler.artifact import files_of\n"
        "from llmc.compiler.pipeline import Options, compile_model\n"
        "files = files_of(compile_model('llama2-7b', Options()))\n"
        "print(hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "LANG": "C"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, zone in (("1", "UTC"), ("2", "Asia/Shanghai"))
    }
    assert len(digests) == 1


def test_compiling_imports_neither_torch_nor_numpy():
    script = (
        "import sys\n"
        "from llmc.compiler.cli import main\n"
        "main(['check', 'llama2-7b'])\n"
        "print(sorted(m for m in ('torch', 'numpy', 'torch_npu', 'transformers') if m in sys.modules))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
