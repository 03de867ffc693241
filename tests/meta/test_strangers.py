"""Implementations in other hands' styles, right ones and wrong ones, none of them made from the kit's own forms or mutants.

The wrong ones are mistakes that a kit misses whose inputs all have the same shapes, even sizes and moderate values: each
stands for a class of case, which its comment names.
"""

import functools

import numpy as np
import pytest

import refimpl

RIGHT, WRONG = [], []


def right(op, **settings):
    return lambda f: RIGHT.append(pytest.param(op, f, settings, id=f"{op}-{getattr(f, '__name__', type(f).__name__)}")) or f


def wrong(op, *bugs, **settings):
    """A function, or one for every value of its keyword `bug`."""

    def add(f):
        for bug in bugs or [None]:
            g = f if bug is None else _with_bug(f, bug)
            WRONG.append(pytest.param(op, g, settings, id=f"{op}-{bug or f.__name__}"))
        return f

    return add


def _with_bug(f, bug):
    """`f` with its mistake chosen, and a signature without it."""
    import inspect

    @functools.wraps(f)
    def call(*args, **kwargs):
        return f(*args, **kwargs, bug=bug)

    kept = [p for p in inspect.signature(f).parameters.values() if p.name != "bug"]
    call.__signature__ = inspect.Signature(kept)
    return call


@pytest.mark.parametrize(("op", "candidate", "settings"), RIGHT)
def test_right(op, candidate, settings):
    report = refimpl.check(op, candidate, **{"dtypes": ["float32"], **settings})
    assert report.ok, str(report)


@pytest.mark.parametrize(("op", "candidate", "settings"), WRONG)
def test_wrong(op, candidate, settings):
    report = refimpl.check(op, candidate, **{"dtypes": ["float32"], "fail_fast": True, **settings})
    assert report.verdict in ("wrong", "deviates"), str(report)


# -- attention ---------------------------------------------------------------------------------------------------------


def _pairs(n, m, causal, offset=None):
    at = np.arange(n)[:, None] + (m - n if offset is None else offset)
    return (np.arange(m) <= at) | (not causal)


def _heads(q, k, v):
    groups = q.shape[-3] // k.shape[-3]
    return np.repeat(k, groups, axis=-3), np.repeat(v, groups, axis=-3)


@right("attention")
def online_over_thirteen_keys(q, k, v, *, causal=False):
    if q.ndim == 2:
        return online_over_thirteen_keys(q[None], k[None], v[None], causal=causal)[0]
    k, v = _heads(q, k, v)
    (n, d), m = q.shape[-2:], k.shape[-2]
    allowed = _pairs(n, m, causal)
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    top, total, acc = np.full((*lead, n, 1), -np.inf, q.dtype), 0, np.zeros((*lead, n, v.shape[-1]), q.dtype)
    for j in range(0, m, 13):
        s = (q * q.dtype.type(d**-0.5)) @ k[..., j : j + 13, :].swapaxes(-1, -2)
        s = np.where(allowed[:, j : j + 13], s, q.dtype.type(-np.inf))
        new = np.maximum(top, s.max(axis=-1, keepdims=True))
        shift = np.where(np.isfinite(new), new, 0)
        p, keep = np.exp(s - shift), np.exp(top - shift)
        total, acc, top = total * keep + p.sum(axis=-1, keepdims=True), acc * keep + p @ v[..., j : j + 13, :], new
    return (acc / np.where(total == 0, 1, total)).astype(q.dtype)


@right("attention", dtypes=["bfloat16"], domain=refimpl.Domain(d=[16, 32]))
def weights_rounded_before_the_product(q, k, v):
    if q.ndim == 2:
        return weights_rounded_before_the_product(q[None], k[None], v[None])[0]
    wide = [x.astype(np.float32) for x in (q, *_heads(q, k, v))]
    s = wide[0] @ wide[1].swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5)
    p = np.exp(s - s.max(axis=-1, keepdims=True, initial=-1e30))
    total = p.sum(axis=-1, keepdims=True)
    return (p.astype(q.dtype).astype(np.float32) @ wide[2] / np.where(total == 0, 1, total)).astype(q.dtype)


