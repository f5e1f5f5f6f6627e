"""A checkpoint small enough to be loaded by ranks in no time."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="package")
def model(tmp_path_factory, save_words_model) -> list[str]:
    """Flags for a llama of 2 layers whose tokens are the words w0 to w63."""
    path = tmp_path_factory.mktemp("tiny")
    save_words_model(path, 4096)
    return ["--model-path", str(path), "--graph", str(path / "mine.yaml"), "--dtype", "float32"]
