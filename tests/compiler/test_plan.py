"""`llmc plan`: bytes, traffic, FLOPs and times against counts by hand, and the bounds of the feature matrix."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmc.compiler.cli import main
from llmc.compiler.diagnostics import UserError
from llmc.compiler.memory import last_true, needed
from llmc.compiler.options import Options
from llmc.compiler.reports import plan as planning
from llmc.compiler.reports.plan import Workload, plan
from llmc.compiler.reports.roofline import Cost, seconds_by_bound
from llmc.compiler.target.device import Board, Link, device, device_names, parse_size

MATRIX = Path(os.environ.get("LLMC_FEATURE_MATRIX", Path(__file__).parents[2] / "../shared/data/feature-matrix.yaml"))
GIVEN = pytest.mark.skipif(not MATRIX.is_file(), reason=f"no feature matrix at {MATRIX} (set LLMC_FEATURE_MATRIX)")
GROUPS = (1, 2, 4, 8)  # world sizes that the seed deploys
# The least that a deployment must do: one sequence of LLaMA-1's whole context, half of it prompt.
LEAST = Workload(batch=1, prompt=1024, answer=1024)
GIB = 2**30

SMALL = """
extends: families/llama
name: small
sizes: {hidden: 64, ffn: 48, layers: 2, heads: 4, kv_heads: 2, vocab: 50, max_positions: 64}
"""


@pytest.fixture
def small(tmp_path):
    def write(more: str = "") -> str:
        path = tmp_path / "small.yaml"
        path.write_text(SMALL + more)
        return str(path)

    return write


def row(model: str, size: int, work: Workload = LEAST, name: str = "atlas-800i-a2", **options: Any) -> dict[str, Any]:
    (found,) = plan(model, Options(device=name, world_size=size, **options), work)["sizes"]
    return found


# The feature matrix ---------------------------------------------------------------------------------------------------


def matrix() -> Mapping[str, Any]:
    return yaml.safe_load(MATRIX.read_text())["models"] if MATRIX.is_file() else {}


def test_a_card_of_32_gb_leaves_what_the_original_stack_leaves():
    """RESERVED_MEMORY_GB 3 of 32, and MAX_MEMORY_GB 29 in its scripts; 15 of a 300I DUO chip's memory."""
    found = {name: planning.budget_of(device(name), None, None)["usable_bytes"] for name in device_names()}
    assert found == {"atlas-800i-a2": 29 * GIB, "atlas-300i-duo": 15 * GIB, "host": None}


@GIVEN
@pytest.mark.parametrize("model", matrix())
def test_the_least_world_size_on_800i_a2_is_the_least_that_fits_32_gb(model):
    """float16, paged, one sequence of 2048 tokens: of 1, 2, 4, 8 the matrix starts at the first one that fits."""
    offered = matrix()[model]["seed"]["atlas-800i-a2"]
    least, smaller = min(offered), [size for size in GROUPS if size < min(offered)]
    assert row(model, least)["fits"]
    assert not smaller or not row(model, smaller[-1])["fits"]


@GIVEN
@pytest.mark.parametrize("model", matrix())
def test_300i_duo_starts_at_one_card_and_holds_no_model_beyond_13b_on_two(model):
    """15 GB a chip. 13B fits from 2 chips on; 7B would fit on one, but the seed deploys whole cards, two chips each
    (ASCEND_RT_VISIBLE_DEVICES names at least 2), so there the matrix follows from the card, not from the memory. What
    the matrix leaves out does not fit on its largest group, two cards."""
    offered = matrix()[model]["seed"]["atlas-300i-duo"]
    card = device("atlas-300i-duo").ranks_per_card
    if not offered:
        assert not row(model, 2 * card, name="atlas-300i-duo")["fits"]
        return
    assert min(offered) == card
    assert row(model, card, name="atlas-300i-duo")["fits"]
    assert row(model, 1, name="atlas-300i-duo")["fits"] == model.endswith("7b")


# The reserve ----------------------------------------------------------------------------------------------------------

MIB = 2**20


def lines(facts: Mapping[str, Any]) -> dict[str, int]:
    return {line["name"]: line["bytes"] for line in facts["reserve"]}


