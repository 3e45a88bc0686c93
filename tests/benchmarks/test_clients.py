"""OpenAI's own client against what serves the tuned model (`make extras`)."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web

from stages.tools import replies, serve
from tests.export.test_export import exported, tuned  # noqa: F401  (a fixture)
from tests.llama import opened

openai = pytest.importorskip("openai", reason="openai is not installed: make extras")
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3?"}]


@contextmanager
def own_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The server of adapters, on a thread of its own."""
    import asyncio
    import shutil
    import socket

    shutil.copytree(folder / "quantized", "models/quantized")
    shutil.copytree(folder / "adapter", "models/adapter")
    shutil.copytree(folder / "tokenizer", "models/tokenizer")
    shutil.copytree(folder / "prepared", "data/prepared")
    listening = socket.create_server(("127.0.0.1", 0))
    app = serve.application(replies.Served(["workspace"], Path()))
    loop = asyncio.new_event_loop()
    run = {"sock": listening, "handle_signals": False, "print": None, "loop": loop}
    threading.Thread(target=web.run_app, args=(app,), kwargs=run, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("server", ["llama.cpp", "adapters"])
def test_openai_client_gets_replies_streams_and_stops(
    tuned: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if server == "llama.cpp":
        exported(tuned, tmp_path / "out", ["gguf-f16"])
        with opened(tmp_path / "out/gguf-f16/model.gguf") as llama:
            require_replies(llama._server.listening_address, "tuned")
    else:
        with own_server(tuned, monkeypatch) as address:
            require_replies(address, "workspace")


def require_replies(address: str, model: str) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    options = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 8}
    whole = client.chat.completions.create(**options).choices[0]
    text = whole.message.content
    assert text
    assert whole.finish_reason in ("stop", "length")
    events = [e.choices[0] for e in client.chat.completions.create(stream=True, **options)]
    assert "".join(e.delta.content or "" for e in events) == text
    assert events[-1].finish_reason == whole.finish_reason
    stop = text[len(text) // 2 :][:2]
    cut = client.chat.completions.create(stop=[stop], **options).choices[0]
    assert cut.message.content == text[: text.index(stop)]
    assert cut.finish_reason == "stop"
