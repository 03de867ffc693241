"""The command line, as a user meets it: exit codes, one-line messages, nothing of ours but the message."""

import importlib.util
import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

import refimpl
from refimpl.cli import app, literal

RIGHT = """
    def scan(a, b, *, state=None, reverse=False, return_state=False):
        import refimpl
        return refimpl.linear_recurrence(a, b, state=state, reverse=reverse, return_state=return_state)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return call


@pytest.fixture
def write(tmp_path):
    def put(text, name="mine.py"):
        (tmp_path / name).write_text(textwrap.dedent(text))
        return name

    return put


def one_line(result, code):
    """The exit code is this, standard error is one line, and there is no traceback."""
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("refimpl: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    return result.stderr


# -- list and show ---------------------------------------------------------------------------------------------------


def test_list_names_every_operator_and_form(run):
    text = run("list").stdout
    for name, op in refimpl.OPS.items():
        assert f"  {name} " in text
        assert ", ".join(op.forms) in text


@pytest.mark.parametrize("name", list(refimpl.OPS))
def test_show(run, name):
    result = run("show", name)
    op = refimpl.OPS[name]
    assert result.exit_code == 0, result.output
    for heading in ("Shapes", "Glossary", "Forms", "Error bound", "Where implementations differ", "References"):
        assert f"\n{heading}" in result.stdout, f"the chapter of {name} says nothing under {heading}"
    for form in op.forms:
        assert f"\n  {form} " in result.stdout
    for law in op.laws:
        assert f"  {law.name}(" in result.stdout
    assert " ?" not in result.stdout.split("elements alive")[1].split("\n\n")[0], "a cost could not be computed"


def test_show_unknown(run):
    assert "linear_recurrence" in one_line(run("show", "linear_recurence"), 2)


# -- check: what the user got wrong ----------------------------------------------------------------------------------


def test_unknown_operator_suggests(run, write):
    assert "did you mean linear_recurrence" in one_line(run("check", "linear_recurence", f"{write(RIGHT)}:scan"), 2)


def test_missing_file(run):
    assert "nowhere.py" in one_line(run("check", "linear_recurrence", "nowhere.py:scan"), 2)


def test_missing_name(run, write):
    message = one_line(run("check", "linear_recurrence", f"{write(RIGHT)}:scam"), 2)
    assert "scam" in message
    assert "scan" in message


def test_missing_module(run):
    assert "no_such_module" in one_line(run("check", "linear_recurrence", "no_such_module:scan"), 3)


@pytest.mark.parametrize("text", ["mine.py", "scan", ":scan", "mine.py:"])
def test_not_a_candidate(run, write, text):
    write(RIGHT)
    assert "NAME" in one_line(run("check", "linear_recurrence", text), 2)


def test_not_a_function(run, write):
    assert "not a function" in one_line(run("check", "linear_recurrence", f"{write('scan = 3')}:scan"), 2)


@pytest.mark.parametrize(("text", "name"), [("import nothing_of_that_name", "nothing_of_that_name"), ("raise SystemExit(1)", "SystemExit"), ("def f(:", "SyntaxError")])
@pytest.mark.parametrize("isolation", [(), ("--no-isolate",)])
def test_file_that_does_not_import(run, write, text, name, isolation):
    assert name in one_line(run("check", "linear_recurrence", f"{write(text)}:scan", *isolation), 3)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--framework", "tensorflow"), "framework"),
        (("--dtype", "float31"), "float31"),
        (("--level", "thorough"), "level"),
        (("--option", "reverse"), "NAME=VALUE"),
        (("--option", "backwards=true"), "backwards"),
        (("--size", "T"), "LETTER=SIZES"),
        (("--size", "T=many"), "T=many"),
        (("--size", "Q=3"), "Q"),
        (("--json", "no/such/folder/report.json"), "no/such/folder"),
        (("--timeout", "0"), "timeout"),
        (("--layout", "xyz"), "layout"),
    ],
)
def test_wrong_arguments(run, write, arguments, word):
    assert word in one_line(run("check", "linear_recurrence", f"{write(RIGHT)}:scan", *arguments), 2)


def test_framework_that_is_not_installed(run, write):
    if importlib.util.find_spec("cupy"):
        pytest.skip("CuPy is installed")
    assert "cupy" in one_line(run("check", "linear_recurrence", f"{write(RIGHT)}:scan", "--framework", "cupy"), 2)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("None", None), ("3", 3), ("0.5", 0.5), ("(1, None)", (1, None)), ("zoh", "zoh"), ("elu+1", "elu+1")])
def test_option_values(text, value):
    assert literal(text) == value
    assert type(literal(text)) is type(value)


# -- check: what the candidate does ----------------------------------------------------------------------------------


def check(run, place, *more):
    return run("check", "linear_recurrence", place, "--level", "quick", *more)


def test_a_right_one_conforms(run, write, tmp_path):
    result = check(run, f"{write(RIGHT)}:scan", "--dtype", "float32", "--json", "r.json", "--junit", "r.xml", "--html", "r.html")
    assert result.exit_code == 0, result.output
    assert "conforms" in result.stdout
    assert result.stderr == ""
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["ok"]
    assert {case["dtype"] for case in report["cases"]} == {"float32"}
    suite = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert int(suite.get("tests")) == len(report["cases"])
    assert suite.get("failures") == "0"
    assert "linear_recurrence" in (tmp_path / "r.html").read_text()


def test_a_wrong_one_does_not(run, write):
    wrong = RIGHT.replace("state=state,", "state=None if state is None else 1.001 * state,")
    result = check(run, f"{write(wrong)}:scan", "--dtype", "float64")
    assert result.exit_code == 1, result.output
    assert "is WRONG" in result.stdout
    assert "reproduce" in result.stdout


def test_fail_fast_stops(run, write):
    always = f"{write('def scan(a, b): return 2 * b')}:scan"
    whole, short = (check(run, always, "--json", "r.json", *more) for more in ((), ("--fail-fast",)))
    assert whole.exit_code == short.exit_code == 1
    assert len(short.stdout) < len(whole.stdout)


def test_options_that_the_domain_fixes_are_not_passed(run, write):
    backwards = "def scan(a, b):\n    import refimpl\n    return refimpl.linear_recurrence(a, b, reverse=True)"
    place = f"{write(backwards)}:scan"
    assert check(run, place, "--option", "reverse=true").exit_code == 0
    assert check(run, place).exit_code == 1


def test_sizes(run, write, tmp_path):
    even = "def scan(a, b):\n    import refimpl\n    assert b.shape[-2] % 4 == 0 and b.shape[-1] == 8\n    return refimpl.linear_recurrence(a, b)"
    place = f"{write(even)}:scan"
    assert check(run, place, "--size", "T=%4", "--size", "c=8").exit_code == 0
    assert check(run, place).exit_code == 3  # it raises at every size of the default domain but those


@pytest.mark.parametrize(
    ("body", "code", "status"),
    [
        ("raise RuntimeError('no kernel')", 3, "ERROR"),
        ("return 'a string'", 3, "ERROR"),
        ("return None", 1, None),
        ("b[...] = 0; return b", 1, None),
        ("import os; os._exit(7)", 3, "CRASH"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 3, "CRASH"),
        ("raise NotImplementedError('nothing at all')", 3, None),
    ],
)
def test_candidates_that_misbehave(run, write, body, code, status):
    result = check(run, f"{write(f'def scan(a, b): {body}')}:scan", "--dtype", "float64", "--fail-fast")
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    if status:
        assert status in result.stdout


def test_a_candidate_that_never_returns_costs_its_cases_only(run, write):
    slow = """
        import time
        def scan(a, b):
            import refimpl
            if b.shape[-2] == 17:
                time.sleep(60)
            return refimpl.linear_recurrence(a, b)
    """
    result = check(run, f"{write(slow)}:scan", "--dtype", "float64", "--timeout", "1.5")
    assert result.exit_code == 1
    assert "TIMEOUT" in result.stdout
    assert not result.stdout.startswith("linear_recurrence: mine.py:scan conforms")


# -- what only a process shows ---------------------------------------------------------------------------------------


def start(*arguments, **more):
    found = {"PYTHONPATH": str(Path(refimpl.__file__).parents[1])}  # also where PYTHONPATH is a relative one
    return subprocess.Popen([sys.executable, "-m", "refimpl", *arguments], stdout=subprocess.PIPE, env=os.environ | found | {"TERM": "xterm"}, **more)


def test_interrupt_prints_what_is_done(write, tmp_path):
    slow = "def scan(a, b):\n    import refimpl, time, pathlib\n    pathlib.Path('called').touch()\n    time.sleep(0.1)\n    return refimpl.linear_recurrence(a, b)"
    process = start("check", "linear_recurrence", f"{write(slow)}:scan", "--no-isolate", cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "called").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=180)
    assert "Traceback" not in out + err
    assert process.returncode == 130
    assert "interrupted" in out + err


def test_a_bar_on_a_terminal(write, tmp_path):
    leader, follower = pty.openpty()
    process = start("check", "linear_recurrence", f"{write(RIGHT)}:scan", "--level", "quick", "--dtype", "float32", "--no-isolate", cwd=tmp_path, stderr=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    out, _ = process.communicate(timeout=60)
    os.close(leader)
    assert process.returncode == 0
    assert b"checking" in shown
    assert b"conforms" in out
    assert b"\x1b" not in out


def test_survey_of_scipy():
    process = start("survey", "--package", "scipy", "--json", os.devnull, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "signal.lfilter" in out
    assert "✓ conforms" in out
    assert err == ""


def test_survey_unknown_package(run):
    assert "scipy" in one_line(run("survey", "--package", "scippy"), 2)
