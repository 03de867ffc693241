"""Ring attention: a sequence spread over devices, keys and values going round.

    device r holds q_r, and at step t the keys and values of shard s = (r - t) mod P:

    (o_t, lse_t) = attention(q_r, k_s, v_s),    (o, lse) <- merge((o, lse), (o_t, lse_t)),    t = 0 ... P-1        (1)

After P steps every query has met every key, and no device has held more than one shard of keys and values beside its
own queries: the context grows with the number of devices. The merge is rule (4) of `attention`, so the result is exact,
in whatever order shards arrive. Here the P devices take turns in one process; what travels, and when, is the same.

With causal attention and contiguous shards device r has no work at the steps where s > r: of P² pairs of shards only
(P + 1) P / 2 are computed, yet the last device computes at every step, so time does not fall (`ring_schedule`).

Glossary
    shards     lists over devices, in the order of the sequence     "hosts" in [1]
    P          number of devices                                      N_h [1, section 3]
    w_t        e^{lse_t - lse}, the share of step t in the result

References
    [1] H. Liu, M. Zaharia, P. Abbeel, "Ring attention with blockwise transformers for near-infinite context", ICLR 2024,
        section 3 and algorithm 1.
    [2] W. Brandon et al., "Striped attention", 2023, section 3 (the causal imbalance).
"""

import itertools

import numpy as np

from refimpl.core.costs import log2_ceil
from refimpl.core.dtypes import HALF
from refimpl.core.options import positive_int
from refimpl.op import Cost, Form
from refimpl.ops.attention import attention as chapter

__all__ = ["ring_attention", "ring_attention_vjp", "ring_schedule"]


def ring_schedule(devices):
    """Who holds whose keys when: row t, column r is the shard that device r holds at step t, (r - t) mod P.

    Parameters
    ----------
    devices : int
        P, at least 1.

    Returns
    -------
    ndarray of int, shape (P, P)

    Raises
    ------
    ValueError
        If `devices` is not an integer of at least 1.

    Examples
    --------
    >>> ring_schedule(3)
    array([[0, 1, 2],
           [2, 0, 1],
           [1, 2, 0]])
    """
    positive_int("ring_schedule", "devices", devices)
    return (np.arange(devices) - np.arange(devices)[:, None]) % devices


def ring_attention(q, k, v, *, mask=None, bias=None, sink=None, return_lse=False, **options):
    """Attention over shards of the sequence, equation (1), step by step.

    Parameters
    ----------
    q : sequence of ndarray, shape (..., Hq, n_r, d)
        Shard r of the queries, r = 0 ... P-1. Shards may differ in length, and be empty.
    k, v : sequences of ndarray, shape (..., Hkv, m_r, d) and (..., Hkv, m_r, e)
        Shards of the keys and values, as many.
    mask, bias, sink
        As in `attention`, over the whole sequence: every device reads its rows.
    return_lse : bool
        Also return each row's log-sum-exp.
    **options
        causal, offset, window, scale, softcap, with the meaning that they have for the whole sequence.

    Returns
    -------
    o : list of ndarray, shape (..., Hq, n_r, e)
    lse : list of ndarray, shape (..., Hq, n_r), only with `return_lse`

    Raises
    ------
    ValueError
        If the lists are not of one length, or shards do not fit together.

    Notes
    -----
    The operations of `attention`, and P merges of n_r (3 e + 19) each; a device holds O(n_r) beside one pair's map. The
    error is that of `attention` with P more roundings.

    References
    ----------
    [1, algorithm 1].

    Examples
    --------
    >>> import numpy as np
    >>> from refimpl import attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 12, 4))
    >>> shards = [np.split(x, 3) for x in (q, k, v)]
    >>> bool(np.allclose(np.concatenate(ring_attention(*shards, causal=True)), attention(q, k, v, causal=True)))
    True
    """
    ring = _Ring(q, k, v, mask, bias, options)
    outputs, logs = ring.run(sink)
    outputs = [o.astype(x.dtype) if x.dtype.name in HALF else o for o, x in zip(outputs, q, strict=True)]
    return (outputs, logs) if return_lse else outputs


def ring_attention_vjp(do, q, k, v, *, mask=None, bias=None, sink=None, **options):
    """Gradient of `ring_attention` with respect to the shards, by a second trip round the ring.

    A result merged from parts is o = Σ_t w_t o_t with w_t = e^{lse_t - lse}, so part t receives

        do_t = w_t do,    dlse_t = w_t do·(o_t - o)                                                            (2)

    and passes it through attention's own gradient. dk_s and dv_s travel with the shard and are complete when it is home.

    Parameters
    ----------
    do : sequence of ndarray, shape (..., Hq, n_r, e)
        Cotangents of the shards of o.

    Returns
    -------
    dict
        "q", "k", "v": lists of gradients, one per shard.
    """
    ring = _Ring(q, k, v, mask, bias, options)
    outputs, logs = ring.run(sink)
    dq, dk, dv = ([np.zeros_like(x) for x in shards] for shards in (ring.q, ring.k, ring.v))
    for step in ring_schedule(len(q)):
        for r, s in enumerate(step):
            if not ring.meets(r, s):
                continue
            o, lse = ring.part(r, s)
            with np.errstate(all="ignore"):
                w = np.where(np.isneginf(lse), np.zeros_like(lse), np.exp(lse - logs[r]))[..., None]
            across = (w * do[r] * (o - outputs[r])).sum(axis=-1)
            g = chapter.attention_vjp((w * do[r], across), ring.q[r], ring.k[s], ring.v[s], **ring.options_of(r, s), return_lse=True)
            dq[r], dk[s], dv[s] = dq[r] + g["q"], dk[s] + g["k"], dv[s] + g["v"]
    return {"q": dq, "k": dk, "v": dv}


