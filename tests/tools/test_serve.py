"""The server of adapters: OpenAI's requests, answers as of each adapter alone."""

import asyncio
import json
import socket
from argparse import Namespace
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer

from stages.evaluate.evaluate import evaluate, evaluate_adapters
from stages.evaluate.inputs import Evaluate, fetch_adapter
from stages.quantize.convert import convert
from stages.shared.chat.templates import read_format
from stages.shared.core.errors import UserError
from stages.shared.model import loading
from stages.shared.step import adapter
from stages.tools import replies, serve
from stages.tools.replies import Replier, Served, Stream
from tests import tiny
from tests.architectures import MIXTURES, saved
from tests.tools.test_chat import NAMES, inside, space  # noqa: F401  (fixtures)
from tests.train.running import settings

CPU, QUANTIZED = torch.device("cpu"), Path("models/quantized")
MESSAGES = [{"role": "user", "content": "What is 3?"}]
Answer = tuple[int, str]


@pytest.fixture(scope="module")
def served(
    space: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Served:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(space)
        return Served([*NAMES], tmp_path_factory.mktemp("adapters"))


def talk(served: Served, script: Callable[[TestClient], Coroutine]) -> Any:
    async def run() -> Any:
        async with TestClient(TestServer(serve.application(served))) as client:
            return await script(client)

    return asyncio.run(run())


def ask(served: Served, *bodies: dict[str, Any]) -> list[Answer]:
    """Status and text of the answers to requests that are sent together."""

    async def one(client: TestClient, body: dict[str, Any]) -> Answer:
        usual = {"messages": MESSAGES, "max_tokens": 8}
        response = await client.post("/v1/chat/completions", json=usual | body)
        return response.status, await response.text()

    async def script(client: TestClient) -> list[Answer]:
        return [*await asyncio.gather(*(one(client, body) for body in bodies))]

    return talk(served, script)


def alone(adapter: Path | None) -> str:
    """A reply of an adapter that is loaded alone, or of the base."""
    model: Any = loading.load_model(QUANTIZED, CPU)
    model = loading.attach(model, adapter) if adapter else model
    form = read_format(Path("data/prepared/format.json"))
    dtype = loading.compute_dtype(QUANTIZED, CPU)
    return Replier(model, dtype, form).reply(MESSAGES, 8).text  # type: ignore[arg-type]


def test_each_adapter_answers_as_if_alone(served: Served, tmp_path: Path) -> None:
    expected = {name: alone(fetch_adapter(name, tmp_path)[0]) for name in NAMES} | {
        "base": alone(None)
    }
    assert len({*expected.values()}) == 3
    order = [*expected, *reversed(expected)]
    answers = ask(served, *({"model": name} for name in order))
    for name, (status, text) in zip(order, answers, strict=True):
        body = json.loads(text)
        assert status == 200
        assert body["choices"][0]["message"]["content"].strip() == expected[name]
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_adapters_of_a_mixture_answer_as_if_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Of all linear layers, and of a router; served together, and evaluated on one base."""
    monkeypatch.chdir(tmp_path)
    QUANTIZED.mkdir(parents=True)
    base = saved(tmp_path / "base", kind, MIXTURES[kind])
    convert(base, QUANTIZED, tiny.quantization("nf4"), CPU)
    data, tokenizer = tiny.prepared(Path("data/prepared"), held_out=4), Path("models/tokenizer")
    tiny.tokenizer().save_pretrained(tokenizer)
    adapters = {"one": tmp_path / "one", "two": tmp_path / "two"}
    targets = ("all-linear", ["q_proj", "gate", {"mixtral": "w2", "qwen3_moe": "down_proj"}[kind]])
    for folder, chosen in zip(adapters.values(), targets, strict=True):
        model = adapter.load_for_lora(QUANTIZED, settings(lora__target_modules=chosen).lora, CPU)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
        adapter.save(model, folder, torch.float32)
    form = read_format(data / "format.json")
    monkeypatch.setattr(replies, "fetch_adapter", lambda name, _: (adapters[name], form))
    served = Served([*adapters], tmp_path)
    expected = {name: alone(folder) for name, folder in adapters.items()} | {"base": alone(None)}
    assert len({*expected.values()}) == 3
    for name in [*expected, *reversed(expected)]:
        assert served.reply(name, MESSAGES, 8).text == expected[name]
    few = Evaluate(generate_rows=2, max_new_tokens=4, prompts=1, seed=0)
    together = dict(evaluate_adapters(adapters, QUANTIZED, tokenizer, data, few))
    for name, folder in adapters.items():
        assert together[name] == evaluate(name, folder, QUANTIZED, tokenizer, data, few)[0]
    assert together["one"]["loss"] != together["two"]["loss"]


def test_stream_is_the_whole_answer_in_pieces(served: Served) -> None:
    (_, whole), (_, stream) = ask(served, {"model": "rank8"}, {"model": "rank8", "stream": True})
    *events, done, end = stream.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == json.loads(whole)["choices"][0]["message"]["content"]
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]


def test_options_are_honoured_or_ask_for_nothing(served: Served) -> None:
    idle = {"model": "base", "n": 1, "top_p": 1, "logprobs": False, "tools": [], "user": "me"}
    hot = idle | {"temperature": 2, "seed": 7}
    coldest = {"model": "base", "temperature": 1e-300}
    streamed = {"model": "base", "stream": True, "stream_options": {"include_usage": True}}
    whole, same, other, cold, (_, stream) = ask(served, hot, hot, idle, coldest, streamed)
    texts = [json.loads(body)["choices"][0]["message"] for _, body in (whole, same, other, cold)]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    last = json.loads(stream.split("\n\n")[-3].removeprefix("data: "))
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 8)


def test_reply_ends_before_a_stop_string(served: Served) -> None:
    [(_, text)] = ask(served, {"model": "base"})
    whole = json.loads(text)["choices"][0]["message"]["content"]
    stop = whole[4:6]
    [(_, text)] = ask(served, {"model": "base", "stop": stop})
    choice = json.loads(text)["choices"][0]
    assert choice["message"]["content"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_stop_string_over_two_pieces_is_held_back() -> None:
    passed: list[str] = []
    stream = Stream(lambda _: "", 0, ["###", "END"], passed.append)
    for text in (" one #", " one ## two E", " one ## two EN", " one ## two END three"):
        stream.extend(text)
    stream.extend(" one ## two END three four", whole=True)
    assert ("".join(passed), stream.text, stream.stopped) == (*[" one ## two "] * 2, True)


def test_stop_string_of_white_space_ends_a_reply() -> None:
    passed: list[str] = []
    stream = Stream(lambda _: "", 0, ["\n\n"], passed.append)
    for text in ("one", "one\n", "one\n\n"):
        stream.extend(text)
    assert ("".join(passed), stream.text, stream.stopped) == ("one", "one", True)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "rank9"}, 404, "model: 'rank9' is none of base, rank8, rank32"),
        ({"model": "base", "messages": []}, 400, "messages: List should have at least 1 item"),
        ({"model": "base", "messages": [{"role": "user", "content": [1]}]}, 400, "content"),
        ({"model": "base", "messages": [MESSAGES[0] | {"role": "robot"}]}, 400, "messages.0.role"),
        ({"model": "base", "messages": MESSAGES * 2}, 400, "turn 2 is of role user"),
        ({"model": "base", "n": 2}, 400, "n: is not supported. Leave it out."),
        ({"model": "base", "tools": [{"type": "function"}]}, 400, "tools: is not supported"),
        ({"model": "base", "temperature": 3}, 400, "temperature: Input should be less than"),
        (
            {"model": "base", "messages": [MESSAGES[0] | {"content": "x" * (1 << 24)}]},
            413,
            "exceeded",
        ),
    ],
)
def test_bad_requests_are_told_in_one_line(
    served: Served, body: dict[str, Any], status: int, message: str
) -> None:
    [(answered, text)] = ask(served, body)
    assert (answered, message in json.loads(text)["error"]["message"]) == (status, True)


def test_client_that_hangs_up_ends_its_reply(served: Served) -> None:
    async def script(client: TestClient) -> int:
        body = {"model": "base", "messages": MESSAGES, "stream": True, "max_tokens": 900}
        response = await client.post("/v1/chat/completions", json=body)
        await response.content.readany()
        response.close()
        short = {"model": "base", "messages": MESSAGES, "max_tokens": 2}
        return (await client.post("/v1/chat/completions", json=short)).status

    assert talk(served, script) == 200


def test_what_cannot_be_served_is_told_before_loading(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for number, reason in ((port, "Address already in use"), (99999, "port must be 0-65535")):
            with pytest.raises(
                UserError, match=f"--port: 127.0.0.1:{number}: .*{reason}\\. Choose"
            ):
                serve.main(Namespace(adapters=[], host="127.0.0.1", port=number))
    with pytest.raises(UserError, match="base: names the model without an adapter"):
        Served(["base"], tmp_path)
