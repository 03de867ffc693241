"""A candidate in a process of its own: what ends it costs one case, and nothing expected is in its reach."""

import functools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import refimpl
from refimpl.conformance import wire, worker
from refimpl.conformance.invoke import Request
from refimpl.conformance.parcel import CannotSend, parcel, unpacked
from refimpl.conformance.worker import Child, NotFound

pytestmark = pytest.mark.skipif(os.name != "posix", reason="isolation needs a POSIX system")
X = np.arange(6.0).reshape(2, 3)


@pytest.fixture
def child(tmp_path):
    """``child(body)``: a process that runs a function of x with this body; ended after the test."""
    started = []

    def start(body, *, head="", timeout=20.0, memory=None):
        path = tmp_path / f"candidate_{len(started)}.py"
        path.write_text(textwrap.dedent(head) + "\ndef f(x, **options):\n" + textwrap.indent(textwrap.dedent(body), "    "))
        started.append(Child(f"{path}:f", "numpy", None, None, timeout, memory))
        return started[-1]

    yield start
    for each in started:
        each.close()


def ask(child, x=X, **more):
    return child(Request([x], {}, ["x"], **more))


def works(child):
    answer = ask(child)
    return answer.status == "OK" and np.array_equal(answer.result, X)


GOOD_AFTER_ONCE = """
    import os, pathlib
    mark = pathlib.Path(__file__ + ".once")
    if not mark.exists():
        mark.touch()
        {how}
    return x.copy()
"""


# -- what ends it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "status", "words"),
    [
        ("os.kill(os.getpid(), 11)", "CRASH", "SIGSEGV"),
        ("import ctypes; ctypes.string_at(0)", "CRASH", "SIGSEGV"),
        ("os.abort()", "CRASH", "SIGABRT"),
        ("os._exit(0)", "CRASH", "exited with status 0"),
        ("os._exit(7)", "CRASH", "exited with status 7"),
        ("import sys; sys.exit('enough')", "CRASH", "SystemExit('enough')"),
        ("raise KeyboardInterrupt", "CRASH", "KeyboardInterrupt"),
        ("os.kill(os.getpid(), 9)", "CRASH", "SIGKILL, as the system does where memory runs out"),
        ("import time; time.sleep(100)", "TIMEOUT", "no answer within 2 s"),
        ("while True: pass", "TIMEOUT", "no answer within 2 s"),
        ("import signal; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]\n        while True: pass", "TIMEOUT", "no answer within 2 s"),
        ("os.closerange(3, 100)", "CRASH", "process"),
        ("[os.write(fd, b'x' * 4096) for fd in range(3, 500) if os.path.exists(f'/proc/self/fd/{fd}')]", "CRASH", "something else than an answer"),
    ],
)
def test_costs_one_case(child, how, status, words):
    process = child(GOOD_AFTER_ONCE.format(how=how), timeout=2.0)
    answer = ask(process)
    assert answer.status == status
    assert words in answer.message
    assert works(process), "the next call gets a fresh process"


def test_an_exception_is_an_answer(child):
    process = child("raise RuntimeError('no kernel for this')")
    pids = set()
    for _ in range(2):
        answer = ask(process)
        assert answer.status == "ERROR"
        assert "no kernel for this (candidate_0.py" in answer.message
        pids.add(process._process._process.pid)
    assert len(pids) == 1


def test_what_it_started_ends_with_it(child, tmp_path):
    process = child("import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', f'import time; time.sleep(60)']); time.sleep(60)", timeout=2.0)
    pid = process._process._process.pid
    assert ask(process).status == "TIMEOUT"
    _wait_for(lambda: not [p for p in Path("/proc").glob("[0-9]*/stat") if _session(p) == pid])  # a killed process takes its time to go


def _session(stat):
    try:
        fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[3]) if fields[0] != "Z" else None


