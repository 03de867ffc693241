"""Counted complexity: what counts for how much, by hand; then every form of the book against its chapter's formula."""

import functools
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.fft
import scipy.special

import refimpl
from refimpl.complexity import Uncounted, fit, leading_term, measure, predict
from refimpl.complexity.growth import MEASURES, axes, blocks
from refimpl.complexity.runs import arguments, execute, letters, run
from refimpl.complexity.table import WIDTHS
from refimpl.core.parallel import one_thread

FORMS = [(name, form) for name, op in refimpl.OPS.items() for form in op.forms]
each_form = pytest.mark.parametrize(("name", "form"), FORMS, ids=[f"{name}-{form}" for name, form in FORMS])

# What `refimpl.op.Cost` says of formulas that do not claim to be the count.
FACTOR = {"work": 1.5, "depth": 2.0, "peak": 2.0}
UNITS = {"work": 1, "depth": 1, "peak": 8}  # formulas count elements, of eight bytes here


def counts(function, **arrays):
    return run(function, arrays)


def filled(*shape):
    return np.random.default_rng(0).uniform(0.5, 1, shape)


# -- what counts for how much ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "work", "depth"),
    [
        (lambda x, y: x + y, 12, 1),
        (lambda x, y: x * y - x / y, 36, 2),
        (lambda x, y: x @ y.T, 2 * 3 * 3 * 4, 1 + 2),
        (lambda x, y: np.einsum("ij,kj->ik", x, y), 2 * 3 * 3 * 4, 1 + 2),
        (lambda x, y: np.einsum("ij,ij->ij", x, y), 12, 1),
        (lambda x, y: x[0] @ y[0], 2 * 4, 1 + 2),
        (lambda x, y: x.sum(axis=-1), 3 * 3, 2),
        (lambda x, y: x.sum(), 11, 4),
        (lambda x, y: np.max(x, axis=0, initial=-np.inf), 4 * 2, 2),
        (lambda x, y: x.mean(axis=-1), 3 * 3 + 3, 3),
        (lambda x, y: np.cumsum(x, axis=-1), 3 * 3, 2),
        (lambda x, y: np.exp(x), 12, 1),
        (lambda x, y: scipy.special.expit(x), 12, 1),
        (lambda x, y: x**2, 12, 1),
        (lambda x, y: np.where(x > y, x, -y), 12, 1),
        (lambda x, y: np.concatenate([x, y]).reshape(-1)[::2], 0, 0),
        (lambda x, y: np.sort(x, axis=-1), 3 * 4 * 2, 2),
        (lambda x, y: np.arange(50) * 3 + np.eye(50), 0, 0),
        (lambda x, y: scipy.fft.rfft(x, 8, axis=-1), 3 * 60, 6),
        (lambda x, y: np.fft.fft(x + 0j, 8, axis=-1), 3 * 120 + 12, 7),
        (lambda x, y: (x + 1j * y) * (y + 1j * x), 2 * (24 + 12) + 72, 3),
        (lambda x, y: np.linalg.solve(x[:, :3] @ x[:, :3].T, x[:, :1]), 2 * 27 + (3 + 10 + 15), 1 + 2 + 17),
    ],
)
def test_weights(function, work, depth):
    found = counts(function, x=filled(3, 4), y=filled(3, 4))
    assert (found.work, found.depth) == (work, depth)


def test_classes_stand_apart():
    found = counts(lambda x: np.exp(x) @ np.log(x) + np.tanh(x).sum(), x=filled(4, 4))
    assert found.by_class == {"add": 16, "exp": 16, "log": 16, "matmul": 128, "special": 16, "sum": 15}
    assert found.transcendental == 48
    assert sum(found.by_class.values()) == found.work


def test_what_needs_no_data_is_set_up_and_not_work():
    found = counts(lambda x: x * np.exp(-2j * np.arange(8) / 8).real, x=filled(8))
    assert found.work == 8
    assert found.setup > 0


