"""Every command that the README and the pages of docs/ show runs as it is written.

Shell blocks run line by line; so do commands in the text (`llmc check graphs/mine.yaml`), each once however often it is
shown. `llmc demo` takes the real checkpoint, but stops after a few words. WEIGHTS is its small twin: the same tokenizer
and family with two narrow layers; BIN_WEIGHTS is one tensor in a .bin file.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from generated_tasks import save_tasks

from llmc.compiler.cli import COMMANDS, main

pytestmark = [pytest.mark.torch, pytest.mark.transformers, pytest.mark.processes]
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# Not run here; the page itself says what each needs.
NEEDS = {
    "torchrun --nnodes 2 --node-rank 0 --master-addr HOST --master-port 20010 --nproc-per-node 4 "
    "-m llmc.run --model-path WEIGHTS": "needs two hosts",
}
# Of the set-up: whoever runs this test has done it. What they name is checked.
SET_UP = ("pip install ", "apt-get ", "git clone ", "cd ", "python3 -m venv ", ". .venv/", "pytest", "ruff ", "mypy ")
SHORT = {"llmc demo": "llmc demo --max-output-length 4"}
REFUSED = {"llmc check graphs/mine.yaml --device atlas-300i-duo --tp 2 --allow-unsupported"}  # and the page says so
# In the text, where a name is meant and not a command that can be typed.
PLACEHOLDERS = {"llmc explain GRAPH NODE", "llmc ops tanh"}


def shell_blocks(text):
    return [block for _, block in re.findall(r"^( *)```shell\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)]


def commands_of(block):
    """The commands of a block, without what the page remarks behind them."""
    for line in block.splitlines():
        command, _, remark = (part.strip() for part in re.split(r"(\s#\s|$)", f"{line.strip()} ", maxsplit=1))
        parts = [command] if command.startswith("eval") else re.split(r"\s*(?:&&|;)\s*", command)
        yield from ((part, remark) for part in parts if part)


def spoken_of(text):
    """Commands in the text: with more than the command's name, and nothing left out."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`((?:llmc|eval)\s[^`]+)`", prose):
        command = " ".join(span.split())
        if len(command.split()) > 2 and command not in PLACEHOLDERS:
            yield command, ""


SHOWN = {
    f"{page.name} {number}": found
    for page in PAGES
    if page.exists()
    for text in [page.read_text(encoding="utf-8")]
    for number, found in enumerate(
        [*(list(commands_of(b)) for b in shell_blocks(text)), list(spoken_of(text))], start=1
    )
    if found
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like the checkout, with the checkpoints that the pages name and the variant that the README makes."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    from llmc.runtime import session
    from llmc.runtime.demo import demo_weights

    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "graphs", folder / "graphs")
    shutil.copy(ROOT / "README.md", folder)
    (folder / "tasks").mkdir()
    save_tasks(folder / "tasks")
    torch.manual_seed(0)
    narrow = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.from_pretrained(demo_weights(), num_hidden_layers=2, head_dim=16, **narrow)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "WEIGHTS")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_weights() / name, folder / "WEIGHTS")
    (folder / "BIN_WEIGHTS").mkdir()
    shutil.copy(folder / "WEIGHTS" / "config.json", folder / "BIN_WEIGHTS")
    torch.save({"model.norm.weight": torch.ones(64)}, folder / "BIN_WEIGHTS" / "pytorch_model.bin")
    # The catalogue has no model so small; `llmc run` finds this one in its place, here and in other processes.
    find = session.choose_variant
    found = "lambda config, path: 'graphs/mine.yaml' if config['hidden_size'] == 64 else find(config, path)"
    (folder / "sitecustomize.py").write_text(
        "from llmc.compiler.language import checkpoint\n"
        f"find = checkpoint.choose_variant\ncheckpoint.choose_variant = {found}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "choose_variant", eval(found, {"find": find}))
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        assert run("llmc init --model-path WEIGHTS --name mine > graphs/mine.yaml")[0] == 0
        yield folder


DONE: set[str] = set()


@pytest.mark.parametrize("shown", SHOWN.values(), ids=SHOWN)
def test_what_a_page_shows_runs(shown, place, monkeypatch):
    monkeypatch.chdir(place)
    for command, remark in shown:
        if command in NEEDS:
            assert NEEDS[command] in remark
        elif command.startswith(SET_UP):
            extras = re.findall(r"\[(\w+)\]", command)
            declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            assert all(f"\n{extra} = [" in declared for extra in extras)
        elif command not in DONE:
            code, said = run(SHORT.get(command, command))
            assert code == (1 if command in REFUSED else 0), f"{command}\n{said}"
            assert "Traceback" not in said
            DONE.add(command)


def test_what_is_left_out_is_shown():
    every = {command for found in SHOWN.values() for command, _ in found}
    assert NEEDS.keys() | REFUSED <= every
    assert {command.split()[1] for command in every if command.startswith("llmc ")} == set(COMMANDS)


def run(command):
    """Exit code and all that was said: in this process where it is a plain `llmc`, else by bash."""
    words = shlex.split(command)
    if words[0] != "llmc":
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-ec", command], capture_output=True, text=True, env={**os.environ, "PATH": path}
        )
        return done.returncode, done.stdout + done.stderr
    target = words.pop() if words[-2] == ">" else None
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words[1:-1] if target else words[1:])
    if target:
        Path(target).write_text(out.getvalue(), encoding="utf-8")
    return code, out.getvalue() + err.getvalue()