def test_ends_with_the_judge(tmp_path):
    """Also where the judge is killed and the candidate hangs."""
    (tmp_path / "hangs.py").write_text("import os, time\nopen('pid', 'w').write(str(os.getpid()))\ndef f(a, b):\n    open('called', 'w').close()\n    time.sleep(300)\n")
    code = "import refimpl; refimpl.check('linear_recurrence', 'hangs.py:f', isolate=True)"
    judge = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=_environment())
    _wait_for(lambda: (tmp_path / "called").exists())
    judge.kill()
    judge.wait()
    pid = int((tmp_path / "pid").read_text())
    _wait_for(lambda: not _runs(pid))


def _environment():
    return os.environ | {"PYTHONPATH": str(Path(refimpl.__file__).parents[1])}


def _wait_for(what, seconds=60):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("body", ["import sys; sys.exit(3)", "import os; os._exit(3)", "import os; os.kill(os.getpid(), 11)", "raise MemoryError", "1 / 0", "import nothing_like_it"])
def test_an_import_that_fails_is_said_in_a_line(child, body):
    with pytest.raises(NotFound, match="fails: "):
        child("return x", head=body)


def test_a_script_that_checks_when_imported_does_not_go_on_for_ever(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import refimpl\ndef f(a, b): return b\nrefimpl.check('linear_recurrence', {str(script)!r} + ':f', isolate=True)\n")
    with pytest.raises(NotFound, match="__main__"):
        refimpl.check("linear_recurrence", f"{script}:f", isolate=True)


def test_given_up_when_one_process_after_the_other_is_lost(tmp_path):
    (tmp_path / "gone.py").write_text("import os\ndef f(a, b): os._exit(1)")
    report = refimpl.check("linear_recurrence", f"{tmp_path}/gone.py:f", dtypes=["float64", "float32"], level="quick", isolate=True)
    assert report.verdict == "inconclusive"
    assert len(report.failures) < 40
    assert any("given up" in note for note in report.notes)
    assert {c.dtype for c in report.failures} == {"float64", "float32"}


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        "np.ones(10**9)",
        "[bytearray(10**8) for _ in range(100)]",
        "bytes(5 * 10**9)",
        "sys.stderr.write('terminate called: std::bad_alloc\\n'); sys.stderr.flush(); os.abort()",
        "(_ for _ in ()).throw(RuntimeError('CUDA out of memory. Tried to allocate 2 GiB'))",
    ],
)
def test_memory_is_bounded(child, how):
    process = child(GOOD_AFTER_ONCE.format(how=f"import sys, numpy as np; {how}"), memory=0.5)
    answer = ask(process)
    assert answer.status == "CRASH"
    assert answer.message.startswith("out of memory")
    assert works(process)


def test_memory_is_watched_where_it_cannot_be_limited(child, monkeypatch):
    monkeypatch.setattr(worker, "_countable", lambda framework, device: False)
    process = child(GOOD_AFTER_ONCE.format(how="import time, numpy as np; kept = np.ones(10**8); time.sleep(20)"), memory=0.3)
    answer = ask(process)
    assert answer.status == "CRASH"
    assert "out of memory: its process took" in answer.message
    assert works(process)


def test_memory_of_what_it_started_counts(child, monkeypatch):
    monkeypatch.setattr(worker, "_countable", lambda framework, device: False)
    started = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; b = bytes([1]) * 6 * 10**8; time.sleep(20)'])"
    process = child(GOOD_AFTER_ONCE.format(how=started), memory=0.3)
    answer = ask(process)
    assert answer.status == "CRASH"
    assert "out of memory" in answer.message


def test_by_default_half_of_the_memory():
    assert 0.5 < worker.half_of_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


# -- what is in reach --------------------------------------------------------------------------------------------------


def test_the_judge_does_not_import_the_candidate(tmp_path, monkeypatch):
    (tmp_path / "imported_only_there.py").write_text("import sys\nimport refimpl.conformance.gates\ndef f(a, b): return b")
    monkeypatch.chdir(tmp_path)
    refimpl.check("linear_recurrence", "imported_only_there:f", dtypes=["float32"], level="quick", isolate=True, fail_fast=True)
    assert "imported_only_there" not in sys.modules