@wrong(
    "attention",
    "mask of the first head",
    "mask read upside down if shared",
    "bias no lower than -1e4",
    "scores no higher than 65504",
    "last of an odd number of values",
)
def dense(q, k, v, *, mask=None, bias=None, bug=""):
    if q.ndim == 2:
        return dense(q[None], k[None], v[None], mask=mask, bias=bias, bug=bug)[0]
    k, v = _heads(q, k, v)
    s = q @ k.swapaxes(-1, -2) * q.dtype.type(q.shape[-1] ** -0.5)
    if bug == "scores no higher than 65504":  # scores beyond half precision
        s = np.minimum(s, 65504)
    if bias is not None:  # rows that a bias disallows
        s = s + (np.maximum(bias, -1e4) if bug == "bias no lower than -1e4" else bias)
    if mask is not None:
        if bug == "mask of the first head" and mask.ndim > 2:  # a mask for each head
            mask = mask[..., :1, :, :]
        if bug == "mask read upside down if shared" and mask.ndim == 2:  # the contract's other shapes
            mask = ~mask
        s = np.where(mask, s, -np.inf)
    top = s.max(axis=-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(np.isfinite(top), top, 0))
    total = p.sum(axis=-1, keepdims=True)
    o = p @ v / np.where(total == 0, 1, total)
    if bug == "last of an odd number of values" and v.shape[-1] % 2:  # odd sizes
        o[..., -1] = 0
    return o.astype(q.dtype)


@wrong(
    "attention", "scale 0.4% too large", "last head 0.3% too large", dtypes=["bfloat16"], domain=refimpl.Domain(e=[16])
)  # gates on factors
def half(q, k, v, *, bug=""):
    if q.ndim == 2:
        return half(q[None], k[None], v[None], bug=bug)[0]
    q32, k32, v32 = (x.astype(np.float32) for x in (q, *_heads(q, k, v)))
    s = q32 @ k32.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5 * (1.004 if bug[:5] == "scale" else 1))
    p = np.exp(s - s.max(axis=-1, keepdims=True, initial=-1e30))
    o = p @ v32 / np.maximum(p.sum(axis=-1, keepdims=True), 1e-30)
    if bug[:4] == "last":
        o[..., -1, :, :] *= 1.003
    return o.astype(q.dtype)


@wrong("attention", dtypes=["float16"], domain=refimpl.Domain(e=[16]))
def sums_in_float16_before_the_division(q, k, v):  # values whose sum is beyond half precision
    if q.ndim == 2:
        return sums_in_float16_before_the_division(q[None], k[None], v[None])[0]
    q32, k32, v32 = (x.astype(np.float32) for x in (q, *_heads(q, k, v)))
    s = q32 @ k32.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5)
    p = np.exp(s - s.max(axis=-1, keepdims=True, initial=-1e30))
    sums = (p @ v32).astype(np.float16).astype(np.float32)
    return (sums / np.maximum(p.sum(axis=-1, keepdims=True), 1e-30)).astype(q.dtype)


def _shared_key_mean(dy, q, k, v):
    """The gradient of a key that serves the whole batch: the mean over the batch where it is the sum."""
    grads = refimpl.attention_vjp(dy, q, k, v)
    return grads | {"k": grads["k"] / (q.shape[0] if k.ndim > 3 and k.shape[0] < q.shape[0] else 1)}


@wrong("attention", gradients=True, candidate_vjp=_shared_key_mean)
def shared_key_gradient_is_a_mean(q, k, v):
    return refimpl.attention(q, k, v)


# -- recurrences -------------------------------------------------------------------------------------------------------


def _spread(a, b):
    a = a[None] if a.ndim == 1 else a
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), *b.shape[-2:])
    dtype = np.result_type(a, b)
    return np.broadcast_to(a, shape).astype(dtype), np.broadcast_to(b, shape).astype(dtype)


