"""How often a report names the mistake that was made, and how often one that was not.

The candidates are written without a look at the catalogue, in the styles of several people. Half of them make a mistake that
the catalogue has, under whatever name; the report must name it. The other half make one that it does not have; the report
must name none. What shows only in some cases, "like X here but not there", is no name.
"""

import importlib.util

import numpy as np
import pytest

import refimpl

KNOWN, UNKNOWN, BOTH = [], [], []
SLOW = ("attention", "gru", "lstm", "selective_scan")


def known(op, *names, bug=None, **settings):
    """A mistake that the catalogue has; any of the names is right."""
    return _add(KNOWN, op, names, bug, settings)


def unknown(op, bug=None, **settings):
    """A mistake that the catalogue does not have."""
    return _add(UNKNOWN, op, (), bug, settings)


def both(op, *names, bug=None, **settings):
    """Two mistakes at once; each must be named."""
    return _add(BOTH, op, names, bug, settings)


def _add(where, op, names, bug, settings):
    def add(f):
        import functools
        import inspect

        g = f
        if bug is not None:

            @functools.wraps(f)
            def g(*args, **kwargs):
                return f(*args, **kwargs, bug=bug)

            kept = [p for p in inspect.signature(f).parameters.values() if p.name != "bug"]
            g.__signature__ = inspect.Signature(kept)
        slow = op in SLOW or len(where) % 3  # all of them by `pytest tests/meta --run thorough`
        marks = [pytest.mark.peers] if settings.get("framework") == "torch" else [pytest.mark.thorough] if slow else []
        where.append(pytest.param(op, g, names, settings, marks=marks, id=f"{op}-{bug or f.__name__}"))
        return f

    return add


def named(report):
    """The mistakes that a report says the candidate makes, without reserve."""
    return [line.partition("`")[2].partition("`")[0] for line in report.diagnosis if line.startswith("matches `")]


def examine(op, candidate, settings):
    if settings.get("framework") == "torch":
        pytest.importorskip("torch")
    return refimpl.check(op, candidate, **{"dtypes": ["float32"], **settings})


@pytest.mark.parametrize(("op", "candidate", "names", "settings"), KNOWN)
def test_a_known_mistake_is_named(op, candidate, names, settings, tally):
    report = examine(op, candidate, settings)
    found = named(report)
    tally("names", "known", right=bool(found) and found[0] in names, wrong=bool(found) and not set(found) & set(names), none=not found)
    assert found and set(found) & set(names), str(report)


@pytest.mark.parametrize(("op", "candidate", "names", "settings"), UNKNOWN)
def test_no_other_mistake_is_named(op, candidate, names, settings, tally):
    report = examine(op, candidate, settings)
    tally("names", "unknown", wrong=bool(named(report)), none=not named(report))
    assert report.verdict == "wrong", str(report)
    assert not named(report), str(report)


@pytest.mark.parametrize(("op", "candidate", "names", "settings"), BOTH)
def test_two_mistakes_are_both_named(op, candidate, names, settings, tally):
    report = examine(op, candidate, settings)
    text = "\n".join(line for line in report.diagnosis if line.startswith("matches `"))
    tally("names", "two", right=all(f"`{name}`" in text for name in names))
    assert all(f"`{name}`" in text for name in names), str(report)


# -- recurrences -------------------------------------------------------------------------------------------------------


