"""Using adapters: by the names of DVC, in the terminal chat, and several on one base."""

import io
import subprocess
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
import torch
from dvc.repo import Repo

from stages.evaluate.evaluate import evaluate, evaluate_adapters
from stages.evaluate.inputs import Evaluate, fetch_adapter
from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.model import loading
from stages.shared.step import adapter
from stages.tools import chat
from stages.tools.replies import Replier
from tests import tiny
from tests.shared.step.adapters import moved
from tests.train.running import settings

OUTS = "[models/adapter, models/quantized, data/prepared/format.json, data/prepared/eval.parquet]"
NAMES = ("rank8", "rank32")


def git(*command: str) -> None:
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", *author, *command], check=True, capture_output=True)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a run whose adapters have the names `NAMES`, and one on another base."""
    root = tmp_path_factory.mktemp("space")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        tiny.prepared(Path("data/prepared"), held_out=6)
        quantized = tiny.quantize(Path("models/quantized"), "nf4")
        tiny.tokenizer().save_pretrained("models/tokenizer")
        tiny.save(Path("models/merged"))
        tuned = moved(quantized).eval()
        git("init", "--quiet")
        files.write_text(Path("dvc.yaml"), f"stages: {{train: {{cmd: 'true', outs: {OUTS}}}}}\n")
        with Repo.init(".") as repo:
            for name in (*NAMES, "split", "other"):
                for parameter in tuned.parameters():
                    parameter.data *= 1.25 if parameter.requires_grad else 1
                tuned.save_pretrained("models/adapter")
                if name == "split":
                    tiny.prepared(root / "split", held_out=5)
                    Path("split/eval.parquet").replace("data/prepared/eval.parquet")
                if name == "other":
                    tiny.quantize(quantized, "fp4")
                repo.commit(force=True)
                git("add", "dvc.yaml", "dvc.lock", ".dvc")
                git("commit", "--quiet", "--message", name)
                git("tag", name)
                if name == NAMES[-1]:
                    kept = files.read_json(quantized / "config.json")
        git("checkout", "--quiet", NAMES[-1])
        with Repo(".") as repo:
            repo.checkout(force=True)
        assert files.read_json(quantized / "config.json") == kept
    return root


@pytest.fixture(autouse=True)
def inside(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(space)


def test_adapters_of_experiments_come_from_the_cache(tmp_path: Path) -> None:
    folders = {name: fetch_adapter(name, tmp_path)[0] for name in NAMES}
    tensors = {name: files.sha256(f / "adapter_model.safetensors") for name, f in folders.items()}
    assert len({*tensors.values()}) == 2
    assert fetch_adapter("workspace", tmp_path)[0] == Path("models/adapter")
    here = files.sha256(Path("models/adapter/adapter_model.safetensors"))
    assert here == tensors[NAMES[-1]]
    for name, commit in zip(("a/b", "a-b"), NAMES, strict=True):  # no folder of one is the other's
        git("tag", name, commit)
    weights = [
        fetch_adapter(name, tmp_path)[0] / "adapter_model.safetensors" for name in ("a/b", "a-b")
    ]
    assert [files.sha256(path) for path in weights] == [*tensors.values()]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "nothing: no experiment, branch or commit with a run"),
        ("other", "other: its adapter was trained on another models/quantized"),
        ("split", "split: its adapter may know rows of data/prepared/eval.parquet"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fetch_adapter(name, tmp_path, scored=True)


def test_adapter_that_left_the_cache_is_named(tmp_path: Path) -> None:
    cache = Path(".dvc/cache")
    cache.rename(tmp_path / "cache")
    try:
        with pytest.raises(UserError, match="rank8: its adapter is not in the cache"):
            fetch_adapter("rank8", tmp_path)
    finally:
        (tmp_path / "cache").rename(cache)


def test_adapters_on_one_base_are_evaluated_as_alone(tmp_path: Path) -> None:
    quantized = Path("models/quantized")
    lora = settings(lora__modules_to_save=["lm_head"]).lora
    whole_head = adapter.load_for_lora(quantized, lora, torch.device("cpu"))
    with torch.no_grad():
        whole_head.get_output_embeddings().weight.mul_(1.1)
    adapter.save(whole_head, tmp_path / "head", torch.float32)
    adapters = {"head": tmp_path / "head", **{n: fetch_adapter(n, tmp_path)[0] for n in NAMES}}
    few = Evaluate(generate_rows=3, max_new_tokens=4, prompts=1, seed=0)
    paths = (quantized, Path("models/tokenizer"), Path("data/prepared"))
    together = dict(evaluate_adapters(adapters, *paths, few))
    for name, folder in adapters.items():
        assert together[name] == evaluate(name, folder, *paths, few)[0]
    assert together["rank8"]["loss"] != together["rank32"]["loss"]


def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, lines: str, *arguments: str
) -> tuple[list[str], list[str]]:
    """What the chat prints to stdout and stderr for some lines of input."""
    parser = ArgumentParser()
    chat.add_options(parser)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat.main(parser.parse_args(["--max-new-tokens", "6", *arguments]))
    printed = capsys.readouterr()
    return printed.out.split("\n"), [line for line in printed.err.split("\n") if "(" in line]