@pytest.mark.parametrize(
    ("options", "environment", "buffers"),
    [
        ({}, {}, {"lccl buffers": 200 * MIB}),
        ({"world_size": 1}, {}, {}),
        ({"backend": "hccl"}, {}, {"hccl buffers": 2 * 200 * MIB}),
        ({"backend": "hccl", "attention": "flash"}, {}, {"hccl buffers": 2 * 120 * MIB}),
        ({"backend": "hccl", "attention": "flash"}, {"HCCL_BUFFSIZE": "64"}, {"hccl buffers": 2 * 64 * MIB}),
        ({"device": "atlas-300i-duo", "world_size": 2}, {"HCCL_BUFFSIZE": "300"}, {"hccl buffers": 2 * 300 * MIB}),
    ],
)
def test_the_reserve_has_named_lines_with_sources_and_a_rest(small, options, environment, buffers):
    """Buffers of collectives are those of the backend, and a rank alone has none."""
    facts = plan(small(), Options(**options), environment=environment)
    scratch = {} if options.get("device") == "atlas-300i-duo" else {"kernel scratch": 188 * MIB}
    known = {**scratch, "ATB context pools": 32 * 3 * MIB, **buffers}
    reserve = facts["memory"]["reserve_bytes"]
    assert lines(facts) == {**known, "the rest": reserve - sum(known.values())}
    assert all(line["source"] for line in facts["reserve"][:-1])
    assert [line["name"] for line in facts["reserve"] if line["several_ranks"]] == list(buffers)


def test_the_lines_of_the_reserve_are_printed_and_are_in_the_json(small, capsys):
    _, out, _ = run(capsys, small())
    assert (
        "reserved: kernel scratch 188.00 MiB, ATB context pools 96.00 MiB, lccl buffers 200.00 MiB (several ranks), "
        "the rest 2.53 GiB"
    ) in out.splitlines()
    _, out, _ = run(capsys, small(), "--json")
    assert sum(lines(json.loads(out)).values()) == 3 * GIB
    assert "reserved:" not in run(capsys, small(), "--device", "host")[1]


def test_the_reserve_is_never_less_than_its_lines_unless_the_user_says_so(small, capsys, monkeypatch):
    words = [small(), "--backend", "hccl"]
    monkeypatch.setenv("HCCL_BUFFSIZE", "2000")
    facts = json.loads(run(capsys, *words, "--json")[1])
    assert facts["memory"]["reserve_bytes"] == (188 + 96 + 2 * 2000) * MIB
    assert "the rest" not in lines(facts)
    facts = json.loads(run(capsys, *words, "--reserve", "1GiB", "--json")[1])
    assert facts["memory"]["reserve_bytes"] == GIB
    assert "which is 3.18 GiB more than that" in run(capsys, *words, "--reserve", "1GiB")[1]
    for text in ("much", "0", "-1", "1.5"):
        monkeypatch.setenv("HCCL_BUFFSIZE", text)
        code, _, err = run(capsys, *words)
        assert (code, f"HCCL_BUFFSIZE={text}: expected a whole number" in err) == (1, True)
    assert run(capsys, small())[0] == 0, "lccl does not read it"


# Numbers by hand ------------------------------------------------------------------------------------------------------


