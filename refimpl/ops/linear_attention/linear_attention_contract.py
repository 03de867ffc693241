"""What linear attention takes, and the one form in which its algorithms see it."""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.numerics import constant, sqrt_of
from refimpl.core.options import one_of
from refimpl.ops.linear_attention.feature_maps import MAPS, feature_map_of, width


def _check(arguments, sizes):
    for name in ("q", "k", "v", "decay", "beta"):
        if arguments.get(name) is not None and arguments[name].dtype.kind == "c":
            raise TypeError(f"linear_attention: {name} must be real, got dtype {arguments[name].dtype}")
    if not {"decay", "beta", "feature_map", "normalize", "scale", "state"} <= arguments.keys():
        return  # shapes are asked for, nothing is computed
    option, normalize, scale, state = (arguments[n] for n in ("feature_map", "normalize", "scale", "state"))
    if option is not None and not callable(option):
        one_of("linear_attention", "feature_map", option, (None, *MAPS, "a callable"))
    one_of("linear_attention", "normalize", normalize, (False, True))
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float | np.floating) or not np.isfinite(scale)):
        raise ValueError(f"linear_attention: scale must be a finite number, got {scale!r}")
    if normalize and arguments["beta"] is not None:
        raise ValueError("linear_attention: normalize must be False with beta: the delta rule has no normaliser")
    if state is not None and isinstance(state, tuple) != bool(normalize):
        kind = "a tuple (S, z) with normalize" if normalize else "one array, S, without normalize"
        raise TypeError(f"linear_attention: state must be {kind}, got {type(state).__name__}")
    decay, q, k = (arguments[n] for n in ("decay", "q", "k"))
    if decay is not None and not (
        (decay.ndim == q.ndim - 1 and decay.shape[-2:] == k.shape[-3:-1]) or (decay.ndim == q.ndim and decay.shape[-3:-1] == k.shape[-3:-1])
    ):
        raise ValueError(
            f"linear_attention: decay must have as many axes as q, or one less, with batch axes of 1 written out, got {decay.shape}"
        )
    m = width(option, arguments["k"])
    if sizes.setdefault("m", m) != m:
        raise ValueError(
            f"linear_attention: state and a decay per channel must have the keys' {m} features (after the feature map), got {sizes['m']}"
        )


CONTRACT = Contract(
    "linear_attention",
    takes="q (..., Hq?, T, d); k (..., Hkv?, T, d); v (..., Hkv?, T, e); decay (..., Hkv?, T) | (..., Hkv?, T, m); beta (..., Hkv?, T);"
    "state (..., Hkv?, m, e); state.z (..., Hkv?, m)",
    gives="o (..., Hq?, T, e)",
    rules=("Hkv divides Hq",),
    check=_check,
)


def prepare(q, k, v, decay, beta, feature_map, normalize, scale, state):
    """Features mapped, q grouped by head of k, log-decays and beta as (..., Hkv, T, 1 or m), a state; one batch shape."""
    phi = feature_map_of(feature_map)
    if scale is None:
        scale = 1 / sqrt_of(q.shape[-1], q) if phi is None else 1
    scale = constant(scale, q)
    if phi is not None:
        q, k = phi(q), phi(k)
    g = np.zeros_like(k[..., :1]) if decay is None else decay if decay.ndim == q.ndim else decay[..., None]
    S, z = state if normalize and state is not None else (state, None)
    beta, z = (None if x is None else x[..., None] for x in (beta, z))
    arrays = (q, k, v, g, beta, S, z)
    batch = np.broadcast_shapes(*(x.shape[:-3] for x in arrays if x is not None))
    q, k, v, g, beta, S, z = (None if x is None else np.broadcast_to(x, (*batch, *x.shape[-3:])) for x in arrays)
    if S is None:
        S = np.zeros_like(k, shape=(*k.shape[:-2], k.shape[-1], v.shape[-1]))
    z = np.zeros_like(k, shape=(*k.shape[:-2], k.shape[-1])) if z is None else z[..., 0]
    return grouped(q, k.shape[-3]), k, v, g, beta, S, z, scale


def grouped(x, heads):
    """(..., Hq, T, m) as (..., Hkv, group, T, m): head h of q reads head h // group of k."""
    return x.reshape(*x.shape[:-3], heads, x.shape[-3] // max(heads, 1), *x.shape[-2:])


def ungrouped(x):
    """(..., Hkv, group, T, e) as (..., Hq, T, e)."""
    return x.reshape(*x.shape[:-4], x.shape[-4] * x.shape[-3], *x.shape[-2:])