def test_depth_belongs_to_elements():
    def recurrence(x):
        y = np.zeros_like(x)
        h = x[0]
        for t in range(len(x)):
            h = 0.5 * h + x[t]
            y[t] = h  # a chain of 2 T
        return y

    assert counts(recurrence, x=filled(20, 3)).depth == 40
    assert counts(lambda x: np.stack([row + row for row in x]) * 2, x=filled(20, 3)).depth == 2

    def in_place(x):
        y = x.copy()
        for row in y:
            row *= row  # each its own
        y[3] += y[2]
        return y

    assert counts(in_place, x=filled(5, 3)).depth == 2

    def one_deep_element(x):
        y = x + 0
        for _ in range(9):
            y[0] += 1
        return y[1:] * 2  # does not wait for y[0]

    assert counts(one_deep_element, x=filled(5)).depth == 10
    assert counts(lambda x: (x[::2] + x[1::2])[:, None] @ x[None, :2], x=filled(4)).depth == 2


def test_traffic_and_peak_by_hand():
    n = 8 * 100
    found = counts(lambda x: x + x, x=filled(100))
    assert (found.traffic, found.peak) == (3 * n, n)
    found = counts(lambda x: ((x * x) + 1) - x, x=filled(100))  # three results, of which two live together
    assert (found.traffic, found.peak) == ((3 + 2 + 3) * n, 2 * n)
    assert counts(lambda x: x[::2].T.reshape(5, 10)[1:], x=filled(100)).traffic == 0
    assert counts(lambda x: [x * k for k in range(4)], x=filled(100)).peak == 4 * n
    found = counts(lambda x: np.broadcast_to(x[:1], (100,)) + x, x=filled(100))
    assert found.traffic == 8 + 2 * n


def test_transfers_of_a_memory_of_two_levels():
    line = 64
    x = filled(64)  # eight lines

    def twice(x):
        return (x * 2).sum() + (x * 3).sum()

    assert run(twice, {"x": x}, memory=2**16).transfers == 8 * line  # once into the small memory
    assert run(twice, {"x": x}, memory=4 * line).transfers > 16 * line  # twice, and products go out and in again
    stored = run(lambda x: x + 1, {"x": x}, memory=2**16)
    assert stored.transfers == 16 * line
    with pytest.raises(ValueError, match="at least one line"):
        run(twice, {"x": x}, memory=8)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: np.heaviside(x, 0.5),
        lambda x: np.unique(x),
        lambda x: np.percentile(x, 5),
        lambda x: x.tobytes(),
        lambda x: x.view(np.int64),
        lambda x: float(x[0]),
        lambda x: scipy.fft.dct(x),
        lambda x: np.frompyfunc(lambda v: v, 1, 1)(x),
        lambda x: np.add(x, x, out=np.ndarray(x.shape)),
        lambda x: np.ndarray.__add__(x.view(type(x)), 1),
    ],
)
def test_what_is_not_known_raises(function):
    with pytest.raises(Uncounted):
        counts(function, x=filled(8))


def test_arrays_from_elsewhere_raise():
    """What was computed where nothing is counted must not pass for a constant."""
    table = np.linspace(0, 1, 8)
    for function in (
        lambda x: x * table,
        lambda x: x @ np.outer(table, table),
        lambda x: np.concatenate([x, table]),
        lambda x: x.__setitem__(slice(None), table),
        lambda x: table,
    ):
        with pytest.raises(Uncounted):
            counts(function, x=filled(8))
    assert counts(lambda x: x * np.random.default_rng(0).random(8), x=filled(8)).work == 8


