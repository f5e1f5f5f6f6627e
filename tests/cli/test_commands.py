"""The command line from outside: exit codes, messages, --json, and nothing half-written."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest

from llmc.compiler.cli import COMMANDS, main, make_parser
from llmc.runtime.flags import positive, ranks, whole


def llmc(*args, cwd=None):
    return subprocess.run([sys.executable, "-m", "llmc.compiler.cli", *args], capture_output=True, text=True, cwd=cwd)


def test_compile_writes_the_artifact_under_build_and_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compile", "llama2-13b"]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "build" / "llama2-13b-atlas-800i-a2-float16-paged-tp1"
    assert sorted(p.name for p in folder.iterdir()) == ["decode.py", "manifest.json", "prefill.py"]
    assert out.count("\n") == 1
    assert str(folder.relative_to(tmp_path)) in out


def test_compile_takes_device_dtype_and_attention(tmp_path, capsys):
    out = tmp_path / "out"
    args = ["--device", "atlas-800i-a2", "--dtype", "bfloat16", "--attention", "flash", "-o", str(out), "--json"]
    assert main(["compile", "llama2-13b", *args]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["dtype"], facts["attention"], facts["path"]) == ("bfloat16", "flash", str(out))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["caches"]["layers.0.attn.core.k_cache"]["shape"] == [1, "B", "S", 5120]


@pytest.mark.parametrize("name", ["build", "types", "phase", "swiglu", "add_norm", "lower", "segment"])
def test_until_a_pass_prints_the_graph_and_writes_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compile", "smollm2-135m", "--until", name, "--print"]) == 0
    assert "attn.qkv" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_until_a_pass_says_that_nothing_was_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compile", "smollm2-135m", "--until", "types"]) == 0
    assert capsys.readouterr().out == "smollm2-135m: ok up to the pass types; nothing is written\n"
    assert main(["compile", "smollm2-135m", "--until", "types", "--print", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["ok"], facts["until"]) == (True, "types")
    assert "attn.qkv" in facts["graphs"]["model"]


def test_json_is_one_object_also_when_the_graph_is_printed(tmp_path, capsys):
    assert main(["compile", "smollm2-135m", "--print", "--json", "-o", str(tmp_path / "out")]) == 0
    assert sorted(json.loads(capsys.readouterr().out)["graphs"]) == ["decode", "prefill"]


@pytest.mark.parametrize("length", ["0", "-3", "x"])
def test_the_demo_refuses_a_length_that_is_none(length, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--max-output-length", length])
    assert stop.value.code == 2
    assert f"'{length}' is not a whole number of at least 1" in capsys.readouterr().err


def test_a_bad_file_gives_place_caret_and_exit_code_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("extends: families/llama\nnaem: bad\n")
    assert main(["compile", "bad.yaml"]) == 1
    err = capsys.readouterr().err
    assert "bad.yaml:2:1" in err
    assert "^^^^" in err
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]


def test_problems_as_json_are_one_object_on_stdout(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("extends: families/lama\n")
    assert main(["check", str(path), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is False
    assert result["problems"][0]["code"] == "E005"
    assert result["problems"][0]["line"] == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["compile", "llama2-7b", "--until", "sharding"], "unknown pass"),
        (["compile", "llama2-7b", "--device", "atlas-800i"], "did you mean 'atlas-800i-a2'"),
        (["compile", "llama2-7b", "--dtype", "float8"], "float8"),
        (["compile", "llama2-7b", "--tp", "3"], "world size 3"),
        (["compile", "llama2-7b", "--layers-per-segment", "-1"], "layers-per-segment"),
        (["compile", "no-such-model"], "no-such-model"),
        (["compile", "graphs"], "cannot read 'graphs'"),
        (["ops", "linaer"], "did you mean 'linear'"),
        (["run", "--model-path", "no/such/folder"], "no/such/folder"),
        (["convert", "no/such/folder"], "no/such/folder"),
        (["init", "--model-path", "no/such/folder"], "no/such/folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_message_that_names_it(args, words, tmp_path):
    result = llmc(*args, cwd=tmp_path)
    assert result.returncode in (1, 2)
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["compile", "smollm2-135m", "-o", str(tmp_path / "file" / "out")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_show_names_types_operations_and_segments(capsys):
    assert main(["show", "llama2-7b"]) == 0
    out = capsys.readouterr().out
    for words in ("float16 [T, 4096]", "PagedAttention", "SelfAttention", "segment of", "hidden"):
        assert words in out


def test_ops_lists_every_operator_and_explains_one(capsys):
    assert main(["ops"]) == 0
    assert "attention" in capsys.readouterr().out
    assert main(["ops", "attention"]) == 0
    assert "kv_heads" in capsys.readouterr().out


def test_schema_is_json(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["$schema"]


def test_init_prints_a_variant_that_compiles(tmp_path, capsys):
    config = {
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 128, "intermediate_size": 256, "vocab_size": 200,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "float16", "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["init", "--model-path", str(tmp_path), "--name", "mine"]) == 0
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    assert main(["check", str(path)]) == 0


def test_a_checkpoint_taken_for_a_description_is_pointed_to_init(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["compile", str(tmp_path)]) == 1
    assert f"llmc init --model-path {tmp_path}" in capsys.readouterr().err


def test_the_closing_line_says_small_weights_in_mib(tmp_path, capsys):
    assert main(["check", "smollm2-135m"]) == 0
    assert "weights 256.57 MiB" in capsys.readouterr().out  # 134,515,008 published parameters of 2 bytes


def test_output_into_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m llmc.compiler.cli show llama2-70b | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in result.stderr


def test_what_the_model_does_not_offer_is_refused_with_what_it_offers_unless_allowed(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    offer = "support: {atlas-800i-a2: {tp: [8], dtypes: [float16], attention: [paged]}}"
    path.write_text(f"extends: llama2-70b\nname: mine\n{offer}\n")
    args = ["check", str(path), "--dtype", "bfloat16", "--attention", "flash", "--tp", "4"]
    assert main(args) == 1
    err = capsys.readouterr().err
    for words in ("world size 4 (offered: 8)", "dtype bfloat16 (offered: float16)", "attention flash (offered: paged)"):
        assert words in err
    assert "--allow-unsupported" in err
    assert main([*args, "--allow-unsupported"]) == 0


def test_the_default_world_size_is_the_smallest_that_the_model_offers(tmp_path, capsys):
    assert main(["compile", "llama2-70b", "-o", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["world_size"] == 8


def test_a_flag_means_one_thing_in_every_command():
    """Of one name: a switch or a value, and of values, numbers, paths or words."""
    kinds: dict[str, dict[str, list[str]]] = {}
    for command in COMMANDS:
        for action in flags_of(command):
            for word in action.option_strings:
                kinds.setdefault(word, {}).setdefault(kind_of(action), []).append(command)
    assert kinds.pop("--batch") == {"number": ["plan"], "words of batch": ["bench"]}  # bench: several, as in 1,4
    assert {word: found for word, found in kinds.items() if len(found) > 1} == {}
    assert len(kinds["--json"]["switch"]) == len(COMMANDS)


def flags_of(command):
    parser = make_parser([command])
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[command]._actions


def kind_of(action):
    if action.nargs == 0:
        return "switch"
    numbers = (int, float, positive, ranks, whole)
    return "number" if action.type in numbers else f"words of {action.dest}"  # a path is words to `run`
