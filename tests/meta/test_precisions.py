"""Precisions in which code computes more coarsely than its arrays say: tf32, eight bits; statistics of every result."""

import functools

import ml_dtypes
import numpy as np
import pytest

import refimpl
from refimpl.conformance import disk, gates, truth
from refimpl.conformance.cases import Support, cases, choose, default_sizes
from refimpl.conformance.domain import Domain
from refimpl.conformance.ensemble import ensemble, readings
from refimpl.conformance.precision import eleven_bits, precision, rounded

KEYS = 4  # the mistake 'a key': this one is left out


def attention_of(kept, given_back, mistake="", scale=1.0):
    """Attention whose operands and weights are `kept` in few bits, and whose result is given back in a dtype."""

    def attention(q, k, v, *, causal=False):
        if q.ndim == 2:
            return attention(q[None], k[None], v[None], causal=causal)[0]
        groups = q.shape[-3] // k.shape[-3]
        q, k, v = (x.astype(np.float32) for x in (q, np.repeat(k, groups, axis=-3), np.repeat(v, groups, axis=-3)))
        n, m = q.shape[-2], k.shape[-2]
        allowed = (np.arange(m) <= np.arange(n)[:, None] + m - n) | (not causal)
        if mistake == "a key" and m > KEYS:
            allowed = allowed & (np.arange(m) != KEYS)
        s = kept(q) @ kept(k).swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5 * scale)
        s = np.where(allowed, s, np.float32(-np.inf))
        p = np.exp(s - s.max(axis=-1, keepdims=True, initial=-1e30))
        total = p.sum(axis=-1, keepdims=True)
        o = kept(p) @ kept(v) / np.where(total == 0, 1, total)
        return (o * (0.97 if mistake == "factor" else 1)).astype(given_back)

    return attention


def in_dtype(name, x):
    return x.astype(getattr(ml_dtypes, name)).astype(np.float32)


def check(candidate, dtype, **settings):
    return refimpl.check("attention", candidate, **{"dtypes": [dtype], "level": "quick", "domain": Domain(d=[16, 32], e=[16])} | settings)


@pytest.mark.parametrize("kept", [eleven_bits, functools.partial(eleven_bits, cut=True)], ids=["rounded", "cut"])
def test_products_in_tf32_conform_where_that_is_promised_and_only_there(kept):
    candidate = attention_of(kept, np.float32)
    report = check(candidate, "tf32")
    assert report.ok, str(report)
    assert check(candidate, "float32", fail_fast=True).failures


@pytest.mark.parametrize("mistake", ["factor", "a key"])
@pytest.mark.parametrize("dtype", ["tf32", "float8_e4m3fn", "float8_e5m2"])
def test_wrong_in_few_bits(dtype, mistake):
    kept = eleven_bits if dtype == "tf32" else functools.partial(in_dtype, dtype)
    assert check(attention_of(kept, np.float32, mistake), dtype, fail_fast=True).failures


def test_products_in_bfloat16_are_no_tf32():
    assert check(attention_of(functools.partial(in_dtype, "bfloat16"), np.float32), "tf32", fail_fast=True).failures


@pytest.mark.parametrize(("dtype", "given_back"), [("float8_e4m3fn", "same"), ("float8_e4m3fn", "bfloat16"), ("float8_e5m2", "float32")])
def test_eight_bits_may_be_given_back_in_more(dtype, given_back):
    result = getattr(ml_dtypes, dtype if given_back == "same" else given_back, np.float32)
    report = check(attention_of(functools.partial(in_dtype, dtype), result), dtype)
    assert report.ok, str(report)


def test_a_factor_is_no_convention():
    """A mistake that only statistics see is not explained by variants that change nothing in these calls."""

    def scaled(q, k, v, *, causal=False):
        return (attention_of(np.asarray, np.float32)(q, k, v, causal=causal) * np.float32(1.003)).astype(q.dtype)

    report = check(scaled, "bfloat16")
    assert report.verdict == "wrong" and any(f.status == "BIAS" for f in report.failures), str(report)


