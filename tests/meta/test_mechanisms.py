"""What the kit is to see or to forgive by a mechanism of its own, shown by candidates that no mutant covers."""

import importlib
import re

import numpy as np
import pytest

import refimpl
from refimpl.conformance import trial_gradients
from refimpl.conformance.cases import Support, covering, default_sizes, factors, fullest, hard_call
from refimpl.conformance.domain import Domain
from refimpl.conformance.mutants import edited
from refimpl.conformance.shapes import reshaped
from refimpl.ops.gated_rnn import gru, lstm

checking = importlib.import_module("refimpl.conformance.check")  # the package's `check` is its function


def check(op, candidate, **settings):
    return refimpl.check(op, candidate, **{"dtypes": ["float32"], "level": "quick"} | settings)


def test_small_integers_come_out_exactly_in_half_precision():
    def one_unit_off(q, k, v):
        o = refimpl.linear_attention(q, k, v, scale=1.0)
        return np.where(abs(o) == 1, o + (o.dtype.type(2.0**-7) if o.dtype.itemsize == 2 else 0), o).astype(o.dtype)

    domain = refimpl.Domain(options={"scale": [1.0]})
    assert any(f.klass == "integers" for f in check("linear_attention", one_unit_off, dtypes=["bfloat16"], domain=domain).failures)


def test_more_results_than_the_contract_has_are_wrong():
    def with_a_state(q, k, v):
        return refimpl.linear_attention(q, k, v, return_state=True)

    assert check("linear_attention", with_a_state).verdict == "wrong"


def test_ties_that_go_elsewhere_are_a_deviation():
    def higher_index(logits, k):
        weights, experts = refimpl.route(logits[..., ::-1], k)
        return weights, logits.shape[-1] - 1 - experts

    report = check("route", higher_index)
    assert report.verdict == "deviates" and "ties" in " ".join(report.diagnosis)


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("wrong", [False, True])
def test_a_sequence_of_no_steps_may_be_refused_but_not_got_wrong(wrong, always):
    def needs_a_step(a, b, *, state=None, return_state=False):
        h = refimpl.linear_recurrence(a, b, state=state, return_state=return_state)
        if b.shape[-2] == 0 and wrong:
            return (h[0] if return_state else h, np.ones(b.shape[:-2] + b.shape[-1:], b.dtype)) if return_state else h
        if b.shape[-2] == 0 and (return_state or always):
            raise IndexError("needs at least one step")
        return h

    report = check("linear_recurrence", needs_a_step)
    assert report.verdict == ("wrong" if wrong else "conforms")
    assert wrong or "T = 0" in report.not_checked


def test_a_candidate_that_always_raises_passes_nothing():
    def broken(q, k, v):
        raise ZeroDivisionError

    report = check("attention", broken)
    assert not any(c.status == "PASS" for c in report.cases) and not report.ok


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_a_kernel_for_equal_heads_and_sizes_is_judged_on_those(factor):
    def kernel(q, k, v, *, causal=False):
        if q.ndim != 4 or q.shape[1] != k.shape[1] or q.shape[-1] != v.shape[-1]:
            raise RuntimeError("unsupported shapes")
        return refimpl.attention(q, k, v, causal=causal) * q.dtype.type(factor)

    report = check("attention", kernel)
    assert report.verdict == ("conforms" if factor == 1 else "wrong")
    assert any("Hq other than Hkv" in n for n in report.not_checked) and any("e other than d" in n for n in report.not_checked)


def test_the_gradient_of_a_legitimate_variant_is_its_own():
    def top_left(q, k, v, *, causal=False):
        n, m = q.shape[-2], k.shape[-2]
        return refimpl.attention(q, k, v, mask=np.tri(n, m, dtype=bool)[None] if causal else None)

    def its_gradient(dy, q, k, v, *, causal=False):
        n, m = q.shape[-2], k.shape[-2]
        return refimpl.attention_vjp(dy, q, k, v, mask=np.tri(n, m, dtype=bool)[None] if causal else None)

    report = check("attention", top_left, gradients=True, candidate_vjp=its_gradient)
    assert report.verdict == "deviates" and report.variant == "causal_top_left"


@pytest.mark.parametrize("writes", [False, True])
def test_a_gradient_may_not_write_to_its_cotangent(writes):
    def vjp(dy, x):
        g = refimpl.silu_vjp(dy, x)
        if writes:
            dy *= 0
        return g

    report = check("silu", lambda x: refimpl.silu(x), gradients=True, candidate_vjp=vjp)
    assert {f.status for f in report.failures} == ({"MUTATED_INPUT"} if writes else set())


def test_half_precision_code_that_is_written_out_is_right():
    import ml_dtypes

    def rounded(x):
        return x.astype(ml_dtypes.bfloat16).astype(np.float32)

    def silu(x):
        wide = x.astype(np.float32)
        return (wide * rounded(1 / (1 + np.exp(-wide)))).astype(x.dtype)

    assert check("silu", silu, dtypes=["bfloat16"], level="standard").ok


def test_covering_combinations_hold_every_choice_that_departs():
    combos = [{"D": False, "z": False, "mode": None}, {"D": True, "z": False, "mode": "a"}, {"D": True, "z": True, "mode": None}, {"D": False, "z": False, "mode": "b"}]
    few = covering(combos)
    assert {(n, v) for c in few for n, v in c.items()} >= {("D", True), ("z", True), ("mode", "a"), ("mode", "b")}
    assert covering(combos[:1]) == combos[:1]