@each_form
def test_counted_runs_compute_the_same(name, form):
    """Bit for bit: what is counted is the run itself, and not one that lost its way."""
    op = refimpl.OPS[name]
    function = op.forms[form].function
    for draw in (op.sample, *op.hard.values()):
        given = {"hard": next(n for n, f in op.hard.items() if f is draw)} if draw is not op.sample else {}
        call = arguments(op, form, **given)
        try:
            with one_thread(), np.errstate(all="ignore"):
                want = function(**call)
        except ValueError:
            continue  # not a call for this form
        with np.errstate(all="ignore"):
            got = execute(function, call)[0]
        for a, b in zip(got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,), strict=True):
            assert np.array_equal(a, b, equal_nan=True)


def test_nothing_stays_behind():
    arange, generator = np.arange, np.random.default_rng
    with pytest.raises(Uncounted):
        counts(lambda x: np.unique(x), x=filled(8))
    assert np.arange is arange and np.random.default_rng is generator
    assert type(scipy.fft.fft(np.arange(4.0))) is np.ndarray


def test_other_threads_see_nothing_of_it():
    import threading

    seen = []

    def function(x):
        other = threading.Thread(target=lambda: seen.append(type(np.zeros(3) + np.arange(3))))
        other.start()
        other.join()
        return x + np.zeros(8)

    assert counts(function, x=filled(8)).work == 8
    assert seen == [np.ndarray]


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match="attention"):
        measure("atention")
    with pytest.raises(ValueError, match="no form 'fast'"):
        measure("attention", "fast")
    with pytest.raises(ValueError, match="neither a size nor an option 'chunk'"):
        measure("attention", "dense", chunk=3)
    with pytest.raises(ValueError, match="no size 'Q'"):
        fit("attention", "dense", "Q")
    with pytest.raises(ValueError, match="five different lengths"):
        fit("attention", "dense", lengths=(1, 2, 4, 8))
    with pytest.raises(ValueError, match="no array 'mask'"):
        measure("softplus", give=("mask",))


# -- growth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 0), (1.5, 0), (0.5, 0)])
def test_leading_terms_are_told_apart(order):
    power, logs = order
    for below in (0, 9, 400) if order != (0, 0) else (0,):
        found = leading_term({n: 3 * n**power * np.log2(n) ** logs + below for n in (16, 32, 64, 128, 256)})
        assert found.order == order
        assert found.coefficient == pytest.approx(3)
    rng = np.random.default_rng(0)
    noisy = leading_term(
        {n: 1e4 * n**power * np.log2(n) ** logs * (1 + 0.001 * rng.uniform(-1, 1)) for n in (16, 32, 64, 128, 256, 512, 1024)}
    )
    assert noisy.order == order or not noisy.exact


def test_terms_below_do_not_hide_the_one_above():
    assert leading_term({n: n * n + 1000 * n for n in (16, 32, 64, 128, 256)}).order == (2, 0)
    assert leading_term({n: n * np.log2(n) + 50 * n for n in (16, 32, 64, 128, 256)}).order == (1, 1)
    assert leading_term({n: max(5000, 3 * n * n + n) for n in (16, 32, 64, 128, 256, 512)}).order == (2, 0)


SPECIAL = {  # what a form needs beside lengths for all growths to be exact, or quick
    "attention": {"Hq": 1, "Hkv": 1},
    "group_norm": {"groups": 4},
    "discretize": {"lengths": (4, 8, 16, 32, 64)},
}


@functools.cache
def fitted(name, form):
    """The growth along the lengths, or along the widest axis of an operator without any."""
    return fit(name, form, axis_of(name), **SPECIAL.get(name, {}))


def axis_of(name):
    op = refimpl.OPS[name]
    return "T" if op.lengths else next(letter for letter in ("c", "k", "n") if letter in letters(op))


def formula(name, form, length):
    op = refimpl.OPS[name]
    sizes = {k: v for k, v in SPECIAL.get(name, {}).items() if k != "lengths"}
    return predict(op, form, **(blocks(op, form) | sizes | dict.fromkeys(axes(op, axis_of(name)), length)))