@known("linear_recurrence", "previous_decay", bug="decay of the step before", domain=refimpl.Domain(options={"reverse": [False]}))
@known("linear_recurrence", "state_ignored", bug="starts from zero")
@known("linear_recurrence", "input_decayed_too", bug="input decays at once")
@known("linear_recurrence", "decay_made_positive", bug="decay through exp of log of its size")
@unknown("linear_recurrence", bug="keeps a tenth of the step before last")
@unknown("linear_recurrence", bug="last feature is not carried on")
@unknown("linear_recurrence", bug="decay is rounded to a hundredth")
@unknown("linear_recurrence", bug="twice from step 40 on")
@both("linear_recurrence", "state_ignored", "reverse_ignored", bug="starts from zero, always forwards")
@both("linear_recurrence", "previous_decay", "reverse_ignored", bug="decay of the step before, always forwards")
def recurrence(a, b, *, state=None, reverse=False, return_state=False, bug=""):
    a = np.broadcast_to(a, np.broadcast_shapes(a.shape, b.shape))
    b = np.broadcast_to(b, a.shape)
    dtype = np.result_type(a, b)
    reverse = reverse and "forwards" not in bug
    steps = list(range(b.shape[-2]))[:: -1 if reverse else 1]
    h = np.zeros(b.shape[:-2] + b.shape[-1:], dtype) if state is None or "starts from zero" in bug else state.astype(dtype)
    out, older = np.zeros(b.shape, dtype), 0 * h
    for i, t in enumerate(steps):
        x, w = b[..., t, :], a[..., t, :]
        if "decay of the step before" in bug:
            w = a[..., steps[max(i - 1, 0)], :]
        if bug.startswith("decay through"):
            w = abs(w)
        if "hundredth" in bug:
            w = np.round(w * 100) / 100
        if bug == "input decays at once":
            new = w * (h + x)
        elif bug == "keeps a tenth of the step before last":
            new = w * h + x + dtype.type(0.1) * older
        elif bug == "last feature is not carried on":
            new = w * h * (np.arange(b.shape[-1]) < b.shape[-1] - 1) + x
        else:
            new = w * h + x
        if "step 40" in bug and i >= 40:
            out[..., t, :] = 2 * new
        else:
            out[..., t, :] = new
        older, h = h, new.astype(dtype)
    return (out, h) if return_state else out


@known("rg_lru", "factor_missing", bug="no input normalisation")
@known("rg_lru", "gates_swapped", bug="gates the wrong way round")
@unknown("rg_lru", bug="factor of the decay to the fourth")
@unknown("rg_lru", bug="input gate at least a half")
def griffin(x, r, i, log_a, *, state=None, return_state=False, bug=""):
    if bug == "gates the wrong way round":
        r, i = i, r
    slow = 8 * r * log_a
    a = np.exp(slow)
    factor = np.sqrt(-np.expm1((4 if "fourth" in bug else 2) * slow))
    if bug == "no input normalisation":
        factor = 1
    gate = np.maximum(i, x.dtype.type(0.5)) if "at least" in bug else i
    return recurrence(a.astype(x.dtype), (factor * gate * x).astype(x.dtype), state=state, return_state=return_state)


# -- state space models ------------------------------------------------------------------------------------------------