@pytest.mark.parametrize(
    "vjp, gates",
    [
        (gru.gru_vjp, ("np.tanh(n)) * sigmoid(z) * sigmoid(-z)", "d_n = dh * sigmoid(-z)", "d_r = d_r * sigmoid(r) * sigmoid(-r)")),
        (lstm.lstm_vjp, ("sigmoid(o) * sigmoid(-o)", "sigmoid(i) * sigmoid(-i)", "sigmoid(f) * sigmoid(-f)")),
    ],
    ids=["gru", "lstm"],
)
def test_derivatives_of_gates_may_be_taken_from_their_values(vjp, gates, monkeypatch):
    """s (1 - s), as native kernels have it, is off by a roundoff of 1 where a gate is nearly open."""
    written = edited(vjp, *((old, re.sub(r"sigmoid\(-(\w)\)", r"(1 - sigmoid(\1))", old)) for old in gates))()
    plan = {"T": 13}, {"b": True, "state": True, "return_state": True}, "saturated", ""
    monkeypatch.setattr(checking, "result_jobs", lambda *_: iter(()))
    monkeypatch.setattr(checking, "law_jobs", lambda *_: iter(()))
    monkeypatch.setattr(trial_gradients, "_plans", lambda trial: [plan] * 20)
    monkeypatch.setattr(trial_gradients, "_reshaped", lambda *_: iter(()))
    name = vjp.__name__.removesuffix("_vjp")
    report = check(name, getattr(refimpl, name), gradients=True, candidate_vjp=written)
    assert len(report.cases) >= 20 and not report.failures, str(report)


def test_a_kernel_for_complex_arrays_may_refuse_real_ones():
    def complex_only(u, nu_log, theta_log, B, C, D, gamma=None, *, state=None, return_state=False):
        if "c" not in B.dtype.kind + C.dtype.kind or B.dtype != C.dtype:
            raise TypeError("expected complex matrices")
        return refimpl.lru(u, nu_log, theta_log, B, C, D, gamma, state=state, return_state=return_state)

    report = check("lru", complex_only, level="standard")
    assert report.verdict == "conforms", str(report)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_state_of_few_bits_was_rounded(dtype):
    import ml_dtypes

    def keeps_few_bits(x, W, R, b=None, *, state=None, return_state=False):
        y, (h, c) = refimpl.lstm(x, W, R, b, state=state, return_state=True)
        c = c.astype(getattr(ml_dtypes, dtype, dtype)).astype(c.dtype) if x.shape[-2] else c
        return (y, (h, c)) if return_state else y

    report = refimpl.check("lstm", keeps_few_bits, dtypes=[dtype], level="quick")
    assert report.verdict == "wrong"
    assert "rounded on the way" in report.worst.message


@pytest.mark.parametrize("wrong", [False, True])
def test_arrays_that_are_not_contiguous_may_be_refused_but_not_got_wrong(wrong):
    def wants_rows(a, b, *, state=None, return_state=False):
        if not b.flags.c_contiguous:
            if not wrong:
                raise RuntimeError("b must be contiguous")
            b = 0 * b
        return refimpl.linear_recurrence(a, b, state=state, return_state=return_state)

    report = check("linear_recurrence", wants_rows)
    assert report.verdict == ("wrong" if wrong else "conforms")
    assert wrong or "transposed inputs" in report.not_checked


@pytest.mark.parametrize("wrong", [False, True])
def test_angles_may_be_constants_but_not_have_a_wrong_gradient(wrong):
    def vjp(dy, x, positions, **options):
        gradients = refimpl.OPS["rope"].gradient(dy, x, positions, **options)
        return {n: g if n == "x" else g * (0.5 if wrong else 0) for n, g in gradients.items()}

    report = check("rope", refimpl.rope, gradients=True, candidate_vjp=vjp)
    assert report.verdict == ("wrong" if wrong else "conforms")
    assert wrong or any(line.endswith("(zero: a constant to it)") for line in report.not_checked)


def test_what_goes_together_is_tried_together():
    """beta and `normalize` exclude each other: each with all the rest."""
    op = refimpl.OPS["linear_attention"]
    full = fullest(op, factors(op, Support(), Domain()))
    assert [(bool(combo["beta"]), combo["normalize"]) for combo in full] == [(True, False), (False, True)]
    assert all(combo["decay"] and combo["state"] and combo["scale"] for combo in full)


@pytest.mark.parametrize("operator", ["route", "moe", "expert_choice"])
def test_zeros_of_hard_inputs_are_positive(operator):
    """Some sort -0 before 0: then equals are not equal."""
    op = refimpl.OPS[operator]
    for hard in op.hard:
        call = hard_call(op, hard, np.random.default_rng(0), default_sizes(op), {}, Support(), Domain())
        for value in (call or {}).values():
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                assert not np.any(np.signbit(value) & (value == 0)), hard


def test_arrays_may_serve_one_of_two_batch_axes():
    op = refimpl.OPS["swiglu"]
    call = op.sample(np.random.default_rng(0), **default_sizes(op) | {"batch": (2, 3)})
    labels = {label for _, label, _ in reshaped(op, call)}
    assert {"one up for a batch axis", "up with an axis fewer"} <= labels
