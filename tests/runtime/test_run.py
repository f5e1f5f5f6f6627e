"""`llmc run` as a user calls it, on a tiny random checkpoint, against transformers. Needs torch and transformers."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from llmc.compiler.artifact import make_manifest
from llmc.compiler.cli import main
from llmc.compiler.diagnostics import UserError
from llmc.compiler.memory import needed
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.runtime.engine.runner import make_caches
from llmc.runtime.flags import RUN_FLAGS, add_flags
from llmc.runtime.prompts import read_prompts, replicate

PROMPTS = [[1, 5, 9, 2], [3] * 11, [7]]


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


def test_a_graph_extends_files_of_its_folder_and_of_those_that_are_allowed(checkpoint, tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"extends: {checkpoint / 'mine.yaml'}\nname: other\n")
    words = ["run", "--model-path", str(checkpoint), "--graph", str(mine), "--dtype", "float32"]
    words += ["--input-ids", "1,2", "--max-output-length", "1", "--json"]
    assert main(words) == 1
    assert "E005" in capsys.readouterr().out
    assert main([*words, "--allow-extends", str(tmp_path), str(checkpoint)]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "other"


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
        (["--logits", "some"], "--logits some: expected last or all"),
        (["--logits", "last", "--prompt-logprobs", "1"], "--logits last contradicts --prompt-logprobs"),
        (["--prompt-logprobs", "1"], "--prompt-logprobs: log-probabilities are printed with --json"),
        (["--device", "gpu"], "gpu"),
        (["--load-tokenizer", "False", "--input-ids", "1", "--stop", "x"], "--stop compares text"),
        (["--input_dict", "[]", "--max_loras", "2"], "--max-loras 2: LoRA is not offered"),
        (["--torch-device", "nonsense"], "--torch-device nonsense"),
        (["--torch-device", "meta"], "--torch-device meta"),
        (["--torch-device", "npu"], "this code is for host"),
        (["--device", "atlas-300i-duo"], "has no float32"),
        (["--artifact", "", "--graph", ""], "cannot be used together"),
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
    assert main([*words[:-1], "--device", "atlas-800i-a2"]) == 1
    assert "compiled for device host, and atlas-800i-a2 is asked for" in capsys.readouterr().err


def test_log_probabilities_are_printed_and_ask_for_the_logits_they_need(checkpoint, capsys, tmp_path):
    words = ["--input-ids", "1,5,9,2", "--ignore-eos", "--max-output-length", "3", "--json"]
    assert run(checkpoint, *words) == 0
    (plain,) = json.loads(capsys.readouterr().out)["outputs"]
    assert (plain["logprobs"], plain["prompt_logprobs"]) == (None, None)
    assert run(checkpoint, *words, "--logprobs", "2", "--prompt_logprobs", "0") == 0
    (output,) = json.loads(capsys.readouterr().out)["outputs"]
    assert output["token_ids"] == plain["token_ids"]
    assert [entry[0]["token_id"] for entry in output["logprobs"]] == output["token_ids"]
    assert [entry[0]["rank"] for entry in output["logprobs"]] == [1, 1, 1]  # greedy
    assert [len(entry) for entry in output["logprobs"]] == [2, 2, 2]
    first, *others = output["prompt_logprobs"]
    assert first is None
    assert [entry[0]["token_id"] for entry in others] == [5, 9, 2]
    target = str(tmp_path / "built")
    made = ["compile", str(checkpoint / "mine.yaml"), "--device", "host", "--dtype", "float32", "-o", target]
    run_it = ["run", "--model-path", str(checkpoint), "--artifact", target, *words, "--prompt-logprobs", "0"]
    assert main(made) == 0
    assert main([*run_it, "--logprobs", "-1"]) == 1
    assert "logprobs must be 0 or more" in capsys.readouterr().out
    assert main(run_it) == 1
    assert "compiled for logits last, and all is asked for" in capsys.readouterr().out
    assert main([*made, "--logits", "all"]) == 0
    capsys.readouterr()
    assert main(run_it) == 0
    (again,) = json.loads(capsys.readouterr().out)["outputs"]
    assert again["prompt_logprobs"] == output["prompt_logprobs"]


def test_an_artifact_of_another_epsilon_is_refused_although_all_shapes_agree(checkpoint, capsys, tmp_path):
    other = (checkpoint / "mine.yaml").read_text().replace("eps: 1e-06", "eps: 1e-05")
    put(tmp_path, "other.yaml", other)
    target = str(tmp_path / "built")
    assert main(["compile", str(tmp_path / "other.yaml"), "--device", "host", "--dtype", "float32", "-o", target]) == 0
    assert main(["run", "--model-path", str(checkpoint), "--artifact", target]) == 1
    assert "config.json says rms_norm_eps 1e-06, the model says 1e-05" in capsys.readouterr().err


def test_code_for_a_chip_runs_without_the_chip_and_says_so(checkpoint, capsys):
    words = ["--device", "atlas-800i-a2", "--dtype", "float16", "--max-output-length", "2", "--ignore-eos"]
    assert run(checkpoint, *words) == 0
    said = capsys.readouterr()
    assert "Generate[0] token num: 2" in said.out
    assert "no NPU here" in said.err


def test_limits_that_shorten_answers_are_said(checkpoint, capsys):
    words = ["--input-ids", "5,9", "--ignore-eos", "--max-output-length", "100", "--max-position-embeddings", "1000"]
    assert run(checkpoint, *words) == 0
    said = capsys.readouterr()
    assert "Generate[0] token num: 62" in said.out
    assert "--max-position-embeddings 1000: the model has 64" in said.err
    assert "answers end where a sequence has 64 tokens" in said.err


def test_one_seed_is_one_text_and_another_seed_another(checkpoint, capsys):
    words = ["--input-ids", "5,9", "--ignore-eos", "--max-output-length", "12", "--temperature", "1.5", "--json"]

    def text(seed: str) -> list[int]:
        assert run(checkpoint, *words, "--seed", seed) == 0
        return json.loads(capsys.readouterr().out)["outputs"][0]["token_ids"]

    assert text("3") == text("3") != text("4")


def test_printed_rates_follow_from_the_printed_times(checkpoint, capsys):
    ids = ["1,5,9", "3,3"]
    assert run(checkpoint, "--input-ids", *ids, "--ignore-eos", "--max-output-length", "9", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    t = said["timing"]
    assert t["total_ms"] == pytest.approx(t["prefill_ms"] + 8 * t["decode_ms_per_token"])
    assert t["prefill_tokens_per_s"] == pytest.approx(5 / t["prefill_ms"] * 1e3)
    assert t["decode_tokens_per_s"] == pytest.approx(2 / t["decode_ms_per_token"] * 1e3)
    assert t["tokens_per_s"] == pytest.approx(18 / t["total_ms"] * 1e3)
    # Each token's own times, measured apart, are those of the steps (and a little between them).
    mean = sum(said["outputs"][0]["token_ms"]) / 8
    assert t["decode_ms_per_token"] <= mean


def test_threads_are_as_asked_and_said(checkpoint, capsys):
    before, words = torch.get_num_threads(), ["--input-ids", "5,9", "--ignore-eos", "--max-output-length", "2"]
    try:
        assert run(checkpoint, *words, "--threads", "1", "--json") == 0
        assert json.loads(capsys.readouterr().out)["threads"] == 1
        assert run(checkpoint, *words, "--threads", "2") == 0
        assert ", 2 threads" in " ".join(capsys.readouterr().out.split())
        assert run(checkpoint, *words, "--threads", "1000", "--verbose", "--dtype", "bfloat16") == 0
    finally:
        torch.set_num_threads(before)
    said = " ".join(capsys.readouterr().err.split())
    assert "--threads 1000: with 1 rank on" in said
    assert "1000 threads on" in said
    assert "product and residual bfloat16 1x256x256" in said or "only one" in said
    with pytest.raises(SystemExit):
        run(checkpoint, *words, "--threads", "0")


def test_weights_beyond_memory_are_refused_before_they_are_loaded_unless_the_user_says_more(
    checkpoint, capsys, monkeypatch
):
    monkeypatch.setattr("llmc.runtime.session.free_memory", lambda: 1 << 16)
    words = ["--input-ids", "1", "--max-output-length", "1"]
    assert run(checkpoint, *words) == 1
    said = capsys.readouterr()
    assert "KiB (64.0 KiB of memory are free on this host)" in said.err
    assert "--memory SIZE" in said.err
    assert said.out == ""
    assert run(checkpoint, *words, "--memory", "1GiB") == 0
    assert "the weights need 0.0 GiB of memory, and 0.0 GiB are free" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(checkpoint, *words) == 0
    assert "GiB" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "needs"),
    [
        (["--batch-size", "1000000000"], "1000000000 prompts with their answers are 6000000000 tokens"),
        (["--batch-size", "9" * 40], "prompts with their answers"),
        (["--batch-size", "1000000000", "--memory", "100TiB"], "a smaller --batch-size"),
        (["--num-blocks", "1" + "0" * 20], "--num-blocks "),
        (["--num-blocks", "1000000000", "--tp", "2"], "each of 2 ranks needs at least"),
    ],
)
def test_sizes_beyond_memory_are_refused_at_once(checkpoint, capsys, monkeypatch, words, needs):
    """Before a list is as long as the batch, or a rank starts."""
    monkeypatch.setattr("llmc.runtime.session.free_memory", lambda: 8 << 30)
    monkeypatch.setattr("llmc.runtime.run.make_engine", lambda *args: pytest.fail("weights were loaded"))
    monkeypatch.setattr("llmc.runtime.launch.launch", lambda *args: pytest.fail("ranks were started"))
    assert run(checkpoint, "--input-ids", "1,2,3", "--max-output-length", "3", *words) == 1
    said = capsys.readouterr().err
    assert needs in said
    assert "8.00 GiB of memory are free on this host" in said


def test_sizes_beyond_what_is_used_change_nothing(checkpoint, capsys):
    huge = "1" + "0" * 25
    words = ["--input-ids", "1,5,9", "--ignore-eos", "--json", "--max-input-length", huge]
    words += ["--max-prefill-tokens", huge, "--max-position-embeddings", huge, "--max-output-length"]
    assert run(checkpoint, *words, "5") == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0]["token_ids"] == reference(checkpoint, [1, 5, 9], 5)
    assert run(checkpoint, *words, huge) == 1
    assert "max_tokens must be 1 to 2147483647" in capsys.readouterr().out
    assert (
        run(checkpoint, "--input-ids", ",".join(["1"] * 60), "--ignore-eos", "--max-output-length", "2147483647") == 0
    )
    assert "answers end where a sequence has" in capsys.readouterr().err


def test_a_batch_that_does_not_fit_at_once_takes_turns(checkpoint, capsys, monkeypatch):
    words = ["--input-ids", "1,5,9", "--ignore-eos", "--max-output-length", "3", "--json", "--load-tokenizer", "False"]
    monkeypatch.setattr("llmc.runtime.session.free_memory", lambda: 3 << 19)
    assert run(checkpoint, *words, "--batch-size", "24") == 0
    said = capsys.readouterr()
    assert "1.50 MiB of memory are free on this host: " in said.err
    assert "blocks of cache, so that sequences take turns" in said.err
    assert [o["token_ids"] for o in json.loads(said.out)["outputs"]] == [reference(checkpoint, [1, 5, 9], 3)] * 24


def test_a_flag_given_twice_adds_to_its_list(checkpoint, capsys):
    words = ["--input_text", "w5", "--input-text", "w9", "--ignore-eos", "--max-output-length", "2", "--json"]
    assert run(checkpoint, *words) == 0
    outputs = json.loads(capsys.readouterr().out)["outputs"]
    assert [o["token_ids"] for o in outputs] == [reference(checkpoint, [t], 2) for t in (5, 9)]
    first = f"w{outputs[0]['token_ids'][0]}"
    assert run(checkpoint, "--input-text", "w5", "--stop", first, "--stop", "nothing", "--json") == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0]["finish_reason"] == "stop"


def test_without_a_tokenizer_ids_are_printed_and_end_at_eos(checkpoint, capsys, tmp_path):
    words = ["--load_tokenizer", "False", "--input-ids", "5,9", "--max-output-length", "4"]
    ids = reference(checkpoint, [5, 9], 4)
    assert run(checkpoint, *words, "--stream", "--ignore-eos") == 0
    said = capsys.readouterr()
    assert f"Answer[0]: {','.join(map(str, ids))}" in said.out
    assert "--stream is for the text of one prompt" in said.err
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    put(copy, "generation_config.json", json.dumps({"eos_token_id": [ids[0]]}))
    assert run(copy, *words, "--json") == 0
    output = json.loads(capsys.readouterr().out)["outputs"][0]
    assert (output["token_ids"], output["finish_reason"]) == (ids[:1], "eos")


def test_a_flag_that_has_no_effect_is_said(checkpoint, capsys):
    assert run(checkpoint, "--attention", "flash", "--num-blocks", "3", "--max-output-length", "1") == 0
    assert "--num-blocks is for the paged cache" in capsys.readouterr().err


def test_one_token_has_no_decode_time(checkpoint, capsys):
    assert run(checkpoint, "--input-ids", "1,5,9", "--ignore-eos", "--max-output-length", "1") == 0
    assert "no decode step" in capsys.readouterr().out


def test_a_conversation_goes_through_the_chat_template(checkpoint, capsys, tmp_path):
    messages = [{"role": r, "content": c} for r, c in (("user", "w5"), ("assistant", "w6"), ("user", "w7 w8"))]
    put(tmp_path, "a.jsonl", json.dumps(messages) + "\n" + json.dumps({"messages": messages[:1]}) + "\n")
    template = "{% for m in messages %}{{ m.content }} w1 {% endfor %}"
    words = ["--input-file", str(tmp_path / "a.jsonl"), "--chat-template", template, "--system", "w9"]
    assert run(checkpoint, *words, "--is_chat_model", "--ignore-eos", "--max-output-length", "4", "--json") == 0
    first, second = json.loads(capsys.readouterr().out)["outputs"]
    assert first["token_ids"] == reference(checkpoint, [9, 1, 5, 1, 6, 1, 7, 8, 1], 4)
    assert second["token_ids"] == reference(checkpoint, [9, 1, 5, 1], 4)
    assert run(checkpoint, *words, "--max-output-length", "4") == 0
    assert "Question[0]: w7 w8" in capsys.readouterr().out


def put(path: Path, name: str, text: str | bytes) -> None:
    (path / name).write_bytes(text.encode() if isinstance(text, str) else text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: [f.unlink() for f in p.iterdir()], "config.json': No such file"),
        (lambda p: put(p, ".llmc-convert.json", "{}"), "holds an unfinished conversion"),
        (lambda p: (p / "tokenizer.json").unlink(), "neither tokenizer.json nor tokenizer.model"),
        (lambda p: put(p, "chat_template.jinja", b"\xff"), "chat_template.jinja cannot be read"),
        (lambda p: put(p, "chat_template.json", '{"chat_template": 5}'), "chat_template of"),
        (lambda p: put(p, "generation_config.json", '{"eos_token_id": "x"}'), "must be an id or a list of ids"),
        (lambda p: put(p, "model.safetensors.index.json", '{"weight_map": {"a": 5}}'), "not the name of a file"),
        (
            lambda p: put(p, "model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}'),
            "not the name of a file",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named(checkpoint, capsys, tmp_path, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    damage(copy)
    assert main(["run", "--model-path", str(copy), "--graph", str(checkpoint / "mine.yaml")]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


@pytest.mark.parametrize(("path", "message"), [("nowhere", "does not exist"), ("file", "is not a directory")])
def test_a_model_path_that_is_no_directory_is_the_first_thing_said(capsys, tmp_path, path, message):
    put(tmp_path, "file", "")
    assert main(["run", "--model-path", str(tmp_path / path)]) == 1
    assert message in capsys.readouterr().err


def test_quantised_weights_are_refused_by_their_kind(checkpoint, capsys, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    put(copy, "config.json", json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert run(copy) == 1
    assert "the weights are quantised ('gptq')" in capsys.readouterr().err


def prompts_of(path: Path) -> list:
    parser = argparse.ArgumentParser()
    add_flags(parser, RUN_FLAGS)
    return read_prompts(parser.parse_args(["--input-file", str(path)]))


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("a.txt", "one\n\ntwo, 2\n", ["one", "two, 2"]),
        ("a.csv", "1,2,3\n4,,\n", [[1, 2, 3], [4]]),
        ("a.jsonl", '{"prompt": "p"}\n"s"\n[1, 2]\n{"question": "q", "id": 3}\n', ["p", "s", [1, 2], "q"]),
        ("bom.txt", "\ufeffone\r\ntwo\r\n", ["one", "two"]),
        ("BOM.CSV", "\ufeff1,2\r\n", [[1, 2]]),
        ("separator.jsonl", '{"prompt": "a\u2028b"}\n', ["a\u2028b"]),
        ("form-feed.txt", "a\fb\n", ["a\fb"]),
    ],
)
def test_input_files(tmp_path, name, text, prompts):
    put(tmp_path, name, text)
    assert prompts_of(tmp_path / name) == prompts


def test_a_numpy_file_holds_a_prompt_a_row(tmp_path):
    numpy.save(tmp_path / "a.npy", numpy.array([[1, 2], [3, 4]]))
    assert prompts_of(tmp_path / "a.npy") == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"1,b\n", "a.csv:1 must be token ids"),
        ("a.jsonl", b'"x"\n{"y": 1}\n', "a.jsonl:2 must be a text"),
        ("a.jsonl", b"{\n", "a.jsonl:1: it is not valid JSON"),
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
        ("a.npy", b"nonsense", "cannot be read"),
        ("a.jsonl", b'[{"role": "user", "content": 3}]', "a.jsonl:1 must be a text"),
    ],
)
def test_a_bad_input_file_is_named_with_the_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        prompts_of(tmp_path / name)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (numpy.zeros((0, 3), int), r"holds no token ids: its shape is \[0, 3\]"),
        (numpy.zeros((2, 0), int), r"holds no token ids"),
        (numpy.zeros((2,), float), "whole numbers; found float64"),
        (numpy.array(3), "whole numbers; found int64"),
    ],
)
def test_a_numpy_file_without_token_ids_says_what_it_holds(tmp_path, array, message):
    numpy.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=message):
        prompts_of(tmp_path / "a.npy")


def test_only_a_single_prompt_is_repeated():
    assert replicate(["a"], 3) == ["a"] * 3
    assert replicate(["a", "b"], 3) == ["a", "b"]
    assert replicate(["a"], None) == ["a"]


# Memory ---------------------------------------------------------------------------------------------------------------


def bytes_needed(checkpoint: Path, blocks: int, tokens: int) -> int:
    """Of three sequences that fill at most a block each, by the plan."""
    manifest = make_manifest(compile_model(str(checkpoint / "mine.yaml"), Options(device="host", dtype="float32")))
    found = needed(manifest["memory"], tokens=tokens, batch=3, context=16, positions=64, blocks=blocks)
    return found["total"]


def test_the_cache_has_the_blocks_that_the_memory_holds(checkpoint, capsys, monkeypatch):
    """Three sequences want a block each; with two, or with one, they take turns and say the same. Those that lose their
    block are read again with their answers: 6 + 13 + 3 tokens, not 4 + 11 + 1."""
    ids = [",".join(map(str, p)) for p in PROMPTS]
    words = ["--input-ids", *ids, "--max-output-length", "2", "--ignore-eos", "--json"]
    seen: list[int] = []

    def watched(manifest: Any, sizes: Any, device: Any) -> Any:
        seen.append(sizes["N"])
        return make_caches(manifest, sizes, device)

    monkeypatch.setattr("llmc.runtime.session.make_caches", watched)
    answers = []
    for blocks, tokens in ((1, 22), (2, 22), (3, 16)):
        assert run(checkpoint, *words, "--memory", f"{bytes_needed(checkpoint, blocks, tokens)}B") == 0
        out, err = capsys.readouterr()
        answers.append([o["token_ids"] for o in json.loads(out)["outputs"]])
        assert ("blocks of cache, so that sequences take turns" in err) == (blocks < 3)
    assert seen == [1, 2, 3]
    assert answers == [[reference(checkpoint, p, 2) for p in PROMPTS]] * 3


@pytest.mark.parametrize("words", [[], ["--tp", "2"], ["--attention", "flash"]], ids=["one", "two ranks", "flash"])
@pytest.mark.parametrize("said", ["--memory", "MAX_MEMORY_GB"])
def test_what_does_not_fit_is_refused_before_anything_is_loaded(checkpoint, capsys, monkeypatch, words, said):
    for name in ("session.load_weights", "session.make_caches", "launch.launch"):
        monkeypatch.setattr(f"llmc.runtime.{name}", lambda *a, **k: pytest.fail("too late"))
    if said == "--memory":
        words = [*words, "--memory", "20KiB"]
    else:
        monkeypatch.setenv(said, "1")
        monkeypatch.setattr("llmc.runtime.room.GIB", 20 << 10)
    assert run(checkpoint, "--input-ids", "1,5", *words) == 1
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("may use 20.0 KiB", said, "weights", "a larger --tp", "llmc plan"):
        assert part in err


def test_blocks_that_do_not_fit_are_refused_with_how_many_do(checkpoint, capsys):
    memory = f"{bytes_needed(checkpoint, 2, tokens=6 + 5 + 3)}B"
    words = ["--input-ids", "1,5,9,2", "3,3,3", "7", "--max-output-length", "2", "--num-blocks", "9"]
    assert run(checkpoint, *words, "--memory", memory) == 1
    assert "--num-blocks 2, a larger --tp" in capsys.readouterr().err


def test_memory_beyond_what_is_needed_changes_nothing(checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("MAX_MEMORY_GB", "29")
    assert run(checkpoint, "--input-ids", "1,5", "--max-output-length", "3", "--ignore-eos") == 0
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["--memory", "32"], "", "'32' is not a size"),
        ([], "lots", "MAX_MEMORY_GB=lots: expected a whole number of GiB"),
    ],
)
def test_sizes_of_memory_that_mean_nothing_are_told(checkpoint, capsys, monkeypatch, words, environment, message):
    monkeypatch.setenv("MAX_MEMORY_GB", environment)
    assert run(checkpoint, "--input-ids", "1", *words) == 1
    assert message in capsys.readouterr().err


def test_an_npu_s_profile_says_what_a_rank_may_use_unless_the_user_does(checkpoint, capsys, monkeypatch):
    """300I DUO: MAX_MEMORY_GB 15."""
    monkeypatch.setattr("llmc.runtime.npu.available", lambda: True)
    monkeypatch.setattr("llmc.runtime.room.GIB", 1 << 10)
    words = ["--device", "atlas-300i-duo", "--allow-unsupported", "--dtype", "float16", "--input-ids", "1"]
    assert run(checkpoint, *words) == 1
    assert "may use 15.0 KiB (MAX_MEMORY_GB=15)" in capsys.readouterr().err
    monkeypatch.setenv("MAX_MEMORY_GB", "16")
    assert run(checkpoint, *words) == 1
    assert "may use 16.0 KiB (MAX_MEMORY_GB=16)" in capsys.readouterr().err
