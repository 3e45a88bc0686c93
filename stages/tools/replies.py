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
from stages.shared.chat.conversation import Conversation, Message
from stages.shared.chat.encode import Encoder
from stages.shared.chat.templates import Format
from stages.shared.chat.tokenizer import load_tokenizer
from stages.shared.core.errors import UserError
from stages.shared.weights.precision import autocast


@dataclass(frozen=True)
class Reply:
    """A reply, and whether it ended itself."""

    text: str
    stopped: bool
    prompt_tokens: int
    tokens: int


class _Streamer(TextStreamer):
    """Passes text on as words are complete; stop tokens are no text, special or not."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], on_text: Callable[[str], Any]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stop_ids, self._on_text = stop_ids, on_text
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt or value.item() not in self._stop_ids:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.text else text.lstrip()  # a reply may begin with the prompt's space
        self.text += text
        if text:
            self._on_text(text)


class _Until(StoppingCriteria):
    """Ends a reply when the caller asks."""

    def __init__(self, ended: Callable[[], bool]) -> None:
        self._ended = ended

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._ended(), device=input_ids.device)


class StopStrings:
    """Passes text on up to the first of some strings, which it holds back."""

    def __init__(self, strings: Sequence[str], on_text: Callable[[str], Any]) -> None:
        self._strings, self._on_text = [s for s in strings if s], on_text
        self._held, self.found = "", False

    def __call__(self, text: str) -> None:
        """Take the next piece."""
        if self.found:
            return
        self._held += text
        places = [at for s in self._strings if (at := self._held.find(s)) >= 0]
        longest = max(map(len, self._strings), default=1) - 1  # the beginning of one at the end
        end = min(places) if places else max(0, len(self._held) - longest)
        self._pass(end)
        self.found = bool(places)

    def flush(self) -> None:
        """Pass on what was held back, at the end of the reply."""
        if not self.found:
            self._pass(len(self._held))

    def _pass(self, end: int) -> None:
        if end:
            self._on_text(self._held[:end])
        self._held = self._held[end:]


class Replier:
    """A model with its tokenizer and the chat format that it was trained with."""

    def __init__(self, model: Any, dtype: torch.dtype, tokenizer: Path, form: Format) -> None:
        self.model, self._dtype, self._form = model, dtype, form
        self._tokenizer = load_tokenizer(tokenizer)
        template = templates.make(form.template, self._tokenizer, form.template_name)
        self._encoder = Encoder(self._tokenizer, template)
        plain: Any = loading.without_adapter(model)
        plain.generation_config = GenerationConfig()  # the model's own penalties would stay
        self._positions = plain.config.get_text_config().max_position_embeddings

    @torch.inference_mode()
    def reply(
        self,
        messages: Sequence[Message],
        max_new_tokens: int,
        on_text: Callable[[str], Any] = lambda text: None,
        temperature: float = 0.0,
        ended: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """Reply to messages, passing text to `on_text` as it comes.

        Args:
            messages: normalized, the last of the user.
            max_new_tokens: at most; fewer where the model's positions end.
            on_text: called with each piece of the reply.
            temperature: 0 is greedy, as the model was evaluated.
            ended: asked after each token whether to end the reply.

        Raises:
            RejectedRow: the messages cannot be rendered.
            UserError: the conversation is longer than the model's positions.
        """
        reply: Message = {"role": "assistant", "content": ""}
        prompt = self._encoder.encode_prompt(Conversation([*messages, reply]))
        room = self._positions - len(prompt)
        if room <= 0:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, the model {self._positions} "
                "positions. Begin a new one."
            )
        ids = torch.tensor([prompt], device=self.model.device)
        stop_ids = self._form.stop_ids
        streamer = _Streamer(self._tokenizer, stop_ids, on_text)
        config = GenerationConfig(
            max_new_tokens=min(max_new_tokens, room),
            do_sample=temperature > 0,
            temperature=temperature or None,
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
        )
        with autocast(ids.device, self._dtype):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=streamer,
                stopping_criteria=[_Until(ended)],
            )
        new = output[0, len(prompt) :].tolist()
        return Reply(streamer.text.rstrip(), new[-1] in stop_ids, len(prompt), len(new))
