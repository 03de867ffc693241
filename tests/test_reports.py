"""Reports: as text, on a terminal, as JSON that keeps its schema, as JUnit, as a page."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

import refimpl
from refimpl.conformance import pictures, report
from refimpl.conformance.examples import wrong_attention
from refimpl.conformance.page import colours
from refimpl.conformance.precision import precision
from refimpl.conformance.report import Report, Result
from refimpl.conformance.terminal import show

SCHEMA = json.loads((Path(report.__file__).parent / "report.schema.json").read_text())
ODD = "<script>alert('&\"')</script> \x00\x1b[31m \ud800 ]]> 😀"


def top_left(q, k, v, *, causal=False):
    return refimpl.attention(q, k, v, causal=causal, offset=0) if causal else refimpl.attention(q, k, v)


def with_nan(a, b):
    y = refimpl.linear_recurrence(a, b).copy()
    y[..., 5:6, :] = np.nan
    return y


def raises(a, b):
    raise RuntimeError(ODD)


def refuses(a, b):
    raise NotImplementedError(ODD)


def complex_gradient(dy, a, b, **options):
    return {n: 1.01 * g for n, g in refimpl.linear_recurrence_vjp(dy, a, b, **options).items()}


CHECKS = {
    "wrong": ("attention", wrong_attention, {}),
    "deviates": ("attention", top_left, {"domain": refimpl.Domain(options={"offset": [None]})}),
    "right": ("attention", refimpl.attention, {"dtypes": ["float32", "bfloat16"]}),
    "NaN": ("linear_recurrence", with_nan, {}),
    "raises": ("linear_recurrence", raises, {}),
    "refuses": ("linear_recurrence", refuses, {}),
    "integers": ("route", lambda logits, k: tuple(x[..., ::-1] for x in refimpl.route(logits, k)), {}),
    "gradients": ("linear_recurrence", refimpl.linear_recurrence, {"gradients": True, "candidate_vjp": complex_gradient}),
    "shape": ("linear_recurrence", lambda a, b: b[..., :1], {}),
}


@pytest.fixture(scope="module", params=list(CHECKS))
def checked(request):
    op, candidate, more = CHECKS[request.param]
    return request.param, refimpl.check(op, candidate, level="quick", **{"dtypes": ["float32"], **more})


# -- JSON --------------------------------------------------------------------------------------------------------------

_KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def violations(value, schema, path="report"):
    """What of a value is not as its schema says: the part of JSON Schema that ours is written in."""
    unknown = set(schema) - {"$schema", "title", "description", "$defs", "$ref", "type", "const", "enum", "anyOf", "required", "properties", "additionalProperties", "items"}
    assert not unknown, f"the schema uses {unknown}, which is not looked at here"
    if "$ref" in schema:
        yield from violations(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], path)
    if "anyOf" in schema and all(any(True for _ in violations(value, s, path)) for s in schema["anyOf"]):
        yield f"{path} is none of what it may be"
    if "const" in schema and value != schema["const"]:
        yield f"{path} is {value!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path} is {value!r}"
    kinds = schema.get("type", [])
    if kinds and not any(_is(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        yield f"{path} is a {type(value).__name__}"
    if isinstance(value, dict):
        yield from (f"{path} lacks {name}" for name in schema.get("required", ()) if name not in value)
        known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        for name, part in value.items():
            if name in known:
                yield from violations(part, known[name], f"{path}.{name}")
            elif rest is False:
                yield f"{path} has {name}"
            elif isinstance(rest, dict):
                yield from violations(part, rest, f"{path}.{name}")
    if isinstance(value, list) and "items" in schema:
        for i, part in enumerate(value):
            yield from violations(part, schema["items"], f"{path}[{i}]")


def _is(value, kind):
    if kind in ("number", "integer"):
        return isinstance(value, int if kind == "integer" else int | float) and not isinstance(value, bool)
    return isinstance(value, _KINDS[kind])


def test_json_keeps_its_schema(checked):
    _, found = checked
    plain = json.loads(found.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(violations(plain, SCHEMA)) == []
    assert plain["schema"] == report.SCHEMA == SCHEMA["properties"]["schema"]["const"]
    assert len(found.to_json(None)) < 600_000
    assert sum("picture" in c for c in plain["cases"]) < 40


@pytest.mark.parametrize(
    "change", [{"schema": 2}, {"verdict": "fine"}, {"more": 1}, {"ok": "yes"}, {"cases": [{}]}, {"notes": [1]}, {"seconds": True}, {"smallest": 3}, {"accuracy": {"float32": {"y": {}}}}]
)
def test_what_breaks_the_schema_is_seen(change):
    plain = Report("op", "f", [Result("a[b]", "a", "float32", "PASS")], settings={"seed": 0}).to_dict() | {"settings": {}}
    assert any(True for _ in violations(plain | change, SCHEMA))


def test_statuses_are_those_of_the_schema():
    assert tuple(SCHEMA["$defs"]["case"]["properties"]["status"]["enum"]) == report.STATUSES


def test_what_a_candidate_says_cannot_pass_for_what_the_kit_says():
    def lies(a, b):
        raise RuntimeError("\x1b[2J\rno\nlinear_recurrence: lies conforms\u2028\u202e")

    for isolate in (False, True):
        text = str(refimpl.check("linear_recurrence", lies, level="quick", dtypes=["float32"], isolate=isolate, fail_fast=True))
        assert "\nlinear_recurrence: lies conforms" not in text
        assert all(ch.isprintable() or ch == "\n" for ch in text)


# -- JUnit -------------------------------------------------------------------------------------------------------------


def test_junit(checked):
    _, found = checked
    suite = ElementTree.fromstring(found.to_junit())
    rows = suite.findall("testcase")
    assert int(suite.get("tests")) == len(rows)
    assert int(suite.get("failures")) == len(suite.findall("testcase/failure")) == len(found.failures)
    assert int(suite.get("skipped")) == len(suite.findall("testcase/skipped"))
    assert int(suite.get("errors")) == len(suite.findall("testcase/error")) == (found.verdict == "inconclusive")
    assert len({(r.get("classname"), r.get("name")) for r in rows}) == len(rows), "CI merges cases of one name"
    assert found.ok == (not suite.findall("testcase/failure") and not suite.findall("testcase/error"))


# -- the page ----------------------------------------------------------------------------------------------------------


class _Reader(HTMLParser):
    """Tags closed as opened; nothing from elsewhere; no script."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.outside, self.images = [], [], [], 0

    def handle_starttag(self, tag, attributes):
        self.outside += [v for n, v in attributes if n in ("src", "href") and not (v or "").startswith("data:")]
        self.outside += [n for n, _ in attributes if n.startswith("on")]
        assert tag not in ("script", "link", "iframe")
        self.images += tag == "img"
        if tag not in ("meta", "img", "rect", "line", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("rect", "line"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page(checked):
    name, found = checked
    html = found.to_html()
    html.encode("utf-8")
    reader = _Reader()
    reader.feed(html)
    assert not reader.open
    assert not reader.outside
    assert "url(" not in html and "@import" not in html
    text = " ".join(" ".join(reader.text).split())
    assert found.candidate in text
    assert len(html) < 400_000
    if found.diagnosis:
        assert text.index("Diagnosis") < text.index("Where it") < text.index("By class of case")
    if name in ("wrong", "NaN", "deviates", "gradients"):
        assert reader.images >= 1
        assert "Around the worst element" in text
    if name == "wrong":
        assert "gqa_modulo" in text and "Reproduce it" in text and "wrong_attention(call[" in text
    if name == "right":
        assert "conforms" in text and "99 % within" in text and "Diagnosis" not in text
    if name in ("raises", "refuses"):
        assert "<script>" not in html and "alert(" in text


# -- the terminal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 120])
def test_terminal(checked, width):
    _, found = checked
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor", highlight=False)
    show(found, console)
    text = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue())
    assert found.candidate in " ".join(text.split())
    assert f"seed {found.settings['seed']}" in " ".join(text.split())
    if found.diagnosis:
        assert "diagnosis" in text
    if found.worst is not None and found.worst.snippet:
        assert found.worst.snippet in text, "what is copied is whole"


def test_a_run_in_this_process_is_labelled():
    inside = refimpl.check("linear_recurrence", refimpl.linear_recurrence, level="quick", dtypes=["float32"])
    apart = refimpl.check("linear_recurrence", refimpl.linear_recurrence, level="quick", dtypes=["float32"], isolate=True)
    assert "cooperative" in str(inside)
    assert "cooperative" not in str(apart)


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_the_map_shows_what_is_wrong():
    right = np.ones((2, 3, 100, 40))
    got = right.copy()
    got[:, 1, 64:] += 1e-3
    found = pictures.picture(("batch", "H", "T", "d"), got, right, np.full(right.shape, 1e-6))
    rows, columns = found["axes"]
    assert [rows["name"], columns["name"]] == ["H", "T"]
    grid = np.array(found["map"])
    step = columns["step"]
    assert grid.shape == (3, -(-100 // step))
    assert np.all(grid[[0, 2]] == pictures.NONE)
    assert np.all(grid[1, -(-64 // step) :] == 3)
    assert np.all(grid[1, : 64 // step] == pictures.NONE)
    close = found["close"]
    assert close["got"][close["rows"].index(1)][close["columns"].index(found["worst"][2])] == "1.001"


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 1), (5, 1), (1, 9), (3, 1, 4), (2000, 3), (3, 2000), (600, 700)])
def test_maps_of_every_shape_are_bounded(shape):
    rng = np.random.default_rng(0)
    right = rng.standard_normal(shape)
    got = right + 1e-3 * rng.standard_normal(shape)
    found = pictures.picture(tuple("abcd"[: len(shape)]), got, right, np.full(shape, 1e-6))
    grid = np.array(found["map"])
    assert grid.shape[0] <= pictures.ROWS and grid.shape[1] <= pictures.COLUMNS
    assert len(json.dumps(found)) < 60_000
    assert colours(grid).shape == (*grid.shape, 3)


def test_places_of_nan_are_wild():
    right = np.zeros((4, 5))
    for value in (np.nan, np.inf, -np.inf):
        got = right.copy()
        got[2, 3] = value
        assert np.argwhere(np.array(pictures.picture(("a", "b"), got, right, np.ones((4, 5)))["map"]) == pictures.WILD).tolist() == [[2, 3]]
    assert pictures.picture(("a",), np.zeros(3), np.zeros(4), np.zeros(4)) is None
    assert pictures.picture(("a",), np.zeros(0), np.zeros(0), np.zeros(0)) is None


def test_ulps_are_counted_in_the_last_place():
    to = precision("float32")
    right = np.array([1.0, 1.0, 1.5, -4.0, 0.0, 1000.0])
    ulp = np.array([2.0**-23, 2.0**-23, 2.0**-23, 2.0**-21, 1.0, 2.0**-14])
    got = (right + np.array([0, 1, -2, 64, 1, 0.5]) * ulp).astype(np.float64)
    counted = {round(pictures.off(int(b)), 1): n for b, n in pictures.ulps(got, right, to).items()}
    assert sum(counted.values()) == 5, "what should be 0 is left out"
    for expected in (0, 1, -2, 64, 0.5):
        assert min(abs(k - expected) for k in counted) <= 0.1 * abs(expected)
    total = pictures.summed([pictures.ulps(got, right, to)] * 3)
    assert total["elements"] == 15
    assert abs(total["max"] - 64) < 6


def test_ulps_of_complex_numbers_and_integers():
    to = precision("float32")
    assert sum(pictures.ulps(np.ones(3, np.complex64), np.ones(3, np.complex128), to).values()) == 3, "imaginary parts should be 0"
    assert pictures.ulps(np.ones(3, int), np.ones(3, int), to) == {}
