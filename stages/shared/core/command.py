"""Command: how a stage or a tool begins, imports and ends."""

import gc
import os
import re
import select
import signal
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from stages.shared.core import display, files
from stages.shared.core.errors import SIGNALS, UserError, raise_signal, report, report_unraisable

INTERVAL = 1.0  # seconds between two looks at the children
PATIENCE = 10  # looks, then a child that is stopped, and its parent is not, is killed

AddOptions = Callable[[ArgumentParser], object]

_pipes: list[int] = []  # to the watchers of this process


def run(main: Callable[..., None], add_options: AddOptions | None = None) -> None:
    """Run the `main()` of a stage or a tool, with its options where it has any.

    `--help` prints its module's docstring and sections of params.yaml. Whatever ends it is one line
    on stderr and an exit code: 1, or 128 and the number of a signal, which ends it as Ctrl-C does.
    """
    module = sys.modules[main.__module__]
    command = module.__spec__.name.removesuffix(".__main__") if module.__spec__ else module.__name__
    heard = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]  # as nohup does
    try:
        _handle(heard, raise_signal)
        display.guard()
        report_unraisable(command)
        sys.excepthook = lambda _, error, trace: report(error, command)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked by `stages`
        options = _parse(module, command, add_options)
        with _watched(command):
            main(*([options] if add_options else []))
            files.record_outs()
            sys.stdout.flush()  # or Python would find its reader gone when all is over
    except SystemExit:  # of --help
        raise
    except BaseException as error:  # a panic of Rust is no `Exception`
        _handle(heard, signal.SIG_IGN)  # a second one comes too late
        sys.exit(report(error, command))
    finally:
        _handle(heard, signal.SIG_IGN)  # all is over; Python's own end would print a traceback


def _handle(signals: list[signal.Signals], handler: "signal._HANDLER") -> None:
    for number in signals:
        signal.signal(number, handler)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import large libraries: without garbage collection, and without a signal in the middle.

    Collection among the objects of torch and transformers, which stay, takes 1.2 of 4 seconds. Half
    imported, a library reports a signal as a missing module; it is delivered after the block.
    """
    gc.disable()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}. `{self.prog} --help` says what it takes.")


def _parse(module: ModuleType, command: str, add_options: AddOptions | None) -> Namespace:
    schema, path = getattr(module, "Params", None), Path("params.yaml")
    text = path.read_text("utf-8", "replace") if schema and path.is_file() else ""
    names = "|".join(getattr(schema, "model_fields", ()))
    sections = [m[0] for m in re.finditer(rf"^({names}):.*(\n .*)*", text, re.MULTILINE)]
    parser = _Parser(
        prog=f"python -m {command}",
        description=(module.__doc__ or "").strip(),
        epilog="\n\n".join(["parameters, in params.yaml:", *sections] if sections else []),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if add_options:
        add_options(parser)
    return parser.parse_args()


@contextmanager
def _watched(command: str) -> Iterator[None]:
    """Watch this process by a fork while the block runs, whose end is a byte in a pipe.

    SIGKILL and a crash leave no message; a stopped child (SIGSTOP) would be waited for for ever.
    """
    reader, writer = os.pipe()
    parent = os.getpid()
    if (child := os.fork()) == 0:
        _handle([*SIGNALS], signal.SIG_IGN)
        os.close(writer)
        _watch(parent, reader, command)
        os._exit(0)
    os.close(reader)
    _pipes.append(writer)
    try:
        yield
    finally:
        dismiss()
        _pipes.remove(writer)
        os.close(writer)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)


def dismiss() -> None:
    """Dismiss the watchers: this process has reported its error, and may end in any way."""
    for pipe in _pipes:
        with suppress(OSError):  # one may have been killed itself
            os.writev(pipe, [b"."])


def _watch(parent: int, reader: int, command: str) -> None:
    kills, stopped = _out_of_memory_kills(), Counter[int]()
    while not select.select([reader], [], [], INTERVAL)[0]:
        paused = _state(parent) == "T"  # Ctrl-Z stops all of them
        halted = [p for p in _descendants(parent) if _state(p) == "T" and not paused]
        stopped = Counter({process: stopped[process] + 1 for process in halted})
        for process, looks in stopped.items():
            if looks >= PATIENCE:
                with suppress(OSError):
                    os.kill(process, signal.SIGKILL)
    if os.read(reader, 1):
        return
    killed = _out_of_memory_kills() > kills
    why = "the kernel ran out of memory" if killed else "a crash or SIGKILL, as for want of memory"
    line = f"\nerror: {command}: ended without a word ({why}). Free memory, and run it again."
    print(line, file=sys.stderr, flush=True)  # it may follow a progress bar


def _descendants(process: int) -> Iterator[int]:
    with suppress(OSError):  # it has ended
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            for child in map(int, path.read_text().split()):
                yield child
                yield from _descendants(child)


def _state(process: int) -> str:
    """State of a process, T where it is stopped; "" once it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def _out_of_memory_kills() -> int:
    """Number of processes that the kernel has killed for want of memory, since it booted."""
    counts = re.findall(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    return sum(map(int, counts))
