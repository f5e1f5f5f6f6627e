"""JSON files of a checkpoint that nobody's program writes: one short message each. Needs torch and transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmc.compiler.cli import main

FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.json",
         "model.safetensors.index.json", "tokenizer.json")  # fmt: skip
TEXTS = {
    "deep list": "[" * 100_000,
    "deep object": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "digits": '{"model_max_length": ' + "9" * 200_000 + "}",
    "twice": '{"eos_token": "a", "eos_token": "b"}',
    "binary": "\x00\x01",
    "a list": "[1, 2]",
}


def run(folder: Path) -> int:
    words = ["--graph", str(folder / "mine.yaml"), "--input-text", "w1", "--dtype", "float32"]
    return main(["run", "--model-path", str(folder), *words, "--max-output-length", "1"])


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", FILES)
def test_a_strange_file_is_named_in_one_short_message(name, kind, checkpoint, tmp_path, capsys):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    (folder / name).write_text(TEXTS[kind])
    assert run(folder) == 1
    said = capsys.readouterr().err
    assert name in said
    assert "Traceback" not in said
    assert len(said) < 600


@pytest.mark.parametrize("line", [TEXTS["deep list"], TEXTS["digits"], '{"prompt": "a", "prompt": "b"}'])
def test_a_strange_line_of_prompts_is_one_short_message(line, checkpoint, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(line)
    words = ["--graph", str(checkpoint / "mine.yaml"), "--input-file", str(tmp_path / "in.jsonl")]
    assert main(["run", "--model-path", str(checkpoint), *words]) == 1
    said = capsys.readouterr().err
    assert "in.jsonl:1" in said
    assert len(said) < 400


def test_no_limit_as_tokenizers_say_it_is_a_number(checkpoint, tmp_path, capsys):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    config = folder / "tokenizer_config.json"
    known = json.loads(config.read_text()) if config.exists() else {}
    config.write_text(json.dumps({**known, "model_max_length": int(1e30), "x": float("inf")}))
    assert run(folder) == 0
