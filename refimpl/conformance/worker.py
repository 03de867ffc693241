"""A candidate in a process of its own: a crash, a hang or an exit costs one case, and nothing expected is in reach.

The process is a fresh interpreter, never a copy of this one. It is given the candidate (by name, or by value: parcel.py)
and inputs, and gives back results; whatever judges them, truths, bounds and the seed, stays here. What it says is data,
looked at with suspicion: only arrays count, and they are judged.

What this keeps out is code that looks or reaches around: into its own memory, the judge's (on Linux the judge's memory is
closed to it), the kit's modules, its standard output, the connection. It is no jail: a candidate can write wherever its
user can.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import inspect
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.conformance import wire
from refimpl.conformance.frameworks import framework
from refimpl.conformance.invoke import OUT_OF_MEMORY, Answer, Invoker, Request
from refimpl.conformance.parcel import parcel, unpacked

_STARTUP = 300  # seconds in which a process must have imported the candidate and its framework
_STATUSES = ("OK", "ERROR", "CRASH", "TIMEOUT", "NOT_APPLICABLE")
_GIVE_UP = 12  # processes lost in a row
_MARK = "REFIMPL_CANDIDATE"  # in the environment of a candidate's process
GIB = 2**30


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


# -- the judge's end ---------------------------------------------------------------------------------------------------


class Child:
    """The judge's end: starts the process, asks, and ends it when it does not answer.

    Parameters
    ----------
    candidate, vjp : callable or str
    framework_name : str
    device : str, optional
    timeout : float
        Seconds that one call may take.
    memory : float, optional
        GiB of this machine's memory that the process, with those that it starts, may take: half of it by default.

    Attributes
    ----------
    keywords : list of str, optional
        That the candidate's signature has; None where it takes any.
    source : str
        The file that defines it, or a digest of its code.

    Raises
    ------
    NotFound
        If the process cannot load the candidate, or does not survive it.
    ImportError
        If there is no such process on this system.
    """

    def __init__(self, candidate: Callable | str, framework_name: str, device: str | None, vjp: Callable | str | None, timeout: float, memory: float | None = None):
        if os.name != "posix":
            raise ImportError("check: isolate=True needs a POSIX system; use isolate=False")
        if os.environ.get(_MARK):
            raise RuntimeError("check: the candidate's file starts a check when it is imported; put that under if __name__ == '__main__'")
        self.timeout, self.memory = timeout, int((memory or half_of_memory()) * GIB)
        self.lost = 0  # processes in a row that gave no answer; one that hangs costs more time, and counts thrice
        self._task = {"framework": framework_name, "device": device, "candidate": _sent(candidate), "vjp": _sent(vjp)}
        self._task |= {"path": [os.getcwd(), *(p for p in sys.path if p)], "memory": self.memory if _countable(framework_name, device) else None}
        self._dumpable = _hide_memory()
        self._process: _Process | None = None
        try:
            hello = self._start()
        except BaseException:
            self.close()
            raise
        self.keywords, self.source = hello["keywords"], hello["source"]

    def __call__(self, request: Request) -> Answer:
        """What the candidate answers, or how its process ended."""
        if request.finish and self._process is None:
            return Answer(status="NOT_APPLICABLE", message="its process is gone, and its results with it")
        answer = self._asked(request)
        self.lost = self.lost + (3 if answer.status == "TIMEOUT" else 1) if self._process is None else 0
        return answer

    @property
    def hopeless(self) -> bool:
        """One process after the other was lost: not worth the hours of asking on."""
        return self.lost >= _GIVE_UP

    def _asked(self, request: Request) -> Answer:
        try:
            if self._process is None:
                self._start()
        except NotFound as error:
            return Answer(status="CRASH", message=f"its process could not be started again: {error}")
        process: Any = self._process
        token = secrets.token_hex(8)
        try:
            process.channel.send({"token": token, "request": _plain(request)}, self.timeout)
            found = process.channel.receive(self.timeout, process.watch)
            if not isinstance(found, dict) or found.get("token") != token:
                raise ValueError("what came was no answer to what was asked")
            answer = _checked(found["answer"])
        except TimeoutError:
            answer = Answer(status="TIMEOUT", message=f"no answer within {self.timeout:g} s; its process was ended")
        except _OutOfMemory as error:
            answer = Answer(status="CRASH", message=str(error))
        except wire.Gone:
            answer = Answer(status="CRASH", message=process.epitaph())
        except (ValueError, KeyError) as error:
            answer = Answer(status="CRASH", message=f"its process sent something else than an answer ({error}); it was ended")
        except BaseException:
            self.close()
            raise
        else:
            if not found.get("last"):
                return answer
        self._end()
        return answer

    def close(self) -> None:
        self._end()
        if self._dumpable is not None:
            _prctl(_PR_SET_DUMPABLE, self._dumpable)
            self._dumpable = None

    def _end(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None

    def _start(self) -> dict:
        self._process = process = _Process(self.memory)
        try:
            process.channel.send(self._task, _STARTUP)
            hello = process.channel.receive(_STARTUP, process.watch)
            failed = str(hello["failed"])
            keywords = None if hello["keywords"] is None else sorted(str(k) for k in hello["keywords"])
            if not failed:
                return {"keywords": keywords, "source": str(hello["source"])}
        except TimeoutError:
            failed = f"importing the candidate fails: its process was not ready within {_STARTUP} s, and was ended"
        except wire.Gone:
            failed = f"importing the candidate fails: {process.epitaph()}"
        except _OutOfMemory as error:
            failed = f"importing the candidate fails: {error}"
        except (ValueError, KeyError, TypeError) as error:
            failed = f"importing the candidate fails: its process sent something else than an answer ({error})"
        self._end()
        raise NotFound(failed)


class _OutOfMemory(Exception):
    """The process takes more memory than it may."""


class _Process:
    """A running worker."""

    def __init__(self, memory: int):
        self.memory, self.errors = memory, tempfile.TemporaryFile()
        ours, theirs = socket.socketpair()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), _MARK: "1"}
        command = [sys.executable, "-P", "-c", f"from refimpl.conformance.worker import main; main({theirs.fileno()})"]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self.errors, stderr=self.errors, env=environment, start_new_session=True, pass_fds=[theirs.fileno()]
            )
        except BaseException:
            ours.close()
            self.errors.close()
            raise
        finally:
            theirs.close()
        self.channel = wire.Channel(ours)

    def watch(self) -> None:
        """Raise where it takes more memory than it may."""
        taken = resident(self._process.pid)
        if taken > self.memory:
            raise _OutOfMemory(f"out of memory: its process took {taken / GIB:.3g} GiB where {self.memory / GIB:.3g} are allowed, and was ended")

    def epitaph(self) -> str:
        """How it ended, in words."""
        try:
            code = self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            return "its process closed the connection, and was ended"
        words = self._last_words()
        if code >= 0:
            text = f"its process exited with status {code}"
        else:
            with contextlib.suppress(ValueError):
                code = signal.Signals(-code).name
            text = f"its process was ended by signal {code}"
            if code == "SIGKILL":
                text += ", as the system does where memory runs out"
        if any(sign in words.lower() for sign in OUT_OF_MEMORY):
            text = f"out of memory: {text}"
        return text + (f": {words}" if words else "")

    def _last_words(self) -> str:
        size = self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, size - 10_000))
        lines = [line for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1][:200] if lines else ""

    def end(self) -> None:
        """End it, and what it started."""
        self.channel.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.errors.close()


def resident(pid: int) -> int:
    """Bytes of memory in use by a process and those that it started; 0 where the system does not say."""
    total, left = 0, [pid]
    while left:
        here = Path("/proc") / str(left.pop())
        with contextlib.suppress(OSError, ValueError, IndexError):
            total += int((here / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in (here / "task").iterdir():
                with contextlib.suppress(OSError, ValueError):
                    left += [int(p) for p in (task / "children").read_text().split()]
    return total


def half_of_memory() -> float:
    """Half of the memory that this machine, or the container, has: GiB."""
    sizes = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError):  # the word "max" where there is no limit
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(1.0, min(sizes, default=16 * GIB) / 2 / GIB)


def _sent(function: Callable | str | None) -> Any:
    found = None if function is None else parcel(function)
    return np.frombuffer(found, dtype=np.uint8) if isinstance(found, bytes) else found


def _plain(request: Request) -> dict:
    """The request as a tree that can be sent: a value that is none (a function as an option) goes by value."""
    return {n: _parcelled(v) for n, v in vars(request).items()}


def _parcelled(value: Any) -> Any:
    if isinstance(value, dict):
        return {n: _parcelled(v) for n, v in value.items()}
    if isinstance(value, list):
        return [_parcelled(v) for v in value]
    if isinstance(value, tuple):
        return type(value)(*map(_parcelled, value)) if hasattr(value, "_fields") else tuple(map(_parcelled, value))
    if value is None or isinstance(value, np.ndarray | np.generic | bool | int | float | complex | str):
        return value
    return {_PARCEL: _sent(value)}


_PARCEL = "a parcel"


def _opened(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {_PARCEL}:
        sent = value[_PARCEL]
        return load(sent) if isinstance(sent, str) else unpacked(sent.tobytes())
    if isinstance(value, dict):
        return {n: _opened(v) for n, v in value.items()}
    if isinstance(value, list):
        return [_opened(v) for v in value]
    if isinstance(value, tuple):
        return type(value)(*map(_opened, value)) if hasattr(value, "_fields") else tuple(map(_opened, value))
    return value


def _checked(said: dict) -> Answer:
    """An answer whose every part is of the kind that it should be."""
    answer = Answer(
        _arrays(said["result"]), [_arrays(r) for r in said["again"]], str(said["status"]), str(said["message"])[:2000], tuple(str(n)[:80] for n in said["mutated"]), bool(said["stale"])
    )
    if answer.status not in _STATUSES:
        raise ValueError(f"the status {answer.status[:40]!r}")
    return answer


def _arrays(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(n): _arrays(v) for n, v in tree.items()}
    if isinstance(tree, tuple):
        return tuple(map(_arrays, tree))
    if tree is None or isinstance(tree, np.ndarray):
        return tree
    raise ValueError(f"{type(tree).__name__} in place of an array")


def _countable(framework_name: str, device: str | None) -> bool:
    """Whether a limit on memory can be set: drivers of other devices map more than they use, and are only watched."""
    return framework_name == "numpy" or (framework_name in ("torch", "jax") and device == "cpu") or (framework_name == "torch" and device is None)


# -- the candidate's end -----------------------------------------------------------------------------------------------


def main(end: int) -> None:
    """Load what the judge names on the connection `end`, then answer until there is nothing more to answer."""
    _alone()
    channel = wire.Channel(socket.socket(fileno=end))
    os.set_inheritable(end, False)
    task = channel.receive()
    sys.path[:] = task["path"]
    kept = [sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "refimpl"]  # what the candidate imports is another copy
    try:
        function, vjp = (_found(task[name]) for name in ("candidate", "vjp"))
        arrays = framework(task["framework"], task["device"])
        hello = {"failed": "", "keywords": keywords(function), "source": source(function, task["candidate"])}
    except (NotFound, ImportError, ValueError, RuntimeError) as error:
        channel.send({"failed": str(error) or type(error).__name__, "keywords": None, "source": ""})
        return
    channel.send(hello)
    if task["memory"]:
        _bound_memory(task["memory"])
    with contextlib.suppress(wire.Gone):
        serve(channel, Invoker(function, arrays, vjp))
    del kept
    os._exit(0)  # a thread that the candidate left behind must not keep the process


def serve(channel: wire.Channel, invoke: Invoker) -> None:
    """Answer requests until there are no more."""
    while True:
        asked = channel.receive()
        answer = invoke(Request(**_opened(asked["request"])))
        reply = {"token": asked["token"], "answer": vars(answer), "last": answer.status == "CRASH"}
        try:
            channel.send(reply)
        except TypeError as error:
            channel.send(reply | {"answer": vars(Answer(status="ERROR", message=f"the result cannot be read: {error}"))})


def keywords(function: Callable) -> list[str] | None:
    """The keywords that a function takes; None where it has ** or no readable signature."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in found):
        return None
    return [p.name for p in found if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]


