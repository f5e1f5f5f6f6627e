"""A random llama with a byte-level tokenizer, and small tasks of every kind with their data, for tests of
`llmc eval --tasks`."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "wizards", "box", "pure", "gold"]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TASKS = {
    "choices": """
        output_type: multiple_choice
        test_split: test
        fewshot_split: train
        num_fewshot: 2
        doc_to_text: "Q: {{question}}\\nA: "
        doc_to_choice: "{{choices}}"
        doc_to_target: answer
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """,
    "last_word": """
        output_type: loglikelihood
        test_split: test
        doc_to_text: "{{before}}"
        doc_to_target: "{{' ' + after}}"
        metric_list: [{metric: acc}, {metric: perplexity}]
    """,
    "rolling": """
        output_type: loglikelihood_rolling
        test_split: test
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
    """,
    "answers": """
        output_type: generate_until
        test_split: test
        doc_to_text: "{{question}}"
        doc_to_target: "{{answer}}"
        generation_kwargs: {until: ["x", "q "], max_gen_toks: 24, do_sample: false}
        metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
    """,
}


def save_checkpoint(folder: Path, *, bos: bool, positions: int = 64) -> None:
    """`bos`: the tokenizer puts the token that begins a text in front of each."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmc.compiler.language.checkpoint import read_config, variant_from_config

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>"} if bos else {}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": CHAT, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "mine.yaml").write_text(variant_from_config(read_config(folder), "mine"))


def save_tasks(folder: Path) -> None:
    """TASKS as YAML files, and their data in `data`: questions of few and of more tokens than a sequence can have."""
    import textwrap

    chance = random.Random(5)

    def text(count: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(count))

    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: mine/{name}\n{textwrap.dedent(task)}")
    data = {
        "choices/train": [
            {"question": text(4), "choices": [text(1), text(2), text(3)], "answer": i % 3} for i in range(6)
        ],
        "choices/test": [
            {"question": text(3 + 40 * (i == 4)), "choices": [text(1), text(2), "yes"], "answer": i % 3}
            for i in range(8)
        ],
        "last_word/test": [
            {"before": before, "after": text(1)} for before in ("", "<s>the quick", "the  ", text(3), text(90))
        ],
        "rolling/test": [{"text": text(n)} for n in (1, 20, 90, 200)],
        "answers/test": [{"question": text(n), "answer": text(1)} for n in (1, 3, 6, 12, 80)],
    }
    for name, rows in data.items():
        file = folder / "data" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # As published: hf download --repo-type dataset aps/super_glue; fields and labels of its boolq
    boolq = folder / "data" / "super_glue" / "boolq"
    boolq.mkdir(parents=True)
    rows = [{"question": f"is {text(3)}", "passage": text(12), "idx": i, "label": i % 2} for i in range(6)]
    (boolq / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
