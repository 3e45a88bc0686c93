"""A GGUF file in llama.cpp itself (the wheel xllamacpp), by the HTTP interface of its server."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xllamacpp


class Llama:
    """A server with one model."""

    def __init__(self, model: Path, adapter: Path | None = None) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 1024, 1, 0
        params.warmup, params.verbosity, params.use_jinja = False, 0, True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.port, params.hostnames = 0, ["127.0.0.1"]
        if adapter:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(params)

    def __call__(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": special}
        return self("/tokenize", body)["tokens"]

    def complete(self, ids: list[int], count: int, **options: Any) -> Any:
        body = {"prompt": ids, "n_predict": count, "temperature": 0, "return_tokens": True}
        return self("/completion", body | options)

    def next_token(self, ids: list[int]) -> dict[int, float]:
        """Log-probabilities of the most likely next tokens, the likeliest first.

        None where the likeliest is half a character or the end: the server leaves them out.
        """
        reply = self.complete(ids, 1, n_probs=20)
        top = reply.get("completion_probabilities", [{"top_logprobs": []}])[0]["top_logprobs"]
        return {found["id"]: found["logprob"] for found in top}


@contextmanager
def opened(model: Path, adapter: Path | None = None) -> Iterator[Llama]:
    """A server that ends with the block."""
    llama = Llama(model, adapter)
    yield llama
    del llama._server
