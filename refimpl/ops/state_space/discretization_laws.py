"""Laws of every discretisation, dense or diagonal: what a step of a linear system must do whatever the formula.

They look at (Ā, B̄) as matrices; a diagonal system is a stack of systems of one state.
"""

import numpy as np

from refimpl.op import Law

EXPONENTIAL = ("zoh", "mamba")


def linear_in_b(contract):
    """B̄ is linear in B, and Ā does not depend on it."""

    def holds(f, call, bound, rng):
        b = _name_of_b(contract)
        other = np.flip(call[b], axis=-1) / 2 if call[b].ndim else call[b] / 2
        A, B = f(**call)
        E_A, E_B = bound(**call)
        A2, B2 = f(**{**call, b: 2 * call[b]})
        yield "B_bar of twice B", B2, 2 * B, 4 * E_B
        yield "A_bar of twice B", A2, A, 2 * E_A
        B3, E3 = f(**{**call, b: other})[1], bound(**{**call, b: other})[1]
        B4, E4 = f(**{**call, b: call[b] + other})[1], bound(**{**call, b: call[b] + other})[1]
        yield "B_bar of a sum", B4, B + B3, E_B + E3 + E4

    return Law("linear", holds, (_name_of_b(contract),))


def time_scale(contract):
    """Only dt A and dt B matter: twice the rates and half the step change nothing."""

    def holds(f, call, bound, rng):
        a, b = _name_of_a(contract), _name_of_b(contract)
        got = f(**{**call, a: 2 * call[a], b: 2 * call[b], "dt": call["dt"] / 2})
        for name, x, y, E in zip(("A_bar", "B_bar"), got, f(**call), bound(**call), strict=True):
            yield f"{name} of (2A, 2B, dt/2)", x, y, 2 * E

    return Law("time_scale", holds, (_name_of_a(contract), _name_of_b(contract), "dt"))


def small_step(contract):
    """As dt -> 0 the state is kept and the input enters as dt B: Ā = I + dt A + O(dt²), B̄ = dt B + O(dt²)."""

    def holds(f, call, bound, rng):
        call = {**call, "dt": call["dt"] * 2.0**-12}
        (A_bar, B_bar), (E_A, E_B) = _matrices(contract, f(**call), call), _matrices(contract, bound(**call), call)
        X, Y = _step_of(contract, call)
        size = abs(X).sum(axis=-1).max(axis=-1, initial=0)[..., None, None]  # ‖dt A‖
        yield "A_bar as dt -> 0", A_bar, X + np.eye(X.shape[-1]), E_A + 2 * size * abs(X).max(axis=(-2, -1), keepdims=True, initial=0)
        yield "B_bar as dt -> 0", B_bar, Y, E_B + 2 * size * abs(Y).max(axis=(-2, -1), keepdims=True, initial=0)

    return Law("small_step", holds, ("dt",))


def semigroup(contract):
    """Two holds are one over twice the step: Ā(2dt) = Ā², B̄(2dt) = Ā B̄ + B̄ (of "mamba", the Ā only)."""

    def holds(f, call, bound, rng):
        method = call.get("method", "zoh")
        if method not in EXPONENTIAL:
            return
        twice = {**call, "dt": call["dt"] * 2}
        (A, B), (E_A, E_B) = _matrices(contract, f(**call), call), _matrices(contract, bound(**call), call)
        (A_bar, B_bar), (F_A, F_B) = _matrices(contract, f(**twice), twice), _matrices(contract, bound(**twice), twice)
        yield "A_bar, two steps in one", A_bar, A @ A, F_A + abs(A) @ E_A + E_A @ abs(A) + E_A @ E_A
        if method == "zoh":
            yield "B_bar, two steps in one", B_bar, A @ B + B, F_B + abs(A) @ E_B + E_A @ abs(B) + E_A @ E_B + E_B

    return Law("semigroup", holds, ("dt",))


def contraction(contract):
    """Where no state can gain energy (A + Aᴴ negative), none does at any step: ‖Ā‖₂ <= 1. Not so for "euler"."""

    def holds(f, call, bound, rng):
        if call.get("method", "zoh") == "euler":
            return
        a = call[_name_of_a(contract)]
        if _name_of_a(contract) == "A":
            a = (a - np.conj(np.swapaxes(a, -1, -2))) / 2 - np.eye(a.shape[-1], dtype=a.dtype) / 2
        else:
            a = 1j * a.imag - abs(a.real) if np.iscomplexobj(a) else -abs(a)
        call = {**call, _name_of_a(contract): a.astype(call[_name_of_a(contract)].dtype), "dt": 3 * abs(call["dt"])}
        A_bar, E = _matrices(contract, f(**call), call)[0], _matrices(contract, bound(**call), call)[0]
        if A_bar.size:
            gain = np.linalg.norm(A_bar, ord=2, axis=(-2, -1)) if np.isfinite(A_bar).all() else np.full(A_bar.shape[:-2], np.inf)
            yield "gain of A_bar beyond 1", np.maximum(gain - 1, 0), np.zeros_like(gain), np.linalg.norm(E, axis=(-2, -1))

    return Law("contraction", holds, (_name_of_a(contract), "dt"))


def _name_of_a(contract):
    return contract.arrays[0].name


def _name_of_b(contract):
    return contract.arrays[1].name


def _matrices(contract, pair, call):
    """(Ā, B̄) as float64 or complex128 matrices (..., n, n) and (..., n, m)."""
    pair = [np.asarray(x, dtype=np.result_type(x.dtype if x.dtype.kind in "fc" else np.float32, np.float64)) for x in pair]
    pair = [x.astype(np.complex128 if x.dtype.kind == "c" else np.float64) for x in pair]
    if _name_of_a(contract) == "a":
        return [x[..., None, None] for x in pair]
    column = _is_column(contract, call)
    return [pair[0], pair[1][..., None] if column else pair[1]]


def _is_column(contract, call):
    return contract.axis("n", A=call["A"], B=call["B"], dt=call["dt"])["B"] == -1


def _step_of(contract, call):
    """dt A and dt B as matrices."""
    a, b = (np.asarray(call[n]) for n in (_name_of_a(contract), _name_of_b(contract)))
    a, b = (x.astype(np.complex128 if x.dtype.kind == "c" else np.float64) for x in (a, b))
    dt = np.asarray(call["dt"]).astype(np.float64)
    if _name_of_a(contract) == "a":
        return (dt * a)[..., None, None], (dt * b)[..., None, None]
    return dt[..., None, None] * a, dt[..., None, None] * (b[..., None] if _is_column(contract, call) else b)
