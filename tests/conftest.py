"""Groups by need: `pytest -m "not torch and not transformers"` runs in seconds on a machine with neither."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.pop("COLUMNS", None)  # reports are compared as a file gets them: not folded to a terminal

NEEDS = {
    "conformance": ["torch"],
    "hostatb": ["torch"],
    "runtime": ["torch", "transformers"],
    "models": ["torch", "transformers"],
    "measure": ["torch", "transformers"],
    "ranks": ["torch", "transformers", "processes"],
    "picture": ["browser"],
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        area = Path(item.path).relative_to(Path(__file__).parent).parts[0]
        for need in NEEDS.get(area, []):
            item.add_marker(need)


@pytest.fixture(autouse=True, scope="session")
def no_timing_decides(request: pytest.FixtureRequest) -> None:
    """Where hostatb chooses by measuring, its clock stands still: the first candidate is taken, nothing remembered."""
    if any(item.get_closest_marker("torch") for item in request.session.items):
        from llmc.runtime.hostatb.choices import CHOICES

        CHOICES.clock, CHOICES.directory = (lambda: 0.0), (lambda: None)


@pytest.fixture(scope="session")
def save_words_model() -> Callable[[Path, int], None]:
    """save(folder, positions): a llama of 2 layers whose tokens are the words w0 to w63, and its variant mine.yaml."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmc.compiler.language.checkpoint import read_config, variant_from_config

    def save(folder: Path, positions: int) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            max_position_embeddings=positions,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.3,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "mine.yaml").write_text(variant_from_config(read_config(folder), "mine"))

    return save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, save_words_model: Callable[[Path, int], None]) -> Path:
    """A llama of 2 layers with 64 positions, whose tokens are the words w0 to w63: 1 begins and 2 ends a text. A module
    has its own and may write there; one that needs another checkpoint has its own fixture of this name."""
    path = tmp_path_factory.mktemp("tiny")
    save_words_model(path, 64)
    return path