def disagreements(found, predicted, lengths):
    """Where formulas (by length) have another growth or another constant than the counts."""
    wrong = []
    for name, factor in FACTOR.items():
        stated = leading_term({n: getattr(predicted[n], name) for n in lengths})
        counted = getattr(found, name)
        at = lengths if not (stated.exact and counted.exact) else lengths[-1:]  # where data decide, every length
        ratios = [getattr(predicted[n], name) * UNITS[name] / getattr(found.counts[n], name) for n in at]
        if stated.exact and counted.exact and stated.order != counted.order:
            wrong.append(f"{name} grows like {counted}, the formula like {stated}")
        elif not all(1 / factor <= ratio <= factor for ratio in ratios):
            wrong.append(f"{name}: formula and count are {', '.join(f'{r:.2f}' for r in ratios)} : 1")
    return wrong


@each_form
def test_counts_exist_and_grow_as_the_chapter_says(name, form):
    found = fitted(name, form)
    for counted in found.counts.values():
        assert min(counted.work, counted.depth, counted.traffic, counted.peak) > 0
        assert counted.depth <= counted.work
    lengths = sorted(found.counts)
    wrong = disagreements(found, {n: formula(name, form, n) for n in lengths}, lengths)
    assert not wrong, f"{name}, {form}: {'; '.join(wrong)}"


@each_form
def test_formulas_hold_at_usual_widths(name, form):
    """Sixty-four features and so on, chunks and tiles as they come: the constants beside the other letters."""
    op = refimpl.OPS[name]
    sizes = {k: v for k, v in WIDTHS.items() if k in letters(op)} | dict.fromkeys(op.lengths, 96) | SPECIAL.get(name, {})
    sizes.pop("lengths", None)
    counted, predicted = measure(op, form, **sizes), predict(op, form, **sizes)
    for measured, factor in FACTOR.items():
        ratio = getattr(predicted, measured) * UNITS[measured] / getattr(counted, measured)
        assert 1 / factor <= ratio <= factor, f"{name}, {form}: {measured} of the formula is {ratio:.2f} times the count"


def test_a_wrong_formula_would_be_seen():
    found = fitted("linear_recurrence", "hillis_steele")
    lengths = sorted(found.counts)
    right = {n: formula("linear_recurrence", "hillis_steele", n) for n in lengths}
    assert not disagreements(found, right, lengths)
    for change in (
        lambda n, c: refimpl.Cost(c.work / np.log2(n), c.depth, c.peak),
        lambda n, c: refimpl.Cost(c.work, c.depth * n, c.peak),
        lambda n, c: refimpl.Cost(c.work, c.depth, c.peak * np.log2(n)),
        lambda n, c: refimpl.Cost(2 * c.work, c.depth, c.peak),
        lambda n, c: refimpl.Cost(c.work, c.depth, c.peak / 3),
    ):
        assert len(disagreements(found, {n: change(n, c) for n, c in right.items()}, lengths)) == 1


@each_form
def test_formulas_that_claim_to_be_exact_are(name, form):
    op = refimpl.OPS[name]
    exact = op.forms[form].exact
    assert set(exact) <= set(FACTOR), f"{name}, {form}: {exact} are not numbers of a Cost"
    for combination in ({}, *op.sizes) if exact else ():
        for length in (5, 16, 23) if op.lengths else (1,):
            sizes = dict.fromkeys(op.lengths, length) | dict(combination)
            counted, predicted = measure(op, form, **sizes), predict(op, form, **sizes)
            for measured in exact:
                want, got = getattr(counted, measured), getattr(predicted, measured) * UNITS[measured]
                assert got == pytest.approx(want, rel=1e-12), f"{name}, {form}, {sizes}: {measured} is {want}, the formula says {got}"


def test_most_work_formulas_are_exact():
    exact = sum("work" in refimpl.OPS[name].forms[form].exact for name, form in FORMS)
    assert exact > len(FORMS) / 2


