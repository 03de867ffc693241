"""A decaying matrix memory in chunks: products of matrices within each, a short recurrence from one to the next.

    S_t = diag(e^{w_t}) S_{t-1} + k_t u_tᵀ,     o_t = S_tᵀ q_t                                                        (1)
    u_t = v_t,   or, with the delta rule,   u_t = β_t (v_t - S'_tᵀ k_t),   S'_t = diag(e^{w_t}) S_{t-1}                 (2)

`linear_attention`, `ssd` and `mlstm` are this. For a chunk of L steps that the state S enters, with E_ts = exp(w_{s+1} + ... + w_t)
for s <= t, F_t = exp(w_0 + ... + w_t) and K_s = exp(w_{s+1} + ... + w_{L-1}), all within the chunk (for decays of each key channel a
factor of each channel),

    M = (Q Kᵀ) ∘ E,      O = M U + (Q ∘ F) S,      S_next = diag(F_{L-1}) S + (K ∘ K_s)ᵀ U                               (3)
    U = V,    or    (I + diag(β) A) U = diag(β) (V - (K ∘ F) S),      A = (K Kᵀ) ∘ E below the diagonal                  (4)

and all but the second half of the last equation is known of all chunks at once. The adjoint has the same shape: with R the cotangent
of S_next,

    dU = Mᵀ dO + (K ∘ K_s) R,      dM = dO Uᵀ,      R_before = diag(F_{L-1}) R + (Q ∘ F)ᵀ dO                             (5)
    dQ = (dM ∘ E) K + F ∘ (dO Sᵀ),      dK = (dM ∘ E)ᵀ Q + K_s ∘ (U Rᵀ)                                                 (6)

and the delta rule is one more reader of the memory: k_t reads S'_t, its cotangent is -β_t y_t, y = (I + diag(β) A)⁻ᵀ dU. A decay
w_r stands in every exponent that spans it: of E with s < r <= t, of F with t >= r, of K_s with s < r. Its cotangent is the sum of
theirs: a sum over a rectangle of dM ∘ M, a sum from r on, a sum up to r. No term is subtracted again.

Exponents are sums of the decays between two steps, not differences of running sums. None is above 0 unless decays are. Where
they are, F is taken relative to its largest value in the chunk, which S is multiplied by instead, so that what is representable
does not overflow on its way.

The equations stand here once, for any arrays: `steps` (``chunk_steps.py``) is what a product, a sum of decays and a recurrence over
chunks are, on NumPy or on a device. Axes: (G, H, T, features), H the heads that may share an array, which then has 1 in its place;
and in chunks (G, H, T/L, L, features).
"""

from typing import Any, NamedTuple

from refimpl.gpu.arrays import cast
from refimpl.gpu.chunk_policy import LONGEST


class Gradients(NamedTuple):
    """Of what `Memory` was given, each in its own shape: (G, 1 or H, T, features); state (G, 1 or H, d, e)."""

    q: Any
    k: Any
    v: Any
    w: Any
    beta: Any
    state: Any


class _Reader(NamedTuple):
    """Queries of the memory: those of the caller read it after step t, the keys of the delta rule before (`strict`)."""

    x: Any
    strict: bool
    product: Any  # x Kᵀ, or None with decays of each channel
    weights: Any  # M or A