def test_a_rank_of_llama2_70b_over_eight():
    """hidden 8192, ffn 28672, 80 layers, 64 heads of 128, 8 kv heads, vocabulary 32000, float16."""
    found = row("llama2-70b", 8)
    layer = (8 + 1 + 1) * 128 * 8192 + 8 * 128 * 8192 + 3 * 28672 // 8 * 8192 + 2 * 8192
    products = 80 * (layer - 2 * 8192) + 32000 // 8 * 8192
    assert found["weight_bytes"] == 2 * (80 * layer + 32000 // 8 * 8192 + 32000 * 8192 + 8192)
    assert found["cache_bytes_per_token"] == 2 * 80 * 1 * 128 * 2
    assert found["needed_bytes"]["cache"] == 2048 * found["cache_bytes_per_token"]
    assert sum(size for key, size in found["needed_bytes"].items() if key != "total") == found["needed_bytes"]["total"]

    decode, prefill = found["decode"], found["prefill"]
    score_and_value = 2 * 2 * 8 * 128  # FLOPs of a position and one before it
    assert decode["flops"] == 2 * products + 80 * score_and_value * 2048
    pairs = 1024 * 1025 // 2
    head = 32000 // 8 * 8192  # lm_head reads the last token only
    assert prefill["flops"] == 2 * (1024 * (products - head) + head) + 80 * score_and_value * pairs

    summed, gathered = 2 * 8192 * 2, 32000 // 8 * 2  # after o and down; a rank's logits
    assert decode["wire_bytes_per_token_and_layer"] == summed * 2 * 7 / 8
    assert (decode["all_reduce_bytes"], decode["all_gather_bytes"]) == (80 * summed * 2 * 7 // 8, 7 * gathered)
    assert (prefill["all_reduce_bytes"], prefill["all_gather_bytes"]) == (
        1024 * decode["all_reduce_bytes"],
        7 * gathered,
    )


def test_padding_and_copies_of_kv_heads_are_in_the_numbers():
    """52 heads over 8 ranks are 7 a rank, four of them zeros; 8 kv heads over 5 ranks are 2 a rank."""
    wide, even = row("llama-33b", 8), row("llama-33b", 4)
    assert even["cache_bytes_per_token"] == 2 * 60 * 13 * 128 * 2
    assert wide["cache_bytes_per_token"] == 2 * 60 * 7 * 128 * 2
    assert 8 * wide["decode"]["flops"] > 4 * even["decode"]["flops"]
    assert row("llama2-70b", 5)["cache_bytes_per_token"] == 2 * 80 * 2 * 128 * 2


def test_nz_weights_are_counted_in_whole_blocks(small):
    """Of 50 rows of lm_head and 48 of ffn a rank of 300I DUO stores 64 and 96, multiples of 16 as 2 * 48 is."""
    nd, nz = (row(small(), 1, Workload(), name) for name in ("atlas-800i-a2", "atlas-300i-duo"))
    assert nz["weight_bytes"] - nd["weight_bytes"] == 2 * 64 * (64 - 50)
    assert nz["activation_bytes_per_token"]["prefill"] > nd["activation_bytes_per_token"]["prefill"]


def test_a_model_without_attention_has_no_cache(tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_text(
        "name: plain\ndtype: float16\nsizes: {max_positions: 64}\nrope: {theta: 10000.0}\n"
        "graph:\n  e: {op: embedding, ids: token_ids, rows: 50, width: 32, weight: e}\noutputs: {logits: e}\n"
    )
    found = row(str(path), 1, Workload())
    assert (found["cache_bytes_per_token"], found["needed_bytes"]["cache"]) == (0, 0)
    assert found["weight_bytes"] == 50 * 32 * 2


def test_one_rank_sends_nothing(small):
    found = row(small(), 1, Workload())
    assert (found["prefill"]["wire_bytes"], found["decode"]["wire_bytes"]) == (0, 0)


def test_the_fused_product_and_sum_sends_what_the_sum_alone_does(small):
    fused, plain = (row(small(), 2, Workload(), fusions=f) for f in (None, ("swiglu", "add_norm")))
    assert fused["prefill"]["wire_bytes"] == plain["prefill"]["wire_bytes"] > 0
    assert fused["prefill"]["flops"] == plain["prefill"]["flops"]


def test_prompts_beyond_the_budget_take_several_steps(small):
    together = row(small(), 2, Workload(batch=5, prompt=20, answer=10))
    apart = row(small(), 2, Workload(batch=5, prompt=20, answer=10, prefill_tokens=45))
    assert (together["prefill"]["steps"], apart["prefill"]["steps"]) == (1, 3)
    assert together["prefill"]["flops"] == apart["prefill"]["flops"]
    assert together["prefill"]["wire_bytes"] == apart["prefill"]["wire_bytes"]
    assert together["prefill"]["memory_bytes"] < apart["prefill"]["memory_bytes"], "weights are read once a step"
    assert together["needed_bytes"]["step_tensors"] > apart["needed_bytes"]["step_tensors"]


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_a_decode_step_reads_the_weights_once_and_the_cache_of_every_sequence(small, attention):
    few, more = (row(small(), 1, Workload(batch=b, prompt=20, answer=20), attention=attention) for b in (2, 3))
    embedding = 50 * 64 * 2  # of which the rows of the tokens are read
    cache = 40 * few["cache_bytes_per_token"]
    assert few["decode"]["memory_bytes"] > few["weight_bytes"] - embedding + 2 * cache
    assert cache < more["decode"]["memory_bytes"] - few["decode"]["memory_bytes"] < 2 * cache


def test_an_operation_takes_as_long_as_the_slowest_of_its_demands():
    board = Board(memory=1, flops=100.0, bandwidth=10.0)
    costs = [Cost(flops=300, memory=20), Cost(flops=100, memory=50, wire=3), Cost(wire=12, memory=10)]
    every, shared = Link(bandwidth=2.0, each_peer=True), Link(bandwidth=2.0, each_peer=False)
    assert seconds_by_bound(costs, board, shared, 4) == {"compute": 3.0, "memory": 5.0, "wire": 6.0}
    assert seconds_by_bound(costs, board, every, 4) == {"compute": 3.0, "memory": 5.0, "wire": 2.0}


# What fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_the_largest_batch_and_the_longest_context_fit_and_one_more_does_not(attention):
    memory, work = parse_size("16GiB"), Workload(batch=3, prompt=700, answer=300)
    options = Options(world_size=2, attention=attention)
    (found,) = plan("llama2-7b", options, work, memory=memory)["sizes"]
    batch, context = found["largest_batch"], found["largest_context"]
    assert batch > 3
    assert context == 4096, "where memory does not end it, the model's positions do"
    for size, fits in ((batch, True), (batch + 1, False)):
        (other,) = plan("llama2-7b", options, Workload(batch=size, prompt=700, answer=300), memory=memory)["sizes"]
        assert other["fits"] == fits


def test_less_memory_never_holds_more():
    contexts = []
    for memory in ("9GiB", "11GiB", "13GiB"):
        options = Options(world_size=2)
        (found,) = plan("llama2-7b", options, Workload(batch=4, prompt=512), memory=parse_size(memory))["sizes"]
        contexts.append((found["fits"], found["largest_batch"], found["largest_context"]))
    assert contexts == sorted(contexts)
    assert contexts[0] == (False, 0, 0)


def test_the_last_number_for_which_something_holds():
    assert [last_true(lambda n, k=k: n <= k, 1, 8) for k in (0, 1, 5, 8, 9)] == [0, 1, 5, 8, 8]


def test_blocks_that_are_given_take_the_place_of_enough_for_all():
    memory = {"weight_bytes": 0, "cache": {"N": 10}, "constants": {"P": 2}, "workspace_at_least": 7,
              "steps": {"prefill": {"tensors": [{"T": 1}], "workspace": [{"B": 1}]}}}  # fmt: skip
    sizes = {"tokens": 5, "batch": 3, "context": 129, "positions": 4}
    assert needed(memory, **sizes)["total"] == 60 + 8 + 5 + 7
    assert needed(memory, **sizes, blocks=4)["total"] == 40 + 8 + 5 + 7


# The command ----------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["plan", *words])
    return code, *capsys.readouterr()


def test_every_legal_size_is_planned_and_offered_ones_are_marked(small, capsys):
    code, out, _ = run(capsys, small("support: {atlas-800i-a2: {tp: [2, 4]}}\n"))
    assert code == 0
    first = [line.split()[0] for line in out.splitlines() if line[:2].strip(" *").isdigit()]
    assert first == ["1", "2*", "3", "4*", "5", "6", "7", "8"] * 2
    assert "assumptions:" in out
    assert out.splitlines()[-1] == "small: batch 1 x context 64 fits at --tp 1, 2, 3, 4, 5, 6, 7, 8 (offered: 2, 4)"


def test_sizes_that_are_not_legal_are_named_with_the_reason(small, capsys):
    """40 columns in 4 heads: shares of 3 ranks cut a head."""
    path = small("blocks: {mlp: {nodes: {down: {heads: 4}}}}\n")
    code, out, _ = run(capsys, path, "--json")
    facts = json.loads(out)
    legal = [found["world_size"] for found in facts["sizes"]]
    assert code == 0
    assert legal == [1, 2, 4]
    assert [found["world_size"] for found in facts["refused"]] == [3, 5, 6, 7, 8]
    assert all("whole heads" in found["reason"] for found in facts["refused"])
    assert "world size 3: " in run(capsys, path)[1]


def test_json_has_bytes_and_seconds_for_one_size(small, capsys):
    code, out, _ = run(capsys, small(), "--tp", "2", "--batch", "3", "--memory", "64GiB", "--json")
    facts = json.loads(out)
    (found,) = facts["sizes"]
    assert code == 0
    assert facts["memory"] == {"memory_bytes": 64 * GIB, "reserve_bytes": 3 * GIB, "usable_bytes": 61 * GIB}
    assert facts["rates"]["memory_bytes_per_second"] == 1.6e12, "the board with that memory"
    assert facts["workload"]["context"] == 64
    assert found["fits"]
    assert found["decode"]["seconds"] == pytest.approx(sum(found["decode"]["bound_seconds"].values()))
    assert found["decode"]["tokens_per_second"] == pytest.approx(3 / found["decode"]["seconds"])


def test_on_the_host_memory_must_be_said_and_times_are_not_guessed(small, capsys):
    _, out, _ = run(capsys, small(), "--device", "host", "--json")
    unknown = json.loads(out)
    assert unknown["sizes"][0]["fits"] is None
    assert unknown["sizes"][0]["decode"]["seconds"] is None
    _, text, _ = run(capsys, small(), "--device", "host")
    assert "--memory says it" in text
    _, out, _ = run(capsys, small(), "--device", "host", "--memory", "100MiB", "--json")
    assert json.loads(out)["sizes"][0]["fits"] is True


def test_what_fits_nowhere_is_said(capsys):
    code, out, _ = run(capsys, "llama2-7b", "--memory", "3500MiB", "--tp", "8")
    assert code == 0
    assert out.splitlines()[-1] == "llama2-7b: batch 1 x context 2048 does not fit at --tp 8 (offered: 8)"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--memory", "32"], "'32' is not a size"),
        (["--memory", "2GiB"], "2.00 GiB of memory 3.00 GiB are reserved"),
        (["--reserve", "much"], "'much' is not a size"),
        (["--batch", "0"], "--batch 0: expected a whole number of at least 1"),
        (["--prompt", "60", "--answer", "9"], "69 positions; the model has 64"),
        (["--tp", "9"], "world size 9 is not possible"),
        (["--tp", "0"], "world size 0 is not possible"),
        (["--device", "atlas"], "unknown device"),
    ],
)
def test_mistakes_are_told_in_a_line(small, capsys, words, said):
    code, out, err = run(capsys, small(), *words)
    assert (code, out) == (1, "")
    assert said in err
    assert any(way in err for way in ("likely:", "needed:", "expected"))


@pytest.mark.parametrize(
    ("text", "size"),
    [("32GiB", 32 * GIB), ("29GB", 29 * 10**9), ("30000MiB", 30000 * 2**20), (" 1.5 gib ", 3 * GIB // 2), ("7B", 7)],
)
def test_sizes_have_a_number_and_a_unit(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "32", "GiB", "-3GiB", "3G", "1e3GiB", "3 GiB GiB", "inf GiB", "9" * 400 + "GiB"])
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(UserError, match="is not a size"):
        parse_size(text)


def test_the_page_shows_what_is_printed(capsys):
    """The lines of its example, except those that stand for others."""
    page = (Path(__file__).parents[2] / "docs" / "sizing.md").read_text(encoding="utf-8")
    example = page.split("```")[3].splitlines()
    printed = set()
    for size in ("4", "5", "8"):
        words = ["llama2-70b", "--batch", "8", "--prompt", "2048", "--answer", "512", "--tp", size]
        printed |= {" ".join(line.split()) for line in run(capsys, *words)[1].splitlines()}
    rows = [" ".join(line.split()) for line in example if line[:2].strip(" *").isdigit()]
    assert len(rows) == 4
    assert [line for line in rows if line not in printed] == []
    assert " ".join(example[1].split()) in printed, "the memory"
    assert " ".join(example[2].split()) in printed, "the workload"