def source(function: Callable, sent: Any = None) -> str:
    """The file that defines a function, or a digest of its code: by which results on disk are known to be about it."""
    import hashlib

    plain = inspect.unwrap(function) if callable(function) else function
    for thing in (plain, type(plain)):
        with contextlib.suppress(TypeError, OSError):
            file = inspect.getsourcefile(thing)
            if file and Path(file).is_file():
                digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
                return f"{file}:{getattr(function, '__qualname__', type(function).__name__)} {digest}"
    if isinstance(sent, np.ndarray):
        return hashlib.sha256(sent.tobytes()).hexdigest()
    file = getattr(sys.modules.get(getattr(plain, "__module__", None) or ""), "__file__", None)
    return f"{file} {hashlib.sha256(Path(file).read_bytes()).hexdigest()}" if file and Path(file).is_file() else ""


def _found(sent: Any) -> Any:
    if sent is None:
        return None
    if isinstance(sent, str):
        return load(sent)
    try:
        return unpacked(sent.tobytes())
    except Exception as error:
        raise NotFound(f"importing the candidate fails: {type(error).__name__}: {error}") from None


def _bound_memory(more: int) -> None:
    """Let allocations fail beyond what is taken now and so much more; where the system has no such limit, the judge watches."""
    with contextlib.suppress(ImportError, OSError, ValueError, AttributeError):
        import resource

        taken = next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = taken + more
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


# -- what only Linux has -----------------------------------------------------------------------------------------------

_PR_SET_PDEATHSIG, _PR_GET_DUMPABLE, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 3, 4, 24, 38
_CAP_SYS_PTRACE = 19


def _prctl(*arguments: int) -> int:
    if not sys.platform.startswith("linux"):
        return -1
    try:
        return ctypes.CDLL(None).prctl(*arguments, *(0,) * (5 - len(arguments)))
    except (OSError, AttributeError):
        return -1


def _hide_memory() -> int | None:
    """Close this process's memory to others of the same user; what it was before, to be set again."""
    before = _prctl(_PR_GET_DUMPABLE)
    if before != 1:
        return None
    _prctl(_PR_SET_DUMPABLE, 0)
    return before


def _alone() -> None:
    """End with the judge; and never look into another process, even as root."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(_PR_CAPBSET_DROP, _CAP_SYS_PTRACE)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            libc = ctypes.CDLL(None)
            if libc.capget(header, sets) == 0:
                for i in range(3):  # effective, permitted, inheritable: the low word of each
                    sets[i] &= ~(1 << _CAP_SYS_PTRACE)
                libc.capset(header, sets)
