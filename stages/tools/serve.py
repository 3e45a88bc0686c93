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
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.shared.chat.conversation import RejectedRow
from stages.shared.core.command import quick_imports, run
from stages.shared.core.errors import UserError

TIMEOUT = 60  # seconds for a client that does not read
LARGEST = 1 << 24  # bytes of a request
SERVED = web.AppKey[Any]("served")
WITHOUT_EFFECT = ("user", "metadata", "store")  # options that change no reply


def add_options(parser: ArgumentParser) -> None:
    """Add the adapters and the address."""
    parser.add_argument("--adapters", nargs="+", default=[], metavar="EXPERIMENT")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")


def main(options: Namespace) -> None:
    """Load the model, and serve until Ctrl-C."""
    try:  # before the model is loaded
        listening = socket.create_server((options.host, options.port))
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", error)).partition(" (while")[0].rstrip(".")
        where = f"{options.host}:{options.port}"
        raise UserError(f"--port: {where}: {reason}. Choose another.") from None
    with quick_imports():
        from stages.tools.replies import Served  # noqa: PLC0415
    with listening, TemporaryDirectory() as folder:
        served = Served(options.adapters, Path(folder))
        host, port = listening.getsockname()
        print(f"http://{host}:{port}/v1 serves {', '.join(served.names)}", flush=True)
        web.run_app(application(served), sock=listening, print=None, shutdown_timeout=1)


class Request(BaseModel):
    """A request for a chat completion; what else would change the reply is refused."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    class Message(BaseModel):
        """A turn; a content of parts is refused."""

        role: Literal["system", "user", "assistant"]
        content: str

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    temperature: float | None = Field(default=0.0, ge=0, le=2)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None

    def options(self, on_text: Callable[[str], Any]) -> tuple[Any, ...]:
        """Arguments of `replies.Served.reply`."""
        messages = [message.model_dump() for message in self.messages]
        limit = self.max_completion_tokens or self.max_tokens or 512
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return (self.model, messages, limit, on_text, self.temperature or 0.0, stops, self.seed)

    def unsupported(self) -> Iterator[str]:
        """Options that ask for something else than one whole reply."""
        for name, value in (self.model_extra or {}).items():
            default = 1 if name in ("n", "top_p") else None
            if name not in WITHOUT_EFFECT and value not in (None, False, [], {}, default):
                yield name


@web.middleware
async def refuse(request: web.Request, handler: Any) -> web.StreamResponse:
    """Tell of errors in the form of OpenAI's."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        body = {"message": error.text, "type": "invalid_request_error", "code": error.status}
        return web.json_response({"error": body}, status=error.status)


def parse(body: bytes, names: list[str]) -> Request:
    """Check a request; raises an HTTPException that says what is wrong."""
    try:
        request = Request.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise web.HTTPBadRequest(text=f"{where}: {first['msg']}") from None
    if request.model not in names:
        raise web.HTTPNotFound(text=f"model: {request.model!r} is none of {', '.join(names)}")
    for name in request.unsupported():
        raise web.HTTPBadRequest(text=f"{name}: is not supported. Leave it out.")
    return request


def application(served: Any) -> web.Application:
    """Web application of what `replies.Served` has loaded."""
    app = web.Application(client_max_size=LARGEST, middlewares=[refuse])
    app[SERVED] = served
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", complete)
    return app


async def models(http: web.Request) -> web.Response:
    """The names that `model` may have."""
    fixed = {"object": "model", "created": 0, "owned_by": "me"}
    data = [{"id": name, **fixed} for name in http.app[SERVED].names]
    return web.json_response({"object": "list", "data": data})


async def complete(http: web.Request) -> web.StreamResponse:
    """A chat completion, whole or as server-sent events."""
    served = http.app[SERVED]
    request = parse(await http.read(), served.names)
    head: dict[str, Any] = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
    head["object"] = "chat.completion.chunk" if request.stream else "chat.completion"
    head["model"] = request.model
    stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    loop = asyncio.get_running_loop()

    def choice(key: str, text: str, reason: str | None = None) -> dict[str, Any]:
        said = {"role": "assistant", "content": text}
        return {"choices": [{"index": 0, key: said, "finish_reason": reason}]}

    async def send(values: dict[str, Any]) -> None:
        if not stream.prepared:  # a refusal comes before any text
            await stream.prepare(http)
        await stream.write(f"data: {json.dumps(head | values)}\n\n".encode())

    def on_text(text: str) -> None:  # on the model's thread; what it raises ends the reply
        if http.transport is None:  # closed, by Ctrl-C too
            raise ConnectionAbortedError
        if request.stream:
            sent = send(choice("delta", text))
            asyncio.run_coroutine_threadsafe(sent, loop).result(TIMEOUT)

    try:
        reply = await asyncio.to_thread(served.reply, *request.options(on_text))
        reason = "stop" if reply.stopped else "length"
        usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens}
        usage["total_tokens"] = reply.prompt_tokens + reply.tokens
        if not request.stream:
            message = choice("message", reply.text, reason)
            return web.json_response(head | message | {"usage": usage})
        await send(choice("delta", "", reason))
        if (request.stream_options or {}).get("include_usage"):
            await send({"choices": [], "usage": usage})
        await stream.write(b"data: [DONE]\n\n")
    except RejectedRow as error:
        raise web.HTTPBadRequest(text=f"messages: {error}") from None
    except UserError as error:
        raise web.HTTPBadRequest(text=str(error)) from None
    except (ConnectionError, TimeoutError):  # the client hung up, or does not read
        pass
    return stream


if __name__ == "__main__":
    run(main, add_options)
