"""Which files `extends` may read: those of the model's folder and of the catalogue. Needs nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from llmc.compiler.cli import main
from llmc.compiler.diagnostics import DiagnosticError, UserError
from llmc.compiler.language import source
from llmc.compiler.language.source import load, loads

SECRET = "root:$6$topsecret:19000:0:99999:7:::"


@pytest.fixture
def outside(tmp_path):
    """A file beside the model's folder that is no model."""
    path = tmp_path / "secrets" / "shadow"
    path.parent.mkdir()
    path.write_text(f"{SECRET}\n")
    return path


@pytest.fixture
def model(tmp_path):
    """Writes models/mine.yaml that extends something."""
    (tmp_path / "models").mkdir()

    def write(extends: str | Path, *, file: str = "mine.yaml") -> Path:
        path = tmp_path / "models" / file
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(f'extends: "{extends}"\nname: mine\n')
        return path

    return write


def refused(path, *words, allow=()) -> str:
    with pytest.raises(DiagnosticError) as caught:
        load(path, allow)
    text = str(caught.value)
    assert caught.value.code == "E005"
    assert [d.place.line for d in caught.value.diagnostics] == [1]
    assert not [word for word in words if word not in text]
    assert SECRET not in text
    assert "topsecret" not in text
    return text


@pytest.mark.parametrize(
    "spelling",
    [
        "{outside}",
        "../secrets/shadow",
        "./../secrets/shadow",
        "../models/../secrets/shadow",
        "sub/../../secrets/shadow",
    ],
)
def test_a_file_outside_is_refused_and_not_read(spelling, model, outside):
    path = model(spelling.format(outside=outside))
    (path.parent / "sub").mkdir()
    text = refused(path, "outside the model's folder", f"--allow-extends {outside.parent}")
    assert text.count("\n") <= 6


@pytest.mark.parametrize("there", [True, False])
def test_the_message_does_not_tell_whether_the_file_is_there(there, model, outside):
    if not there:
        outside.unlink()
    refused(model(outside), "outside the model's folder")


@pytest.mark.parametrize(
    "path", ["/etc/shadow", "/etc/passwd", "/proc/self/environ", "/dev/zero", "/dev/stdin", "/", "//etc//passwd"]
)
def test_files_of_the_system_are_refused(path, model, monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    refused(model(path), "outside the model's folder")


@pytest.mark.parametrize("what", ["file", "folder", "chain", "without suffix"])
def test_links_are_followed_before_the_folder_is_compared(what, model, outside, tmp_path):
    folder = tmp_path / "models"
    (folder / "first").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent)
    (folder / "second").symlink_to(folder / "first")
    (folder / "base.yaml").symlink_to(outside)
    name = {"file": "first", "folder": "linked/shadow", "chain": "second", "without suffix": "base"}[what]
    refused(model(name), "outside the model's folder", f"it leads to {outside}")


def test_a_link_that_goes_round_is_told(model, tmp_path):
    (tmp_path / "models" / "a").symlink_to(tmp_path / "models" / "b")
    (tmp_path / "models" / "b").symlink_to(tmp_path / "models" / "a")
    refused(model("a"), "symbolic links")


def test_a_file_that_is_extended_is_held_to_the_same_folder(model, outside):
    model("../../secrets/shadow", file="families/base.yaml")
    with pytest.raises(DiagnosticError, match="outside the model's folder") as caught:
        load(model("families/base"))
    assert caught.value.diagnostics[0].place.file.endswith("base.yaml")
    assert SECRET not in str(caught.value)


def test_files_below_and_up_again_within_the_folder_may_be_extended(model):
    (model("families/llama").parent / "families").mkdir()
    for name, text in (("families/llama", "extends: ../shared/base\ndtype: float32\n"), ("shared/base", "name: far\n")):
        path = model("").parent / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert load(model("families/llama")).root.items["dtype"].text == "float32"
    assert load(model(model("x").parent / "families" / "llama.yaml")).root.items["dtype"].text == "float32"


def test_the_catalogue_may_be_extended_by_name_and_by_path(model):
    for spelling in ("llama2-7b", "graphs/llama2-7b", os.path.join(source.GRAPHS, "families", "llama.yaml")):
        assert "layers" in load(model(spelling)).root.items["graph"].items


