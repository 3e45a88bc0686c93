"""Replies of a loaded model to a conversation, token by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.shared.model import loading  # before transformers

# isort: split
import torch
from transformers import GenerationConfig, StoppingCriteria, TextStreamer

from stages.shared.chat import templates
from stages.shared.chat.conversation import Conversation, Message, RejectedRow, problem_with
from stages.shared.chat.encode import Encoder
from stages.shared.chat.templates import Format
from stages.shared.chat.tokenizer import load_tokenizer
from stages.shared.core.errors import UserError
from stages.shared.weights.precision import autocast

COLDEST = 0.01  # temperature; below it logits overflow, and the likeliest token is certain


@dataclass(frozen=True)
class Reply:
    """A reply, and whether it ended itself or at a stop string."""

    text: str
    stopped: bool
    prompt_tokens: int
    tokens: int


class Stream(TextStreamer, StoppingCriteria):
    """Text of a reply by complete words, up to the first stop token or stop string.

    A stop token is no text even where the tokenizer does not call it special.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: Sequence[int],
        stop_strings: Sequence[str],
        on_text: Callable[[str], Any],
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stop_ids, self._on_text = stop_ids, on_text
        self._strings = [text for text in stop_strings if text]
        self._longest = max(map(len, self._strings), default=1)
        self._held = self.text = ""
        self.found = False  # a stop string

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """End the reply at a stop string."""
        return torch.full((len(input_ids),), self.found, device=input_ids.device)

    def put(self, value: torch.Tensor) -> None:
        """Take a token."""
        if self.next_tokens_are_prompt or value.item() not in self._stop_ids:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass words on; what may be the beginning of a stop string is held back."""
        held = self._held + text
        held = held if self.text else held.lstrip()  # a reply may begin with the prompt's space
        places = [at for string in self._strings if (at := held.find(string)) >= 0]
        if places:
            end = min(places)
        else:
            end = len(held) if stream_end else max(0, len(held) - self._longest + 1)
        if end and not self.found:
            self.text += held[:end]
            self._on_text(held[:end])
        self._held, self.found = held[end:], self.found or bool(places)


class Replier:
    """A model with its tokenizer and the chat format that it was trained with."""

    def __init__(self, model: Any, dtype: torch.dtype, tokenizer: Path, form: Format) -> None:
        self.model, self._dtype, self._form = model, dtype, form
        self._tokenizer = load_tokenizer(tokenizer)
        template = templates.make(form.template, self._tokenizer, form.template_name)
        self._encoder = Encoder(self._tokenizer, template)
        plain: Any = loading.without_adapter(model)
        plain.generation_config = GenerationConfig()  # the model's own penalties would stay
        plain.config.get_text_config().output_router_logits = False
        self._positions = plain.config.get_text_config().max_position_embeddings

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
        """Reply to normalized messages, the last of the user, passing text to `on_text`.

        At most `max_new_tokens`, fewer where the model's positions end. Temperature 0 is greedy,
        as the model was evaluated. What `on_text` raises ends the reply.

        Raises:
            RejectedRow: the messages are none that a model is trained on.
            UserError: the conversation is longer than the model's positions.
        """
        talk: list[Message] = [*messages, {"role": "assistant", "content": ""}]
        if problem := problem_with(talk):
            raise RejectedRow(problem)
        prompt = self._encoder.encode_prompt(Conversation(talk))
        room = self._positions - len(prompt)
        if room <= 0:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, the model {self._positions} "
                "positions. Begin a new one."
            )
        ids = torch.tensor([prompt], device=self.model.device)
        stop_ids = self._form.stop_ids
        stream = Stream(self._tokenizer, stop_ids, stop_strings, on_text)
        config = GenerationConfig(
            max_new_tokens=min(max_new_tokens, room),
            do_sample=temperature >= COLDEST,
            temperature=temperature if temperature >= COLDEST else None,
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
        )
        if seed is not None:
            torch.manual_seed(seed)
        with autocast(ids.device, self._dtype):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=stream,
                stopping_criteria=[stream],
            )
        new = output[0, len(prompt) :].tolist()
        stopped = stream.found or new[-1] in stop_ids
        return Reply(stream.text.rstrip(), stopped, len(prompt), len(new))
