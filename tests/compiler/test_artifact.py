"""Artifacts: complete or absent, and refused by name when damaged."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmc.compiler import artifact
from llmc.compiler.diagnostics import UserError
from llmc.compiler.manifest import problems
from llmc.compiler.memory import evaluate, largest
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model


@pytest.fixture(scope="module")
def compiled():
    return compile_model("smollm2-135m", Options(device="host", dtype="float32"))


@pytest.fixture
def written(compiled, tmp_path):
    path = tmp_path / "out"
    artifact.write(compiled, path)
    return path


def test_a_written_artifact_reads_back_with_everything_named(written):
    manifest = artifact.read(written).manifest
    assert sorted(p.name for p in written.iterdir()) == ["decode.py", "manifest.json", "prefill.py"]
    for phase in ("prefill", "decode"):
        known = {*manifest["weights"], *manifest["caches"], *manifest["constants"], *manifest["inputs"]}
        for part in manifest["phases"][phase]["segments"]:
            assert set(part["inputs"]) <= known
            known |= set(part["outputs"])
        assert "logits" in known
        hosts = {n for part in manifest["phases"][phase]["segments"] for n in part["host"]}
        assert hosts == {n for n in manifest["phases"][phase]["inputs"] if manifest["inputs"][n]["host"]}


def test_tied_embeddings_are_counted_once(written):
    manifest = artifact.read(written).manifest
    assert manifest["weights"]["lm_head.weight"]["sources"] == manifest["weights"]["embed.weight"]["sources"]
    parameters = 134_515_008  # published parameter count of SmolLM2-135M
    assert manifest["memory"]["weight_bytes"] == parameters * 4


def test_writing_again_replaces_the_artifact_and_leaves_nothing_else(compiled, written):
    (written / "prefill.py").write_text("broken")
    artifact.write(compiled, written)
    artifact.read(written)
    assert [p.name for p in written.parent.iterdir()] == ["out"]


def test_a_directory_that_is_no_artifact_is_not_overwritten(compiled, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="not an artifact"):
        artifact.write(compiled, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_files_beside_an_artifact_are_not_lost(compiled, written):
    (written / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match=r"not of an artifact: notes\.txt"):
        artifact.write(compiled, written)
    assert (written / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")], ids=repr)
def test_the_old_artifact_comes_back_when_the_new_one_cannot_take_its_place(compiled, written, monkeypatch, error):
    before = (written / "manifest.json").read_bytes()
    replace = os.replace

    def fail(source, target):
        if source.name == "new":
            raise error
        replace(source, target)

    monkeypatch.setattr(artifact.os, "replace", fail)
    with pytest.raises((UserError, KeyboardInterrupt)):
        artifact.write(compiled, written)
    assert (written / "manifest.json").read_bytes() == before
    assert [p.name for p in written.parent.iterdir()] == ["out"]


def test_many_writers_of_one_target_leave_one_whole_artifact(compiled, tmp_path):
    path = tmp_path / "out"
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(artifact.write, compiled, path) for _ in range(24)]:
            done.result()
    artifact.read(path)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    command = f"ulimit -f 8; {sys.executable} -m llmc.compiler.cli compile smollm2-135m -o {tmp_path / 'out'}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.returncode == 1
    assert "cannot write" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_absolute_path_of_this_machine_is_written(tmp_path, monkeypatch):
    text = "extends: llama2-7b\nname: mine\ngraph: {norm: {op: rms_norm, x: layers.x, eps: eps, weight: n.weight}}\n"
    (tmp_path / "mine.yaml").write_text(text)
    made = artifact.files_of(compile_model(str(tmp_path / "mine.yaml"), Options()))
    assert not [name for name, text in made.items() if str(tmp_path) in text]
    assert "# mine.yaml:3:9" in made["prefill.py"]
    assert '"mine.yaml"' in made["manifest.json"]
    monkeypatch.chdir(tmp_path)
    assert artifact.files_of(compile_model("./mine.yaml", Options())) == made
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert "# ../mine.yaml:3:9" in artifact.files_of(compile_model("../mine.yaml", Options()))["prefill.py"]


@pytest.mark.parametrize("name", ['a"""b', "a\\Nb", "a\nimport os", "größe 1"])
def test_no_file_name_reaches_the_code_as_code(tmp_path, monkeypatch, name):
    text = "extends: llama2-7b\nname: mine\ngraph: {norm: {op: rms_norm, x: layers.x, eps: eps, weight: n.weight}}\n"
    (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    made = artifact.files_of(compile_model(f"{name}.yaml", Options()))
    compile(made["prefill.py"], "prefill.py", "exec")
    assert not any(line.startswith("import os") for line in made["prefill.py"].splitlines())


def forge(path, **values):
    """A manifest that fits its own hash."""
    body = {k: v for k, v in {**json.loads(path.read_text()), **values}.items() if v is not None and k != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**body, "sha256": digest}))