@pytest.mark.parametrize(
    ("name", "form", "measured", "order"),
    [
        ("long_conv", "fft", "work", (1, 1)),
        ("long_conv", "direct", "work", (2, 0)),
        ("long_conv", "monarch", "work", (1.5, 0)),
        ("linear_recurrence", "sequential", "depth", (1, 0)),
        ("linear_recurrence", "blelloch", "work", (1, 0)),
        ("linear_recurrence", "blelloch", "depth", (0, 1)),
        ("linear_recurrence", "hillis_steele", "work", (1, 1)),
        ("linear_recurrence", "hillis_steele", "depth", (0, 1)),
        ("ssd", "chunked", "work", (1, 0)),
        ("ssd", "quadratic", "work", (2, 0)),
        ("mlstm", "chunkwise", "work", (1, 0)),
        ("mlstm", "parallel", "work", (2, 0)),
        ("linear_attention", "chunkwise", "work", (1, 0)),
        ("linear_attention", "chunkwise", "traffic", (1, 0)),
        ("attention", "dense", "peak", (2, 0)),
        ("attention", "tiled", "work", (2, 0)),
        ("attention", "tiled", "peak", (1, 0)),
        ("linformer_attention", "dense", "work", (1, 0)),
        ("lsh_attention", "chunked", "work", (1, 1)),
        ("selective_scan", "associative", "depth", (0, 1)),
        ("expert_choice", "sort", "work", (1, 1)),
    ],
)
def test_growth_that_is_known(name, form, measured, order):
    """What the literature says, not the chapter: Blelloch 1990, Hillis and Steele 1986, Dao and Gu 2024, Beck et al. 2025 ..."""
    assert getattr(fitted(name, form), measured).order == order


def test_tiled_attention_keeps_n_times_d():
    assert fit("attention", "tiled", "d e", n=64, m=64, Hq=1, Hkv=1).peak.order == (1, 0)
    assert fit("attention", "tiled", "n", m=64, Hq=1, Hkv=1).peak.order == (1, 0)
    assert fit("attention", "tiled", "m", n=64, Hq=1, Hkv=1, lengths=(64, 128, 256, 512, 1024)).peak.order == (0, 0)


def test_experts_cost_by_those_that_are_chosen():
    work = lambda **sizes: measure("moe", "gathered", T=64, d=16, f=32, **sizes).by_class["matmul"]
    router = lambda E: 2 * 64 * 16 * E
    chosen = [work(E=E, k=2) - router(E) for E in (4, 6, 8)]
    assert max(chosen) == min(chosen)
    per_expert = [(work(E=8, k=k) - router(8)) / k for k in (1, 2, 4)]
    assert max(per_expert) == min(per_expert)
    assert measure("moe", "dense", T=64, d=16, f=32, E=8, k=2).by_class["matmul"] - router(8) >= 4 * chosen[0]


def test_attention_moves_what_flash_attention_says():
    """Dao et al. (2022), theorem 2: N² d² / M in tiles that fit a memory of M, N² for the whole map of scores."""
    d, sizes = 16, {"d": 16, "e": 16, "Hq": 1, "Hkv": 1}

    def tiled(N, M):
        block = M // 8 // (16 * d)  # tiles of q, k, v, o and scores beside each other
        return measure("attention", "tiled", n=N, m=N, block_q=block, block_k=block, memory=M, **sizes).transfers

    def dense(N, M):
        return measure("attention", "dense", n=N, m=N, memory=M, **sizes).transfers

    small, large = tiled(128, 2**15), tiled(256, 2**15)
    assert 3.5 < large / small < 4.2  # N²
    assert 1.7 < tiled(128, 2**14) / small < 2.2  # 1 / M
    assert 1.7 < large / tiled(256, 2**16) < 2.2
    assert 3.6 < dense(256, 2**14) / dense(128, 2**14) < 4.2
    assert dense(256, 2**16) > 7 * tiled(256, 2**16)


# -- the same counts, always -----------------------------------------------------------------------------------------