@known("selective_scan", "exact_zoh", bug="zero-order hold of the input too")
@known("selective_scan", "skip_forgotten", bug="no skip")
@known("selective_scan", "gate_before_skip", bug="gated before the skip")
@unknown("selective_scan", bug="midpoint rule")
@unknown("selective_scan", bug="first half of the states only")
@unknown("selective_scan", bug="softplus of twice the step, halved")
@both("selective_scan", "skip_forgotten", "bias_ignored", bug="no skip, no step bias")
@both("selective_scan", "sigmoid_gate", "state_ignored", bug="sigmoid gate, from zero")
def mamba(u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus=False, state=None, return_state=False, bug=""):
    if B.ndim > u.ndim or C.ndim > u.ndim or np.iscomplexobj(A):
        raise NotImplementedError("one group of real maps")
    dt = delta if delta_bias is None or "no step bias" in bug else delta + delta_bias
    if delta_softplus:
        dt = np.logaddexp(0, 2 * dt) / 2 if "halved" in bug else np.logaddexp(0, dt)
    shape = np.broadcast_shapes(u.shape, dt.shape, B.shape[:-1] + (1,), C.shape[:-1] + (1,))
    h = np.zeros((*shape[:-2], u.shape[-1], A.shape[-1]), u.dtype) if state is None or "from zero" in bug else state
    ys = []
    for t in range(u.shape[-2]):
        d, b, c = dt[..., t, :, None], B[..., t, None, :], C[..., t, None, :]
        x = u[..., t, :, None]
        if "midpoint" in bug:
            w, v = (1 + d * A / 2) / (1 - d * A / 2), d * b / (1 - d * A / 2)
        elif "hold" in bug:
            w = np.exp(d * A)
            v = np.where(A == 0, d, np.expm1(d * A) / np.where(A == 0, 1, A)) * b
        else:
            w, v = np.exp(d * A), d * b
        h = w * h + v * x
        s = h * c
        y = s[..., : (s.shape[-1] + 1) // 2].sum(-1) if "first half" in bug else s.sum(-1)
        ys.append(y)
    y = np.stack(ys, axis=-2) if ys else np.zeros(shape, u.dtype)
    act = lambda v: (1 if "sigmoid" in bug else v) / (1 + np.exp(-v))
    if bug == "gated before the skip":
        y = y * (1 if z is None else act(z))
        y = y if D is None else y + D * u
    else:
        y = y if D is None or "no skip" in bug else y + D * u
        y = y if z is None else y * act(z)
    y = y.astype(u.dtype)
    return (y, h.astype(u.dtype)) if return_state else y


# -- attention ---------------------------------------------------------------------------------------------------------


@known("attention", "scale_missing", "scale_ignored", bug="no scale")
@known("attention", "scale_one_over_d", bug="divided by d")
@known("attention", "causal_top_left", bug="diagonal from the top left")
@known("attention", "gqa_modulo", bug="heads dealt out in turn")
@known("attention", "lse_in_log2", bug="lse to base two")
@known("attention", "causal_strict", bug="looks at the past only")
@unknown("attention", bug="scaled by the root of the number of keys")
@unknown("attention", bug="last key counted twice")
@unknown("attention", bug="softmax over queries")
@unknown("attention", bug="squared scores")
@unknown("attention", bug="every other head is dropped")
@both("attention", "scale_missing", "causal_top_left", bug="no scale, diagonal from the top left")
@both("attention", "gqa_modulo", "causal_strict", bug="heads dealt out in turn, looks at the past only")
def softmax_attention(q, k, v, *, causal=False, return_lse=False, bug=""):
    if q.ndim == 2:
        o = softmax_attention(q[None], k[None], v[None], causal=causal, return_lse=return_lse, bug=bug)
        return tuple(x[0] for x in o) if return_lse else o[0]
    H, G = q.shape[-3], k.shape[-3]
    owner = np.arange(H) % G if "in turn" in bug else np.arange(H) * G // H if G else np.arange(0)
    k, v = k[..., owner, :, :], v[..., owner, :, :]
    (n, d), m = q.shape[-2:], k.shape[-2]
    s = np.einsum("...id,...jd->...ij", q, k)
    scale = 1 if "no scale" in bug else 1 / d if "by d" in bug else max(m, 1) ** -0.5 if "number of keys" in bug else d**-0.5
    s = s * q.dtype.type(scale)
    if bug == "squared scores":
        s = np.sign(s) * s * s
    at = np.arange(n)[:, None] + (0 if "top left" in bug else m - n)
    keep = (np.arange(m) < at if "past only" in bug else np.arange(m) <= at) if causal else np.ones((n, m), bool)
    axis = -2 if "over queries" in bug else -1
    top = np.max(s, axis=axis, keepdims=True, where=keep, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0)
    p = np.where(keep, np.exp(np.where(keep, s, -np.inf) - top), 0)
    if "counted twice" in bug and m:
        p[..., -1] *= 2
    total = p.sum(axis=axis, keepdims=True)
    o = np.einsum("...ij,...je->...ie", p / np.where(total == 0, 1, total), v)
    if bug == "every other head is dropped":
        o[..., 1::2, :, :] = 0
    o = o.astype(q.dtype)
    if not return_lse:
        return o
    with np.errstate(divide="ignore"):
        lse = (np.log(p.sum(-1)) + (top[..., 0] if axis == -1 else 0))
    return o, (lse * q.dtype.type(1.4426950408889634) if "base two" in bug else lse).astype(q.dtype)


# -- norms, activations, positions -------------------------------------------------------------------------------------


@known("rms_norm", "eps_outside_the_root", bug="epsilon beside the root")
@known("rms_norm", "sum_for_mean", bug="sum of squares")
@unknown("rms_norm", bug="largest instead of the root mean square")
@unknown("rms_norm", bug="weight twice")
def rms(x, weight=None, *, eps=1e-6, bug=""):
    square = x * x
    if bug == "sum of squares":
        y = x / np.sqrt(square.sum(-1, keepdims=True) + x.dtype.type(eps))
    elif bug == "epsilon beside the root":
        y = x / (np.sqrt(square.mean(-1, keepdims=True)) + x.dtype.type(eps))
    elif bug.startswith("largest"):
        y = x / (abs(x).max(-1, keepdims=True, initial=0) + x.dtype.type(eps))
    else:
        y = x / np.sqrt(square.mean(-1, keepdims=True) + x.dtype.type(eps))
    if weight is None:
        return y.astype(x.dtype)
    return (y * weight * (weight if "twice" in bug else 1)).astype(x.dtype)


@known("layer_norm", "divided_by_c_minus_1", bug="unbiased variance")
@known("layer_norm", "bias_before_weight", bug="bias inside")
@unknown("layer_norm", bug="median for mean")
def layer(x, weight=None, bias=None, *, eps=1e-5, bug=""):
    m = np.median(x, -1, keepdims=True) if "median" in bug else x.mean(-1, keepdims=True)
    c = x.shape[-1]
    var = ((x - m) ** 2).sum(-1, keepdims=True) / (max(c - 1, 0) if "unbiased" in bug else c)
    y = (x - m) / np.sqrt(var + x.dtype.type(eps))
    if bug == "bias inside":
        y = y if bias is None else y + bias
        y = y if weight is None else y * weight
    else:
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
    return y.astype(x.dtype)


@known("rope", "layouts_swapped", "layout_always_interleaved", bug="neighbours in pairs", domain=refimpl.Domain(options={"layout": ["half"]}))
@known("rope", "turned_backwards", bug="sine negated", domain=refimpl.Domain(options={"layout": ["half"]}))
@unknown("rope", bug="angles in turns of 6.28", domain=refimpl.Domain(options={"layout": ["half"]}))
@unknown("rope", bug="frequencies in reverse", domain=refimpl.Domain(options={"layout": ["half"]}))
def rotary(x, positions, *, base=10000.0, bug=""):
    half = x.shape[-1] // 2
    f = float(base) ** (-np.arange(half) / half) if half else np.zeros(0)
    f = f[::-1] if "reverse" in bug else f * (2 * np.pi / 6.28) if "6.28" in bug else f
    angle = positions.astype(np.float64)[..., None] * f
    c, s = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    s = -s if "negated" in bug else s
    if bug == "neighbours in pairs":
        p, q = x[..., 0::2], x[..., 1::2]
        return np.stack([p * c - q * s, p * s + q * c], -1).reshape(np.broadcast_shapes(x.shape, angle.shape[:-1] + (1,)))
    p, q = x[..., :half], x[..., half:]
    return np.concatenate([p * c - q * s, p * s + q * c], -1)


@known("causal_conv1d", "weight_reversed", bug="taps the other way round")
@known("causal_conv1d", "sigmoid_for_silu", bug="sigmoid at the end")
@unknown("causal_conv1d", bug="first tap forgotten")
@unknown("causal_conv1d", bug="bias doubled")
def conv(x, weight, bias=None, *, activation=None, bug=""):
    W, T = weight.shape[-1], x.shape[-2]
    padded = np.concatenate([np.zeros((*x.shape[:-2], W - 1, x.shape[-1]), x.dtype), x], axis=-2)
    w = weight[:, ::-1] if bug.startswith("taps") else weight
    y = sum(padded[..., j : j + T, :] * w[:, j] for j in range(1 if "first tap" in bug else 0, W)) + 0 * x
    if bias is not None:
        y = y + bias * (2 if "doubled" in bug else 1)
    if activation in ("silu", "swish"):
        y = (1 if "sigmoid" in bug else y) / (1 + np.exp(-y))
    elif activation is not None:
        raise NotImplementedError(activation)
    return y.astype(x.dtype)


@known("softplus", "relu")
def ramp(x):
    return np.maximum(x, 0)


@unknown("softplus")
def of_threshold_5(x):
    return np.where(x > 5, x, np.log1p(np.exp(np.minimum(x, 5)))).astype(x.dtype)


@known("silu", "quick_gelu")
def with_1702(x):
    return x / (1 + np.exp(-1.702 * x)).astype(x.dtype)


@unknown("silu")
def mish(x):
    return x * np.tanh(np.logaddexp(0, x))


@known("swiglu", "gelu_for_silu", "gelu_for_silu")
def gated_by_gelu(gate, up):
    from scipy.special import ndtr

    return (gate * ndtr(gate) * up).astype(gate.dtype)


@unknown("gelu", domain=refimpl.Domain(options={"approximate": ["none"]}))
def of_logistic_with_1_6(x):
    return x / (1 + np.exp(-1.6 * x)).astype(x.dtype)


# -- gated recurrent networks, linear attention ------------------------------------------------------------------------


@known("lstm", "gates_in_order_igfo", bug="i g f o")
@known("lstm", "output_of_old_cell", bug="shows the old cell")
@known("lstm", "R_transposed", bug="recurrent matrices transposed")
@unknown("lstm", bug="candidate without tanh")
@unknown("lstm", bug="peeks at the cell")
@both("lstm", "bias_ignored", "tanh_of_cell_missing", bug="no bias, cell shown bare")
def long_short_term(x, W, R, b=None, *, state=None, return_state=False, bug=""):
    sig = lambda v: 0.5 * (1 + np.tanh(0.5 * v))
    order = (0, 2, 1, 3) if bug == "i g f o" else (0, 1, 2, 3)
    R = R.swapaxes(-1, -2) if "transposed" in bug else R
    bias = np.zeros(W.shape[0::2], x.dtype) if b is None or "no bias" in bug else b
    h, c = (np.zeros((*x.shape[:-2], W.shape[-1]), x.dtype),) * 2 if state is None else state
    out = []
    for t in range(x.shape[-2]):
        g = [x[..., t, :] @ W[j] + h @ R[j] + bias[j] for j in order]
        if "peeks" in bug:
            g[1] = g[1] + c / 10
        old = c
        c = sig(g[1]) * c + sig(g[0]) * (g[2] if "without tanh" in bug else np.tanh(g[2]))
        shown = old if "old cell" in bug else c
        h = sig(g[3]) * (shown if "bare" in bug else np.tanh(shown))
        out.append(h)
    y = np.stack(out, -2) if out else np.zeros((*x.shape[:-1], W.shape[-1]), x.dtype)
    return (y, (h, c)) if return_state else y


@known("gru", "z_swapped", bug="update gate the other way round")
@unknown("gru", bug="reset gate squared")
def gated_recurrent(x, W, R, b=None, b_recurrent=None, *, state=None, return_state=False, bug=""):
    sig = lambda v: 0.5 * (1 + np.tanh(0.5 * v))
    b, br = (np.zeros((3, W.shape[-1]), x.dtype) if v is None else v for v in (b, b_recurrent))
    h = np.zeros((*x.shape[:-2], W.shape[-1]), x.dtype) if state is None else state
    out = []
    for t in range(x.shape[-2]):
        inp, rec = ([x[..., t, :] @ W[j] + b[j] for j in range(3)], [h @ R[j] + br[j] for j in range(3)])
        r, z = sig(inp[0] + rec[0]), sig(inp[1] + rec[1])
        r = r * r if "squared" in bug else r
        n = np.tanh(inp[2] + r * rec[2])
        h = z * n + (1 - z) * h if "other way" in bug else (1 - z) * n + z * h
        out.append(h)
    y = np.stack(out, -2) if out else np.zeros((*x.shape[:-1], W.shape[-1]), x.dtype)
    return (y, h) if return_state else y


# -- in torch ----------------------------------------------------------------------------------------------------------

if importlib.util.find_spec("torch"):
    import torch
    import torch.nn.functional as F


@known("attention", "scale_twice", "scale_one_over_d", framework="torch")
def scaled_before_and_after(q, k, v):
    q, k, v = (x[None] if x.ndim == 2 else x for x in (q, k, v)) if q.ndim == 2 else (q, k, v)
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    return F.scaled_dot_product_attention(q * q.shape[-1] ** -0.5, k, v)


@known("linear_recurrence", "one_step_late", framework="torch")
def shows_the_state_before(a, b):
    h, out = torch.zeros_like(b[..., :1, :].sum(-2)), []
    a = a.expand_as(b)
    for t in range(b.shape[-2]):
        out.append(h)
        h = a[..., t, :] * h + b[..., t, :]
    return torch.stack(out, -2) if out else torch.zeros_like(b)


@known("layer_norm", "eps_outside_the_root", framework="torch")
def epsilon_added_to_the_deviation(x, weight=None, bias=None, *, eps=1e-5):
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True).sqrt() + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@known("long_conv", "circular", framework="torch", dtypes=["float64"])
def transform_without_padding(u, kernel):
    T = u.shape[-2]
    if kernel.ndim > 2 or kernel.shape[0] > T or T == 0:
        raise NotImplementedError("one short kernel")
    return torch.fft.irfft(torch.fft.rfft(u, T, -2) * torch.fft.rfft(kernel, T, -2), T, -2)


