"""A candidate in a process of its own: a crash, a hang or an exit costs one case, and nothing expected is in reach.

    python -m refimpl.conformance.worker FRAMEWORK DEVICE CANDIDATE [VJP]

reads requests from its standard input and answers on its standard output (wire.py). Whatever the candidate prints goes
to standard error.
"""

import contextlib
import importlib
import importlib.util
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refimpl.conformance import wire
from refimpl.conformance.frameworks import framework
from refimpl.conformance.invoke import Answer, Invoker, Request

_STARTUP = 300  # seconds in which a process must have imported the candidate and its framework


class NotFound(ValueError):
    """The candidate named cannot be loaded; the message is one line."""


def load(spec: str) -> Callable:
    """The function that ``file.py:name`` or ``package.module:name`` names.

    Raises
    ------
    NotFound
        If there is no such file, module or name, or importing it fails.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise NotFound(f"candidate must be FILE.py:NAME or MODULE:NAME, got {spec!r}")
    try:
        if place.endswith(".py"):
            path = Path(place)
            if not path.is_file():
                raise NotFound(f"no file {place!r}")
            module_spec = importlib.util.spec_from_file_location(path.stem, path)
            if module_spec is None or module_spec.loader is None:
                raise NotFound(f"{place!r} is not a Python file")
            module = importlib.util.module_from_spec(module_spec)
            sys.modules.setdefault(path.stem, module)
            sys.path.insert(0, str(path.parent.resolve()))
            module_spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except NotFound:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise NotFound(f"importing {place!r} fails: {type(error).__name__}: {error}") from None
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = [n for n in dir(module) if not n.startswith("_")][:12]
            raise NotFound(f"{place!r} has no {name!r}; it has {', '.join(near) or 'nothing public'}")
        found = getattr(found, part)
    if not callable(found):
        raise NotFound(f"{spec!r} is not a function")
    return found


def address(function: Callable) -> str | None:
    """``module:name`` from which a new process can load this very function, or None."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not module or module == "__main__" or "<" in name:
        return None
    found = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not function:
        return None
    if importlib.util.find_spec(module) is None:
        return None
    return f"{module}:{name}"


class Child:
    """The judge's end: starts the process when needed, asks, and ends it when it does not answer."""

    def __init__(self, candidate: Callable | str, framework_name: str, device: str | None, vjp: Callable | str | None, timeout: float):
        self.candidate, self.framework, self.device, self.vjp, self.timeout = candidate, framework_name, device, vjp, timeout
        self._process: _Process | None = None

    def __call__(self, request: Request) -> Answer:
        if self._process is None:
            self._process = self._start()
            if not self._process.answers_within(_STARTUP):
                self.close(kill=True)
                return Answer(status="TIMEOUT", message=f"its process was not ready within {_STARTUP} s, and was ended")
        process = self._process
        try:
            if not process.ready:
                process.ready = wire.receive(process.back) is not None
            wire.send(process.to, vars(request))
            if not process.answers_within(self.timeout):
                self.close(kill=True)
                return Answer(status="TIMEOUT", message=f"no answer within {self.timeout:g} s; its process was ended")
            return Answer(**wire.receive(process.back))
        except (EOFError, BrokenPipeError, ValueError) as error:
            message = process.epitaph() or str(error)
            self.close(kill=True)
            return Answer(status="CRASH", message=message)

    def close(self, kill: bool = False) -> None:
        if self._process is not None:
            self._process.end(kill)
            self._process = None

    def _start(self) -> "_Process":
        where = self.candidate if isinstance(self.candidate, str) else address(self.candidate)
        vjp = self.vjp if isinstance(self.vjp, str) or self.vjp is None else address(self.vjp)
        if where is None or (self.vjp is not None and vjp is None):
            return _Forked(self._function(self.candidate), self._function(self.vjp), self.framework, self.device)
        return _Spawned([self.framework, self.device or "", where, *([vjp] if vjp else [])])

    @staticmethod
    def _function(f):
        return load(f) if isinstance(f, str) else f


class _Process:
    """A running worker: streams to and from it."""

    to: Any
    back: Any
    ready = False

    def wait(self, seconds: float) -> int | None:
        """Its exit status, or None while it runs."""
        raise NotImplementedError

    def end(self, kill: bool) -> None:
        """Let it end, or end it."""
        raise NotImplementedError

    def answers_within(self, seconds: float) -> bool:
        return bool(select.select([self.back], [], [], seconds)[0])

    def epitaph(self) -> str:
        """How it ended, in words."""
        code = self.wait(2.0)
        if code is None:
            return ""
        if code < 0:
            return f"its process was ended by signal {signal.Signals(-code).name}" + self.last_words()
        return f"its process exited with status {code}" + self.last_words()

    def last_words(self) -> str:
        return ""


class _Spawned(_Process):
    def __init__(self, arguments: list[str]):
        self.errors = tempfile.TemporaryFile()
        path = os.pathsep.join(p for p in [*sys.path] if p)
        environment = os.environ | {"PYTHONPATH": path}
        command = [sys.executable, "-m", "refimpl.conformance.worker", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=environment, start_new_session=True, bufsize=0)
        self.to, self.back = self.process.stdin, self.process.stdout

    def wait(self, seconds: float) -> int | None:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def last_words(self) -> str:
        self.errors.seek(0)
        lines = [line for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
        return f": {lines[-1][:200]}" if lines else ""

    def end(self, kill: bool) -> None:
        with contextlib.suppress(Exception):
            self.to.close()
        if kill or self.wait(2.0) is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.back.close()
        self.errors.close()


class _Forked(_Process):
    """For functions that no other process can import (closures, a notebook's): a copy of this process."""

    def __init__(self, function, vjp, framework_name, device):
        ask_read, ask_write = os.pipe()
        reply_read, reply_write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.setsid()
                os.close(ask_write)
                os.close(reply_read)
                with os.fdopen(ask_read, "rb", 0) as requests, os.fdopen(reply_write, "wb", 0) as answers:
                    serve(requests, answers, Invoker(function, framework(framework_name, device), vjp))
                status = 0
            finally:
                os._exit(status)
        os.close(ask_read)
        os.close(reply_write)
        self.to, self.back = os.fdopen(ask_write, "wb", 0), os.fdopen(reply_read, "rb", 0)
        self._code: int | None = None

    def wait(self, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        while self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                return None
            else:
                time.sleep(0.01)
        return self._code

    def end(self, kill: bool) -> None:
        with contextlib.suppress(Exception):
            self.to.close()
        if self._code is None and (kill or self.wait(2.0) is None):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.wait(5.0)
        self.back.close()


def serve(requests, answers, invoke: Invoker) -> None:
    """Say that all is loaded, so that no call is charged for it; then answer requests until there are no more."""
    wire.send(answers, {"ready": True})
    while True:
        try:
            request = wire.receive(requests)
        except EOFError:
            return
        answer = invoke(Request(**request))
        try:
            wire.send(answers, vars(answer))
        except TypeError as error:
            wire.send(answers, vars(Answer(status="ERROR", message=f"the result cannot be read: {error}")))


def main(arguments: list[str]) -> int:
    name, device, candidate, *rest = arguments
    answers = os.fdopen(os.dup(1), "wb", 0)
    os.dup2(2, 1)  # the candidate's prints must not reach the judge
    try:
        invoke = Invoker(load(candidate), framework(name, device or None), load(rest[0]) if rest else None)
    except (NotFound, ImportError) as error:
        print(error, file=sys.stderr)
        return 3
    serve(os.fdopen(0, "rb", 0, closefd=False), answers, invoke)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