def test_chat_replies_as_evaluation_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    folder, _ = fetch_adapter("rank8", tmp_path)
    settings = Evaluate(generate_rows=6, max_new_tokens=6, prompts=6, seed=0)
    paths = (Path("models/quantized"), Path("models/tokenizer"), Path("data/prepared"))
    _, expected = evaluate("adapter", folder, *paths, settings)
    for row in expected["answers"][:2]:
        line = row["prompt"][0]["content"] + "\n"
        printed, _ = talk(monkeypatch, capsys, line, "--adapter", "rank8")
        assert "\n".join(printed).removesuffix(" […]\n").strip() == row["answer"]


def test_chat_obeys_commands_and_remembers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seen = []
    reply = Replier.reply

    def spy(self: Replier, messages: list, *rest: Any) -> Any:
        seen.append(messages)
        return reply(self, messages, *rest)

    monkeypatch.setattr(Replier, "reply", spy)
    lines = (
        "What is 1?\nWhat is 2?\n/variant quantized\n/variant base\n/what\n/reset\n\nHi\n/quit\nNo"
    )
    _, notes = talk(monkeypatch, capsys, lines, "--system", "Be brief.")
    assert [[m["role"] for m in messages][1:] for messages in seen] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user"],
    ]
    assert all(messages[0]["content"] == "Be brief." for messages in seen)
    assert notes[:2] == ["(merged)", "(quantized)"]
    assert notes[2] == "(base)"
    assert notes[3] == "(/variant base|quantized|adapter|merged, /reset, /quit)"


def test_chat_names_a_model_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    Path("models/base").rename("models/moved")
    try:
        _, notes = talk(monkeypatch, capsys, "/variant base\nWhat is 1?\n")
    finally:
        Path("models/moved").rename("models/base")
    assert notes[1].startswith("(models/base: not there; `dvc repro`")
    assert len(notes) == 2


def test_ctrl_c_ends_a_reply_or_a_load_and_keeps_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    load, lengths = loading.load_adapted, []

    def interrupted(folder: Path, *rest: Any) -> Any:
        if folder.name == "base":
            raise KeyboardInterrupt
        return load(folder, *rest)

    def stopped(self: Replier, messages: list, *_: object) -> None:
        lengths.append(len(messages))
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load_adapted", interrupted)
    monkeypatch.setattr(Replier, "reply", stopped)
    lines = "What is 1?\nWhat is 2?\n/variant base\nHi\n/variant merged\n"
    _, notes = talk(monkeypatch, capsys, lines)
    none = "(no model is loaded. Choose one: /variant merged)"
    forgotten = "(stopped; this turn is forgotten)"
    assert notes == ["(merged)", *[forgotten] * 3, none, "(merged)"]
    assert lengths == [1, 1]


def test_conversation_beyond_the_positions_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _, notes = talk(monkeypatch, capsys, "two " * 2000 + "\n")
    assert notes[1].endswith("the model 1024 positions. Begin a new one.)")
