"""The gradient of linear attention: an adjoint recurrence, last step first."""

import numpy as np

from refimpl.ops.linear_attention.feature_maps import feature_map_of
from refimpl.ops.linear_attention.linear_attention_contract import CONTRACT, grouped, prepare, ungrouped
from refimpl.ops.linear_attention.state import State


@CONTRACT.gradient
def linear_attention_vjp(dy, q, k, v, *, decay=None, beta=None, feature_map=None, normalize=False, scale=None, state=None, dstate=None):
    """Gradient of `linear_attention`: (4), (3), (2) and (1) transposed, last step first.

    With dS, dz the cotangents of the state after step t, r = v - S'ᵀk, and sums over the queries that share the head:

        (4)  dq = scale S do,    dS += scale q doᵀ;      normalised, with D = q·z and dD = -o·do / D:
             dq = S do / D + dD z,    dS += q doᵀ / D,    dz += dD q
        (3)  dk = dS u,    du = dSᵀ k,    dS' = dS;      dz' = dz,    dk += dz
        (2)  dv = du;      with the delta rule:  dβ = du·r,    dv = β du,    dk -= S' dv,    dS' -= k dvᵀ
        (1)  dg = Σ_e dS' S' (+ dz' z'), summed over the channels that share it,    dS_{t-1} = e^g dS',    dz_{t-1} = e^g dz'

    and last the feature map's own adjoint, for q and k. At its kink relu has the slope 0.

    Parameters
    ----------
    dy : ndarray, shape (..., Hq, T, e)
        Cotangent of o.
    dstate : ndarray, shape (..., Hkv, m, e), or State, optional
        Cotangent of the final state.

    Returns
    -------
    dict
        "q", "k", "v", and "decay", "beta", "state" where they were given.

    Raises
    ------
    TypeError
        If the feature map is a callable without `vjp`, or dstate is not of the state's kind.

    Notes
    -----
    Keeps all T states, T m e elements a head. 14 T m e operations or so.
    """
    phi = feature_map_of(feature_map)
    if phi is not None and not callable(getattr(phi, "vjp", None)):
        raise TypeError(f"linear_attention: feature_map must have a method vjp(dphi, x) for the gradient (see FeatureMap), got {phi!r}")
    if dstate is not None and isinstance(dstate, tuple) != bool(normalize):
        raise TypeError(f"linear_attention: dstate must be {'a tuple (dS, dz)' if normalize else 'one array'}, as the state is")
    raw_q, raw_k, per_channel = q, k, decay is not None and decay.ndim == q.ndim
    q, k, v, g, beta, S, z, scale = prepare(q, k, v, decay, beta, feature_map, normalize, scale, state)
    T = k.shape[-2]
    dy = grouped(dy, k.shape[-3])
    states = [(S, z)]
    for t in range(T):
        S = np.exp(g[..., t, :, None]) * S
        u = v[..., t, :] if beta is None else beta[..., t, :] * (v[..., t, :] - _recall(S, k[..., t, :]))
        S = S + k[..., t, :, None] * u[..., None, :]
        z = np.exp(g[..., t, :]) * z + k[..., t, :] if normalize else z
        states.append((S, z))
    if dstate is None:
        dS, dz = np.zeros_like(S), np.zeros_like(z)
    else:
        dS, dz = dstate if normalize else (dstate, np.zeros_like(z))
    steps = []
    for t in reversed(range(T)):
        (S, z), (S_before, z_before) = states[t + 1], states[t]
        q_t, k_t, v_t, do = q[..., t, :], k[..., t, :], v[..., t, :], dy[..., t, :]  # (..., Hkv, group, m or e) and (..., Hkv, m or e)
        a = np.exp(g[..., t, :])  # (..., Hkv, 1 or m)
        S_old, z_old = a[..., None] * S_before, a * z_before
        dN = scale * do
        if normalize:
            D = q_t @ z[..., None]  # (..., Hkv, group, 1)
            dN = do / D
            dD = -(dN * (q_t @ S)).sum(axis=-1, keepdims=True) / D
        dq = dN @ _transposed(S)
        dS = dS + _transposed(q_t) @ dN
        if normalize:
            dq = dq + dD * z[..., None, :]
            dz = dz + (dD * q_t).sum(axis=-2)
        u = v_t
        if beta is not None:
            residual = v_t - _recall(S_old, k_t)
            u = beta[..., t, :] * residual
        dk = (dS @ u[..., None])[..., 0] + dz  # (..., Hkv, m)
        dv = _recall(dS, k_t)
        dbeta = None
        if beta is not None:
            dbeta = (dv * residual).sum(axis=-1)  # (..., Hkv)
            dv = beta[..., t, :] * dv
            dk = dk - (S_old @ dv[..., None])[..., 0]
            dS = dS - k_t[..., :, None] * dv[..., None, :]
        dg = (dS * S_old).sum(axis=-1) + dz * z_old  # (..., Hkv, m)
        dS, dz = a[..., None] * dS, a * dz
        steps.append((dq, dk, dv, dg if per_channel else dg.sum(axis=-1), dbeta))
    gradients = {"state": State(dS, dz) if normalize else dS}
    if not steps:
        empty = {"q": raw_q, "k": raw_k, "v": v, "decay": decay, "beta": None if beta is None else beta[..., 0]}
        return gradients | {name: x for name, x in empty.items() if x is not None}
    dq, dk, dv, dg, dbeta = zip(*steps[::-1], strict=True)
    dq, dk, dv = ungrouped(np.stack(dq, axis=-2)), np.stack(dk, axis=-2), np.stack(dv, axis=-2)
    if phi is not None:
        dq = phi.vjp(dq, np.broadcast_to(raw_q, (*dq.shape[:-1], raw_q.shape[-1])))
        dk = phi.vjp(dk, np.broadcast_to(raw_k, (*dk.shape[:-1], raw_k.shape[-1])))
    gradients |= {"q": dq, "k": dk, "v": dv, "decay": np.stack(dg, axis=-2 if per_channel else -1)}
    return gradients if beta is None else gradients | {"beta": np.stack(dbeta, axis=-1)}


def _recall(S, k):
    """Sᵀk"""
    return (k[..., None, :] @ S)[..., 0, :]


def _transposed(x):
    return np.swapaxes(x, -1, -2)