@right("linear_recurrence")
def sums_of_logarithms(a, b, *, state=None):
    if np.iscomplexobj(a) or np.iscomplexobj(b):
        raise NotImplementedError("real only")
    a, b = (x.copy() for x in _spread(a, b))
    T = b.shape[-2]
    if T and state is not None:
        b[..., 0, :] += a[..., 0, :] * state
    zeros, minus = np.cumsum(a == 0, axis=-2), np.cumsum(a < 0, axis=-2) % 2
    logs = np.cumsum(np.log(np.where(a == 0, 1, abs(a))), axis=-2)
    alive = np.tri(T, dtype=bool)[..., None] & (zeros[..., :, None, :] == zeros[..., None, :, :])
    weights = np.exp(np.where(alive, logs[..., :, None, :] - logs[..., None, :, :], -np.inf))
    signs = np.where(minus[..., :, None, :] == minus[..., None, :, :], 1, -1)
    return np.einsum("...ijc,...jc->...ic", weights * signs, b).astype(b.dtype)


class Scan:
    """Chunks of seven, each from its products of decays; a callable object."""

    def __call__(self, a, b, state=None, reverse=False, return_state=False):
        a, b = (x[..., ::-1, :] if reverse else x for x in _spread(a, b))
        h = np.zeros_like(b, shape=(*b.shape[:-2], b.shape[-1])) + (0 if state is None else state)
        parts = [b[..., :0, :]]
        for t in range(0, b.shape[-2], 7):
            decay, y = a[..., t : t + 7, :], b[..., t : t + 7, :].copy()
            for i in range(1, y.shape[-2]):
                y[..., i, :] += decay[..., i, :] * y[..., i - 1, :]
            parts.append((y + np.cumprod(decay, axis=-2) * h[..., None, :]).astype(b.dtype))
            h = parts[-1][..., -1, :]
        y = np.concatenate(parts, axis=-2)
        y = y[..., ::-1, :] if reverse else y
        return (y, h.astype(b.dtype)) if return_state else y


right("linear_recurrence")(Scan())


@wrong(
    "linear_recurrence",
    "decay no larger than 1",
    "no result beyond 1e4",
    "other arithmetic beyond 32 features",
    "reset at 128",
    "state of the step before",
)
def steps(a, b, *, state=None, return_state=False, bug=""):
    a, b = _spread(a, b)
    if bug == "decay no larger than 1":  # growth
        a = a / np.maximum(abs(a), 1)
    h, out = np.zeros_like(b, shape=(*b.shape[:-2], b.shape[-1])), np.empty_like(b)
    h = h if state is None else h + state
    before = h
    for t in range(b.shape[-2]):
        before, h = h, a[..., t, :] * (0 if bug == "reset at 128" and t == 128 else h) + b[..., t, :]
        if bug == "no result beyond 1e4" and not np.iscomplexobj(h):  # linear: times a large power of two
            h = np.clip(h, -1e4, 1e4)
        out[..., t, :] = h
    if bug == "other arithmetic beyond 32 features":  # tiles of features
        out[..., 32:] *= out.dtype.type(1.01)
    if not return_state:
        return out.astype(b.dtype)
    return out.astype(b.dtype), (before if bug == "state of the step before" else h).astype(b.dtype)


@wrong("linear_recurrence")
def division_by_products(a, b):
    if np.iscomplexobj(a) or np.iscomplexobj(b):
        raise NotImplementedError("real only")
    a, b = _spread(a, b)
    products = np.cumprod(a, axis=-2)
    return products * np.cumsum(b / products, axis=-2)


def _silu(z):
    return z / (1 + np.exp(-z))