@known("selective_scan", "softplus_skipped", framework="torch", domain=refimpl.Domain(options={"delta_softplus": [True]}))
def raw_steps(u, delta, A, B, C):
    if B.dim() > u.dim() or C.dim() > u.dim() or A.is_complex() or B.is_complex() or C.is_complex():
        raise NotImplementedError("one group of real maps")
    h, ys = 0, []
    for t in range(u.shape[-2]):
        d = delta[..., t, :, None]
        h = torch.exp(d * A) * h + d * B[..., t, None, :] * u[..., t, :, None]
        ys.append((h * C[..., t, None, :]).sum(-1))
    return torch.stack(ys, -2) if ys else torch.zeros_like(u)


@unknown("attention", framework="torch")
def drops_a_tenth(q, k, v):
    q, k, v = (x[None] if x.ndim == 2 else x for x in (q, k, v)) if q.ndim == 2 else (q, k, v)
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    p = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
    return (p * (p > 0.1)) @ v


@unknown("group_norm", framework="torch")
def over_the_last_group_only(x, groups, weight=None, bias=None, *, eps=1e-5):
    y = x.unflatten(-1, (groups, -1))
    m, s = y[..., -1:, :].mean(-1, keepdim=True), y[..., -1:, :].var(-1, unbiased=False, keepdim=True)
    y = ((y - m) / (s + eps).sqrt()).flatten(-2)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@unknown("linear_recurrence", framework="torch")
def carries_through_tanh(a, b):
    h, out = torch.zeros_like(b[..., :1, :].sum(-2)), []
    a = a.expand_as(b)
    for t in range(b.shape[-2]):
        h = a[..., t, :] * (torch.tanh(h) if not h.is_complex() else h / (1 + h.abs())) + b[..., t, :]
        out.append(h)
    return torch.stack(out, -2) if out else torch.zeros_like(b)


@unknown("rms_norm", framework="torch")
def in_two_halves(x, weight=None, *, eps=1e-6):
    if x.shape[-1] < 2:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    else:
        half = x.shape[-1] // 2
        y = torch.cat([p * torch.rsqrt(p.pow(2).mean(-1, keepdim=True) + eps) for p in (x[..., :half], x[..., half:])], -1)
    return y if weight is None else y * weight


@unknown("softplus", framework="torch")
def of_beta_two(x):
    return F.softplus(x, beta=2)


@unknown("causal_conv1d", framework="torch")
def every_other_tap(x, weight, bias=None):
    W = weight.shape[1]
    y = sum(F.pad(x, (0, 0, W - 1, 0))[..., j : j + x.shape[-2], :] * weight[:, j] for j in range(0, W, 2))
    return y if bias is None else y + bias