def test_the_process_is_no_copy_of_the_judge(child):
    marker = ["kept by the judge alone", object()]

    def found(x):
        import gc

        return np.array([any(isinstance(o, list) and o and isinstance(o[0], str) and o[0] == "kept by the judge " + "alone" for o in gc.get_objects())])

    process = Child(found, "numpy", None, None, 20.0)
    try:
        assert not ask(process).result[0]
    finally:
        process.close()
    assert found(X)[0], marker


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_the_judges_memory_is_closed(child):
    body = """
        import os
        try:
            with open(f"/proc/{os.getppid()}/mem", "rb", 0) as f, open(f"/proc/{os.getppid()}/maps") as maps:
                f.seek(int(maps.readline().split("-")[0], 16))
                return np.array([len(f.read(8))])
        except OSError:
            return np.array([0])
    """
    process = child(body, head="import numpy as np")
    assert ask(process).result[0] == 0
    process.close()
    assert Path("/proc/self/maps").exists()
    assert worker._prctl(worker._PR_GET_DUMPABLE) == 1, "and opened again"


def test_no_more_open_files_than_its_own(child):
    process = child("import os; return np.array([fd for fd in range(3, 200) if os.path.exists(f'/proc/self/fd/{fd}')])", head="import numpy as np")
    with open(__file__):
        assert len(ask(process).result) <= 1


def test_the_modules_that_serve_are_not_those_that_it_can_import(child):
    head = """
        import numpy as np, sys, __main__
        import refimpl.conformance.invoke as invoke, refimpl.conformance.wire as wire, refimpl.conformance.frameworks as frameworks
        invoke._same_bits = lambda a, b: True
        invoke.Invoker.__call__ = wire.Channel.send = wire.encode = frameworks.Numpy.numpy = None
        keep = np.array, np.array_equal, np.ascontiguousarray
        np.array = np.array_equal = np.ascontiguousarray = np.asarray = np.copy = None
    """
    process = child("x[...] = 0; return x", head=head)
    answer = ask(process)
    assert answer.status == "OK"
    assert answer.mutated == ("x",)


@pytest.mark.parametrize(
    "said",
    [
        {"result": X, "again": [], "status": "PASS", "message": "", "mutated": [], "stale": False},
        {"result": 3.5, "again": [], "status": "OK", "message": "", "mutated": [], "stale": False},
        {"result": X, "again": 0, "status": "OK", "message": "", "mutated": [], "stale": False},
        {"result": X},
        [],
        None,
    ],
)
def test_answers_are_looked_at_with_suspicion(said):
    with pytest.raises((ValueError, KeyError, TypeError)):
        worker._checked(said)


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 8, b"\xff" * 40, (5).to_bytes(8, "little") + b"[1,2]", (400_000).to_bytes(8, "little") + b"[" * 400_000,
     *((len(h)).to_bytes(8, "little") + h for h in (b'{"array": ["object", [1], 8]}', b'{"array": ["float64", [1000000000000], 8]}', b'{"array": ["finfo", [1], 8]}',
                                                     b'{"array": ["float64", [-1], 8]}', b'{"named": ["x; y", ["a b"], [1]]}', b'{"complex": ["x", "y"]}', b"3", b"{}"))],
)  # fmt: skip
def test_bytes_that_are_no_message(data):
    with pytest.raises(ValueError, match="not a message"):
        wire.decode(data)


def test_an_answer_that_never_ends_is_not_waited_for():
    import socket

    ours, theirs = socket.socketpair()
    channel = wire.Channel(ours)
    stop = threading.Event()

    def drip():
        theirs.send((10**6).to_bytes(8, "little"))
        while not stop.wait(0.05):
            theirs.send(b"x")

    thread = threading.Thread(target=drip)
    thread.start()
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        channel.receive(0.5)
    assert time.monotonic() - start < 5
    stop.set()
    thread.join()
    theirs.close()
    channel.close()


# -- functions that cannot be imported elsewhere -----------------------------------------------------------------------


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return self.factor * helper(x)


def helper(x):
    return x + OFFSET


OFFSET = np.float64(0.5)