@wrong(
    "selective_scan", "softplus 0 below -10", "exponents no lower than -20", "rates transposed if square", "final state transposed if square", "exp(z) / (1 + exp(z))",
    "skip in one channel",
)  # fmt: skip
@right("selective_scan")
def mamba(u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus=False, state=None, return_state=False, bug=""):
    if np.iscomplexobj(A):
        raise NotImplementedError("real only")
    if B.ndim > u.ndim:
        raise NotImplementedError("one group only")
    square = A.shape[0] == A.shape[1]
    dt = delta if delta_bias is None else delta + delta_bias
    if delta_softplus:
        dt = np.where(dt < -10, 0, np.logaddexp(dt, 0)) if bug == "softplus 0 below -10" else np.logaddexp(dt, 0)  # steps nearly shut
    exponent = dt[..., None] * (A.T if square and bug == "rates transposed if square" else A)  # all sizes alike
    if bug == "exponents no lower than -20":  # one input, then strong decay
        exponent = np.maximum(exponent, -20)
    write = (dt * u)[..., None] * B[..., None, :]
    exponent, write = np.broadcast_arrays(exponent, write)
    h, y = 0 * write.sum(axis=-3) + (0 if state is None else state), np.empty(write.shape[:-1], u.dtype)
    for t in range(y.shape[-2]):
        h = np.exp(exponent[..., t, :, :]) * h + write[..., t, :, :]
        y[..., t, :] = (C[..., t, None, :] * h).sum(axis=-1)
    if D is not None:
        y = y + (D[0] if bug == "skip in one channel" else D) * u
    if z is not None:  # a hard gate is always given
        y = y * (z * (np.exp(z) / (1 + np.exp(z))) if bug.startswith("exp(z)") else _silu(z))
    h = h.swapaxes(-1, -2) if square and bug == "final state transposed if square" else h
    return (y.astype(u.dtype), h.astype(u.dtype)) if return_state else y.astype(u.dtype)


@wrong("mlstm", "log f no lower than -20", "log of the sigmoid", "n no larger than 10", "not the last step")
def matrix_memory(q, k, v, i, f, *, state=None, return_state=False, bug=""):
    if q.ndim == 2:
        raise NotImplementedError("heads only")
    k = k * q.dtype.type(q.shape[-1] ** -0.5)
    log_f = -np.logaddexp(0, -f)
    if bug == "log f no lower than -20":  # written once, then forgotten
        log_f = np.maximum(log_f, -20)
    if bug == "log of the sigmoid":
        log_f = np.log(1 / (1 + np.exp(-f)))
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2], i.shape[:-1], f.shape[:-1])
    C, n, m = np.zeros((*lead, q.shape[-1], v.shape[-1])), np.zeros((*lead, q.shape[-1])), np.full(lead, -np.inf)
    if state is not None:
        C, n, m = C + state[0], n + state[1], state[2] + np.zeros(lead)
    h = np.zeros((*lead, q.shape[-2], v.shape[-1]), q.dtype)
    for t in range(q.shape[-2] - (bug == "not the last step" and q.shape[-2] > 128)):
        new = np.maximum(log_f[..., t] + m, i[..., t])
        keep, write, m = np.exp(log_f[..., t] + m - new), np.exp(i[..., t] - new), new
        C = keep[..., None, None] * C + (write[..., None] * k[..., t, :])[..., None] * v[..., t, None, :]
        n = keep[..., None] * n + write[..., None] * k[..., t, :]
        if bug == "n no larger than 10":  # large keys
            n = np.clip(n, -10, 10)
        dot = abs((n * q[..., t, :]).sum(axis=-1))
        h[..., t, :] = (C * q[..., t, :, None]).sum(axis=-2) / np.maximum(dot, np.exp(-m))[..., None]
    state = tuple(x.astype(q.dtype) for x in (C, n, m))
    return (h, state) if return_state else h


# -- convolutions, the rest --------------------------------------------------------------------------------------------


@right("long_conv", dtypes=["float64", "float32"])
def by_fft(u, kernel, skip=None):
    size, T = 2 * max(u.shape[-2], kernel.shape[-2], 1), u.shape[-2]
    y = np.fft.ifft(np.fft.fft(u, size, axis=-2) * np.fft.fft(kernel, size, axis=-2), axis=-2)[..., :T, :]
    dtype = np.result_type(u, kernel)
    y = (y if np.issubdtype(dtype, np.complexfloating) else y.real).astype(dtype)
    return y if skip is None else (y + skip * u).astype(dtype)


@wrong("long_conv", "one step too short", "kernel of the first entry", "1e-6 added")
def by_taps(u, kernel, skip=None, *, bug=""):
    T, kernel = u.shape[-2], kernel[:1] if kernel.ndim > 2 and bug.startswith("kernel") else kernel
    y = 0 * (u + kernel[..., :1, :]) if kernel.shape[-2] else 0 * u
    for s in range(min(T - (bug.startswith("one") and T > 64), kernel.shape[-2])):
        y[..., s:, :] += kernel[..., s : s + 1, :] * u[..., : T - s, :]
    return y + (0 if skip is None else skip * u) + y.dtype.type(1e-6 * (bug == "1e-6 added"))