def test_eleven_bits():
    x = np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-10, -(1 + 3 * 2.0**-12), np.inf, -np.inf, 0.0, 1e-40], np.float32)
    want = np.array([1, 1 + 2.0**-9, 1 + 2.0**-10, -(1 + 2.0**-10), np.inf, -np.inf, 0.0, 1e-40], np.float32)  # ties to even; by hand
    assert np.array_equal(eleven_bits(x)[:7], want[:7])
    assert eleven_bits(x, cut=True)[1] == np.float32(1 + 2.0**-10)
    assert np.isnan(eleven_bits(np.array([np.nan], np.float32)))[0]


# -- the ensemble ------------------------------------------------------------------------------------------------------


def plain_call(op, to):
    sizes = {**default_sizes(op), **dict.fromkeys(op.lengths, 11)}
    return rounded(op.contract, choose(op, op.sample(np.random.default_rng(0), **sizes), sizes, {}), to)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "tf32"])
def test_every_operator_has_eight_legal_emulations(dtype):
    """As many different ones, too, where the operator rounds at all; and none of them wrong."""
    to = precision(dtype)
    for op in refimpl.OPS.values():
        call = plain_call(op, to)
        emulations = ensemble(op, call, to)
        assert len(emulations) >= 8, op.name
        right = truth.truth(op, call, to)
        assert all(set(e) == set(right) for e in emulations), op.name
        assert all(e[n].shape == v.shape for e in emulations for n, v in right.items()), op.name
        if dtype == "float32":
            assert len({b"".join(e[n].tobytes() for n in right) for e in emulations}) >= 8 or op.name in EXACT, op.name


EXACT = ("route", "expert_choice", "ternary_quantize", "binary_quantize")  # results of few values


def test_the_gates_ask_for_numbers_of_which_no_result_follows(tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path))
    op, to = refimpl.OPS["linear_attention"], precision("bfloat16")
    call = plain_call(op, to)
    call = {n: np.concatenate([v] * 30, axis=-2) for n, v in call.items() if n in "qkv"}
    right = truth.truth(op, call, to)
    first = readings(op, call, to, right, keep=True)
    (path,) = (tmp_path / "ensembles").iterdir()
    kept = disk.load(path.name.partition(".")[0])
    assert sum(v.size for v in kept.values()) < sum(v.size for v in right.values()) / 2
    again = readings(op, call, to, right, keep=True)
    for name, peers in first.items():
        assert peers.gains == again[name].gains and peers.spread == again[name].spread and np.array_equal(peers.slopes, again[name].slopes)
        assert np.array_equal(peers.errors, again[name].errors)


def test_what_is_kept_is_asked_for_again_only_for_the_same_call(tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path))
    x = np.arange(6.0)
    key = disk.digest("ensemble", "attention", "bfloat16", {"q": x, "causal": True})
    assert key == disk.digest("ensemble", "attention", "bfloat16", {"causal": True, "q": x.copy()})
    others = [("float16", {"q": x, "causal": True}), ("bfloat16", {"q": x, "causal": False}), ("bfloat16", {"q": x.reshape(2, 3), "causal": True}),
              ("bfloat16", {"q": x + 1e-9, "causal": True}), ("bfloat16", {"k": x, "causal": True}), ("bfloat16", {"q": x.astype(np.float32), "causal": True})]  # fmt: skip
    assert len({key, *(disk.digest("ensemble", "attention", dtype, call) for dtype, call in others)}) == 1 + len(others)
    assert disk.digest("ensemble", {"q": np.sum}) == ""  # a function has no bytes
    disk.store(key, {"a": x})
    assert np.array_equal(disk.load(key)["a"], x)
    monkeypatch.setenv("REFIMPL_CACHE", "off")
    assert disk.digest("ensemble") == "" and disk.load(key) is None