DIGEST = """
import hashlib, refimpl
from refimpl.complexity import measure
found = repr([(name, form, measure(name, form)) for name, op in refimpl.OPS.items() for form in op.forms])
print(hashlib.sha256(found.encode()).hexdigest())
"""


def test_counts_are_the_same_in_every_run():
    """Twice here, and in another process with another order of hashes and of threads."""
    here = [repr([(name, form, measure(name, form)) for name, form in FORMS]) for _ in range(2)]
    assert here[0] == here[1]
    environment = os.environ | {"PYTHONHASHSEED": "7", "REFIMPL_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "2"}
    there = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True, env=environment, timeout=120)
    assert there.stdout.strip() == hashlib.sha256(here[0].encode()).hexdigest()


def test_large_calls_stay_in_one_thread():
    """So large that heads would go to threads."""
    sizes = {"T": 512, "d": 16, "e": 16, "H": 4}
    assert measure("mlstm", "chunkwise", **sizes) == measure("mlstm", "chunkwise", **sizes)


@pytest.mark.parametrize("name", [name for name, op in refimpl.OPS.items() if op.gradient is not None])
def test_gradients_can_be_counted_too(name):
    """A gradient is at least a tenth and at most twenty times its function (which most of them call again)."""
    forwards, backwards = measure(name), measure(name, "vjp")
    assert min(backwards.depth, backwards.traffic, backwards.peak) > 0
    assert forwards.work / 10 <= backwards.work < 20 * forwards.work


def test_the_gradient_of_a_product_is_two():
    """Kaplan et al. (2020), section 2.1: backwards is twice forwards, where products of matrices are all there is."""
    forwards, backwards = (measure("attention", form, n=64, m=64, d=64, e=64).by_class["matmul"] for form in ("dense", "vjp"))
    assert backwards == pytest.approx(3 * forwards, rel=0.2)  # forwards once again, then twice
    assert fit("linear_recurrence", "vjp").work.order == (1, 0)


# -- the command -----------------------------------------------------------------------------------------------------


def test_cost_command(tmp_path, capsys):
    from refimpl.complexity.command import print_costs, read_sizes

    given = read_sizes(["--T", "16", "...", "128", "--c=2"])
    assert given == {"T": [16, 32, 64, 128], "c": [2]}
    print_costs("linear_recurrence", ["sequential", "blelloch"], given, json=tmp_path / "a.json", plot=tmp_path / "a.png")
    text = capsys.readouterr().out
    assert "sequential" in text and "blelloch" in text and "log T" in text and "hillis" not in text
    data = json.loads((tmp_path / "a.json").read_text())
    row = data["forms"]["sequential"]["lengths"]["128"]
    assert row["predicted"]["work"] == row["counted"]["work"] == 2 * 128 * 2
    assert data["forms"]["blelloch"]["growth"]["depth"] == {"says": "log T", "power": 0, "logs": 1, "exact": True}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_cost_command_predicts_what_it_cannot_count(capsys):
    from refimpl.complexity.table import costs

    (found,) = costs("attention", ["dense"], "T", (64, 2**20), growing=False)
    assert found.rows[0].counted.work == found.rows[0].predicted.work
    assert found.rows[1].counted is None
    assert found.rows[1].predicted.work > 1e14


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["64"], "belongs to no size"),
        (["--T", "0"], "integer of at least 1"),
        (["--T", "...", "64"], "dots stand between"),
        (["--T", "64", "...", "32"], "dots stand between"),
        (["--T"], "needs a size"),
        (["--T", "many"], "integer of at least 1"),
    ],
)
def test_cost_command_refuses(words, message):
    from refimpl.complexity.command import read_sizes

    with pytest.raises(ValueError, match=message):
        read_sizes(words)
    from typer.testing import CliRunner

    from refimpl.cli import app

    result = CliRunner().invoke(app, ["cost", "linear_recurrence", *words])
    assert result.exit_code == 2, result.output


def test_measures_have_names():
    assert MEASURES == ("work", "depth", "traffic", "peak")
