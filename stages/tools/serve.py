"""Serve the tuned model, or adapters of several experiments on one base, to OpenAI's clients.

/v1/models, and /v1/chat/completions with streaming; `model` selects the adapter by the
experiment's name, or `base`. Requests are answered one after the other: for load, see vLLM.

Reads:  models/merged, or models/quantized and adapters; models/tokenizer,
        data/prepared/format.json
Run:    python -m stages.tools.serve [--adapters EXPERIMENT ...] [--port 8000]
"""

import asyncio
import json
import socket
import time
import uuid
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.evaluate.__main__ import MODELS, PREPARED, QUANTIZED, TOKENIZER
from stages.shared.core import files, machine, progress
from stages.shared.core.errors import UserError, run

BASE, MERGED = "base", "merged"


def add_options(parser: ArgumentParser) -> None:
    """Add the adapters and the address."""
    parser.add_argument("--adapters", nargs="+", default=[], metavar="EXPERIMENT")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)


def main(options: Namespace) -> None:
    """Load the model, and serve until Ctrl-C."""
    try:
        listening = socket.create_server((options.host, options.port))
    except OSError as error:
        where = f"{options.host}:{options.port}"
        raise UserError(f"--port: {where}: {error.strerror}. Choose another.") from None
    with progress.quick_imports():
        import stages.tools.replies  # noqa: F401, PLC0415

    with listening, TemporaryDirectory() as folder:
        server = Server(options.adapters, Path(folder))
        print(f"http://{options.host}:{options.port}/v1 serves {', '.join(server.names)}")
        web.run_app(server.app(), sock=listening, print=None)


def _refuse(status: int, message: str) -> web.Response:
    """An error in the form of OpenAI's."""
    error = {"message": message, "type": "invalid_request_error", "code": status}
    return web.json_response({"error": error}, status=status)


class Request(BaseModel):
    """A request for a chat completion, as far as it is honoured; other options are ignored."""

    model_config = ConfigDict(extra="ignore")

    class Message(BaseModel):
        """A turn; a content of parts is refused."""

        role: str
        content: str

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None


class Server:
    """A loaded model; the lock is held for a reply, as the active adapter is its state."""

    def __init__(self, experiments: list[str], folder: Path) -> None:
        from stages.evaluate.adapters import fetch, require_adapter  # noqa: PLC0415
        from stages.shared.chat.templates import read_format  # noqa: PLC0415
        from stages.shared.model import loading  # noqa: PLC0415
        from stages.tools.replies import Replier  # noqa: PLC0415

        device = machine.device()
        formats = {BASE if experiments else MERGED: read_format(PREPARED / "format.json")}
        source = QUANTIZED if experiments else MODELS[MERGED]
        self._model: Any = loading.load_model(source, device)
        self._adapters: dict[str, str] = {}  # peft's name by the experiment's
        for number, name in enumerate(dict.fromkeys(experiments)):
            adapter, formats[name] = fetch(name, folder)
            require_adapter(name, adapter)
            if files.read_json(adapter / "adapter_config.json").get("bias", "none") != "none":
                raise UserError(f"{name}: trained the base's biases. Serve its merged model alone.")
            self._adapters[name] = f"adapter{number}" if number else "default"
            if number:
                result = self._model.load_adapter(adapter, adapter_name=self._adapters[name])
                if result.unexpected_keys or result.missing_keys:
                    raise UserError(f"{name}: its tensors do not fit the base. Serve it alone.")
            else:
                self._model = loading.attach(self._model, adapter)
        dtype = loading.compute_dtype(source, device)
        self.names = list(formats)
        self._repliers = {
            name: Replier(self._model, dtype, TOKENIZER, form) for name, form in formats.items()
        }
        self._lock = asyncio.Lock()

    def _adapter(self, name: str) -> AbstractContextManager[None]:
        """Context in which the adapter of that name is active, or none."""
        if name in self._adapters:
            self._model.set_adapter(self._adapters[name])
        return self._model.disable_adapter() if name == BASE else nullcontext()

    def app(self) -> web.Application:
        """The application."""
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/chat/completions", self.complete)
        return app

    async def models(self, _: web.Request) -> web.Response:
        """The names that `model` may have."""
        data = [{"id": n, "object": "model", "created": 0, "owned_by": "me"} for n in self.names]
        return web.json_response({"object": "list", "data": data})

    async def complete(self, http: web.Request) -> web.StreamResponse:
        """A chat completion, whole or as server-sent events."""
        try:
            request = Request.model_validate_json(await http.text())
        except ValidationError as error:
            first = error.errors()[0]
            return _refuse(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        if request.model not in self.names:
            return _refuse(404, f"model: {request.model!r} is none of {', '.join(self.names)}")
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        head["model"] = request.model
        events = self._events(request)
        try:
            first_event = await anext(events)  # a refusal comes before any text
        except UserError as error:
            return _refuse(400, str(error))
        if not request.stream:
            text, last = first_event[0], first_event[1]
            async for piece, end in events:
                text, last = text + piece, end
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": last["finish_reason"]}
            body = head | {"object": "chat.completion", "choices": [choice], "usage": last["usage"]}
            return web.json_response(body)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        try:
            piece, last = first_event
            while True:
                delta = {"content": piece} if piece else {}
                choice = {"index": 0, "delta": delta, "finish_reason": last.get("finish_reason")}
                chunk = head | {"object": "chat.completion.chunk", "choices": [choice]}
                await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
                piece, last = await anext(events)
        except StopAsyncIteration:
            await response.write(b"data: [DONE]\n\n")
        finally:
            await events.aclose()
        return response

    async def _events(self, request: Request) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """Pieces of the reply with {}, the last with `finish_reason` and `usage`."""
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop, left = asyncio.get_running_loop(), [False]
        put = lambda text: loop.call_soon_threadsafe(pieces.put_nowait, text)  # noqa: E731
        async with self._lock:
            work = asyncio.ensure_future(asyncio.to_thread(self._reply, request, put, left))
            work.add_done_callback(lambda _: pieces.put_nowait(None))
            try:
                while (piece := await pieces.get()) is not None:
                    yield piece, {}
                yield "", await work
            finally:
                left[0] = True  # a client that hangs up ends its reply
                await asyncio.wait([work])

    def _reply(self, request: Request, put: Any, left: list[bool]) -> dict[str, Any]:
        """Reply on a thread, with the adapter that is asked for."""
        from stages.shared.chat.conversation import RejectedRow, normalize  # noqa: PLC0415
        from stages.tools.replies import StopStrings  # noqa: PLC0415

        messages: Any = [
            {"role": m.role, "content": normalize(m.content)} for m in request.messages
        ]
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        cut = StopStrings(stops, put)
        most = request.max_completion_tokens or request.max_tokens or 512
        ended = lambda: left[0] or cut.found  # noqa: E731
        replier = self._repliers[request.model]
        try:
            with self._adapter(request.model):
                reply = replier.reply(messages, most, cut, request.temperature, ended)
        except RejectedRow as error:
            raise UserError(f"messages: {error}") from None
        cut.flush()
        return {
            "finish_reason": "stop" if reply.stopped or cut.found else "length",
            "usage": {
                "prompt_tokens": reply.prompt_tokens,
                "completion_tokens": reply.tokens,
                "total_tokens": reply.prompt_tokens + reply.tokens,
            },
        }


if __name__ == "__main__":
    run(main, add_options)
