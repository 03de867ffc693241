"""Signatures of state space models: SciPy, mamba_ssm, mambapy, transformers."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.conformance.adapters.common import fold, leading, like_operator, refuse, unfold


@like_operator("discretize")
def cont2discrete(f: Callable) -> Callable:
    """``f((A, B, C, D), dt, method) -> (A, B, C, D, dt)``, SciPy's, a system at a time. Its C and D are not looked at."""
    methods = {"zoh": "zoh", "bilinear": "bilinear", "euler": "euler", "backward_euler": "backward_diff"}

    def discretize(A, B, dt, *, method="zoh"):
        refuse(method not in methods, f"has no method {method!r}")
        n = A.shape[-1]
        refuse(n == 0, "needs a state")
        vector = B.ndim < A.ndim or B.shape[-2:-1] != (n,) or (B.ndim == A.ndim and B.ndim > 2 and B.shape[:-1] == A.shape[:-2] and B.shape[-1] == n and B.shape[-2] != n)
        core = 1 if vector else 2
        dt = np.asarray(dt, dtype=A.real.dtype)
        lead = leading((A, 2), (B, core), (dt, 0))
        A, B, dt = fold(A, 2, lead), fold(B, core, lead), fold(dt, 0, lead)
        m = 1 if vector else B.shape[-1]
        systems = [f((a, b.reshape(n, m), np.zeros((1, n)), np.zeros((1, m))), float(step), method=methods[method])[:2] for a, b, step in zip(A, B, dt, strict=True)]
        if not systems:
            return A.reshape(*lead, n, n), B.reshape(*lead, *B.shape[1:])
        return np.stack([a for a, _ in systems]).reshape(*lead, n, n), np.stack([b.reshape(B.shape[1:]) for _, b in systems]).reshape(*lead, *B.shape[1:])

    return discretize


@like_operator("selective_scan")
def mamba_ssm(f: Callable, *, groups: bool = True) -> Callable:
    """``f(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)`` on (batch, channels, time), as mamba_ssm's.

    There is no initial state. `groups`: B and C may be (batch, groups, state, time).
    """

    def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus=False, return_state=False):
        refuse(any(x.is_complex() for x in (A, B, C)), "complex B and C are laid out otherwise")
        refuse(u.shape[-2] == 0, "needs a step")
        core = 2 if B.ndim <= u.ndim else 3
        refuse(core == 3 and not groups, "B and C are shared by all channels")
        lead = leading((u, 2), (delta, 2), (B, core), (C, core), *(((z, 2),) if z is not None else ()))
        u, delta, z = (None if x is None else fold(x, 2, lead).swapaxes(-1, -2) for x in (u, delta, z))
        B, C = (fold(x, core, lead) for x in (B, C))
        B, C = (x.swapaxes(-1, -2) if core == 2 else x.permute(0, 2, 3, 1) for x in (B, C))
        options: dict[str, Any] = {"D": D, "z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus}
        y = f(u, delta, A, B, C, **options, **({"return_last_state": True} if return_state else {}))
        if return_state:
            return unfold(y[0].swapaxes(-1, -2), lead), unfold(y[1], lead)
        return unfold(y.swapaxes(-1, -2), lead)

    return selective_scan


@like_operator("selective_scan")
def mambapy_scan(f: Callable) -> Callable:
    """``f(x, delta, A, B, C, D)`` on (batch, time, channels), after the softplus: mambapy's MambaBlock.selective_scan."""

    def selective_scan(u, delta, A, B, C, D=None):
        refuse(B.ndim > u.ndim, "B and C are shared by all channels")
        refuse(u.shape[-2] == 0, "needs a step")
        refuse(A.is_complex(), "y = 2 Re(C h) is the caller's to take")
        lead = leading((u, 2), (delta, 2), (B, 2), (C, 2))
        u, delta, B, C = (fold(x, 2, lead) for x in (u, delta, B, C))
        return unfold(f(u, delta, A, B, C, A.new_zeros(A.shape[0]) if D is None else D), lead)

    return selective_scan


@like_operator("ssd")
def chunk_scan(f: Callable, *, chunk: int = 16) -> Callable:
    """``f(x, dt, A, B, C, chunk, D, dt_bias, initial_states, dt_softplus, dt_limit, return_final_states)``, as mamba_chunk_scan_combined.

    On (batch, time, heads, features); states there are transposed.
    """

    def ssd(x, dt, A, B, C, D=None, dt_bias=None, *, dt_softplus=False, dt_limit=(0.0, math.inf), state=None, return_state=False):
        refuse(x.shape[-2] == 0, "needs a step")
        one_head = x.ndim == 2
        A, D, dt_bias = (None if v is None else v.reshape(-1) for v in (A, D, dt_bias))
        if one_head:
            x, dt, B, C, state = (None if v is None else v[None] for v in (x, dt, B, C, state))
        lead = leading((x, 3), (dt, 2), (B, 3), (C, 3), *(((state, 3),) if state is not None else ()))
        x, B, C = (fold(v, 3, lead).swapaxes(1, 2) for v in (x, B, C))
        options: dict[str, Any] = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit, "return_final_states": True}
        if state is not None:
            options["initial_states"] = fold(state, 3, lead).swapaxes(-1, -2)
        y, last = f(x, fold(dt, 2, lead).swapaxes(1, 2), A, B, C, chunk, **options)
        y, last = unfold(y.swapaxes(1, 2), lead), unfold(last.swapaxes(-1, -2), lead)
        if one_head:
            y, last = y[..., 0, :, :], last[..., 0, :, :]
        return (y, last) if return_state else y

    return ssd
