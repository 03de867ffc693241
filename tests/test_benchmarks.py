"""Benchmarks are parametrised by the catalogue and can be set up; the page is made of whatever measurements are kept, or none."""

import doctest
import importlib
import itertools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import refimpl

ROOT = Path(refimpl.__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "asv_benchmarks" / "asv.conf.json").exists(), reason="an installed package has no benchmarks beside it")


@pytest.fixture(scope="module", autouse=True)
def paths():
    added = [str(ROOT / "asv_benchmarks"), str(ROOT / "docs" / "extension")]
    sys.path[:0] = added
    yield
    for path in added:
        sys.path.remove(path)
    for name in [n for n in sys.modules if n.partition(".")[0] in ("benchmarks", "peers", "cpu", "benchmark_data", "site_of_asv")]:
        del sys.modules[name]


def load(name):
    return importlib.import_module(name)


def classes():
    for module in ("host", "device", "counted", "public"):
        found = load(f"benchmarks.{module}")
        yield from (v for v in vars(found).values() if isinstance(v, type) and v.__module__ == found.__name__ and hasattr(v, "params"))


def axes(cls):
    """Lists of values: asv takes one axis without its list."""
    return cls.params if isinstance(cls.params[0], list | tuple) else [cls.params]


def measures(cls):
    return [name for name in dir(cls) if re.match(r"(time|track|peakmem)_", name) and getattr(cls, name)]


def test_axes_are_those_of_the_catalogue():
    host, device, counted, calls = (load(f"benchmarks.{m}") for m in ("host", "device", "counted", "calls"))
    forms = [f"{op.name}.{form}" for op in refimpl.OPS.values() for form in op.forms]
    assert list(host.Forms.params[0]) == list(host.Memory.params[0]) == forms
    assert set(host.Gradients.params[0]) == {op.name for op in refimpl.OPS.values() if op.gradient}
    assert list(counted.Counts.params[0]) == [f for f in forms if refimpl.OPS[f.partition(".")[0]].lengths]
    mirrored = {p.stem for p in (ROOT / "gpu").glob("*/*.py") if p.parent.name != "teaching"} & refimpl.OPS.keys()
    assert set(device.Mirror.params[0]) == mirrored and len(mirrored) > 10
    assert calls.LENGTHS == calls.SHORT + calls.LONG


def test_every_class_is_set_up_for_its_first_parameters():
    """And measures something, unless it says what is missing."""
    seen = []
    for cls in classes():
        parameters = [axis[0] for axis in axes(cls)]
        assert len(parameters) == len(cls.param_names) and measures(cls), cls
        bench = cls()
        cache = []
        if hasattr(bench, "setup_cache"):
            bench.params = [[parameters[0]], *axes(cls)[1:]]
            cache = [bench.setup_cache()]
        try:
            bench.setup(*cache, *parameters)
        except NotImplementedError:
            continue
        for name in measures(cls):
            value = getattr(bench, name)(*cache, *parameters)
            assert value is None if name.startswith(("time_", "peakmem_")) else math.isfinite(value)
        seen.append(cls.__name__)
    assert {"Forms", "Gradients", "Memory", "Counts"} <= set(seen)


def test_memory_holds_at_least_the_result():
    bench = load("benchmarks.host").Memory()
    bench.setup("linear_recurrence.sequential", "numpy", "float32", 512)
    assert bench.track_peak("linear_recurrence.sequential", "numpy", "float32", 512) >= 512 * 256 * 4


def test_counts_grow_as_the_algorithm_does():
    counts = load("benchmarks.counted").Counts()
    counts.params = [["linear_recurrence.hillis_steele"], ["work"]]
    found = counts.setup_cache()
    arguments = (found, "linear_recurrence.hillis_steele", "work")
    assert (counts.track_exponent(*arguments), counts.track_logarithms(*arguments)) == (1, 1)
    with pytest.raises(NotImplementedError, match=r"linear_recurrence\.blelloch"):
        counts.setup(found, "linear_recurrence.blelloch", "work")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_calls_have_the_dtype_and_the_length(dtype):
    call = load("benchmarks.calls").draw("selective_scan.chunked", dtype, 32)
    floats = [x for x in call.values() if isinstance(x, np.ndarray)]
    assert floats and {x.dtype.name for x in floats} == {dtype} and call["u"].shape[-2:] == (32, 256)


def test_what_would_take_too_long_is_left_out_with_the_reason():
    with pytest.raises(NotImplementedError, match=r"selective_scan\.attention.*length of 4096"):
        load("benchmarks.calls").draw("selective_scan.attention", "float32", 4096)


def test_a_device_that_is_not_there_is_named():
    if importlib.util.find_spec("cupy") is None:
        with pytest.raises(NotImplementedError, match="CuPy is not installed"):
            load("benchmarks.device").device()


