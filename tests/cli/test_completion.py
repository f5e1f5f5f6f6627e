"""What the TAB key offers: the shell's own function of argcomplete, in bash, as a user switches it on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmc.compiler.cli import COMMANDS
from llmc.compiler.language.source import catalogue
from llmc.compiler.passes.fuse import FUSIONS
from llmc.compiler.pipeline import PASS_NAMES
from llmc.compiler.target.device import device_names

TAB = """
export PATH="$1:$PATH"
eval "$(register-python-argcomplete llmc)"
shift
for COMP_LINE in "$@"; do
    COMP_POINT=${#COMP_LINE} COMP_TYPE=9 COMPREPLY=()
    read -ra COMP_WORDS <<<"$COMP_LINE"
    [[ $COMP_LINE == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _python_argcomplete llmc
    echo "${COMPREPLY[@]}"
done
"""
OFFERED = {
    "llmc ": {*COMMANDS, "--help", "--version"},
    "llmc co": {"compile", "convert"},
    "llmc --json comp": {"compile"},
    "llmc compile ": {"--device", "--fuse", *catalogue(), "mine.yaml", "folder/"},
    "llmc compile smol": {"smollm2-135m"},
    "llmc compile mi": {"mine.yaml"},
    "llmc check x --la": {"--layers-per-segment"},
    "llmc check x --device ": set(device_names()),
    "llmc env --device=atlas-3": {"atlas-300i-duo"},
    "llmc compile x --dtype b": {"bfloat16"},
    "llmc compile x --attention ": {"paged", "flash"},
    "llmc compile x --device atlas-300i-duo --backend ": {"hccl"},
    "llmc compile x --fuse ": {*FUSIONS, "none"},
    "llmc compile x --fuse swiglu,": {f"swiglu,{name}" for name in FUSIONS if name != "swiglu"},
    "llmc compile x --until ": set(PASS_NAMES),
    "llmc explain smollm2-135m layers.7.attn.o": {"layers.7.attn.o"},
    "llmc diff llama2-7b llama2-1": {"llama2-13b"},
    "llmc ops ro": {"rope"},
    "llmc init --name ": set(),  # the user's own word
    "llmc run --max-out": {"--max-output-length"},
    "llmc run --max_out": {"--max_output_length"},
    "llmc run --model-path ": {"folder/"},
    "llmc xyz --": {"--help", "--version"},
    "llmc explain nowhere ": {"--device"},
}


@pytest.mark.processes
def test_the_shell_is_offered_what_may_stand_there(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "notes.txt").write_text("")
    words = ["bash", "-c", TAB, "bash", str(Path(sys.executable).parent), *OFFERED]
    shell = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert shell.stderr == ""
    found = dict(zip(OFFERED, map(set, map(str.split, shell.stdout.split("\n"))), strict=False))
    partial = {line for line, words in OFFERED.items() if words and {"--device", "--help"} & words}  # and other flags
    for line, expected in OFFERED.items():
        assert expected <= found[line] if line in partial else expected == found[line], line
        assert "notes.txt" not in found[line]


@pytest.mark.processes
def test_nothing_of_it_is_imported_where_no_shell_asks(tmp_path):
    code = "import sys; from llmc.compiler.cli import main; main(['compile', 'llama2-7b']); print(*sys.modules)"
    env = {key: value for key, value in os.environ.items() if key != "_ARGCOMPLETE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    loaded = {name.partition(".")[0] for name in done.stdout.split()} | set(done.stdout.split())
    assert "llmc.compiler.pipeline" in loaded
    assert not loaded & {"argcomplete", "torch", "rich", "llmc.compiler.completion", "llmc.runtime.flags"}
