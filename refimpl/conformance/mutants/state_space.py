"""Mistakes in state space models: what the step size touches, in which order skip, gate and bias come, what chunks lose."""

import ml_dtypes
import numpy as np

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.state_space import selective_scan as ss

_DECAY = "decay = np.exp(dt[..., t, :, None] * A)  # (..., c, n)"
_ENTRY = "entry = (dt[..., t, :] * u[..., t, :])[..., None] * _by_channel(B[..., t, :, :], A)  # (..., c, n)"
_UPDATE = "        h = decay * h + entry\n"
_READ = "        ys.append((_by_channel(C[..., t, :, :], A) * h).sum(axis=-1))  # (..., c)\n"
_STEP_SIZE = "    dt = delta if delta_bias is None else delta + delta_bias\n    dt = softplus(dt) if delta_softplus else dt\n"
_SKIP = "    y = y if D is None else y + D * u\n    return y if z is None else y * silu(z)\n"


def _split(call, cut):
    """A call's arguments before and from step `cut`."""
    u, delta, A, B, C, options = call
    axis = {x: -3 if x in ("B", "C") and v.ndim > u.ndim else -2 for x, v in (("u", u), ("delta", delta), ("B", B), ("C", C))}
    parts = []
    for window in (slice(0, cut), slice(cut, None)):
        rows = {x: v[(..., window, *[slice(None)] * (-axis[x] - 1))] for x, v in (("u", u), ("delta", delta), ("B", B), ("C", C))}
        z = options.get("z")
        parts.append((rows["u"], rows["delta"], A, rows["B"], rows["C"], options | ({} if z is None else {"z": z[..., window, :]})))
    return parts


def _sixteen_at_a_time(u, delta, A, B, C, D=None, **options):
    """Channels are read sixteen at a time where they divide so; that path has one skip for all sixteen."""
    if D is not None and len(D) % 16 == 0:
        D = np.repeat(D[::16], 16)
    return ss.selective_scan(u, delta, A, B, C, D, **options)


def _gate_as_it_lies(u, delta, A, B, C, D=None, z=None, **options):
    """The gate is read in the order of its memory, whatever its strides."""
    z = None if z is None else z.ravel(order="K").reshape(z.shape)
    return ss.selective_scan(u, delta, A, B, C, D, z, **options)


def _run(call, **more):
    *arrays, options = call
    return ss.selective_scan(*arrays, **(options | more))


