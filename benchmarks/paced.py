"""A process that lives on and takes one step whenever it is told to: both ends of its pipes.

Lines of JSON go both ways. The worker's first line is its job, its first answer what it found; then
each line asks for one step, and the end of the input ends the worker. So two trainings can be
measured in turn, each warm, and only one of them computes at a time.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Channel:
    """The worker's end."""

    def __init__(self) -> None:
        """Keep standard output for answers: what libraries print goes to standard error."""
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def hear(self) -> Any:
        """Wait for the next line.

        Raises:
            SystemExit: there is none, and the work is done.
        """
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(0)
        return json.loads(line)

    def tell(self, answer: Mapping[str, Any]) -> None:
        """Answer with a line."""
        print(json.dumps(answer), file=self._answers, flush=True)


class Worker:
    """The driver's end; in a `with` block, which ends the worker.

    It is started at once, and imports what it needs; it begins to work when it is first asked.
    """

    def __init__(
        self,
        module: str,
        job: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        """Start `python -m module`.

        Args:
            module: that serves a `Channel`.
            job: what it is told first.
            environment: variables beside those of this process.
            python: that runs it.
        """
        self.module, self._job = module, job
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(  # noqa: S603
            [python, "-m", module],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    @cached_property
    def found(self) -> dict[str, Any]:
        """The worker's answer to its job."""
        return self._answer(self._job)

    def ask(self, message: Any = None) -> dict[str, Any]:
        """Send a line and wait for the answer.

        Raises:
            SystemExit: the worker failed; the end of what it wrote to standard error says why.
        """
        _ = self.found
        return self._answer(message)

    def _answer(self, message: Any) -> dict[str, Any]:
        if self._process.stdin is None or self._process.stdout is None:
            raise ValueError("the worker's pipes are closed")
        try:
            print(json.dumps(message), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = self._errors.read()[-4000:]
            sys.exit(f"{last}\nerror: python -m {self.module} ended with {self._process.poll()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._errors.close()