@pytest.mark.parametrize("harm", ["cut short", "one bit", "another name", "pickle", "empty"])
def test_a_damaged_file_is_no_answer(harm, tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path))
    key = "0" * 40
    disk.store(key, {"a": np.arange(100.0)})
    (path,) = (tmp_path / "ensembles").iterdir()
    content = bytearray(path.read_bytes())
    if harm == "another name":
        key = "1" * 40
        path = path.rename(path.with_name(key + path.suffix))
    elif harm == "pickle":
        disk.store(key, {"a": np.array([print], dtype=object)})  # np.savez would pickle it; reading refuses
    else:
        content[200] ^= 1
        path.write_bytes(bytes(content) if harm == "one bit" else content[:150] if harm == "cut short" else b"")
    assert disk.load(key) is None


def test_the_oldest_files_make_room(tmp_path):
    import os

    for i in range(10):
        path = tmp_path / f"{i}.npz1"
        path.write_bytes(b"x" * 8192)
        os.utime(path, (i, i))
    (tmp_path / "notes.txt").write_text("not ours")
    disk.make_room(tmp_path, room=100_000)
    assert len(list(tmp_path.glob("*.npz1"))) == 10
    disk.make_room(tmp_path, room=40_000)
    assert sorted(p.stem for p in tmp_path.glob("*.npz1")) == ["8", "9"] and (tmp_path / "notes.txt").exists()


def test_a_check_in_isolation_leaves_the_folder_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path))
    settings = {"dtypes": ["bfloat16"], "level": "quick"}
    assert refimpl.check("linear_recurrence", "refimpl:linear_recurrence", isolate=True, **settings).ok
    assert not (tmp_path / "ensembles").exists()
    assert refimpl.check("linear_recurrence", refimpl.linear_recurrence, **settings).ok
    assert any((tmp_path / "ensembles").iterdir())


# -- statistics of every result ----------------------------------------------------------------------------------------


def large_call(op, to, label):
    """The case of that label, its truth, and what the gates know of it."""
    case = next(c for c in cases(op, level="standard", seed=0, support=Support(None), domain=Domain()) if label in c.name)
    call = rounded(op.contract, case.call, to)
    right = truth.truth(op, call, to)
    return call, right, readings(op, call, to, right, keep=False)


@pytest.mark.parametrize("name", ["lstm", "gru", "ssm", "causal_conv1d"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_returned_state_off_by_a_hair_is_caught(name, dtype):
    """A factor of 1.002 on the state (in float16, of 1.0005), which the bound of no element sees."""
    op, to, factor = refimpl.OPS[name], precision(dtype), 1.002 if dtype == "bfloat16" else 1.0005
    call, right, others = large_call(op, to, "many sequences")
    for state in (n for n in right if n.startswith("state")):
        got = op.contract.named(op.definition(**call), True)[state]
        assert gates.unbiased(state, got, right[state], others[state], to.common) is None
        assert gates.unbiased(state, got * got.dtype.type(factor), right[state], others[state], to.common) is not None


@pytest.mark.parametrize("name", ["gru", "wkv6"])
def test_one_row_in_ten_thousand_is_caught(name):
    op, to = refimpl.OPS[name], precision("bfloat16")
    call, right, known = large_call(op, to, "ten thousand")
    first = next(iter(right))
    others, limit = known[first], truth.tolerance(op, call, to, right)[first]
    got = op.contract.named(op.definition(**call), call.get("return_state", False))[first]
    assert gates.no_row_apart(first, got, right[first], others, limit) is None
    wrong = got.reshape(-1, got.shape[-1]).copy()
    strong = np.argsort(-np.abs(wrong.astype(np.float32)).min(axis=-1))[:50]  # rows that are not nearly zero
    found = 0
    for row in strong:
        one = wrong.copy()
        one[row] *= one.dtype.type(1.05)
        found += gates.no_row_apart(first, one.reshape(got.shape), right[first], others, limit) is not None
    assert found > len(strong) / 2


def test_a_factor_that_only_all_cases_show():
    slopes = [(0.002 + noise, 0.004) for noise in np.linspace(-0.004, 0.004, 61)]
    assert gates.together("y", slopes, 2.0**-8) is None  # their mean is not certain enough
    assert "1.002 times" in gates.together("y", [(s, spread / 4) for s, spread in slopes], 2.0**-8).message
    assert gates.together("y", [(s - 0.002, spread / 4) for s, spread in slopes], 2.0**-8) is None