def test_an_interrupted_write_leaves_the_old_artifact(compiled, written, monkeypatch):
    before = (written / "manifest.json").read_bytes()
    monkeypatch.setattr(
        artifact.os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match="No space left"):
        artifact.write(compiled, written)
    assert (written / "manifest.json").read_bytes() == before
    assert [p.name for p in written.parent.iterdir()] == ["out"]


def change(path, **values):
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, **values}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "manifest.json").unlink(), "half-written"),
        (lambda p: (p / "manifest.json").write_text("{"), "cannot be read"),
        (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda p: (p / "manifest.json").write_text("[]"), "format"),
        (lambda p: change(p / "manifest.json", format=99), "newer format 99"),
        (lambda p: change(p / "manifest.json", format=0), "older or foreign format 0"),
        (lambda p: change(p / "manifest.json", dtype="float16"), "changed after it was written"),
        (lambda p: forge(p / "manifest.json", weights=None, files=None), "lacks files, weights"),
        (lambda p: forge(p / "manifest.json", files={}), "names the module decode.py but not its sha256"),
        (lambda p: (p / "decode.py").unlink(), "decode.py is missing"),
        (lambda p: (p / "decode.py").write_text("import os"), "decode.py was changed"),
        (lambda p: os.truncate(p / "prefill.py", 100), "prefill.py was changed"),
    ],
    ids=[
        "no manifest",
        "cut manifest",
        "binary",
        "list",
        "newer",
        "older",
        "edited",
        "without keys",
        "without files",
        "missing",
        "foreign code",
        "cut code",
    ],
)
def test_a_damaged_artifact_is_refused_with_its_path_and_the_reason(written, damage, words):
    damage(written)
    with pytest.raises(UserError, match=words) as error:
        artifact.read(written)
    assert str(written) in str(error.value)


