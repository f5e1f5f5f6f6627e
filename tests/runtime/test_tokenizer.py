"""Tokenizers built here, read by us and by transformers; streaming; chat templates. Needs transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_files import CORPUS, byte_level
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Fast

from llmc.compiler.diagnostics import UserError
from llmc.runtime.engine.tokenizer import TextStream, Tokenizer, eos_ids, load_tokenizer, render_chat

TEXTS = ["Hello world", " two  spaces ", "", "naïve 你好 😀!", "a\nb\tc", "<s> not special? </s>", "the fox", "🤦🏽‍♂️"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[{{ m.content | trim }}]\n"
    "{% else %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def llama_style() -> Fast:
    """As converted from sentencepiece: a visible space, byte fallback, one leading space stripped again."""
    specials = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    letters = sorted({c for text in CORPUS[:2] for c in text.replace(" ", "▁")} | {"▁"})
    merges = [("h", "e"), ("t", "he"), ("▁", "the"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello")]
    vocab = {t: i for i, t in enumerate([*specials, *bytes_, *letters, *("".join(m) for m in merges)])}
    fast = Fast(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast


MAKERS = {"byte-level": byte_level, "llama": llama_style}


@pytest.fixture(scope="module", params=MAKERS)
def checkpoint(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    fast = MAKERS[request.param]()
    fast.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": fast.token_to_id("</s>")}))
    return path


def theirs(path: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path))


def test_ids_equal_transformers(checkpoint):
    ours, reference = load_tokenizer(checkpoint), theirs(checkpoint)
    for text in TEXTS:
        assert ours.encode(text) == reference.encode(text)
        assert ours.encode(text, special=False) == reference.encode(text, add_special_tokens=False)


def test_decoded_text_equals_transformers(checkpoint):
    ours, reference = load_tokenizer(checkpoint), theirs(checkpoint)
    for text in TEXTS:
        ids = reference.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special=skip) == reference.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("flags", [{"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
def test_bos_and_eos_are_added_as_transformers_does(checkpoint, tmp_path, flags):
    (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    config = json.loads((checkpoint / "tokenizer_config.json").read_text()) | flags
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).encode("hello") == theirs(tmp_path).encode("hello")


def test_chat_equals_transformers(checkpoint):
    messages = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "hi <b>"}]
    expected = theirs(checkpoint).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert load_tokenizer(checkpoint).chat(messages) == expected


def test_special_ids(checkpoint):
    ours, reference = load_tokenizer(checkpoint), theirs(checkpoint)
    assert ours.bos_id == reference.bos_token_id
    assert reference.eos_token_id in ours.eos_ids


def test_several_eos_ids_from_the_generation_config(checkpoint, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load_tokenizer(tmp_path).eos_ids == {7, 9}


ABSENT = object()


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("eos")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(path)
    return path


@pytest.mark.parametrize("config", [ABSENT, None, 5, [5, 6]], ids=["absent", "null", "one", "list"])
@pytest.mark.parametrize(
    "generation", [None, {}, {"eos_token_id": None}, {"eos_token_id": 7}, {"eos_token_id": [7, 9]}], ids=json.dumps
)
def test_answers_end_where_those_of_transformers_do(tiny_llama, tmp_path, config, generation):
    from transformers import AutoModelForCausalLM

    said = json.loads((tiny_llama / "config.json").read_text())
    said.pop("eos_token_id")
    said |= {} if config is ABSENT else {"eos_token_id": config}
    (tmp_path / "config.json").write_text(json.dumps(said))
    (tmp_path / "model.safetensors").symlink_to(tiny_llama / "model.safetensors")
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    settings, _ = model._prepare_generation_config(None)
    model._prepare_special_tokens(settings, True, device="cpu")
    expected = settings._eos_token_tensor
    assert eos_ids(tmp_path) == frozenset([] if expected is None else expected.tolist())


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": None}, {"eos_token_id": []}])
def test_the_tokenizer_says_where_answers_end_if_no_configuration_does(checkpoint, tmp_path, generation):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    ours = load_tokenizer(tmp_path)
    assert ours.decode(ours.eos_ids, skip_special=False) == "</s>"
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert load_tokenizer(tmp_path).eos_ids == {7}


@pytest.mark.parametrize("value", ["7", '"x"', "[7, null]", "true", "7.5", "{}", "[[7]]", "1e999"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_that_is_no_id_is_refused(tmp_path, name, value):
    (tmp_path / name).write_text(f'{{"eos_token_id": {value}}}')
    if value == "7":
        assert eos_ids(tmp_path) == {7}
        return
    with pytest.raises(UserError, match=rf"{name}: an end or start token must be an id or a list of ids"):
        eos_ids(tmp_path)


@pytest.mark.parametrize("kind", MAKERS)
@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=30), cut=st.integers(0, 5))
def test_streamed_text_is_whole_characters_and_adds_up(kind, text, cut, tmp_path_factory):
    tokenizer = cached(kind, tmp_path_factory)
    ids = tokenizer.encode(text)[: -cut or None]
    stream = TextStream(tokenizer)
    parts = [stream.push(i) for i in ids]
    shown = "".join(parts)
    assert "\ufffd" not in shown or "\ufffd" in text
    assert shown + stream.finish() == stream.text
    if cut == 0:  # a text cut within a character has no one right form
        assert stream.text == tokenizer.decode(ids)


CACHE: dict[str, Tokenizer] = {}


def cached(kind: str, factory) -> Tokenizer:
    if kind not in CACHE:
        path = factory.mktemp(f"stream-{kind}")
        MAKERS[kind]().save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        CACHE[kind] = load_tokenizer(path)
    return CACHE[kind]


def letters(**more) -> Tokenizer:
    """Token i is character i."""
    empty: dict = {"special_ids": frozenset(), "bos_id": None, "eos_ids": frozenset(), "template": None, "tokens": {}}
    return Tokenizer(
        encode=lambda text, special: [ord(c) for c in text], decode=lambda ids: "".join(map(chr, ids)), **empty | more
    )


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_are_never_shown_wherever_tokens_part(text, stops):
    stream = TextStream(letters(), stop=stops)
    shown = ""
    for token in map(ord, text):
        shown += stream.push(token)
        if stream.stopped:
            break
    shown += stream.finish()
    ends = [text.find(s) + len(s) for s in stops if s in text]
    if not ends:
        assert shown == text
        assert not stream.stopped
    else:
        assert stream.stopped
        first = text[: min(ends)]  # the first moment at which a stop string is complete
        assert shown == first[: min(first.find(s) for s in stops if s in first)]


def test_stop_can_be_included():
    stream = TextStream(letters(), stop=["END"], include_stop=True)
    assert "".join(stream.push(ord(c)) for c in "goENDx") == "goEND"


def test_text_that_may_become_a_stop_string_is_held_then_shown():
    stream = TextStream(letters(), stop=["END"])
    assert [stream.push(ord(c)) for c in "aENx"] == ["a", "", "", "ENx"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "refuses"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_bad_or_hostile_template_is_a_message(template, words):
    with pytest.raises(UserError, match=words):
        render_chat(template, {"messages": []})


def test_template_helpers():
    source = "{% generation %}{{ messages | tojson }}{% endgeneration %}{{ strftime_now('%Y') | length }}"
    assert render_chat(source, {"messages": [{"a": "<é>"}]}) == '[{"a": "<é>"}]4'


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "neither tokenizer.json nor tokenizer.model"),
        ({"tokenizer.json": "{"}, "tokenizer.json cannot be read"),
        ({"tokenizer.json": "{}"}, "tokenizer.json cannot be read"),
        ({"tokenizer_config.json": "[1]"}, "must hold a JSON object"),
    ],
)
def test_damaged_files_are_named(tmp_path, files, words):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        load_tokenizer(tmp_path)


def test_no_template_says_what_to_do():
    with pytest.raises(UserError, match="no chat template"):
        letters().chat([{"role": "user", "content": "x"}])


def test_named_templates_give_the_default_and_a_file_wins(checkpoint, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(tmp_path).chat([]) == "D"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert load_tokenizer(tmp_path).chat([]) == "F"


def test_tokenizer_model_alone_gives_the_ids_of_sentencepiece(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=330, model_type="bpe",
        byte_fallback=True, remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = load_tokenizer(tmp_path)
    for text in ("Hello world", "two  spaces", "naïve 你好 😀!", "the fox"):
        ids = ours.encode(text)
        assert ids == [1, *reference.encode(text)]
        assert ours.decode(ids) == text