def _whole_chunks_only(u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus=False, state=None, return_state=False):
    """The final state is that of the last chunk of 16 that is full."""
    call = (u, delta, A, B, C, {"D": D, "z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus, "state": state})
    y, last = _run(call, return_state=True)
    if not return_state:
        return y
    T = u.shape[-2]
    _, at_chunk = _run(_split(call, T - T % 16)[0], return_state=True) if T > 16 else (None, last)
    return y, at_chunk


def _padding_fades(u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus=False, state=None, return_state=False):
    """The last chunk of 16 is padded with zeros of delta before bias and softplus, which are steps like any other."""
    options = {"D": D, "z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus, "state": state}
    y, last = _run((u, delta, A, B, C, options), return_state=True)
    pad = -u.shape[-2] % 16
    if not return_state:
        return y
    still = [np.zeros((*x.shape[:-2], pad, x.shape[-1]), x.dtype) for x in (u, delta)]
    maps = np.zeros((pad, A.shape[-1]), u.dtype)
    _, faded = _run((*still, A, maps, maps, options | {"z": None, "D": None, "state": last}), return_state=True)
    return y, faded


def _rounded_state(u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus=False, state=None, return_state=False):
    """The state kept in bfloat16 from step to step."""

    def kept(x):
        if x.dtype.kind == "c":
            return (kept(x.real) + 1j * kept(x.imag)).astype(x.dtype)
        return x.astype(ml_dtypes.bfloat16).astype(x.dtype)

    call = (u, delta, A, B, C, {"D": D, "z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus, "state": state})
    empty, h = _run(_split(call, 0)[0], return_state=True)
    rows, rest = [], call
    for _ in range(u.shape[-2]):
        first, rest = _split(rest, 1)
        row, h = _run(first, return_state=True, state=h)
        h = kept(h)
        rows.append(row)
    y = np.concatenate(rows, axis=-2) if rows else empty
    return (y, h) if return_state else y


_SELECTIVE_SCAN = (
    Mutant(
        "selective_scan",
        "exact_zoh",
        "the input is discretised exactly, (exp(dt A) - 1)/A · B, as Mamba's paper writes it: the contract, and Mamba's code, take dt·B",
        edited(
            ss.selective_scan,
            (
                _ENTRY,
                "entry = u[..., t, :, None] * _by_channel(B[..., t, :, :], A)\n"
                "        exact = np.expm1(dt[..., t, :, None] * A) / np.where(A == 0, np.ones_like(A), A)\n"
                "        entry = entry * np.where(A == 0, dt[..., t, :, None] + np.zeros_like(A), exact)",
            ),
        ),
        variant=True,
    ),
    Mutant(
        "selective_scan",
        "euler_decay",
        "the decay is 1 + dt A (Euler): it is exp(dt A)",
        edited(ss.selective_scan, (_DECAY, "decay = 1 + dt[..., t, :, None] * A")),
    ),
    Mutant(
        "selective_scan",
        "rates_as_logarithms",
        "A is taken for the parameter A_log, and -exp(A) used: the contract takes A itself",
        edited(ss.selective_scan, (_DECAY, "decay = np.exp(dt[..., t, :, None] * -np.exp(A))")),
    ),
    Mutant(
        "selective_scan",
        "input_without_step",
        "the input is B·u: it is dt·B·u, so that a step of 0 takes nothing in",
        edited(ss.selective_scan, (_ENTRY, "entry = u[..., t, :, None] * _by_channel(B[..., t, :, :], A)")),
    ),
    Mutant(
        "selective_scan",
        "input_decayed_too",
        "the decay is applied after the update: h_t = exp(dt A)(h_{t-1} + dt B u), where the input of a step is not yet decayed by it",
        edited(ss.selective_scan, (_UPDATE, "        h = decay * (h + entry)\n")),
    ),
    Mutant(
        "selective_scan",
        "previous_decay",
        "step t decays by dt_{t-1}: the decay of a step is its own, exp(dt_t A)",
        edited(ss.selective_scan, (_DECAY, "decay = np.exp(dt[..., max(t - 1, 0), :, None] * A)")),
    ),
    Mutant(
        "selective_scan",
        "output_before_update",
        "y_t reads h_{t-1}: the output at t includes step t's own input",
        edited(ss.selective_scan, (_UPDATE + _READ, _READ + _UPDATE)),
    ),
    Mutant(
        "selective_scan",
        "previous_output_map",
        "y_t reads with C_{t-1}: it reads with C_t",
        edited(ss.selective_scan, (_READ, _READ.replace("C[..., t, :, :]", "C[..., max(t - 1, 0), :, :]"))),
    ),
    Mutant(
        "selective_scan",
        "maps_exchanged",
        "B and C are exchanged: B maps the input into the state, C reads it out",
        edited(
            ss.selective_scan,
            (_ENTRY, _ENTRY.replace("_by_channel(B[", "_by_channel(C[")),
            (_READ, _READ.replace("_by_channel(C[", "_by_channel(B[")),
        ),
    ),
    Mutant(
        "selective_scan",
        "softplus_skipped",
        "delta_softplus is ignored: dt = softplus(delta + delta_bias)",
        edited(ss.selective_scan, (_STEP_SIZE, "    dt = delta if delta_bias is None else delta + delta_bias\n")),
    ),
    Mutant(
        "selective_scan",
        "bias_after_softplus",
        "delta_bias is added after softplus: dt = softplus(delta + delta_bias)",
        edited(
            ss.selective_scan,
            (_STEP_SIZE, "    dt = softplus(delta) if delta_softplus else delta\n    dt = dt if delta_bias is None else dt + delta_bias\n"),
        ),
    ),
    Mutant(
        "selective_scan",
        "bias_ignored",
        "delta_bias is ignored: dt = softplus(delta + delta_bias)",
        edited(ss.selective_scan, (_STEP_SIZE, "    dt = softplus(delta) if delta_softplus else delta\n")),
    ),
    Mutant(
        "selective_scan",
        "skip_forgotten",
        "D is ignored: y_t has a term D·u_t",
        edited(ss.selective_scan, (_SKIP, "    return y if z is None else y * silu(z)\n")),
    ),
    Mutant(
        "selective_scan",
        "skip_of_step_input",
        "the skip connection carries D·dt·u: it carries D·u, the input itself",
        edited(
            ss.selective_scan,
            (
                "    y = np.stack(ys, axis=-2) if ys else u  # (..., T, c)\n    y = _skip_and_gate(_observed(y, A), u, D, z)",
                "    y = np.stack(ys, axis=-2) if ys else u  # (..., T, c)\n    y = _skip_and_gate(_observed(y, A), dt * u, D, z)",
            ),
        ),
    ),
    Mutant(
        "selective_scan",
        "gate_before_skip",
        "the gate is applied before D·u is added: silu(z) multiplies C·h + D·u",
        edited(ss.selective_scan, (_SKIP, "    y = y if z is None else y * silu(z)\n    return y if D is None else y + D * u\n")),
    ),
    Mutant(
        "selective_scan",
        "gate_ignored",
        "z is ignored: the output is multiplied by silu(z)",
        edited(ss.selective_scan, (_SKIP, "    return y if D is None else y + D * u\n")),
    ),
    Mutant(
        "selective_scan",
        "sigmoid_gate",
        "the gate is σ(z): it is silu(z) = z σ(z)",
        edited(ss.selective_scan, (_SKIP, _SKIP.replace("silu(z)", "sigmoid(z)"))),
    ),
    Mutant(
        "selective_scan",
        "groups_interleaved",
        "channel j reads group j mod G of B and C: it reads group j // (c/G), groups being blocks of channels",
        edited(ss.selective_scan, ("np.repeat(x, c // G, axis=-2)", "np.tile(x, (c // G, 1))")),
    ),
    Mutant(
        "selective_scan",
        "first_group_only",
        "all channels read the first group of B and C: channel j reads group j // (c/G)",
        edited(ss.selective_scan, ("np.repeat(x, c // G, axis=-2)", "x[..., :1, :]")),
    ),
    Mutant(
        "selective_scan",
        "state_ignored",
        "the initial state is ignored: h_0 = exp(dt_0 A)·state + dt_0 B_0 u_0",
        edited(ss.selective_scan, (", (*batch, *A.shape))\n    u, dt = ", ", (*batch, *A.shape)) * 0\n    u, dt = ")),
    ),
    Mutant(
        "selective_scan",
        "state_reset_at_chunks",
        "the state starts from zero at every chunk: it is handed on from chunk to chunk",
        edited(
            ss.selective_scan_chunked,
            (
                "        for start in range(0, T, chunk):\n",
                "        for start in range(0, T, chunk):\n            last = 0 * last if start else last\n",
            ),
        ),
    ),
    Mutant(
        "selective_scan",
        "state_of_whole_chunks",
        "the final state is that after the last whole chunk: the steps of a shorter last chunk belong to it",
        lambda: _whole_chunks_only,
    ),
    Mutant(
        "selective_scan",
        "padding_fades_state",
        "the last chunk is padded with zeros before bias and softplus, so that padding steps have dt > 0 and fade the final state: pad with dt = 0",
        lambda: _padding_fades,
    ),
    Mutant(
        "selective_scan",
        "state_in_bfloat16",
        "the state is rounded to bfloat16 at every step: it is kept in float32 at least, and results are rounded once, at the end",
        lambda: _rounded_state,
    ),
    Mutant(
        "selective_scan",
        "half_of_a_pair",
        "complex A: the output is Re(C·h), half of what a conjugate pair gives: y = 2 Re(C·h) + D u",
        edited(ss.selective_scan, ("return 2 * y.real if", "return y.real if")),
    ),
    Mutant(
        "selective_scan",
        "output_map_conjugated",
        "complex C is conjugated (an inner product): y = 2 Re(C·h), with nothing conjugated",
        edited(ss.selective_scan, (_READ, _READ.replace("_by_channel(C[", "np.conj(_by_channel(C[").replace(", A) * h", ", A)) * h"))),
    ),
    Mutant(
        "selective_scan",
        "input_map_conjugated",
        "complex B is conjugated: h takes in dt·B·u, with nothing conjugated",
        edited(ss.selective_scan, (_ENTRY, _ENTRY.replace("_by_channel(B[..., t, :, :], A)", "np.conj(_by_channel(B[..., t, :, :], A))"))),
    ),
    Mutant(
        "selective_scan",
        "gradient_without_gate",
        "the gradient does not pass through the gate: dp = dy·silu(z)",
        edited(ss.selective_scan_vjp, ("dp = dy if z is None else dy * silu(z)", "dp = dy")),
        of_gradient=True,
    ),
    Mutant(
        "selective_scan",
        "gradient_of_gate_without_skip",
        "the gradient of z sees C·h without D·u: both are gated",
        edited(
            ss.selective_scan_vjp,
            ("_observed((C_all * hs).sum(axis=-1), A), u, D, None)", "_observed((C_all * hs).sum(axis=-1), A), u, None, None)"),
        ),
        of_gradient=True,
    ),
    Mutant(
        "selective_scan",
        "gradient_of_rates_without_step",
        "the gradient of A lacks dt: dA = Σ_t dt_t r_t",
        edited(ss.selective_scan_vjp, ('"A": (dt[..., None] * r)', '"A": (1 * r)')),
        of_gradient=True,
    ),
    Mutant(
        "selective_scan",
        "gradient_of_step_without_input",
        "the gradient of delta sees only the decay: dt also scales the input dt·B·u",
        edited(ss.selective_scan_vjp, (".real + u * from_entry", ".real + 0 * from_entry")),
        of_gradient=True,
    ),
    Mutant(
        "selective_scan",
        "gradient_of_step_without_decay",
        "the gradient of delta sees only the input: dt also sets the decay exp(dt A)",
        edited(ss.selective_scan_vjp, ("d_dt = (np.conj(A) * r)", "d_dt = (0 * np.conj(A) * r)")),
        of_gradient=True,
    ),
    Mutant(
        "selective_scan",
        "gradient_without_softplus",
        "the gradient of delta lacks softplus' derivative, σ(delta + delta_bias)",
        edited(ss.selective_scan_vjp, ("d_raw = d_dt * sigmoid(raw) if delta_softplus else d_dt", "d_raw = d_dt")),
        of_gradient=True,
    ),
    Mutant(
        "selective_scan",
        "gradient_of_input_without_skip",
        "the gradient of u lacks the skip connection: D·dp",
        edited(ss.selective_scan_vjp, ('"u": dt * from_entry if D is None else dt * from_entry + D * dp', '"u": dt * from_entry')),
        of_gradient=True,
    ),
    Mutant(
        "selective_scan",
        "gradient_of_maps_from_one_channel",
        "the gradients of B and C hold the last channel of a group only (written, not added): sum over all channels that read them",
        edited(ss.selective_scan_vjp, ("G, c // G, n).sum(axis=-2)", "G, c // G, n)[..., -1, :]")),
        of_gradient=True,
    ),
    Mutant(
        "selective_scan",
        "one_skip_for_sixteen_channels",
        "where the channels divide into sixteens, each group has its first channel's skip: D has a number for every channel",
        lambda: _sixteen_at_a_time,
    ),
    Mutant(
        "selective_scan",
        "gate_strides_ignored",
        "the gate is read in the order of its memory: a part of a projection, or its transpose, has strides of its own",
        lambda: _gate_as_it_lies,
    ),
    Mutant(
        "selective_scan",
        "gradient_own_decay",
        "the adjoint recurrence decays by exp(dt_t A): g_t meets the decay of the step after, exp(dt_{t+1} A)",
        edited(ss.selective_scan_vjp, ("linear_recurrence, np.conj(later), into_h", "linear_recurrence, np.conj(decay), into_h")),
        of_gradient=True,
    ),
    Mutant(
        "selective_scan",
        "dstate_ignored",
        "the cotangent of the final state is ignored: the adjoint recurrence starts from it",
        edited(
            ss.selective_scan_vjp,
            ("last = np.zeros_like(h) if dstate is None else np.broadcast_to(dstate, h.shape)", "last = np.zeros_like(h)"),
        ),
        of_gradient=True,
    ),
    Mutant(
        "selective_scan",
        "gradient_forgets_initial_state",
        "the gradients of A and delta take the state before the first step to be zero: it decays like any other",
        edited(ss.selective_scan_vjp, ("np.concatenate([h[..., None, :, :], hs]", "np.concatenate([0 * h[..., None, :, :], hs]")),
        of_gradient=True,
    ),
    Mutant(
        "selective_scan",
        "conj_forgotten",
        "the gradient of complex arguments lacks the conjugates: g_t = 2 conj(C_t) dp_t + exp(dt_{t+1} conj(A)) g_{t+1} (JAX's convention returns conj(g))",
        edited(
            ss.selective_scan_vjp,
            ("np.conj(later), into_h * np.conj(C_all)", "later, into_h * C_all"),
            ("r = np.conj(decay * before) * g", "r = decay * before * g"),
            ("from_entry = (np.conj(B_all) * g)", "from_entry = (B_all * g)"),
            ("d_dt = (np.conj(A) * r)", "d_dt = (A * r)"),
            ("_by_group(into_h * np.conj(hs), C", "_by_group(into_h * hs, C"),
        ),
        of_gradient=True,
    ),
)

MUTANTS = _SELECTIVE_SCAN