def test_the_quick_set_is_of_the_cpu_and_short():
    """The expression of `make bench`, on the names that asv gives."""
    quick = re.search(r"--quick --bench '([^']+)'", (ROOT / "Makefile").read_text(encoding="utf-8"))[1]
    names = []
    for cls in classes():
        for parameters in itertools.product(*axes(cls)):
            names += [f"{cls.__module__.removeprefix('benchmarks.')}.{cls.__name__}.{m}({', '.join(map(repr, parameters))})" for m in measures(cls)]
    chosen = [name for name in names if re.search(quick, name)]
    assert len(chosen) > 1000 and not [n for n in chosen if n.startswith("device") or ", 4096)" in n]
    assert {n.partition("(")[0] for n in names if not n.startswith("device")} == {n.partition("(")[0] for n in chosen}


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data():
    return load("benchmark_data")


@pytest.mark.parametrize("module", ["benchmark_data", "site_of_asv"])
def test_examples(module):
    result = doctest.testmod(load(module))
    assert result.attempted and not result.failed


def test_kept_rows_speak_of_the_catalogue(data):
    assert data.cpu_file()["machine"]["processor"]
    for row in [*data.cpu_file()["rows"], *(row for run in data.gpu_files() for row in run["rows"])]:
        assert row["operator"] in refimpl.OPS, row
    assert {row["operator"] for row in data.cpu_file()["rows"]} == set(refimpl.OPS), "python asv_benchmarks/cpu.py measures anew"


def test_the_page_is_made_of_what_is_kept_or_of_nothing(data, tmp_path):
    kept = [data.kept_on_device, data.measured_on, data.public_ratios, data.points]
    for folder in (data.RESULTS, tmp_path):
        for make in kept:
            shown = make(folder)
            assert folder == data.RESULTS or not (shown if isinstance(shown, list) else shown.rows)
    assert all(part in data.PARTS for part in map(data.part_of, refimpl.OPS.values()))


def test_pictures_of_what_is_kept_and_of_nothing(data, tmp_path):
    pytest.importorskip("matplotlib_inline")
    import matplotlib

    matplotlib.use("agg")
    assert data.pictures("attention", tmp_path) is None
    for figure in (data.pictures("gated_rnn"), data.overtaking(), data.overtaking(folder=tmp_path)):
        assert figure.axes
        matplotlib.pyplot.close(figure)


def test_every_part_has_its_picture_on_the_page(data):
    shown = re.findall(r'kept\.pictures\("(\w+)"\)', (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"))
    assert shown == list(data.PARTS)


@pytest.mark.parametrize(
    ("who", "kind"),
    [
        ("refimpl", "gpu"),
        ("ours", "gpu"),
        ("rows", "gpu"),
        ("ours again", ""),
        ("(4, 4, 256)", ""),
        ("back (1, 2)", ""),
        ("CPU chunked", ""),
        ("copy of as many bytes", ""),
        ("torch.fft", "peer"),
        ("FlashAttention-2", "peer"),
    ],
)
def test_who_is_who_among_the_contenders(data, who, kind):
    assert data.kind_of(who) == kind


def test_gradients_and_steps_are_not_drawn_as_forward_passes(data, tmp_path):
    row = {"operator": "attention", "shape": "B1 H2 T64 d8", "floor_ms": 1.0, "ms": {"refimpl": 2.0, "cuDNN": None}}
    rows = [row | {"work": work} for work in ("forward", "attention bwd full", "decode GQA", "forward, gradient")]
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / "a.json").write_text(json.dumps({"measured_on": {"device": "X"}, "rows": rows}), encoding="utf-8")
    found = data.points(tmp_path)
    assert [(p.kind, p.T, p.elements, p.seconds) for p in found] == [("gpu", 64, 1024, 0.002), ("floor", 64, 1024, 0.001)]
    assert len(data.kept_on_device(tmp_path).rows) == 4


def test_rows_that_do_not_say_their_size_are_not_drawn(data):
    assert data.place({"operator": "attention", "shape": "see WORK"}) is None
    assert data.place({"operator": "moe", "shape": "4096 tokens d1024 f2048 E8 k2"}) == (4096, 4096 * 1024)
    assert data.place({"operator": "ssd", "shape": "B8 T8192 H32 p64 N128"}) == (8192, 8 * 32 * 8192 * 64)


def test_lines_cross_where_they_do(data):
    def line(**at):
        return [data.Point("", "", "cpu", int(T[1:]), s, 1) for T, s in at.items()]

    level, rising = line(T64=4, T256=4, T1024=4), line(T64=1, T256=4, T1024=16)
    assert abs(data.crossing(rising, level).T - 256) < 1e-6
    assert data.crossing(rising, line(T64=0.1, T1024=0.1)).where == "below"
    assert data.crossing(level, line(T64=9, T1024=9)).where == "beyond"
    assert data.crossing([], level).where == "nothing"
    assert data.crossing(line(T4096=9), line(T1024=1)).where == "below"


def test_attention_is_overtaken_in_counted_work(data):
    """By hand: 4 T operations of products an element in attention (d = e = 64) and some for the softmax; a recurrence needs 2."""
    assert data.work_each(refimpl.OPS["linear_recurrence"], 512) == 2
    assert 4 * 512 < data.work_each(refimpl.OPS["attention"], 512) < 4.2 * 512
    assert data.work_crossover(refimpl.OPS["linear_recurrence"]) == 1
    assert 50 < data.work_crossover(refimpl.OPS["lstm"]) < 5000