def test_the_folder_of_the_catalogue_is_not_left_either(model, tmp_path, monkeypatch, outside):
    monkeypatch.setattr(source, "GRAPHS", str(tmp_path / "models"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.yaml").write_text("extends: families/../../secrets/shadow\n")
    with pytest.raises(DiagnosticError) as caught:
        load(tmp_path / "elsewhere" / "mine.yaml")
    assert SECRET not in str(caught.value)


def test_a_shared_folder_beside_is_allowed_by_the_flag(model, tmp_path, monkeypatch):
    (tmp_path / "shared" / "deep").mkdir(parents=True)
    (tmp_path / "shared" / "deep" / "base.yaml").write_text("extends: ../other\ndtype: float32\n")
    (tmp_path / "shared" / "other.yaml").write_text("extends: families/llama\n")
    path = model("../shared/deep/base")
    refused(path, "outside the model's folder")
    refused(path, "outside the model's folder", allow=[tmp_path / "models"])
    assert load(path, [tmp_path / "shared"]).root.items["dtype"].text == "float32"
    monkeypatch.chdir(tmp_path)
    assert load(path, ["models", "shared"]).root.items["dtype"].text == "float32"
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    assert load(path, ["link"]).root.items["dtype"].text == "float32"
    assert load(path, ["."]).root.items["dtype"].text == "float32"


@pytest.mark.parametrize("given", ["nowhere", "file", ""])
def test_a_folder_that_is_none_is_told(given, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"--allow-extends '{given}'.*directory"):
        load(model("llama2-7b"), [given])


def test_a_model_in_the_root_of_the_file_system_has_no_tree(monkeypatch):
    """Everything lies below `/`."""
    chain = source._Chain(source.Report({}), "/")
    assert chain.allowed("/base.yaml")
    assert not chain.allowed("/etc/shadow")


def test_text_in_memory_extends_from_the_working_directory(tmp_path, monkeypatch, outside):
    monkeypatch.chdir(outside.parent)
    with pytest.raises(DiagnosticError, match="outside the model's folder"):
        loads("extends: ../models/mine\n")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: os.mkfifo(path), "a pipe"),
        (lambda path: path.mkdir(), "a directory"),
        (lambda path: path.write_bytes(b"#" * (source.MAX_BYTES + 1)), "larger than 1 MiB"),
        (lambda path: path.write_bytes(b"\xff"), "not UTF-8"),
    ],
    ids=["pipe", "directory", "huge", "binary"],
)
def test_what_is_no_file_is_refused_by_name(make, words, model, tmp_path):
    make(tmp_path / "models" / "base")
    with pytest.raises(DiagnosticError, match=words) as caught:
        load(model("base"))
    assert "base" in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/zero")
def test_a_device_is_refused_also_where_it_is_allowed(model):
    with pytest.raises(DiagnosticError, match="a device"):
        load(model("/dev/zero"), ["/dev"])


@pytest.mark.parametrize("name", ["a\\0b", "x" * 5000, "\\e[31mred", "a/" * 2000])
def test_names_that_are_none_are_told(name, model):
    refused(model(name))


COMMANDS = {
    "compile": ["{path}", "-o", "{out}"],
    "check": ["{path}"],
    "show": ["{path}"],
    "explain": ["{path}", "norm"],
    "plan": ["{path}", "--tp", "1"],
    "diff": ["{path}", "llama2-7b"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_reads_a_model_has_the_flag(command, model, tmp_path, capsys):
    path = model("../shared/base")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "base.yaml").write_text("extends: llama2-7b\nsizes: {layers: 1}\n")
    words = [command, *(word.format(path=path, out=tmp_path / "out") for word in COMMANDS[command])]
    assert main(words) == 1
    assert "--allow-extends" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    flags = ["--allow-extends", str(tmp_path / "models"), "--allow-extends", str(tmp_path / "shared")]
    assert main([*words, *flags]) == 0, capsys.readouterr().err


def test_one_side_of_a_comparison_may_have_it_alone(model, tmp_path, capsys):
    path = model("../shared/base")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "base.yaml").write_text("extends: llama2-7b\nsizes: {layers: 1}\n")
    assert main(["diff", f"{path}@allow-extends={tmp_path / 'shared'}", "llama2-7b"]) == 0
    assert main(["diff", f"{path}@allow-extends={tmp_path / 'shared'}", str(path)]) == 1
