"""Files and bytes: what can be read, what is refused, and that places survive merging. Needs nothing."""

from __future__ import annotations

import os

import pytest
import yaml

from llmc.compiler.diagnostics import DiagnosticError
from llmc.compiler.language import source
from llmc.compiler.language.source import Scalar, catalogue, load, loads


def refused(text: str | bytes, code: str, words: str, position: tuple[int, int] | None = None) -> DiagnosticError:
    with pytest.raises(DiagnosticError, match=words) as caught:
        loads(text)
    first = caught.value.diagnostics[0]
    assert first.code == code
    if position:
        assert (first.place.line, first.place.column) == position
    return caught.value


def scalar(text: str) -> object:
    value = loads(f"name: {text}\n").root.items["name"]
    assert isinstance(value, Scalar)
    return value.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-3", -3),
        ("1e-5", 1e-5),  # text in YAML 1.1
        ("1.0e-5", 1e-5),
        (".5", 0.5),
        ("true", True),
        ("yes", "yes"),  # true in YAML 1.1
        ("on", "on"),
        ("010", "010"),  # 8 in YAML 1.1
        ("1:30", "1:30"),  # 90 in YAML 1.1
        ("2020-01-01", "2020-01-01"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        (".inf", ".inf"),
        ("'12'", "12"),
        ('"true"', "true"),
    ],
)
def test_plain_scalars_mean_what_they_look_like(text, value):
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_every_value_knows_its_place():
    root = loads("name: tiny\nsizes:\n  hidden: 8\n  ffn: 'hidden * 2'\n", "t.yaml").root
    assert str(root.items["sizes"].items["hidden"].place) == "t.yaml:3:11"
    assert str(root.items["sizes"].keys["ffn"]) == "t.yaml:4:3"
    assert root.items["sizes"].items["ffn"].within(9, 10).column == 18  # the 2, inside the quotes


def test_a_byte_order_mark_is_not_text():
    root = loads(b"\xef\xbb\xbfname: tiny\n").root
    assert str(root.keys["name"]) == "<text>:1:1"


def test_windows_line_ends_do_not_move_places():
    assert loads("name: tiny\r\nsizes:\r\n  hidden: 8\r\n").root.items["sizes"].place.line == 3


def test_text_that_is_not_utf8_is_shown_where_it_starts():
    refused(b"name: tiny\nsizes: \xff\n", "E001", "not UTF-8", (2, 8))
    refused("name: tiny\n".encode("utf-16"), "E001", "not UTF-8", (1, 1))


@pytest.mark.parametrize("character", ["\0", "\x07", "\x1b", "\ufffe"])
def test_control_characters_are_refused(character):
    refused(f"name: tiny\nsizes: a{character}\n", "E002", "character", (2, 9))


def test_a_huge_file_is_refused(tmp_path):
    path = tmp_path / "huge.yaml"
    path.write_text("#" * (source.MAX_BYTES + 1))
    with pytest.raises(DiagnosticError, match=r"E004 .*larger than 1 MiB"):
        load(path)


@pytest.mark.parametrize("loader", ["CSafeLoader", "SafeLoader"])
@pytest.mark.parametrize("depth", [41, 200, 1_400])
@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "\n"])
def test_deep_nesting_is_refused_in_our_words_with_every_parser(loader, depth, opening, monkeypatch):
    """libyaml has a limit of its own, in its scanner, which is ahead of the events."""
    monkeypatch.setattr(source, "LOADER", getattr(yaml, loader))
    nested = "\n".join(" " * i + "a:" for i in range(depth + 1)) if opening == "\n" else opening * (depth + 1)
    refused(nested if opening in "\n- " else f"a: {nested}", "E004", "nested more than 40 deep")


@pytest.mark.parametrize("words", ["exceeded maximum nesting depth", "Maximum nesting level reached"])
def test_other_versions_of_the_parser_say_it_otherwise(words, monkeypatch):
    def parse(*_, **__):
        raise yaml.scanner.ScannerError("while scanning", None, words, yaml.Mark("", 0, 0, 3, "", 0))
        yield

    monkeypatch.setattr(yaml, "parse", parse)
    refused("a: 1", "E004", "nested more than 40 deep", (1, 4))


def test_many_values_are_refused():
    refused("a: [" + "x, " * source.MAX_VALUES + "x]", "E004", "more than 50000 values")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("lama2-13b", "did you mean 'llama2-13b'"),
        ("nowhere/mine.yaml", "No such file"),
        ("", "cannot read"),
        ("a\0b", "cannot read"),
        ("x" * 5000, "too long"),
    ],
)
def test_a_missing_file_is_told_with_a_near_name(path, words):
    with pytest.raises(DiagnosticError, match=words) as caught:
        load(path)
    assert caught.value.code == "E001"


def test_a_directory_and_a_pipe_are_not_models(tmp_path):
    with pytest.raises(DiagnosticError, match="is a directory"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(DiagnosticError, match="not a regular file"):
        load(tmp_path / "pipe.yaml")


def test_a_file_without_read_permission_is_told(tmp_path, monkeypatch):
    path = tmp_path / "secret.yaml"
    path.write_text("name: a\n")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(DiagnosticError, match="Permission denied"):
        load(path)


@pytest.mark.parametrize("spelling", ["llama2-13b", "graphs/llama2-13b", "graphs/llama2-13b.yaml"])
def test_catalogue_is_found_by_name_from_any_directory(spelling, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = load(spelling)
    assert list(document.sources) == ["graphs/llama2-13b.yaml", "graphs/families/llama.yaml"]


def test_hash_is_of_the_bytes_and_not_of_the_path(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.yaml").write_text("extends: llama2-7b\nname: mine\n")
    hashes = [load(tmp_path / folder / "m.yaml").hash for folder in ("a", "b")]
    (tmp_path / "b" / "m.yaml").write_text("extends: llama2-7b\nname: other\n")
    assert hashes[0] == hashes[1] != load(tmp_path / "b" / "m.yaml").hash


def test_a_file_beside_the_model_goes_before_the_catalogue(tmp_path):
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "llama.yaml").write_text("name: near\n")
    (tmp_path / "m.yaml").write_text("extends: families/llama\n")
    assert load(tmp_path / "m.yaml").root.items["name"].text == "near"


def test_extends_may_be_chained_but_not_without_end(tmp_path):
    for i in range(12):
        (tmp_path / f"m{i}.yaml").write_text(f"extends: m{i + 1}\nname: m{i}\n")
    (tmp_path / "m12.yaml").write_text("dtype: float16\n")
    assert load(tmp_path / "m5.yaml").root.items["dtype"].text == "float16"
    with pytest.raises(DiagnosticError, match=r"E005 .*more than 10 files deep"):
        load(tmp_path / "m0.yaml")


def test_merged_values_keep_the_place_of_the_file_that_said_them_last(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: llama2-7b\nname: mine\nsizes: {layers: 4}\n")
    sizes = load(path).root.items["sizes"]
    assert sizes.items["layers"].place.file == str(path)
    assert sizes.items["hidden"].place.file == "graphs/llama2-7b.yaml"
    assert sizes.items["head_dim"].place.file == "graphs/families/llama.yaml"
    assert sizes.keys["layers"].file == str(path)


def test_aliases_are_one_value_in_two_places():
    root = loads("a: &x {b: 1}\nc: *x\n").root
    assert root.items["a"] is root.items["c"]


def test_pure_python_loader_reads_the_same(monkeypatch):
    fast = [load(name).root for name in catalogue()]
    monkeypatch.setattr(source, "LOADER", yaml.SafeLoader)
    assert [load(name).root for name in catalogue()] == fast
