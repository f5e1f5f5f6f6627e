"""Sampling: properties, and agreement with the logits processors of transformers. Needs torch and transformers."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.diagnostics import UserError
from llmc.runtime.engine.sampling import Sampler, SamplingParams, draw, keep, make_generator, penalise

VOCAB = 40


@dataclass
class Row:
    params: SamplingParams
    token_ids: list[int] = field(default_factory=lambda: [1, 2, 3])
    prompt_len: int = 3
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        self.generator = self.generator or make_generator(self.params)


def logits_of(seed: int, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


SAMPLED = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 3.0),
    top_k=st.sampled_from([0, -1, 2, 5, VOCAB, 1000]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    repetition_penalty=st.floats(0.5, 2.0),
    frequency_penalty=st.floats(-2, 2),
    presence_penalty=st.floats(-2, 2),
    seed=st.integers(0, 2**63 - 1),
)


@settings(deadline=None, max_examples=60)
@given(SAMPLED, st.integers(0, 1000))
def test_kept_tokens_are_the_best_and_their_probabilities_sum_to_one(params, seed):
    logits = logits_of(seed)[0]
    probabilities = keep(logits, params)
    kept = int((probabilities > 0).sum())
    assert 1 <= kept <= (params.top_k if params.top_k > 0 else VOCAB)
    assert set(probabilities.nonzero().flatten().tolist()) == set(logits.argsort(descending=True)[:kept].tolist())
    assert float(probabilities.sum()) == pytest.approx(1.0)


def warped(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """[V] -> what transformers would draw from."""
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(float(params.temperature))(None, logits[None].double())
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if 0 < params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    return scores.softmax(-1)[0]


@settings(deadline=None, max_examples=60)
@given(SAMPLED, st.integers(0, 1000))
def test_temperature_top_k_and_top_p_equal_the_warpers_of_transformers(params, seed):
    logits = logits_of(seed)[0]
    torch.testing.assert_close(keep(logits, params), warped(logits, params), rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, VOCAB), st.floats(0.1, 3.0), st.integers(0, 1000), st.permutations(range(VOCAB)))
def test_equals_of_the_last_token_of_top_k_stay_as_in_transformers(top_k, temperature, seed, order):
    logits = logits_of(seed)[0].div(3).round()  # about seven values for 40 tokens
    params = SamplingParams(temperature=temperature, top_k=top_k if top_k > 1 else 2)
    found = keep(logits, params)
    torch.testing.assert_close(found, warped(logits, params), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(keep(logits[list(order)], params), found[list(order)], rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=60)
@given(st.floats(0.01, 0.99), st.integers(0, 1000), st.permutations(range(VOCAB)))
def test_equals_of_the_last_token_of_top_p_stay_whatever_their_ids(top_p, seed, order):
    """transformers cuts them where its sort has put them, so its tokens are among ours, and only equals beside them."""
    logits = logits_of(seed)[0].div(3).round()
    params = SamplingParams(top_k=0, top_p=top_p)
    found, theirs = keep(logits, params), warped(logits, params)
    assert set(logits[found > 0].tolist()) == set(logits[theirs > 0].tolist())
    least = logits[found > 0].min()
    assert bool((found[logits >= least] > 0).all())
    torch.testing.assert_close(keep(logits[list(order)], params), found[list(order)], rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e30, 1.7e308])
def test_no_temperature_makes_a_distribution_that_is_none(temperature):
    logits = torch.tensor([3.0, -70000.0, 2.0, 3.0])
    for top_k, top_p in ((0, 0.0), (2, 0.0), (0, 0.5)):
        found = keep(logits, SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p))
        assert float(found.sum()) == pytest.approx(1.0)
        assert found[0] == found[3]
    assert keep(torch.tensor([1.0, float("inf"), 2.0]), SamplingParams(top_k=0)).tolist() == [0.0, 1.0, 0.0]


@settings(deadline=None, max_examples=40)
@given(st.floats(0.2, 3.0), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30), st.integers(0, 99))
def test_repetition_penalty_equals_transformers(penalty, tokens, seed):
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = logits_of(seed)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), logits)[0]
    ours = penalise(logits[0], SamplingParams(repetition_penalty=penalty), tokens, prompt_len=1)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_frequency_counts_and_presence_marks_generated_tokens_only():
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=1.0)
    out = penalise(torch.zeros(6), params, token_ids=[1, 1, 2, 3, 3, 3], prompt_len=2)
    assert out.tolist() == [0.0, 0.0, -1.5, -2.5, 0.0, 0.0]


def test_repetition_comes_before_frequency():
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0)
    assert penalise(torch.tensor([4.0, 1.0]), params, token_ids=[0], prompt_len=0).tolist() == [1.0, 1.0]


def test_prompt_ids_beyond_the_head_are_ignored():
    out = penalise(torch.ones(4), SamplingParams(repetition_penalty=2.0), token_ids=[2, 7], prompt_len=2)
    assert out.tolist() == [1.0, 1.0, 0.5, 1.0]


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=0.0, top_k=0), SamplingParams(top_k=1, top_p=0.5, seed=3)]
)
def test_greedy_is_the_exact_argmax(params):
    logits = logits_of(5, rows=16)
    assert Sampler().sample(logits, [Row(params) for _ in range(16)]) == logits.argmax(-1).tolist()


@settings(deadline=None, max_examples=30)
@given(st.lists(SAMPLED | st.just(SamplingParams()), min_size=2, max_size=5), st.integers(0, 100))
def test_a_row_gets_the_same_tokens_alone_and_in_any_batch(params, seed):
    steps = [logits_of(seed + i, rows=len(params)) for i in range(4)]
    together = [Row(p) for p in params]
    batch = [Sampler().sample(step, together) for step in steps]
    for i, p in enumerate(params):
        alone = Row(p)
        assert [Sampler().sample(step[i : i + 1], [alone])[0] for step in steps] == [tokens[i] for tokens in batch]


def test_the_generator_advances_and_the_seed_repeats_it():
    params = SamplingParams(temperature=5.0, top_k=0, seed=11)
    logits = logits_of(1, vocab=1000)
    row = Row(params)
    first = [Sampler().sample(logits, [row])[0] for _ in range(20)]
    row = Row(params)
    assert first == [Sampler().sample(logits, [row])[0] for _ in range(20)]
    assert len(set(first)) > 10


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.0, 0.25, 0.15, 0.1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([draw(probabilities, generator) for _ in range(8000)]), minlength=5)
    assert counts[1] == 0
    counts, probabilities = counts[probabilities > 0], probabilities[probabilities > 0]
    chi_square = float((((counts - 8000 * probabilities) ** 2) / (8000 * probabilities)).sum())
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


def share_of_other_draws(one: torch.Tensor, other: torch.Tensor, draws: int) -> float:
    """Of as many steps from the same seeds: those in which two distributions [V] give two tokens."""
    different = 0
    for seed in range(draws):
        first, second = (draw(p, torch.Generator().manual_seed(seed)) for p in (one, other))
        different += first != second
    return different / draws


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (50, 0.0), (0, 0.95)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_that_differ_in_the_last_bit_change_few_draws(dtype, top_k, top_p):
    """As few as can be asked of a rule that sees one of both: 2 d / (1 + d), d the distance of the distributions."""
    generator = torch.Generator().manual_seed(1)
    one = (torch.randn(1000, generator=generator) * 2 + 10).to(dtype)
    moves = torch.randint(-1, 2, one.shape, generator=generator)
    other = (one.view(torch.int16) + moves).to(torch.int16).view(dtype)
    params = SamplingParams(top_k=top_k, top_p=top_p)
    before, after = keep(one.float(), params), keep(other.float(), params)
    distance = float((before - after).abs().sum() / 2)
    most = 2 * distance / (1 + distance)
    assert share_of_other_draws(before, after, 1000) <= most + 3 * (most / 1000) ** 0.5


def test_tokens_that_change_places_by_the_last_bit_keep_their_draws():
    """Two leaders that are equal but for rounding; half of all draws are theirs."""
    one = torch.zeros(100)
    one[7], one[90] = 4.0, 4.0 + 2**-9
    other = one.clone()
    other[7], other[90] = one[90], one[7]
    params = SamplingParams(top_k=0)
    assert share_of_other_draws(keep(one, params), keep(other, params), 1000) <= 0.003


def test_nan_logits_are_reported_with_the_row():
    logits = torch.zeros(3, 5)
    logits[1, 2] = float("nan")
    with pytest.raises(UserError, match="row 1 hold NaN"):
        Sampler().sample(logits, [Row(SamplingParams())] * 3)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must be 1 to 2147483647; found 0"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"temperature": -0.1}, "temperature must be at least 0; found -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -2}, "top_k must be -1 or 0"),
        ({"top_p": 1.5}, "top_p must be within 0"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"presence_penalty": 3}, "presence_penalty must be within -2 and 2"),
        ({"frequency_penalty": "x"}, "frequency_penalty"),
        ({"seed": -1}, "seed must be 0 to"),
        ({"seed": True}, "seed"),
        ({"stop": ("",)}, "stop must be at most 1024 strings"),
    ],
)
def test_values_out_of_range_are_refused_by_name(bad, words):
    with pytest.raises(UserError) as error:
        SamplingParams(**bad)
    assert words in str(error.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(UserError) as error:
        SamplingParams(top_p=2, top_k=-5)
    assert "top_p" in str(error.value)
    assert "top_k" in str(error.value)


@pytest.mark.parametrize("stop", [3, {"a"}, ("",), (1,)])
def test_stop_must_be_strings(stop):
    with pytest.raises(UserError, match="stop must be"):
        SamplingParams(stop=stop)


class OnDevice(torch.Tensor):
    """A tensor of the host that counts how often it, or what was computed from it, is read."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name not in (
            "cpu",
            "tolist",
            "item",
            "numpy",
            "__bool__",
            "__int__",
            "__index__",
            "__float__",
            "__contains__",
        ):
            return super().__torch_function__(func, types, args, kwargs or {})
        OnDevice.reads += 1
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        return found.as_subclass(torch.Tensor) if isinstance(found, torch.Tensor) else found


