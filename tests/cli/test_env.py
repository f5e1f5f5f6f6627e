"""`llmc env`: the exports of the seed document for a device and its attention, as a shell takes them."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from llmc.compiler.cli import main
from llmc.compiler.target.device import device

SEED = Path(__file__).parents[2] / "../shared/seed-readme.zh.md"
MODES = [(name, attention) for name in ("atlas-800i-a2", "atlas-300i-duo") for attention in ("paged", "flash")]
# Headings of the seed document: of its device, then of the run whose exports are meant.
HEADINGS = {
    ("atlas-800i-a2", "paged"): ("800I A2", "运行Paged Attention FP16"),
    ("atlas-800i-a2", "flash"): ("800I A2", "运行Flash Attention FP16"),
    ("atlas-300i-duo", "paged"): ("300I DUO 运行", "对话测试"),
    ("atlas-300i-duo", "flash"): ("300I DUO 运行", "对话测试"),
}
# What the reference says has no reader today; for these a user need not do anything.
IGNORED = {
    "ATB_LAYER_INTERNAL_TENSOR_REUSE", "ATB_CONVERT_NCHW_TO_ND", "ATB_CONTEXT_WORKSPACE_RING",
    "ATB_CONTEXT_WORKSPACE_SIZE", "ATB_WORKSPACE_MEM_ALLOC_GLOBAL", "ATB_LAUNCH_KERNEL_WITH_TILING", "IS_QUANT",
}  # fmt: skip


def printed(capsys, name: str, attention: str, *words: str) -> str:
    assert main(["env", "--device", name, "--attention", attention, *words]) == 0
    return capsys.readouterr().out


def exported(text: str) -> dict[str, str]:
    return dict(re.findall(r"^ *export (\w+)=(\S+)", text, re.MULTILINE))


@pytest.mark.skipif(not SEED.is_file(), reason=f"no seed document at {SEED}")
@pytest.mark.parametrize(("name", "attention"), MODES)
def test_the_exports_are_those_of_the_seed_document(name, attention, capsys):
    text = SEED.read_text(encoding="utf-8")
    for heading in HEADINGS[name, attention]:
        text = text[text.index(heading) + len(heading) :]
    theirs = exported(text[: text.index("```", text.index("```shell") + 3)])
    theirs.pop("ASCEND_RT_VISIBLE_DEVICES", None)
    assert theirs
    assert exported(printed(capsys, name, attention)) == theirs


@pytest.mark.parametrize(("name", "attention"), MODES)
def test_a_shell_that_evaluates_the_lines_has_the_values_that_llmc_run_sets(name, attention, capsys, tmp_path):
    path = tmp_path / "lines"
    path.write_text(printed(capsys, name, attention))
    shell = subprocess.run(["bash", "-euc", f'eval "$(cat {path})"; env'], capture_output=True, text=True, check=True,
                           env={"PATH": os.environ["PATH"]})  # fmt: skip
    found = dict(line.partition("=")[::2] for line in shell.stdout.splitlines())
    profile = device(name).environment
    wanted = {**profile.get("common", {}), **profile.get(attention, {})}
    assert wanted
    assert wanted.items() <= found.items()
    assert "ASCEND_RT_VISIBLE_DEVICES" not in found  # an example for the user to fill in
    assert not shell.stderr


@pytest.mark.parametrize(("name", "attention"), MODES)
def test_every_line_has_a_word_and_says_what_newer_libraries_ignore(name, attention, capsys):
    text = printed(capsys, name, attention)
    facts = json.loads(printed(capsys, name, attention, "--json"))
    lines = {match[1]: line for line in text.splitlines() if (match := re.search(r"export (\w+)=", line))}
    assert list(lines) == [v["name"] for v in facts["variables"]]
    for variable in facts["variables"]:
        line = lines[variable["name"]]
        assert line.startswith("# export") == variable["choose"]
        assert f"  # {variable['does']}; " in line
        assert (
            ("newer libraries ignore it" in line) == (variable["name"] in IGNORED) == (variable["today"] == "ignored")
        )


def test_what_has_no_known_reader_is_said_so(capsys):
    (line,) = (
        line for line in printed(capsys, "atlas-800i-a2", "paged").splitlines() if "LCCL_ENABLE_FALLBACK" in line
    )
    assert line.endswith("no reader is known")


def test_the_host_needs_none(capsys):
    assert printed(capsys, "host", "paged") == "# host needs no variables\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--device", "atlas-900"], "unknown device 'atlas-900'"), (["--attention", "ring"], "unknown attention ring")],
)
def test_a_device_or_attention_that_is_not_is_refused(words, said, capsys):
    assert main(["env", *words]) == 1
    assert said in capsys.readouterr().err