@pytest.mark.parametrize("device", ["host", "atlas-800i-a2", "atlas-300i-duo"])
@pytest.mark.parametrize("attention", ["paged", "flash"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_schema_fits_what_is_written(device, attention, world_size):
    options = Options(
        device=device, attention=attention, world_size=world_size, dtype="float16", allow_unsupported=True
    )
    files = artifact.files_of(compile_model("smollm2-135m", options))
    assert problems(json.loads(files["manifest.json"])) == []


PARTS = "parts: {q: {out: hidden, heads: heads}, k: {out: hidden, heads: heads}, v: {out: hidden, heads: heads}}"


@pytest.mark.parametrize(
    "text",
    [
        'blocks: {attention: {nodes: {qkv: {op: linear, x: x, tp: column, weight: "l.{i}.W", bias: "{i}", PARTS}}}}',
        'blocks: {attention: {nodes: {qkv: {op: linear, x: x, tp: column, weight: "{i}", groups: heads, PARTS}}}}',
        'blocks: {mlp: {nodes: {down: {bias: "l.{i}.b"}}}}',
        "rope: {scaling: {type: yarn, factor: 2, original_max_positions: 64, truncate: false, mscale: 1}}",
        "rope: {scaling: {type: dynamic, factor: 2, original_max_positions: 4096}}",
        'config: {rms_norm_eps: {ignore: why}, a b: {is: 3}}\nunused: {"*.norm.bias": why}',
        "policy: [{nodes: lm_head, dtype: bfloat16}]",
    ],
)
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_schema_fits_what_variants_add(text, world_size, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: llama2-7b\nname: mine\nsizes: {{layers: 2}}\n{text.replace('PARTS', PARTS)}\n")
    options = Options(device="host", dtype="bfloat16", world_size=world_size)
    assert problems(json.loads(artifact.files_of(compile_model(str(path), options))["manifest.json"])) == []


WEIGHT = "layers.0.attn.qkv.weight"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("device",), 7, "device: expected 'atlas-300i-duo', 'atlas-800i-a2' or 'host'; found 7"),
        (("world_size",), 0, r"world_size: expected a world size (1 to 1024); found 0"),
        (("world_size",), True, "found true"),
        (("world_size",), 2, "backend: expected that of the collectives of 2 ranks"),
        (("sizes", "max_positions"), None, "sizes.max_positions: expected a size (1 to 2^48); found null"),
        (("sizes", "max_positions"), "x" * 5000, 'found "xxx'),
        (("sizes", "eps"), float("nan"), "sizes.eps: expected a finite number; found NaN"),
        (("sizes", "eps"), float("inf"), "found Infinity"),
        (("rope", "theta"), -1.0, "rope.theta: expected a finite number above 0; found -1.0"),
        (("rope", "scaling"), {"type": "linear"}, "rope.scaling lacks factor"),
        (("weights",), [], "weights: expected an object; found a list of 0"),
        (
            ("weights", WEIGHT, "shape"),
            [960, -576],
            f"weights['{WEIGHT}'].shape[1]: expected a size (1 to 2^48); found -576",
        ),
        (("weights", WEIGHT, "shape"), [961, 576], "expected what its sources give, [960, 576]; found [961, 576]"),
        (("weights", WEIGHT, "shape"), [10**30, 576], "found 1000000000"),
        (("weights", WEIGHT, "dtype"), "float99", "dtype: expected 'float16', 'bfloat16'"),
        (("weights", WEIGHT, "splits"), ["nowhere"], "splits: expected 0 names"),
        (("weights", WEIGHT, "sources", 0, "rows"), {"groups": 2}, "sources[0].rows lacks stride, offset, size"),
        (("weights", WEIGHT, "extra"), 1, "extra: unknown; expected sources, axis"),
        (("phases", "prefill", "module"), "../prefill.py", "phases.prefill.module: expected the name of a Python file"),
        (
            ("phases", "prefill", "module"),
            "/etc/passwd",
            "expected the name of a Python file in the artifact's directory",
        ),
        (("phases", "prefill", "module"), "other.py", "names the module other.py but not its sha256"),
        (("phases", "prefill", "segments", 0, "inputs", 0), "nobody", "nothing before it makes 'nobody'"),
        (("phases", "prefill", "operations", 0, "layers"), "0-99999999", "expected numbers and ranges of layers"),
        (("phases", "chunk"), {}, "phases.chunk: unknown; expected prefill, decode"),
        (("caches",), {}, "nothing before it makes 'layers.0.attn.core.k_cache'"),
        (("memory", "steps", "decode", "tensors"), [], "memory.steps.decode: expected a form"),
        (("memory", "cache"), {"X": 1}, "memory.cache: expected symbols of T, B, M, N, P, S"),
        (("\x1b[31m",), 1, "unknown; expected"),
        (("files", "../../x.py"), "0" * 64, "expected the name of a Python file"),
        (("files", "gone.py"), "0" * 64, "gone.py is missing"),
    ],
)
def test_a_field_that_is_wrong_is_named_with_what_was_expected(written, path, value, words):
    manifest = json.loads((written / "manifest.json").read_text())
    inner = manifest
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    for write in (lambda file: forge(file, **manifest), lambda file: file.write_text(json.dumps(manifest))):
        write(written / "manifest.json")  # also where its hash is not mended
        with pytest.raises(UserError) as caught:
            artifact.read(written)
        if "is missing" in words:  # that is looked at last
            break
        assert words in str(caught.value)
        assert len(str(caught.value)) < 1000
        assert str(written) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": 3, "model": "a", "model": "b"}', "the key 'model' is said twice"),
        ("[" * 100_000, "nested more than 100 deep"),
        ("[" * 500 + "]" * 500, "nested more than 100 deep"),
        ('{"a":' * 100_000, "nested more than 100 deep"),
        ('{"format": ' + "9" * 200_000 + "}", "a number of 200000 digits"),
        ('{"format": 1e999}', "older or foreign format inf"),
        ('{"format": true}', "older or foreign format True"),
        ('{"format": "' + "x" * 100_000 + '"}', "format 'xxxx"),
        ("", "not valid JSON"),
        ("nul", "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
    ],
    ids=lambda value: value[:20],
)
def test_json_that_no_writer_makes_is_one_short_message(written, text, words):
    (written / "manifest.json").write_text(text)
    with pytest.raises(UserError) as caught:
        artifact.read(written)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_model_without_attention_is_an_artifact_too(tmp_path):
    tiny = Path(__file__).parents[1] / "cases" / "language" / "base" / "tiny.yaml"
    artifact.write(compile_model(str(tiny), Options(device="host")), tmp_path / "out")
    assert artifact.read(tmp_path / "out").manifest["caches"] == {}


def test_a_module_that_leads_out_of_the_directory_is_refused(written, tmp_path):
    text = (written / "prefill.py").read_text()
    (tmp_path / "prefill.py").write_text(text)
    (written / "prefill.py").unlink()
    (written / "prefill.py").symlink_to(tmp_path / "prefill.py")
    with pytest.raises(UserError, match=r"prefill\.py leads out of the directory"):
        artifact.read(written)
    (written / "prefill.py").unlink()
    (written / "..data").mkdir()  # as Kubernetes mounts files
    (written / "..data" / "prefill.py").write_text(text)
    (written / "prefill.py").symlink_to("..data/prefill.py")
    artifact.read(written)


