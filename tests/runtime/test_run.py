"""`llmc run` as a user calls it, on a tiny random checkpoint, against transformers. Needs torch and transformers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy
import pytest
import torch
from llmc.compiler.checkpoint import read_config, variant_from_config
from llmc.compiler.cli import main
from llmc.compiler.diagnostics import UserError
from llmc.runtime.flags import add_run_flags
from llmc.runtime.run import read_prompts, replicate
from tokenizers import Tokenizer, models, pre_tokenizers

PROMPTS = [[1, 5, 9, 2], [3] * 11, [7]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A llama of 2 layers whose tokens are the words w0 to w63."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "mine.yaml").write_text(variant_from_config(read_config(path), "mine"))
    return path


def run(checkpoint: Path, *words: str) -> int:
    graph = ["--graph", str(checkpoint / "mine.yaml")]
    return main(["run", "--model-path", str(checkpoint), *graph, "--dtype", "float32", *words])


def reference(checkpoint: Path, prompt: list[int], count: int) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    made = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_a_batch_of_token_ids_gives_the_tokens_of_transformers(checkpoint, capsys, attention):
    ids = [",".join(map(str, p)) for p in PROMPTS]
    assert (
        run(
            checkpoint,
            "--attention",
            attention,
            "--input_ids",
            *ids,
            "--max_output_length",
            "12",
            "--ignore_eos",
            "--json",
        )
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert [o["token_ids"] for o in said["outputs"]] == [reference(checkpoint, p, 12) for p in PROMPTS]
    assert [o["prompt_tokens"] for o in said["outputs"]] == [4, 11, 1]
    assert all(len(o["token_ms"]) == 11 for o in said["outputs"])
    assert said["attention"] == attention


def test_lines_of_the_old_scripts_and_one_prompt_repeated(checkpoint, capsys):
    assert (
        run(checkpoint, "--input_text", "w5 w9", "--batch_size", "2", "--max_output_length", "4", "--ignore_eos") == 0
    )
    out = capsys.readouterr().out.splitlines()
    answer = " ".join(f"w{t}" for t in reference(checkpoint, [5, 9], 4))
    for i in range(2):
        assert f"Question[{i}]: w5 w9" in out
        assert f"Answer[{i}]: {answer}" in out
        assert f"Generate[{i}] token num: 4" in out
    assert out[-1].startswith("prefill ")


def test_streamed_text_is_the_answer(checkpoint, capsys):
    words = ["--input-text", "w5 w9", "--max-output-length", "6", "--ignore-eos"]
    assert run(checkpoint, *words) == 0
    plain = capsys.readouterr().out.splitlines()
    assert run(checkpoint, *words, "--stream") == 0
    streamed = capsys.readouterr().out.splitlines()
    assert streamed[:3] == plain[:3]


def test_a_small_cache_and_bfloat16_work(checkpoint, capsys):
    ids = ["1,5,9,2", "3,3,3"]
    assert run(checkpoint, "--is_bf16", "--dtype", "bfloat16", "--input-ids", *ids, "--num-blocks", "1", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["outputs"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-beams", "2"], "beam search is not offered"),
        (["--top-p", "3"], "top_p must be within"),
        (["--input-ids", "1,x"], "--input-ids must be token ids"),
        (["--input-ids", "999"], "token id 999; the model knows 0 to 63"),
        (["--input-ids", ",".join(["1"] * 64)], "64 tokens, but a sequence can have 64 in all"),
        (["--input-file", "nowhere.txt"], "--input-file nowhere.txt cannot be read"),
        (["--chat"], "no chat template"),
        (["--load-tokenizer", "False"], "text needs a tokenizer"),
        (["--dtype", "float8"], "float8"),
        (["--device", "gpu"], "gpu"),
        (["--torch-device", "nonsense"], "--torch-device nonsense"),
    ],
)
def test_a_mistake_is_one_message_on_stderr_and_code_1(checkpoint, capsys, words, message):
    assert run(checkpoint, *words) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_an_artifact_is_run_as_it_was_compiled(checkpoint, capsys, tmp_path):
    target = str(tmp_path / "built")
    made = ["compile", str(checkpoint / "mine.yaml"), "--device", "host", "--dtype", "float32", "--attention", "flash"]
    assert main([*made, "-o", target]) == 0
    words = [
        "run",
        "--model-path",
        str(checkpoint),
        "--artifact",
        target,
        "--input-ids",
        "1,5",
        "--ignore-eos",
        "--json",
    ]
    capsys.readouterr()
    assert main([*words, "--max-output-length", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0]["token_ids"] == reference(checkpoint, [1, 5], 5)
    assert main([*words[:-1], "--dtype", "bfloat16", "--attention", "paged"]) == 1
    said = capsys.readouterr().err
    assert "compiled for attention flash, and paged is asked for" in said
    assert "compiled for dtype float32, and bfloat16 is asked for" in said
    assert main([*words[:3], "--artifact", "nowhere"]) == 1
    assert "nowhere is not a directory" in capsys.readouterr().err


def test_a_path_that_is_no_checkpoint(capsys, tmp_path):
    assert main(["run", "--model-path", str(tmp_path)]) == 1
    assert "neither tokenizer.json nor tokenizer.model" in capsys.readouterr().err


def prompts_of(path: Path) -> list:
    parser = argparse.ArgumentParser()
    add_run_flags(parser)
    return read_prompts(parser.parse_args(["--input-file", str(path)]))


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("a.txt", "one\n\ntwo, 2\n", ["one", "two, 2"]),
        ("a.csv", "1,2,3\n4,,\n", [[1, 2, 3], [4]]),
        ("a.jsonl", '{"prompt": "p"}\n"s"\n[1, 2]\n{"question": "q", "id": 3}\n', ["p", "s", [1, 2], "q"]),
    ],
)
def test_input_files(tmp_path, name, text, prompts):
    (tmp_path / name).write_text(text)
    assert prompts_of(tmp_path / name) == prompts


def test_a_numpy_file_holds_a_prompt_a_row(tmp_path):
    numpy.save(tmp_path / "a.npy", numpy.array([[1, 2], [3, 4]]))
    assert prompts_of(tmp_path / "a.npy") == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"1,b\n", "a.csv:1 must be token ids"),
        ("a.jsonl", b'"x"\n{"y": 1}\n', "a.jsonl:2 must be a text"),
        ("a.jsonl", b"{\n", "a.jsonl:1 is not JSON"),
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
        ("a.npy", b"nonsense", "cannot be read"),
    ],
)
def test_a_bad_input_file_is_named_with_the_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        prompts_of(tmp_path / name)


def test_only_a_single_prompt_is_repeated():
    assert replicate(["a"], 3) == ["a"] * 3
    assert replicate(["a", "b"], 3) == ["a", "b"]
    assert replicate(["a"], None) == ["a"]