def closures():
    factor = 3.0

    def plain(x):
        return factor * helper(x)

    @functools.wraps(plain)
    def wrapped(x):
        return plain(x)

    def fact(n):
        return 1 if n < 2 else n * fact(n - 1)

    class Local(Scaled):
        def __call__(self, x):
            return super().__call__(x)

    return {
        "closure": plain,
        "wrapped": wrapped,
        "lambda": lambda x: 3.0 * (x + OFFSET),
        "recursive": lambda x: fact(3) / 2 * helper(x),
        "object": Scaled(3.0),
        "object of a local class": Local(3.0),
        "method": Scaled(3.0).__call__,
        "partial": functools.partial(lambda f, x: f * helper(x), 3.0),
        "helper of this module": functools.partial(np.multiply, 3.0) if False else wrapped,
    }


@pytest.mark.parametrize("name", list(closures()))
def test_a_function_is_sent_by_value(name):
    process = Child(closures()[name], "numpy", None, None, 20.0)
    try:
        answer = ask(process)
        assert answer.status == "OK", answer.message
        np.testing.assert_array_equal(answer.result, 3.0 * (X + 0.5))
    finally:
        process.close()


def test_what_can_be_imported_is_named():
    assert parcel(refimpl.OPS["attention"].definition) == "refimpl.ops.attention.attention:attention"
    assert parcel("file.py:f") == "file.py:f"


def test_the_same_bytes_in_every_run():
    assert parcel(closures()["closure"]) == parcel(closures()["closure"])
    assert unpacked(parcel(closures()["closure"]))(1.0) == 4.5


def test_what_cannot_be_sent_is_refused_not_copied():
    lock = threading.Lock()
    with pytest.raises(CannotSend, match="isolate=False"):
        refimpl.check("linear_recurrence", lambda a, b: lock and b, isolate=True)


def test_functions_as_options_go_by_value(child):
    answer = child("return options['phi'](x)")(Request([X], {"phi": lambda x: x + 1}, ["x"]))
    np.testing.assert_array_equal(answer.result, X + 1)


# -- interrupted -------------------------------------------------------------------------------------------------------


def test_an_interrupt_ends_the_process(child):
    process = child("import time; time.sleep(60)", timeout=60.0)
    pid = process._process._process.pid
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        ask(process)
    assert not _runs(pid)


# -- CUDA --------------------------------------------------------------------------------------------------------------

ON_CUDA = """
    import torch, pathlib
    def scan(a, b, *, state=None, reverse=False, return_state=False):
        {once}
        b = b + 0 * a
        a, b = torch.broadcast_tensors(a, b)
        if reverse:
            a, b = a.flip(-2), b.flip(-2)
        h = torch.zeros_like(b.sum(-2)) if state is None else state + 0 * b.sum(-2)
        out = []
        for t in range(b.shape[-2]):
            h = a[..., t, :] * h + b[..., t, :]
            out.append(h)
        y = torch.stack(out, -2) if out else b.clone()
        y = y.flip(-2) if reverse else y
        return (y, h) if return_state else y
    mark = pathlib.Path(__file__ + ".once")
    def once():
        if mark.exists() or torch.cuda.current_device() < 0:
            return False
        mark.touch()
        return True
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("once", "message"),
    [
        ("pass", None),
        ("once() and torch.zeros(3, device='cuda')[torch.tensor([10**6], device='cuda')].cpu()", "the device answers no more"),
        ("once() and torch.empty(2**50, dtype=torch.uint8, device='cuda')", "out of memory"),
    ],
)
def test_a_fault_of_the_device_costs_one_case(tmp_path, once, message):
    (tmp_path / "kernel.py").write_text(textwrap.dedent(ON_CUDA).format(once=once))
    how = {"framework": "torch", "device": "cuda", "dtypes": ["float32"], "level": "quick", "isolate": True}
    report = refimpl.check("linear_recurrence", f"{tmp_path}/kernel.py:scan", **how)
    assert [c.status for c in report.failures] == ["CRASH"] * (message is not None), str(report)
    if message:
        assert message in report.failures[0].message
    else:
        assert report.ok