@right("discretize")
def squared_taylor_series(A, B, dt):
    n, columns = A.shape[-1], B.ndim > 1 and B.shape[-2:-1] == A.shape[-1:] and B.ndim >= A.ndim
    X = B if columns else B[..., None]
    p, step = X.shape[-1], np.asarray(dt)[..., None, None]
    lead = np.broadcast_shapes(A.shape[:-2], X.shape[:-2], np.shape(dt))
    dtype = np.result_type(A, B)
    Z = np.zeros((*lead, n + p, n + p), dtype)
    Z[..., :n, :n], Z[..., :n, n:] = A * step, 0
    halvings = max(0, int(np.ceil(np.log2(max(abs(Z).sum(axis=-1).max(initial=0), 1e-9)))) + 1)
    Z[..., :n, n:] = X * step
    Z, term = Z / dtype.type(2.0**halvings), np.eye(n + p, dtype=dtype)
    E = term
    for j in range(1, 13):
        term = term @ Z / dtype.type(j)
        E = E + term
    for _ in range(halvings):
        E = E @ E
    if lead != np.broadcast_shapes(A.shape[:-2], np.shape(dt)):
        raise NotImplementedError("A for several B")
    return E[..., :n, :n], E[..., :n, n:] if columns else E[..., :n, n]


@right("route")
@wrong("route", "experts by index", "not the largest of all")
def choose(logits, k, *, renormalize=False, bug=""):
    first = int(bug == "not the largest of all" and logits.shape[-1] > 8)
    found = np.argsort(-logits, axis=-1, kind="stable")[..., first : first + k].astype(np.int32)
    found = np.sort(found, axis=-1) if bug == "experts by index" else found
    chosen = np.take_along_axis(logits, found, axis=-1)
    w = np.exp(chosen - chosen.max(axis=-1, keepdims=True))
    return w / w.sum(axis=-1, keepdims=True), found


@right("rms_norm", dtypes=["float32", "bfloat16"])
@wrong("rms_norm", "another eps", "eps or the default", "mean taken off")
def norm(x, weight=None, *, eps=1e-6, bug=""):
    wide = x.astype(np.float32)
    eps = {"another eps": 1e-5, "eps or the default": eps or 1e-6}.get(bug, eps)
    square = wide.var(axis=-1, keepdims=True) if bug == "mean taken off" else (wide * wide).mean(axis=-1, keepdims=True)
    y = wide / np.sqrt(square + np.float32(eps))
    return (y if weight is None else y * weight.astype(np.float32)).astype(x.dtype)


@right("causal_conv1d")
@wrong("causal_conv1d", "three taps reversed", "bias after silu")
def taps(x, weight, bias=None, *, activation=None, bug=""):
    T, width = x.shape[-2], weight.shape[-1]
    weight = weight[:, ::-1] if bug == "three taps reversed" and width == 3 else weight
    padded = np.concatenate([np.zeros_like(x, shape=(*x.shape[:-2], width - 1, x.shape[-1])), x], axis=-2)
    y = sum(padded[..., j : j + T, :] * weight[:, j] for j in range(width))
    late = bug == "bias after silu" and activation is not None
    y = y if bias is None or late else y + bias
    y = _silu(y) if activation == "silu" else y
    return (y + bias if late and bias is not None else y).astype(x.dtype)


def test_a_candidate_without_states_is_not_asked_for_one_by_a_law():
    """Laws may spell out ``return_state=False``, which is the default and no keyword that a candidate must have."""

    def plain(x, dt, A, B, C):
        return refimpl.ssd(x, dt, A, B, C)

    report = refimpl.check("ssd", plain, level="quick", dtypes=["float32"])
    assert report.ok, report


def test_an_operator_of_a_readers_own_can_be_checked():
    """It is in no catalogue, and the kit looks nothing up by its name."""
    import dataclasses

    op = dataclasses.replace(refimpl.OPS["linear_recurrence"], name="a_scan_of_my_own")
    assert refimpl.check(op, op.definition, level="quick", dtypes=["float32"]).ok
    assert not refimpl.check(op, lambda a, b: b, level="quick", dtypes=["float32"]).ok
