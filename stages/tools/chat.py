"""Talk with the tuned model in the terminal, or with the base.

  /variant base|quantized|adapter|merged   another of the four models, the same conversation
  /reset                                   forget the conversation
  /quit, or Ctrl-D                         end; Ctrl-C ends a reply

Reads:  models/merged, or another variant's model; models/tokenizer, data/prepared/format.json
Run:    python -m stages.tools.chat [--adapter EXPERIMENT]
"""

import contextlib
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stages.evaluate.inputs import FORMAT, MODELS, fetch_adapter
from stages.shared.chat.conversation import Message, RejectedRow
from stages.shared.core.command import quick_imports, run
from stages.shared.core.errors import UserError


def add_options(parser: ArgumentParser) -> None:
    """Add the variant, the experiment and how to reply."""
    parser.add_argument("--variant", choices=MODELS, help="merged, or adapter with --adapter")
    parser.add_argument("--adapter", metavar="EXPERIMENT", help="an experiment's adapter, by name")
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")


def main(options: Namespace) -> None:
    """Load a model, and talk until the input ends."""
    if options.max_new_tokens < 1 or options.temperature < 0:
        raise UserError("--max-new-tokens is below 1, or --temperature below 0. Raise it.")
    with quick_imports():
        from stages.shared.chat.templates import read_format  # noqa: PLC0415
        from stages.tools import replies  # noqa: PLC0415

    with TemporaryDirectory() as folder:
        models, form = dict(MODELS), read_format(FORMAT)
        if options.adapter:
            models["adapter"], form = fetch_adapter(options.adapter, Path(folder), whole=True)
        talk = Talk(options, models, lambda folder: replies.load(folder, form))
        talk.load(options.variant or ("adapter" if options.adapter else "merged"))
        for line in lines():
            talk.answer(line)


class Talk:
    """A conversation with one of the variants at a time; `load` gives a folder's `Replier`."""

    def __init__(
        self, options: Namespace, models: Mapping[str, Path], load: Callable[[Path], Any]
    ) -> None:
        self._options, self._models, self._load = options, models, load
        self._replier: Any = None
        self._reset()

    def _reset(self) -> None:
        system = self._options.system
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def load(self, variant: str) -> None:
        """Load a variant in place of the one before."""
        folder = self._models[variant]
        folder.stat()  # a missing one is an error before the other is dropped
        self._replier = None  # before the next is loaded
        self._replier = self._load(folder)
        print(f"({variant})", file=sys.stderr)

    def answer(self, line: str) -> None:
        """Obey a command, or reply to a message; a mistake or Ctrl-C prints one line."""
        command, _, argument = line.partition(" ")
        try:
            if command == "/variant" and argument in MODELS:
                self.load(argument)
            elif command == "/reset":
                self._reset()
            elif line.startswith("/"):
                print(f"(/variant {'|'.join(MODELS)}, /reset, /quit)", file=sys.stderr)
            elif line:
                self._reply(line)
        except (RejectedRow, UserError) as error:
            print(f"({error})", file=sys.stderr)
        except FileNotFoundError as error:
            print(f"({error.filename}: not there; `dvc repro` writes it)", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(stopped; this turn is forgotten)", file=sys.stderr)

    def _reply(self, text: str) -> None:
        if self._replier is None:
            raise UserError("no model is loaded. Choose one: /variant merged")
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        limit, temperature = self._options.max_new_tokens, self._options.temperature
        reply = self._replier.reply(messages, limit, _write, temperature)
        _write("\n" if reply.stopped else " […]\n")
        self.messages = [*messages, {"role": "assistant", "content": reply.text}]


def _write(text: str) -> None:
    print(text, end="", flush=True)


def lines() -> Iterator[str]:
    """Lines of the user until /quit or the end of the input."""
    watched = sys.stdin.isatty()
    if watched:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, PLC0415  (lets the arrow keys edit and recall)
    while True:
        try:
            line = input("> " if watched else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        yield line


if __name__ == "__main__":
    run(main, add_options)
