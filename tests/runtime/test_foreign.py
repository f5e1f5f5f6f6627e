"""Code that comes with a checkpoint never runs, whatever stdin says. Needs transformers, sentencepiece, gguf."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from tiny_files import BYTES, SMALL, byte_level, gguf_tensors, tiny_model, write_gguf

from llmc.compiler.diagnostics import UserError
from llmc.runtime.convert.convert import convert
from llmc.runtime.engine.chat import CHILD, render_chat
from llmc.runtime.engine.tokenizer import load_tokenizer
from llmc.runtime.foreign import no_questions

CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, ProcessorMixin
class Evil(LlamaTokenizer): pass
class EvilConfig(LlamaConfig): model_type = "evil"
class EvilModel(LlamaForCausalLM): pass
class EvilProcessor(ProcessorMixin): pass
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A sentencepiece vocabulary."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "corpus.txt").write_text("the quick brown fox\nhello world\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=290, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """What the code of `hostile` would make. Somebody answers yes to everything."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1000))
    return tmp_path / "ran"


def hostile(folder: Path, marker: Path, tokenizer: dict, config: dict) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("evil.py", "setup.py", "sitecustomize.py", "conftest.py", "__init__.py"):
        (folder / name).write_text(CODE.format(marker=str(marker)))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


AUTO = {"AutoTokenizer": ["evil.Evil", None]}
SETTINGS = {
    "auto_map of the tokenizer": ({"auto_map": AUTO, "tokenizer_class": "Evil"}, {"model_type": "llama"}),
    "fast and slow": ({"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}, {"model_type": "evil"}),
    "one name": ({"auto_map": {"AutoTokenizer": "evil.Evil"}}, {"model_type": "evil"}),
    "legacy list": ({"auto_map": ["evil.Evil", "evil.Evil"]}, {"model_type": "evil"}),
    "elsewhere": ({"auto_map": {"AutoTokenizer": ["some/repo--evil.Evil", None]}}, {"model_type": "evil"}),
    "known class": ({"auto_map": AUTO, "tokenizer_class": "LlamaTokenizer"}, {"model_type": "llama"}),
    "in config.json": ({"tokenizer_class": "Evil"}, {"model_type": "evil", "auto_map": AUTO}),
    "auto processor": (
        {"tokenizer_class": "AutoProcessor", "auto_map": {"AutoProcessor": "evil.EvilProcessor"}},
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoProcessor": "evil.EvilProcessor"}},
    ),
    "auto model": (
        {"tokenizer_class": "AutoModelForCausalLM"},
        {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "evil.EvilModel", "AutoConfig": "evil.EvilConfig"}},
    ),
    "auto config": (
        {"tokenizer_class": "AutoConfig"},
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}},
    ),
    "class of config.json": ({}, {"model_type": "evil", "tokenizer_class": "AutoTokenizer", "auto_map": AUTO}),
    "no text": ({"tokenizer_class": ["LlamaTokenizer"]}, {"model_type": "llama"}),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_tokenizer_that_needs_code_of_the_checkpoint_is_refused_by_name(tmp_path, model, marker, settings):
    folder = hostile(tmp_path / "w", marker, *settings)
    shutil.copy(model, folder)
    with pytest.raises(UserError, match=r"such code is never run|has no tokenizer of the tokenizer_class"):
        load_tokenizer(folder)
    assert not marker.exists()
    assert sys.stdin.tell() == 0


def test_code_of_the_model_does_not_keep_a_stock_tokenizer_from_being_read(tmp_path, model, marker):
    code = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "auto_map": {"AutoProcessor": "evil.EvilProcessor"}}
    folder = hostile(tmp_path / "w", marker, tokenizer, {"model_type": "evil", "auto_map": code})
    shutil.copy(model, folder)
    ours = load_tokenizer(folder)
    assert ours.decode(ours.encode("hello world")) == "hello world"
    assert not marker.exists()
    assert sys.stdin.tell() == 0


def test_a_tokenizer_json_is_read_without_the_code_beside_it(tmp_path, marker):
    folder = hostile(tmp_path / "w", marker, *SETTINGS["auto_map of the tokenizer"])
    byte_level().save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("the fox")
    assert not marker.exists()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_files_beside_a_gguf_neither_run_nor_change_its_tokenizer(tmp_path, marker, settings, small):
    folder = hostile(tmp_path / "g", marker, *settings)
    shutil.copy(small, folder)
    convert(folder / small.name, tmp_path / "out", progress=False)
    assert not marker.exists()
    assert sys.stdin.tell() == 0
    convert(small, tmp_path / "alone", progress=False)
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return write_gguf(path, SMALL, gguf_tensors(tiny_model(SMALL)), meta=BYTES)


def test_stdin_is_empty_meanwhile_and_whole_afterwards(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    here, there = os.pipe()
    saved = os.dup(0)
    try:
        os.write(there, b"yes\n")
        os.dup2(here, 0)
        with no_questions():
            assert os.read(0, 1) == b""
            with pytest.raises(EOFError):
                input()
        assert os.read(0, 10) == b"yes\n"
        assert input() == "yes"
        os.close(0)  # as by `<&-`
        with no_questions():
            assert os.read(0, 1) == b""
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(0)
    finally:
        os.dup2(saved, 0)
        for number in (here, there, saved):
            os.close(number)


@pytest.mark.processes
def test_python_files_of_the_directory_that_one_stands_in_are_not_imported(tmp_path, monkeypatch):
    for name in ("json", "argparse", "jinja2"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the checkpoint')")
    command = [sys.executable, "-m", "llmc.run", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    monkeypatch.chdir(tmp_path)
    CHILD.end()
    assert render_chat("{{ 1 }}", {}) == "1"
