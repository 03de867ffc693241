"""Results are on disk as they arrive: Ctrl-C, a killed kit, a killed child and a hung one lose at most the case in hand."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import refimpl
from refimpl.conformance.journal import Journal, usual_place

ABOUT = {"operator": "op", "seed": 0}
COUNTS = """
    import os, refimpl
    def scan(a, b, *, state=None, reverse=False, return_state=False):
        with open("calls", "ab") as f:
            f.write(b".")
        {extra}
        return refimpl.linear_recurrence(a, b, state=state, reverse=reverse, return_state=return_state)
"""
HOW = {"level": "quick", "dtypes": ["float64"], "isolate": True}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def write(extra="pass", name="mine.py"):
    Path(name).write_text(textwrap.dedent(COUNTS).format(extra=extra))
    return f"{name}:scan"


def calls():
    return Path("calls").stat().st_size if Path("calls").exists() else 0


def same(a, b):
    def plain(report):
        return [{k: v for k, v in c.to_dict().items() if k not in ("seconds", "picture")} for c in report.cases]  # few are asked again and drawn

    return plain(a) == plain(b) and (a.verdict, a.diagnosis, a.not_checked) == (b.verdict, b.diagnosis, b.not_checked)


# -- the file ----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_there_again(here):
    journal = Journal("r.jsonl", ABOUT, False)
    journal.add(0, "first", results=[1])
    journal.add(1, "second", results=[2])
    again = Journal("r.jsonl", ABOUT, True)  # the first is not even closed
    assert again.done(0, "first")["results"] == [1]
    assert again.done(1, "second")["results"] == [2]
    assert again.done(1, "another name") is None
    assert again.done(2, "third") is None
    journal.close()
    again.close()


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_line_that_was_cut_is_work_not_done(here, cut):
    journal = Journal("r.jsonl", ABOUT, False)
    journal.add(0, "first", results=[1])
    before = Path("r.jsonl").stat().st_size
    journal.add(1, "second", results=[2])
    journal.close()
    whole = Path("r.jsonl").read_bytes()
    Path("r.jsonl").write_bytes(whole[:-cut])
    again = Journal("r.jsonl", ABOUT, True)
    assert len(again) == 1
    again.add(1, "second", results=[2])
    again.close()
    assert Path("r.jsonl").read_bytes() == whole
    assert before < len(whole) - 29


@pytest.mark.parametrize("change", [{"seed": 1}, {"operator": "other"}, {"more": None, "seed": 0, "version": "9"}])
def test_results_about_something_else_are_refused(here, change):
    Journal("r.jsonl", ABOUT, False).close()
    with pytest.raises(ValueError, match="another check"):
        Journal("r.jsonl", ABOUT | change, True)
    assert Path("r.jsonl").read_text().count("\n") == 1, "nothing is lost"


@pytest.mark.parametrize("text", ["", "notes of mine\n", "[1]\n", "3\n", '{"a": 1}\n'])
def test_other_files_are_refused_and_left_alone(here, text):
    Path("r.jsonl").write_text(text)
    if text:
        with pytest.raises(ValueError, match="does not hold results"):
            Journal("r.jsonl", ABOUT, True)
        assert Path("r.jsonl").read_text() == text


# -- a check -----------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_run_again(here):
    first = refimpl.check("linear_recurrence", write(), **HOW, save="r.jsonl")
    count = calls()
    second = refimpl.check("linear_recurrence", "mine.py:scan", **HOW, resume="r.jsonl")
    assert first.ok
    assert same(first, second)
    assert calls() - count < 0.3 * count


@pytest.mark.parametrize("extra", ["b = 1.001 * b", "b = b + (0.5 if b.shape[-2] > 30 else 0)", "state = None", "0 / (b.shape[-2] != 17)"])
def test_a_wrong_one_has_the_same_report(here, extra):
    first = refimpl.check("linear_recurrence", write(extra), **HOW, save="r.jsonl")
    second = refimpl.check("linear_recurrence", "mine.py:scan", **HOW, resume="r.jsonl")
    assert first.verdict == "wrong"
    assert same(first, second)
    assert first.smallest == second.smallest or str(first.smallest) == str(second.smallest)


def test_half_a_run_goes_on(here):
    write()
    whole = refimpl.check("linear_recurrence", "mine.py:scan", **HOW, save="r.jsonl")
    lines = Path("r.jsonl").read_bytes().splitlines(keepends=True)
    Path("r.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]) + lines[len(lines) // 2][:20])
    again = refimpl.check("linear_recurrence", "mine.py:scan", **HOW, resume="r.jsonl")
    assert same(whole, again)
    assert Path("r.jsonl").read_bytes().count(b"\n") == len(lines)


def test_a_changed_candidate_or_option_is_another_check(here):
    refimpl.check("linear_recurrence", write(), **HOW, save="r.jsonl")
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        refimpl.check("linear_recurrence", "mine.py:scan", **HOW, seed=1, resume="r.jsonl")
    with pytest.raises(ValueError, match="dtypes"):
        refimpl.check("linear_recurrence", "mine.py:scan", **{**HOW, "dtypes": ["float32"]}, resume="r.jsonl")
    write("b = b + 0")
    with pytest.raises(ValueError, match="file has changed"):
        refimpl.check("linear_recurrence", "mine.py:scan", **HOW, resume="r.jsonl")


def test_two_names_for_one_file(here):
    with pytest.raises(ValueError, match="two files"):
        refimpl.check("linear_recurrence", write(), **HOW, save="a", resume="b")


# -- what cuts a run short ---------------------------------------------------------------------------------------------

SLOW = "import time; time.sleep(0.05)"


def start(*more):
    arguments = ["check", "linear_recurrence", "mine.py:scan", "--level", "quick", "--dtype", "float64", *more]
    environment = os.environ | {"PYTHONPATH": str(Path(refimpl.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-m", "refimpl", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def until(count, process):
    deadline = time.monotonic() + 60
    while calls() < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def finished_lines():
    (path,) = usual_place({"operator": ""}).parent.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()[1:] if line.endswith("}")]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_at_most_the_case_in_hand_is_lost(here, how):
    write(SLOW)
    process = start()
    until(40, process)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    made, kept = calls(), finished_lines()
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert "Traceback" not in out + err
    answered = sum(len(record["results"]) for record in kept)
    assert answered >= made - 12  # settling makes one call or two; a case of laws or hygiene is several
    assert all(r["results"][0]["status"] == "PASS" for r in kept if r["results"])
    if how == signal.SIGINT:
        assert "the run was interrupted" in out
        assert "--resume" in out

    again = start("--resume")
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, out + err
    assert "conforms" in out
    rest = calls() - made
    Path("calls").unlink()
    whole = start()
    whole.communicate(timeout=120)
    assert rest < calls() - 20
    assert not list(usual_place({"operator": ""}).parent.glob("*.jsonl")), "nothing is left of what is complete"


def test_a_file_of_ones_own(here):
    write(SLOW)
    process = start("--save", "r.jsonl")
    until(30, process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert "--save r.jsonl --resume" in out
    again = start("--save", "r.jsonl", "--resume")
    assert again.wait(120) == 0
    again.communicate()
    assert Path("r.jsonl").exists()


@pytest.mark.parametrize(("how", "status"), [("os._exit(1)", "CRASH"), ("import time; time.sleep(60)", "TIMEOUT"), ("os.kill(os.getpid(), 9)", "CRASH")])
def test_a_lost_child_costs_one_case(here, how, status):
    once = f"""
        if calls_so_far() == 20:
            {how}
    """
    path = write(textwrap.dedent(once).replace("\n", "\n        ").strip())
    Path("mine.py").write_text(Path("mine.py").read_text() + "\ndef calls_so_far(): return os.path.getsize('calls')\n")
    report = refimpl.check("linear_recurrence", path, **HOW, timeout=2.0)
    assert [c.status for c in report.failures] == [status]
    assert report.verdict == "wrong"
    assert sum(c.status == "PASS" for c in report.cases) > 50


def test_an_interrupted_check_does_not_conform(here):
    calls_made = []

    def candidate(a, b, **options):
        calls_made.append(1)
        if len(calls_made) == 30:
            raise KeyboardInterrupt
        return refimpl.linear_recurrence(a, b, **options)

    report = refimpl.check("linear_recurrence", candidate, level="quick")
    assert report.interrupted
    assert report.verdict == "inconclusive"
    assert not report.failures
    assert len(report.cases) > 10
