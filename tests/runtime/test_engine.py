"""The engine over a stand-in executor that really reads its caches: wrong slots, rows or lengths change the tokens.

The stand-in writes each token into the cache where it is told to, gathers the whole context from the cache, and gives
logits that are a hash of it. A plain loop over the token list is the oracle. Needs torch.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.diagnostics import UserError
from llmc.runtime.engine.engine import Engine
from llmc.runtime.engine.runner import make_caches, make_constants
from llmc.runtime.engine.sampling import SamplingParams
from llmc.runtime.engine.tokenizer import Tokenizer

VOCAB = 50
EOS = 7


def manifest(kind: str, block: int = 4) -> dict:
    host = {"seq_len", "context_lens", "token_offset"}
    inputs = {"prefill": ["token_ids", "position_ids", "rope_len", "seq_len", "last_rows"]}
    inputs["decode"] = ["token_ids", "position_ids", "rope_len", "seq_len"]
    if kind == "paged":
        inputs["prefill"] += ["slots", "block_tables"]
        inputs["decode"] += ["slots", "block_tables", "context_lens"]
    else:
        inputs = {phase: [*names, "token_offset", "layer_id"] for phase, names in inputs.items()}
    wide = {"token_ids", "position_ids", "last_rows"}
    facts = {
        n: {"dtype": "int64" if n in wide else "int32", "host": n in host} for names in inputs.values() for n in names
    }
    shape = ["N", block, 1, 1] if kind == "paged" else [1, "B", "S", 1]
    return {
        "inputs": facts,
        "phases": {phase: {"inputs": names} for phase, names in inputs.items()},
        "caches": {"layers.0.k_cache": {"shape": shape, "dtype": "float32", "format": "nd"}},
        "sizes": {"vocab": VOCAB},
    }


def hashed(context: list[int]) -> torch.Tensor:
    """Logits that depend on every token of the context and on its place."""
    state = 17
    for token in context:
        state = (state * 31 + token + 1) % 1000003
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(state)) * 4


class StandIn:
    """Executor over one cache of token ids."""

    def __init__(self, caches: dict[str, torch.Tensor]) -> None:
        self.cache = caches["layers.0.k_cache"]
        self.calls: list[tuple[str, int]] = []

    def run(self, phase: str, inputs) -> torch.Tensor:
        tokens, counts = inputs["token_ids"], inputs["seq_len"].tolist()
        starts = [0, *itertools.accumulate(counts)]
        assert inputs["rope_len"].tolist() == counts
        self.calls.append((phase, len(counts)))
        if phase == "prefill":
            assert inputs["last_rows"].tolist() == [e - 1 for e in starts[1:]]
        return torch.stack([hashed(self.context(phase, inputs, b, tokens, starts)) for b in range(len(counts))])

    def context(self, phase, inputs, b: int, tokens: torch.Tensor, starts: list[int]) -> list[int]:
        mine = slice(starts[b], starts[b + 1])
        positions = inputs["position_ids"][mine].tolist()
        total = positions[-1] + 1
        assert positions == list(range(total - len(positions), total))
        if "slots" in inputs:
            flat = self.cache.view(-1)
            flat[inputs["slots"][mine].long()] = tokens[mine].float()
            if phase == "decode":
                assert int(inputs["context_lens"][b]) == total
            block = self.cache.shape[1]
            places = [int(inputs["block_tables"][b, p // block]) * block + p % block for p in range(total)]
            return [int(flat[p]) for p in places]
        assert int(inputs["token_offset"][b]) == total
        rows = inputs["layers.0.k_cache"]
        rows[0, b, positions[0] : total, 0] = tokens[mine].float()
        return [int(t) for t in rows[0, b, :total, 0]]


def letters() -> Tokenizer:
    """Token i is character chr(48 + i)."""
    return Tokenizer(
        encode=lambda text, special: [ord(c) - 48 for c in text],
        decode=lambda ids: "".join(chr(48 + i) for i in ids),
        special_ids=frozenset(),
        bos_id=None,
        eos_ids=frozenset({EOS}),
        template=None,
        tokens={},
    )


def make(kind: str, *, blocks: int = 64, rows: int = 8, length: int = 80, clock=None, **more) -> Engine:
    facts = manifest(kind)
    caches = make_caches(facts, {"N": blocks, "B": rows, "S": length})
    clock = {"clock": clock} if clock else {}
    return Engine(facts, StandIn(caches), letters(), caches=caches, **{"max_batch": 8, **more}, **clock)


def oracle(prompt: list[int], max_tokens: int, *, ignore_eos: bool = True) -> list[int]:
    context = list(prompt)
    for _ in range(max_tokens):
        context.append(int(hashed(context).argmax()))
        if context[-1] == EOS and not ignore_eos:
            break
    return context[len(prompt) :]


PROMPTS = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14), min_size=1, max_size=6)


@pytest.mark.parametrize("kind", ["paged", "flash"])
@settings(deadline=None, max_examples=40)
@given(
    prompts=PROMPTS,
    lengths=st.lists(st.integers(1, 14), min_size=6, max_size=6),
    batch=st.integers(1, 4),
    blocks=st.integers(8, 20),
)
def test_every_batch_gives_the_tokens_of_a_plain_loop(kind, prompts, lengths, batch, blocks):
    """With few blocks this covers preemption, with few rows the moves."""
    engine = make(kind, blocks=blocks, rows=batch, max_batch=batch, max_prefill_tokens=30)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths[: len(prompts)]]
    outputs = engine.generate(prompts, params)
    for prompt, chosen, output in zip(prompts, params, outputs, strict=True):
        assert output.token_ids == oracle(prompt, chosen.max_tokens)
        assert output.finish_reason == "length"


def test_small_cache_preempts_and_still_gives_the_same_tokens():
    engine = make("paged", blocks=6, max_batch=3)
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=16, ignore_eos=True))
    assert engine.scheduler.preemptions > 0
    assert [o.token_ids for o in outputs] == [oracle(p, 16) for p in prompts]


@pytest.mark.parametrize("kind", ["paged", "flash"])
def test_seeded_samples_do_not_depend_on_the_batch(kind):
    params = [SamplingParams(max_tokens=12, temperature=1.5, top_k=0, seed=s, ignore_eos=True) for s in range(4)]
    prompts = [[1], [2, 3], [1], [9, 8, 7]]
    together = make(kind).generate(prompts, params)
    alone = [make(kind).generate([p], [c])[0] for p, c in zip(prompts, params, strict=True)]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    assert together[0].token_ids != together[2].token_ids  # another seed


def first_with_eos() -> list[int]:
    """A prompt whose greedy answer meets EOS within 40 tokens."""
    return next([a, b] for a in range(VOCAB) for b in range(VOCAB) if EOS in oracle([a, b], 40)[3:])


def test_eos_ends_an_answer_and_is_not_in_its_text():
    prompt = first_with_eos()
    output = make("paged").generate([prompt], SamplingParams(max_tokens=40))[0]
    assert output.finish_reason == "eos"
    assert output.token_ids == oracle(prompt, 40, ignore_eos=False)
    assert output.text == "".join(chr(48 + t) for t in output.token_ids[:-1])


def test_ignore_eos_generates_exactly_max_tokens():
    output = make("paged").generate([first_with_eos()], SamplingParams(max_tokens=40, ignore_eos=True))[0]
    assert (output.generated_tokens, output.finish_reason) == (40, "length")


def test_stop_strings_across_tokens_end_the_answer_and_are_not_streamed():
    answer = "".join(chr(48 + t) for t in oracle([1, 2], 20))
    stop = answer[6:9]
    shown: list[str] = []
    output = make("paged").generate(
        ["12"], SamplingParams(max_tokens=20, stop=(stop,), ignore_eos=True), lambda i, text: shown.append(text)
    )[0]
    assert output.finish_reason == "stop"
    assert output.text == "".join(shown) == answer[: answer.find(stop)]


def test_stop_token_ids_end_with_stop():
    ids = oracle([5], 10)
    output = make("paged").generate([[5]], SamplingParams(max_tokens=10, stop_token_ids=(ids[4],), ignore_eos=True))[0]
    assert output.finish_reason == "stop"
    assert output.token_ids == ids[: ids.index(ids[4]) + 1]


@pytest.mark.parametrize("kind", ["paged", "flash"])
def test_streamed_pieces_add_up_for_every_prompt(kind):
    shown: dict[int, str] = {0: "", 1: "", 2: ""}

    def callback(index: int, text: str) -> None:
        shown[index] += text

    outputs = make(kind, max_batch=2).generate(["1", "22", "333"], SamplingParams(max_tokens=9), callback)
    assert [o.text for o in outputs] == [shown[i] for i in range(3)]
    assert [o.prompt_tokens for o in outputs] == [1, 2, 3]


def test_times_count_each_step_once():
    """The clock ticks once a call: arrival, step start, step end, ..."""
    ticks = itertools.count()
    engine = make("paged", clock=lambda: float(next(ticks)))
    output = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))[0]
    assert output.first_token_s == 2.0  # arrival 0, prefill from 1 to 2
    assert output.token_s == [2.0, 2.0, 2.0]  # decode steps end at 4, 6, 8
    assert [(s.phase, s.tokens_in, s.tokens_out, s.seconds) for s in engine.steps] == [
        ("prefill", 3, 1, 1.0),
        *[("decode", 1, 1, 1.0)] * 3,
    ]


def test_an_answer_ends_where_the_cache_ends():
    output = make("flash", length=10).generate([[1] * 6], SamplingParams(max_tokens=50, ignore_eos=True))[0]
    assert (output.generated_tokens, output.finish_reason) == (4, "length")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([1] * 90, "prompt 1 has 90 tokens, but a sequence can have 80 in all"),
        ([], "the prompt is empty"),
        ([3, 99], "prompt 1 holds token id 99; the model knows 0 to 49"),
        ([-1], "token id -1"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_runs_and_the_engine_stays_usable(prompt, words):
    engine = make("flash")
    with pytest.raises(UserError) as error:
        engine.generate([[1], prompt])
    assert words in str(error.value)
    assert engine.steps == []
    assert engine.generate([[1]], SamplingParams(max_tokens=5, ignore_eos=True))[0].token_ids == oracle([1], 5)


def test_an_interrupt_gives_every_block_back():
    engine = make("paged", blocks=16)

    def interrupt(index: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1], [2]], SamplingParams(max_tokens=5), interrupt)
    assert engine.scheduler.room.free_blocks == 16
    assert not engine.scheduler.busy


def test_text_needs_a_tokenizer():
    engine = make("paged")
    engine.tokenizer = None
    with pytest.raises(UserError, match="there is no tokenizer"):
        engine.generate(["hello"])


def test_a_cache_beyond_memory_is_refused_with_its_size():
    with pytest.raises(UserError, match=r"1 tensors of 16777216 MiB \(16384.0 GiB\)"):
        make_caches(manifest("paged"), {"N": 2**40})


def test_constants_of_a_manifest():
    facts = {
        "rope": {"theta": 100.0, "pairing": "half"},
        "constants": {
            "mask": {"kind": "causal_mask", "shape": [3, 3], "dtype": "float16", "value": -65504.0, "format": "nd"},
            "cos_table": {"kind": "rope_cos", "shape": ["P", 4], "dtype": "float32"},
            "sin_table": {"kind": "rope_sin", "shape": ["P", 4], "dtype": "float32"},
        },
    }
    made = make_constants(facts, positions=6)
    assert made["mask"].tolist() == [[0, -65504, -65504], [0, 0, -65504], [0, 0, 0]]
    assert made["cos_table"].shape == made["sin_table"].shape == (6, 4)
    angles = torch.arange(6.0)
    torch.testing.assert_close(made["sin_table"][:, 0], angles.sin())
    torch.testing.assert_close(made["cos_table"][:, 3], (angles / 10).cos())
