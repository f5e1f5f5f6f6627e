"""The flags of `llmc run`. Needs nothing but Python."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from llmc.compiler.diagnostics import UserError
from llmc.runtime.flags import (
    RUN_FLAGS,
    add_flags,
    attention_of,
    check_run_flags,
    dtype_of,
    sampling_of,
    spellings,
    words_of,
)

# Flags of the seed document and of the seed-era scripts, each with a value that its users pass.
OLD = {
    "model_path": "w",
    "input_text": "hello",
    "input_texts": "hello",
    "input_file": "f.jsonl",
    "input_ids": "1,2,3",
    "max_input_length": "512",
    "max_output_length": "20",
    "max_position_embeddings": "2048",
    "max_prefill_tokens": "4096",
    "batch_size": "1",
    "max_batch_size": "1",
    "block_size": "128",
    "is_flash_causal_lm": "True",
    "is_bf16": None,
    "is_flash_model": None,
    "num_beams": "1",
    "temperature": "1.0",
    "top_k": "1",
    "top_p": "0.0",
    "length_penalty": "1.0",
    "repetition_penalty": "1.0",
    "presence_penalty": "0.0",
    "frequency_penalty": "0.0",
    "use_refactor": None,
    "ignore_eos": None,
    "is_chat_model": None,
    "chat_template": "{{ messages }}",
}


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser, RUN_FLAGS)
    return parser.parse_args(list(words))


@pytest.mark.parametrize("name", OLD)
def test_old_flags_parse_alike_in_both_spellings(name):
    value = [] if OLD[name] is None else [OLD[name]]
    both = [parse(word, *value) for word in ("--" + name, "--" + name.replace("_", "-"))]
    assert both[0] == both[1]
    assert both[0] != parse() or name in ("block_size", "num_beams") or "penalty" in name or OLD[name] == "20"


def test_every_flag_has_a_help_and_a_source_and_one_destination():
    assert all(flag.help and flag.source for flag in RUN_FLAGS)
    words = [word for flag in RUN_FLAGS for name in (flag.name, *flag.aliases) for word in spellings(name)]
    assert len(set(words)) == len(words)


def test_parsing_needs_no_torch():
    code = "import sys, llmc.runtime.flags; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_defaults_are_accepted_and_greedy():
    args = parse("--model-path", "w")
    check_run_flags(args)
    chosen = sampling_of(args)
    assert (chosen["top_k"], chosen["temperature"], chosen["top_p"], chosen["max_tokens"]) == (1, 1.0, 0.0, 20)


@pytest.mark.parametrize(
    ("words", "top_k"),
    [
        (["--temperature", "1.0", "--top_p", "0.0"], 1),
        (["--temperature", "0.7"], 0),
        (["--top-p", "0.9"], 0),
        (["--seed", "1"], 0),
        (["--temperature", "0.7", "--top_k", "1"], 1),
        (["--top_k", "50"], 50),
        (["--do_sample", "False", "--top_k", "50"], 1),
        (["--do_sample", "True"], 0),
    ],
)
def test_asking_to_sample_lifts_only_the_default_of_top_k(words, top_k):
    assert sampling_of(parse(*words))["top_k"] == top_k


@pytest.mark.parametrize(
    ("words", "attention"),
    [
        ([], "paged"),
        (["--attention", "flash"], "flash"),
        (["--is_flash_causal_lm", "False"], "flash"),
        (["--is_flash_causal_lm", "True"], "paged"),
        (["--is_flash_causal_lm"], "paged"),
        (["--is_flash_model"], "flash"),
        (["--is_flash_model", "True", "--attention", "paged"], "paged"),
    ],
)
def test_attention_follows_the_old_scripts_meaning(words, attention):
    assert attention_of(parse(*words)) == attention


def test_is_bf16_is_a_dtype():
    assert dtype_of(parse("--is_bf16")) == "bfloat16"
    assert dtype_of(parse()) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_beams", "4"], "--num-beams 4: beam search is not offered"),
        (["--length-penalty", "2"], "--length-penalty 2.0: it belongs to beam search"),
        (["--block_size", "64"], "--block-size 64: the generated code works on cache blocks of 128"),
        (["--distributed-enable"], "torchrun --nnodes N"),
        (["--trust_remote_code"], "code of a checkpoint is never run"),
        (["--is-bf16", "--dtype", "float16"], "--is-bf16 contradicts --dtype float16"),
        (["--attention", "flash", "--is_flash_causal_lm", "True"], "contradiction: --attention asks for flash"),
        (["--graph", "g.yaml", "--artifact", "d"], "--graph and --artifact cannot be used together"),
        (["--attention", "sparse"], "--attention sparse: expected paged or flash"),
        (["--input_text", "a", "--input_ids", "1"], "--input-text and --input-ids cannot be used together"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_reason(words, message):
    with pytest.raises(UserError) as error:
        check_run_flags(parse("--model-path", "w", *words))
    assert message in str(error.value)


def test_all_refusals_come_together():
    with pytest.raises(UserError) as error:
        check_run_flags(parse("--num-beams", "2", "--dp", "8"))
    assert all(word in str(error.value) for word in ("--num-beams", "--dp", "--model-path is needed"))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--input-text", "-x $$5 ${local_rank}", "=", "", "--stop", "a", "b c", "--chat", "--top-k", "-1"],
        ["--is-flash-model", "--use_refactor", "--do-sample", "False", "--load-tokenizer", "False", "--tp", "2"],
        ["--temperature", "0.1", "--seed", "9223372036854775807", "--repetition-penalty", "1e-5", "--dtype", "float16"],
    ],
)
def test_ranks_are_started_with_the_flags_that_were_given(words):
    given = parse(*words)
    assert parse(*words_of(given, RUN_FLAGS)) == given


def test_minus_one_rank_is_the_old_word_for_not_given_and_zero_is_a_mistake(capsys):
    assert (parse("--tp", "-1").tp, parse("--world_size", "4").tp, parse().tp) == (-1, 4, None)
    with pytest.raises(SystemExit):
        parse("--tp", "0")
    assert "'0' is not a number of ranks" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--max-output-length", "0"], ["--batch-size", "two"], ["--do_sample", "maybe"]])
def test_bad_values_end_with_usage_and_code_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*words)
    assert end.value.code == 2
    assert repr(words[1]) in capsys.readouterr().err