class _Ring:
    """Shards, and where they stand in the sequence."""

    def __init__(self, q, k, v, mask, bias, options):
        if not len(q) == len(k) == len(v) or len(q) == 0:
            raise ValueError(f"ring_attention: q, k and v must be lists of as many shards, at least one, got {len(q)}, {len(k)}, {len(v)}")
        self.q, self.k, self.v = ([_wide(x) for x in shards] for shards in (q, k, v))
        self.mask, self.bias, self.options = mask, bias, dict(options)
        self.rows, self.keys = _slices(self.q), _slices(self.k)
        offset = self.options.pop("offset", None)
        self.offset = self.keys[-1].stop - self.rows[-1].stop if offset is None else offset
        unknown = set(self.options) - {"causal", "window", "scale", "softcap"}
        if unknown:
            raise TypeError(
                f"ring_attention: unknown argument {sorted(unknown)[0]!r}; the options are causal, offset, window, scale, softcap"
            )

    def run(self, sink):
        """(1) for every device; the sink is a part of its own, with o = 0 and lse = sink."""
        outputs, logs = [], []
        for q, v in zip(self.q, self.v, strict=True):
            batch = np.broadcast_shapes(q.shape[: -2 - (q.ndim > 2)], v.shape[: -2 - (v.ndim > 2)])
            shape = (*batch, *q.shape[q.ndim - 2 - (q.ndim > 2) : -1])
            o = np.zeros_like(q, shape=(*shape, v.shape[-1]))
            lse = np.full_like(q, -np.inf, shape=shape)
            if sink is not None:
                lse = np.zeros_like(lse) + (np.asarray(sink, dtype=lse.dtype)[:, None] if np.ndim(sink) else sink)
            outputs.append(o)
            logs.append(lse)  # without keys this is the result
        for step in ring_schedule(len(self.q)):
            for r, s in enumerate(step):
                if not self.meets(r, s):
                    continue
                o, lse = self.part(r, s)
                outputs[r], logs[r] = chapter.merge_by_lse(*_common((outputs[r], o), (logs[r], lse)))
        return outputs, logs

    def meets(self, r, s):
        """Whether there is anything to compute: neither shard is empty."""
        return self.q[r].shape[-2] > 0 and self.k[s].shape[-2] > 0

    def part(self, r, s):
        """What device r computes from shard s."""
        return chapter.attention(self.q[r], self.k[s], self.v[s], **self.options_of(r, s), return_lse=True)

    def options_of(self, r, s):
        """The options of the whole, as seen from shards r and s: positions count from the shards' beginnings."""
        rows, keys = self.rows[r], self.keys[s]
        cut = {name: chapter.tile(x, rows, keys) for name, x in (("mask", self.mask), ("bias", self.bias)) if x is not None}
        return {**self.options, **cut, "offset": rows.start + self.offset - keys.start}


def _slices(shards):
    ends = np.cumsum([0] + [x.shape[-2] for x in shards]).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def _common(outputs, logs):
    """Two parts with the same batch axes; a mask or bias may have brought more."""
    shape = np.broadcast_shapes(*(lse.shape for lse in logs))
    return tuple(np.broadcast_to(o, (*shape, o.shape[-1])) for o in outputs), tuple(np.broadcast_to(lse, shape) for lse in logs)


def _wide(x):
    """Half precisions are merged in float32, and rounded once, at the end."""
    x = x if isinstance(x, np.ndarray) else np.asarray(x)
    return x.astype(np.float32) if x.dtype.name in HALF else x


@chapter.CONTRACT.form
def attention_ring(
    q,
    k,
    v,
    *,
    causal=False,
    offset=None,
    window=None,
    mask=None,
    bias=None,
    scale=None,
    softcap=None,
    sink=None,
    return_lse=False,
    devices=4,
):
    """The same with the sequence cut into `devices` shards that go round a ring, equation (1); `attention` has the arguments.

    Equal because the merge is exact. The operations of `dense`; a device's memory is that of one pair of shards.
    """
    positive_int("attention", "devices", devices)
    shards = [np.array_split(x, devices, axis=-2) for x in (q, k, v)]
    options = {"causal": causal, "offset": offset, "window": window, "scale": scale, "softcap": softcap}
    o, lse = ring_attention(*shards, mask=mask, bias=bias, sink=sink, return_lse=True, **options)
    o, lse = np.concatenate(o, axis=-2), np.concatenate(lse, axis=-1)
    return (o, lse) if return_lse else o


def _cost(n, m, d, e, Hq, Hkv, batch=1, devices=4):
    return Cost(
        batch * Hq * n * (m * (2 * d + 2 * e + 5) + devices * (3 * e + 19 + d)),
        6 * devices + log2_ceil(d) + 2 * log2_ceil(m / devices) + 10,
        batch * Hq * n * (3 * m / devices**2 + 4 * (e + 2)),
    )


FORMS = {"attention": {"ring": Form(attention_ring, _cost, exact=("work", "depth"))}}
