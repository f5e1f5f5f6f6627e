"""Terminals, pipes, locales and signals as they are found in the field. Needs torch and transformers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.transformers]
LLMC = [sys.executable, "-m", "llmc.compiler.cli"]
BARE_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
CHECKPOINT = """
import sys, torch
from pathlib import Path
from llmc.compiler.language.checkpoint import read_config, variant_from_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

path = Path(sys.argv[1])
torch.manual_seed(0)
config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                     vocab_size=256, max_position_embeddings=100000, initializer_range=0.3)
LlamaForCausalLM(config).save_pretrained(path)
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.save(str(path / "tokenizer.json"))
(path / "mine.yaml").write_text(variant_from_config(read_config(path), "mine"))
"""


def llmc(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([*LLMC, *args], capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def shell(command: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", command.replace("llmc", " ".join(LLMC), 1)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """`run` with a checkpoint of one layer that reads and writes bytes."""
    path = tmp_path_factory.mktemp("bytes")
    subprocess.run([sys.executable, "-c", CHECKPOINT, str(path)], check=True, capture_output=True)
    return ["run", "--model-path", str(path), "--graph", str(path / "mine.yaml"), "--ignore-eos"]


def test_a_full_disk_behind_stdout_is_told():
    result = shell("llmc show llama2-7b > /dev/full")
    assert result.returncode == 1
    assert result.stderr == "llmc: the output cannot be written: No space left on device\n"


@pytest.mark.skipif(shutil.which("setpriv") is None and os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("command", ["run --model-path {}", "init --model-path {}", "convert {}", "compile x -o {}"])
def test_a_directory_that_may_not_be_read_is_named(tmp_path, command):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0)
    plain = "setpriv --bounding-set=-dac_override,-dac_read_search" if os.geteuid() == 0 else ""
    result = shell(f"{plain} llmc {command.format(folder).replace('compile x', 'compile smollm2-135m')}")
    assert result.returncode == 1
    assert "Permission denied" in result.stderr
    assert str(folder) in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-"])
def test_closed_streams_are_no_error(closed):
    result = shell(f"llmc check llama2-7b {closed}")
    assert result.returncode == 0
    assert result.stderr == ""


@pytest.mark.parametrize("command", ["show llama2-70b", "schema", "ops --json", "run --help"])
def test_a_reader_that_goes_away_is_no_error(command):
    result = shell(f"llmc {command} | true; echo ${{PIPESTATUS[0]}}")
    assert result.stdout == "0\n"
    assert result.stderr == ""


@pytest.mark.parametrize("env", [BARE_LOCALE, {"PYTHONIOENCODING": "ascii"}, {}], ids=["LC_ALL=C", "ascii", "utf-8"])
def test_text_beyond_ascii_is_the_same_question_in_every_locale(words, env):
    result = llmc(*words, "--input-text", "größe 世界", "--max-output-length", "4", "--json", **env)
    assert result.returncode == 0, result.stderr.decode()
    output = json.loads(result.stdout)["outputs"][0]
    assert output["prompt"] == "größe 世界"
    assert output["prompt_tokens"] == len("größe 世界".encode())


def test_an_ascii_terminal_gets_escapes_instead_of_a_traceback(words, tmp_path):
    result = llmc(*words, "--input-text", "größe", "--max-output-length", "4", PYTHONIOENCODING="ascii")
    assert result.returncode == 0
    assert b"Question[0]: gr\\xf6\\xdfe" in result.stdout
    (tmp_path / "a.yaml").write_text("größe: 1\n", encoding="utf-8")
    result = llmc("check", str(tmp_path / "a.yaml"), PYTHONIOENCODING="ascii")
    assert result.returncode == 1
    assert b"gr\\xf6\\xdfe" in result.stderr


def test_half_a_character_is_named(words, tmp_path):
    (tmp_path / "a.jsonl").write_text('"\\ud800"\n')
    result = llmc(*words, "--input-file", str(tmp_path / "a.jsonl"))
    assert result.returncode == 1
    assert b"is not Unicode" in result.stderr
    result = subprocess.run([*LLMC, *words, "--input-text", b"\xff"], capture_output=True)
    assert result.returncode == 2
    assert b"is not UTF-8" in result.stderr


@pytest.mark.parametrize("when", ["imports", "answer"])
def test_an_interrupt_ends_with_one_word_and_code_130(words, when):
    command = [*LLMC, *words, "--max-output-length", "90000", "--stream"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        if when == "answer":
            process.stdout.readline()
        else:
            time.sleep(0.8)  # torch alone takes longer
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err
    assert "Generate[0]" not in out


def test_torch_does_not_import_a_backend_by_itself(words, tmp_path, monkeypatch):
    """torch_npu is found through such an entry point, and would come before its environment is set."""
    (tmp_path / "early.py").write_text("def load():\n    print('EARLY')\n")
    info = tmp_path / "early-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: early\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nearly = early:load\n")
    path = {"PYTHONPATH": str(tmp_path)}
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)  # `main` in this process may have set it
    control = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, env={**os.environ, **path})
    assert b"EARLY" in control.stdout
    result = llmc(*words, "--max-output-length", "2", **path)
    assert result.returncode == 0
    assert b"EARLY" not in result.stdout
    kept = llmc(*words, "--max-output-length", "2", TORCH_DEVICE_BACKEND_AUTOLOAD="1", **path)
    assert b"EARLY" in kept.stdout  # the user's value wins


def test_a_terminal_sees_progress_on_stderr_and_stdout_stays_clean(words):
    """The bar is for eyes: it goes to a terminal on stderr, never into a file."""
    master, slave = os.openpty()
    command = [*LLMC, *words, "--input-ids", "5", "6", "--load-tokenizer", "False", "--max-output-length", "200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, text=True) as process:
        os.close(slave)
        seen = b""
        with contextlib.suppress(OSError):  # the terminal's end
            while chunk := os.read(master, 4096):
                seen += chunk
        out = process.communicate(timeout=60)[0]
    os.close(master)
    assert b"tokens" in seen
    assert out.count("\n") == 9  # four lines an answer and the closing line
    assert "\x1b" not in out


def test_a_misspelt_flag_is_a_short_message():
    result = llmc("run", "--temperature", "hot")
    assert result.returncode == 2
    assert re.fullmatch(rb"usage: [^\n]*\n[^\n]*--temperature[^\n]*'hot'\n", result.stderr)
    result = llmc("run", "--num_bemas", "2")
    assert result.returncode == 2
    assert b"unrecognized arguments: --num_bemas 2 (did you mean '--num_beams'?)" in result.stderr


def test_init_names_the_variant_after_the_directory_also_when_given_the_file(words, capsys):
    from llmc.compiler.cli import main

    folder = Path(words[2])
    assert main(["init", "--model-path", str(folder / "config.json")]) == 0
    assert f'name: "{folder.name.lower()}"' in capsys.readouterr().out
