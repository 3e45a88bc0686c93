"""Replies of a loaded model, or of one of several adapters on it, token by token."""

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from stages.shared.model import loading  # before transformers

# isort: split
import torch
from transformers import StoppingCriteria

from stages.evaluate import generate
from stages.evaluate.inputs import FORMAT, MODELS, QUANTIZED, TOKENIZER, fetch_adapter
from stages.shared.chat import templates
from stages.shared.chat.conversation import (
    Conversation,
    Message,
    RejectedRow,
    normalize,
    problem_with,
)
from stages.shared.chat.encode import Encoder
from stages.shared.chat.templates import Format
from stages.shared.chat.tokenizer import load_tokenizer
from stages.shared.core import files, machine
from stages.shared.core.errors import UserError
from stages.shared.weights.precision import autocast

COLDEST = 0.01  # temperature; below it logits overflow, and the likeliest token is certain
BASE, MERGED = "base", "merged"


class Reply(NamedTuple):
    """A reply, and whether it ended itself or at a stop string."""

    text: str
    stopped: bool
    prompt_tokens: int
    tokens: int


class Stream(StoppingCriteria):
    """Text of a reply as it grows, up to a stop string; `decode` gives that of all its tokens."""

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        prompt_tokens: int,
        stop_strings: Sequence[str],
        on_text: Callable[[str], Any],
    ) -> None:
        self._decode, self._prompt_tokens, self._on_text = decode, prompt_tokens, on_text
        self._stops = [text for text in stop_strings if text]
        self.text, self.stopped = "", False  # at a stop string

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Take the tokens; end the reply at a stop string."""
        self.extend(self._decode(input_ids[0, self._prompt_tokens :].tolist()))
        return torch.full((len(input_ids),), self.stopped, device=input_ids.device)

    def extend(self, text: str, *, whole: bool = False) -> None:
        """Pass on what is new; the beginning of a stop string or a character is held back.

        So is white space, which does not end a reply unless a stop string follows it.
        """
        places = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        longest = max(map(len, self._stops), default=1)
        printed = text if whole else text.rstrip("\N{REPLACEMENT CHARACTER}")
        held = len(text) if whole else len(text) - longest + 1
        end = min(places) if places else min(held, len(printed.rstrip()))
        if end > len(self.text):
            self._on_text(text[len(self.text) : end])
            self.text = text[:end]
        self.stopped = bool(places)


class Replier:
    """A model with its tokenizer and the chat format that it was trained with."""

    def __init__(self, model: Any, dtype: torch.dtype, form: Format) -> None:
        self._model, self._dtype, self._form = model, dtype, form
        self._tokenizer = load_tokenizer(TOKENIZER)
        template = templates.make(form.template, self._tokenizer, form.template_name)
        self._encoder = Encoder(self._tokenizer, template)
        config: Any = loading.without_adapter(model).config
        self._positions = config.get_text_config().max_position_embeddings

    @torch.inference_mode()
    def reply(
        self,
        messages: Sequence[Message],
        max_new_tokens: int,
        on_text: Callable[[str], Any] = lambda text: None,
        temperature: float = 0.0,
        stop_strings: Sequence[str] = (),
        seed: int | None = None,
    ) -> Reply:
        """Reply to messages, the last of the user, passing text to `on_text`.

        At most `max_new_tokens`, fewer where the model's positions end. Temperature 0 is greedy,
        as the model was evaluated. What `on_text` raises ends the reply.

        Raises:
            RejectedRow: the messages are none that a model is trained on.
            UserError: the conversation is longer than the model's positions.
        """
        turns: list[Message] = [{**m, "content": normalize(m["content"])} for m in messages]
        turns.append({"role": "assistant", "content": ""})
        if problem := problem_with(turns):
            raise RejectedRow(problem)
        prompt = self._encoder.encode_prompt(Conversation(turns))
        free = self._positions - len(prompt)
        if free <= 0:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, the model {self._positions} "
                "positions. Begin a new one."
            )
        ids = torch.tensor([prompt], device=self._model.device)
        stop_ids = self._form.stop_ids

        def decode(new: list[int]) -> str:
            text = generate.to_text(self._tokenizer, new, stop_ids, skip_control=True)
            return text.lstrip()  # a reply may begin with the prompt's space

        stream = Stream(decode, len(prompt), stop_strings, on_text)
        temperature = temperature if temperature >= COLDEST else 0.0
        options = generate.options(self._model, min(max_new_tokens, free), stop_ids, temperature)
        if seed is not None:
            torch.manual_seed(seed)
        with autocast(ids.device, self._dtype):
            output = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=options,
                stopping_criteria=[stream],
            )
        new = output[0, len(prompt) :].tolist()
        stream.extend(decode(new), whole=True)
        return Reply(stream.text, stream.stopped or new[-1] in stop_ids, len(prompt), len(new))


def load(folder: Path, form: Format) -> Replier:
    """Load a model, or an adapter on the quantized model."""
    device = machine.device()
    model = loading.load_adapted(folder, QUANTIZED, device)
    source = QUANTIZED if loading.is_adapter(folder) else folder
    return Replier(model, loading.compute_dtype(source, device), form)


class Served:
    """The merged model, or experiments' adapters, brought into `folder`, on one base."""

    def __init__(self, experiments: Sequence[str], folder: Path) -> None:
        forms = {BASE if experiments else MERGED: templates.read_format(FORMAT)}
        adapters: dict[str, Path] = {}
        for name in dict.fromkeys(experiments):
            if name == BASE:
                raise UserError(f"{BASE}: names the model without an adapter. `git tag` another.")
            adapters[name], forms[name] = fetch_adapter(name, folder)
            config = files.read_json(adapters[name] / "adapter_config.json")
            if config.get("bias", "none") != "none":
                raise UserError(f"{name}: trained the base's biases. Serve its merged model alone.")
        device, source = machine.device(), QUANTIZED if experiments else MODELS[MERGED]
        dtype = loading.compute_dtype(source, device)
        self._model: Any = loading.load_model(source, device)
        self._adapters: dict[str, str] = {}  # peft's name by the experiment's
        for number, (name, adapter) in enumerate(adapters.items()):
            self._adapters[name] = f"adapter{number}"
            self._model = loading.attach(self._model, adapter, self._adapters[name])
        self._repliers = {name: Replier(self._model, dtype, form) for name, form in forms.items()}
        self._lock = Lock()  # for a reply, as the active adapter is the model's state

    @property
    def names(self) -> list[str]:
        """Names of the adapters, after `base`; or `merged` alone."""
        return list(self._repliers)

    def reply(self, name: str, *options: Any) -> Reply:
        """Reply by an adapter, with the options of `Replier.reply`."""
        with self._lock:
            if name in self._adapters:
                self._model.base_model.enable_adapter_layers()
                self._model.set_adapter(self._adapters[name])
            elif self._adapters:
                self._model.base_model.disable_adapter_layers()
            return self._repliers[name].reply(*options)