@pytest.mark.parametrize(
    "params",
    [
        [SamplingParams()] * 4,
        [SamplingParams(top_k=0, seed=3)] * 4,
        [SamplingParams(), SamplingParams(top_k=0, top_p=0.9, seed=5), SamplingParams(repetition_penalty=1.5)],
        [SamplingParams(presence_penalty=1.0), SamplingParams()],
    ],
    ids=["greedy", "sampled", "mixed", "penalised"],
)
def test_a_step_reads_the_device_once(params, monkeypatch):
    monkeypatch.setattr(OnDevice, "reads", 0)
    logits = logits_of(4, rows=len(params))
    tokens = Sampler().sample(logits.as_subclass(OnDevice), [Row(each) for each in params])
    assert OnDevice.reads == 1
    assert all(type(token) is int for token in tokens)
    assert tokens == Sampler().sample(logits, [Row(each) for each in params])


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=0, seed=1)])
def test_nan_is_found_in_the_same_read(params, monkeypatch):
    monkeypatch.setattr(OnDevice, "reads", 0)
    logits = logits_of(4, rows=3)
    logits[2, 7] = torch.nan
    with pytest.raises(UserError, match="row 2 hold NaN"):
        Sampler().sample(logits.as_subclass(OnDevice), [Row(params)] * 3)
    assert OnDevice.reads == 1