class Memory:
    """The memory through all chunks.

    Parameters
    ----------
    steps : Steps
        The arithmetic, and where arrays lie.
    q, k : array, shape (G, 1 or H, T, d)
    v : array, shape (G, 1 or H, T, e)
    w : array, shape (G, 1 or H, T, 1 or d)
        Log-decays, in the precision of sums; of the same heads as v and the state.
    beta : array, shape (G, 1 or H, T, 1), optional
    state : array, shape (G, 1 or H, d, e)
        In the precision of sums.
    gain : array, shape (G, 1 or H, T, 1), optional
        Logarithms of factors of the keys, of the heads of w; with decays of a head, and without beta.
    chunk : int
        Steps of a chunk.

    Attributes
    ----------
    last : array, shape (G, 1 or H, d, e)
        The state after the last step.
    """

    def __init__(self, steps, q, k, v, w, beta=None, state=None, gain=None, *, chunk: int):
        self.steps, self.T, self.d, self.e = steps, q.shape[2], q.shape[3], v.shape[3]
        self.per_channel = w.shape[3] > 1
        self.q, self.k, self.v = (steps.cut(x, chunk) for x in (q, k, v))
        self.w = steps.cut(w, chunk, features=self.per_channel)
        self.since, self.peak, self.rest, self.kept = steps.spans(self.w)
        self.gain = None if gain is None else steps.cut(gain, chunk, features=False)
        self.kept = self.kept if gain is None else self.kept + self.gain
        self.reader = self._reader(self.q, strict=False)
        state = steps.padded(state)
        if beta is None:
            self.recaller, self.u = None, self.v
            self.S, last = steps.carry(self._written(self.v), self.peak, self.rest, state)
        else:
            self.beta = steps.cut(beta, chunk, features=False)
            self.recaller = self._reader(self.k, strict=True)
            last = self._carry_corrected(state)
        self.last = last[..., : self.d, : self.e]

    # -- forward -------------------------------------------------------------------------------------------------------

    def _reader(self, x, strict: bool) -> _Reader:
        if self.per_channel:
            return _Reader(x, strict, None, self.steps.pairs(x, self.k, self.w, strict))
        product = self.steps.product(x, _T(self.k))
        return _Reader(x, strict, product, self.steps.weigh(product, self.w, strict, self.gain))

    def _written(self, u):
        """(K ∘ K_s)ᵀ U."""
        if self.per_channel:
            return self.steps.product(_T(self.steps.faded(self.k, self.kept)), u)
        return self.steps.product(_T(self.k), self.steps.faded(u, self.kept))

    def _read_state(self, x, S):
        """(X ∘ F) S as a product and the factor of its rows, if there is one."""
        if self.per_channel:
            return self.steps.product(self.steps.scaled(x, self.since), S), None
        return self.steps.product(x, S), self.since

    def _carry_corrected(self, state):
        """The states with the delta rule: U of a chunk needs the state that enters it, but no more than a product with it."""
        steps = self.steps
        self.inverse = steps.inverse(self.recaller.weights, self.beta)  # (I + diag(β) A)⁻¹
        free = steps.product(self.inverse, steps.scaled(self.v, self.beta))  # U for a state of 0
        of_state = steps.store(steps.product(self.inverse, steps.scaled(steps.scaled(self.k, self.since), self.beta)))
        keys = steps.faded(self.k, self.kept)
        entering, written = [], []
        for c in range(self.q.shape[2]):
            entering.append(steps.store(steps.grown(state, self.peak[:, :, c, :, None])))
            u = steps.store(free[:, :, c] - steps.product(of_state[:, :, c], entering[c]))
            state = steps.grown(entering[c], self.rest[:, :, c, :, None]) + steps.product(_T(keys[:, :, c]), u)
            written.append(u)
        self.S, self.u = (steps.xp.stack(x, axis=2) for x in (entering, written))
        return state

    def read(self, **after):
        """o (G, H, T, e) in the precision of sums; `after`, arrays of the shape of o among it, is what `Steps.finish` does with it."""
        within = self.steps.product(self.reader.weights, self.u)
        before, factor = self._read_state(self.q, self.S)
        after = {
            name: x if name in ("D", "scale", "dtype") or x is None else self.steps.cut(x, self.q.shape[3]) for name, x in after.items()
        }
        return self._joined(self.steps.finish(within, before, factor, **after), self.e)

    # -- backward ------------------------------------------------------------------------------------------------------

    def vjp(self, do, dlast=None) -> Gradients:
        """Gradients in the precision of sums, of the cotangents of o and of the last state."""
        steps, xp = self.steps, self.steps.xp
        do = steps.cut(do, self.q.shape[3])
        dlast = xp.zeros(self.last.shape, steps.wide) if dlast is None else dlast
        dbeta = None
        if self.recaller is None:
            R, dfirst = steps.carry_back(self._to_state(self.q, do), self.peak, self.rest, steps.padded(dlast))
            dv = self._through_writing(do, R)
            cotangents = [(self.reader, do)]
        else:
            R, dfirst, dv, dbeta = self._back_corrected(do, steps.padded(dlast))
            cotangents = [(self.reader, do), (self.recaller, steps.store(-dv))]

        written = steps.product(self.u, _T(R))
        if self.per_channel:
            written = steps.grown(written, self.kept)
            of_kept = _shared(cast(self.k, steps.wide) * written, self.w)
        else:
            of_kept = _shared(steps.grown(steps.dots(self.k, written)[..., None], self.kept), self.w)
        held = steps.dots(R, self.S)  # (G, H, T/L, d)
        held = xp.exp(self.rest) * (held if self.per_channel else held.sum(axis=-1, keepdims=True))
        dx, dk, of_pairs, of_since = zip(*(self._read_vjp(reader, cotangent) for reader, cotangent in cotangents), strict=True)
        dw = steps.spans_vjp(sum(of_pairs[1:], of_pairs[0]), sum(of_since[1:], of_since[0]), of_kept, held)
        dk = self._plus(sum(dk[1:], dk[0]), written, exponent=None if self.per_channel else self.kept)
        if self.recaller is not None:
            dk = dk + dx[1]
        dq, dk, dw = self._joined(dx[0], self.d), self._joined(dk, self.d), self._joined(dw, self.d)
        dbeta = None if dbeta is None else self._joined(dbeta, 1)
        return Gradients(dq, dk, self._joined(dv, self.e), dw, dbeta, dfirst[..., : self.d, : self.e])

    def _to_state(self, x, cotangent):
        """(X ∘ F)ᵀ dO, summed over the heads that share the state."""
        if self.per_channel:
            product = self.steps.product(_T(self.steps.scaled(x, self.since)), cotangent)
        else:
            product = self.steps.product(_T(x), self.steps.scaled(cotangent, self.since))
        return _shared(product, self.S)

    def _through_writing(self, do, R):
        """dU of (5)."""
        within = _shared(self.steps.product(_T(self.reader.weights), do), self.v)
        if self.per_channel:
            return within + self.steps.product(self.steps.faded(self.k, self.kept), R)
        return self._plus(within, self.steps.product(self.k, R), exponent=self.kept)

    def _back_corrected(self, do, R):
        """R, its value before the first step, dV and dβ with the delta rule: last chunk first."""
        steps, xp = self.steps, self.steps.xp
        within = _shared(steps.product(_T(self.reader.weights), do), self.v)
        read, keys, recalled = self._to_state(self.q, do), steps.faded(self.k, self.kept), steps.scaled(self.k, self.since)
        cotangents, gradients = [], []
        for c in reversed(range(self.q.shape[2])):
            R_c = steps.store(R)
            du = steps.store(within[:, :, c] + steps.product(keys[:, :, c], R_c))
            y = steps.product(_T(self.inverse[:, :, c]), du)
            back = steps.store(self.beta[:, :, c] * y)
            R = steps.grown(R, self.rest[:, :, c, :, None]) + read[:, :, c] - steps.product(_T(recalled[:, :, c]), back)
            R = steps.grown(R, self.peak[:, :, c, :, None])
            cotangents.append(R_c)
            gradients.append(y)
        y = xp.stack(gradients[::-1], axis=2)
        recall = steps.product(recalled, self.S) + steps.product(self.recaller.weights, self.u)
        dbeta = (y * (cast(self.v, steps.wide) - recall)).sum(axis=-1, keepdims=True)
        return xp.stack(cotangents[::-1], axis=2), R, self.beta * y, dbeta

    def _read_vjp(self, reader: _Reader, cotangent):
        """What a reader's cotangent is worth to its queries, to the keys, and to the decays: of pairs, and of each F_t."""
        steps = self.steps
        weights = steps.product(cotangent, _T(self.u))
        if self.per_channel:
            dx, dk, dw = steps.pairs_vjp(reader.x, self.k, self.w, weights, reader.strict)
        else:
            d_product, dw = steps.weigh_vjp(reader.product, weights, self.w, reader.strict, self.gain)
            if d_product.shape[1] > reader.x.shape[1] == self.k.shape[1]:  # heads that share both: one product for all
                d_product = steps.store(_shared(cast(d_product, steps.wide), reader.x))
            dx, dk = steps.product(d_product, self.k), steps.product(_T(d_product), reader.x)
        from_state = steps.product(cotangent, _T(self.S))
        if self.per_channel:
            from_state = self.since * from_state
            spans = cast(reader.x, steps.wide) * from_state
        else:
            spans = self.since * steps.dots(reader.x, from_state)[..., None]
        dx = self._plus(_shared(dx, reader.x), from_state, factor=None if self.per_channel else self.since)
        return dx, _shared(dk, self.k), _shared(dw, self.w), _shared(spans, self.w)

    def _plus(self, x, more, **factor):
        """x and a multiple of what every head adds to it."""
        if x.shape == more.shape:
            return self.steps.finish(x, more, **factor)
        return x + _shared(self.steps.finish(None, more, **factor), x)

    def _joined(self, x, features: int):
        """(G, H, T/L, L, f) as (G, H, T, f), without what was filled up."""
        G, H, chunks, length, f = x.shape
        return x.reshape(G, H, chunks * length, f)[:, :, : self.T, :features]


def length(T: int, per_channel: bool, chunk: int | None = None) -> int:
    """Steps of a chunk: what is asked for, or by default 128, of decays per channel 64, in whole runs of 8.

    Not shorter: a state is d × e numbers that are written and read for each chunk, the weights are as many as a chunk has steps.
    """
    wanted = chunk or (64 if per_channel else LONGEST)
    return -(-max(1, min(wanted, T)) // 8) * 8


def _shared(x, like):
    """A gradient of every head, summed over those that share what it is the gradient of."""
    return x.sum(axis=1, keepdims=True) if x.shape[1] > like.shape[1] else x


def _T(x):
    return x.swapaxes(-1, -2)