@pytest.mark.parametrize("name", ["manifest.json", "prefill.py"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_does_not_hang(written, name, make):
    (written / name).unlink()
    make(written / name)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        artifact.read(written)


def test_the_memory_plan_counts_the_activations_that_live_together(written):
    """SmolLM2 in float32: most is held where the gate is applied, and of the 23 layers of a segment not all values can
    have a name of their own, so one of a key's size keeps its place. Beside it lie the segment's outputs: x and what is
    added to it (576 each), the rope rows (2 x 64); and the inputs of the step."""
    memory = artifact.read(written).manifest["memory"]
    hidden, keys, ffn = 576, 192, 1536
    layer = 4 * (2 * ffn + ffn + hidden + keys)  # gate and up packed, the product, the residual sum
    handed_over, inputs = 4 * (2 * hidden + 2 * 64), 8 + 8 + 4  # token and position ids, slots
    assert memory["steps"]["prefill"]["workspace"][0] == {"T": layer}
    assert memory["activation_bytes_per_token"]["prefill"] == layer + handed_over + inputs
    assert {"B": layer} in memory["steps"]["decode"]["workspace"]


def test_forms_that_another_one_exceeds_are_left_out():
    forms = [{"T": 4, "B": 2}, {"T": 4}, {"B": 3}, {"T": 4, "B": 2}, {"": 1}]
    assert largest(forms) == [{"T": 4, "B": 2}, {"B": 3}, {"": 1}]
    assert evaluate({"": 5, "T": 2, "B*M": 3}, {"T": 10, "B": 2, "M": 4}) == 5 + 20 + 24


# ---- default names

# Each option of a compilation with values that may be chosen; the first is the default, or what the default comes to.
CHOICES = {
    "device": ["atlas-800i-a2", "atlas-300i-duo", "host"],
    "dtype": [None, "bfloat16"],
    "attention": ["paged", "flash"],
    "logits": ["last", "all"],
    "world_size": [1, 2],
    "backend": [None, "lccl", "hccl"],
    "fusions": [None, (), ("swiglu",), ("swiglu", "add_norm"), ("add_norm", "swiglu"), ("linear_all_reduce",)],
    "layers_per_segment": [0, 1, 2],
    "taps": [(), ("embed",), ("norm", "embed")],
    "allow_unsupported": [True],  # what is refused, not what is made; so the next
    "allow_extends": [()],
}


def test_every_option_is_tried():
    assert [field.name for field in dataclasses.fields(Options)] == list(CHOICES)


def test_artifacts_that_differ_have_different_default_names(tmp_path):
    """Over choices of all options: one name never stands for two artifacts."""
    path = tmp_path / "small.yaml"
    sizes = "{vocab: 96, hidden: 64, ffn: 96, layers: 3, heads: 4, max_positions: 64}"
    path.write_text(f"extends: families/llama\nname: small\nsizes: {sizes}\n")
    one_change = [
        (*(values[0] for values in list(CHOICES.values())[:i]), value, *(v[0] for v in list(CHOICES.values())[i + 1 :]))
        for i, values in enumerate(CHOICES.values())
        for value in values
    ]
    any_change = random.Random(5).sample(list(itertools.product(*CHOICES.values())), 150)
    made: dict[str, dict[str, str]] = {}
    for values in [*one_change, *any_change]:
        try:
            compiled = compile_model(str(path), Options(**dict(zip(CHOICES, values, strict=True))))
        except UserError:  # this device has not that
            continue
        files = json.dumps(artifact.files_of(compiled), sort_keys=True)
        made.setdefault(artifact.default_name(compiled), {}).setdefault(files, str(values))
    assert {name: list(found.values()) for name, found in made.items() if len(found) > 1} == {}
    assert len(made) > 60


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        ({}, "atlas-800i-a2-float16-paged-tp1"),
        ({"world_size": 2}, "atlas-800i-a2-float16-paged-tp2"),
        ({"world_size": 2, "backend": "lccl"}, "atlas-800i-a2-float16-paged-tp2"),  # the device's own
        ({"world_size": 2, "backend": "hccl"}, "atlas-800i-a2-float16-paged-tp2-hccl"),
        ({"backend": "hccl"}, "atlas-800i-a2-float16-paged-tp1"),  # one rank has none
        ({"device": "atlas-300i-duo", "world_size": 2, "backend": "hccl"}, "atlas-300i-duo-float16-paged-tp2"),
        ({"fusions": ()}, "atlas-800i-a2-float16-paged-tp1-fuse-none"),
        ({"fusions": ("swiglu", "add_norm")}, "atlas-800i-a2-float16-paged-tp1-fuse-add_norm-swiglu"),
        ({"logits": "all"}, "atlas-800i-a2-float16-paged-tp1-logits-all"),
        ({"layers_per_segment": 4}, "atlas-800i-a2-float16-paged-tp1-segment4"),
    ],
)
def test_a_name_says_only_what_is_not_the_default(options, ending):
    compiled = compile_model("smollm2-135m", Options(allow_unsupported=True, dtype="float16", **options))
    assert artifact.default_name(compiled) == f"smollm2-135m-{ending}"
