"""sLSTM on the device: one persistent kernel for the whole sequence."""

import cupy as cp
import numpy as np
from refimpl.gpu import mirror
from refimpl.gpu.arrays import or_null
from refimpl.gpu.launch import Kernel, shared_memory
from refimpl.gpu.matrix_memory import flat
from refimpl.gpu.precision import widened

from refimpl.ops.gated_rnn import slstm as chapter

_WIDEST = 1024  # a thread has one unit of a head
_FORWARD, _BACKWARD = (
    {
        (x, D): Kernel("kernel_slstm.cu", f"{name}<{c}, {D}>", spills=(x, D) == ("float64", 0))
        for x, c in (("float32", "float"), ("float64", "double"))
        for D in (16, 64, 0)
    }
    for name in ("slstm", "slstm_vjp")
)
KERNELS = (*_FORWARD.values(), *_BACKWARD.values())


@mirror.form(chapter.CONTRACT)
def slstm(z, i, f, o, R, bias=None, *, forget="sigmoid", state=None, return_state=False):
    """sLSTM on CuPy arrays; arguments and results as `refimpl.slstm`.

    Notes
    -----
    A block for each head of each sequence; R is held in registers for d <= 64, in shared memory up to d = 117 (float32), and read from
    the L2 cache beyond. Heads of more than 1024 units run the chapter's steps one by one. float32 arithmetic for halves.
    """
    z, i, f, o, R, bias = widened(z, i, f, o, R, bias)
    if R.shape[-1] > _WIDEST:
        return chapter.slstm(z, i, f, o, R, bias, forget=forget, state=state, return_state=return_state)
    call = _Call(z, i, f, o, R, bias, forget, state)
    h, last, _ = call.run(keep=False)
    return (h, last) if return_state else h


@mirror.gradient(chapter.CONTRACT)
def slstm_vjp(dy, z, i, f, o, R, bias=None, *, forget="sigmoid", state=None, dstate=None):
    """Gradient of `slstm` on CuPy arrays, as `refimpl.slstm_vjp`. Keeps pre-activations and states, eight times the memory of z."""
    dy, z, i, f, o, R, bias = widened(dy, z, i, f, o, R, bias)
    if R.shape[-1] > _WIDEST:
        return chapter.slstm_vjp(dy, z, i, f, o, R, bias, forget=forget, state=state, dstate=dstate)
    call = _Call(z, i, f, o, R, bias, forget, state)
    h, _, saved = call.run(keep=True)
    da, dstate = call.run_vjp(flat(dy, call.heads, 2), h, saved, dstate)  # (sequences, T, 4, d)
    before = cp.zeros((call.count, 1, call.d), h.dtype) if state is None else flat(state[2], call.heads, 1)[:, None]
    read = cp.concatenate([before, h.reshape(call.count, call.T, call.d)[:, :-1]], axis=1)[:, : call.T]  # h_{t-1}
    if call.T:
        dR = da.reshape(call.count, call.T, 4 * call.d).swapaxes(-1, -2) @ read  # (sequences, 4 d, d)
    else:
        dR = cp.zeros((call.count, 4 * call.d, call.d), h.dtype)
    dR = dR.reshape(*call.heads, 4, call.d, call.d)
    da = da.reshape(*call.heads, call.T, 4, call.d)
    inputs = {name: da[..., g, :] for g, name in enumerate("zifo")}
    return inputs | {"R": cp.moveaxis(dR, -3, -4), "bias": cp.moveaxis(da.sum(axis=-3), -2, -3), "state": chapter.State(*dstate)}


class _Call:
    """A call as the kernels take it: inputs (sequences, T, d), heads of a sequence next to each other."""

    def __init__(self, z, i, f, o, R, bias, forget, state):
        states = () if state is None else tuple(state)
        self.heads = np.broadcast_shapes(*(x.shape[:-2] for x in (z, i, f, o)), *(s.shape[:-1] for s in states))
        self.T, self.d = z.shape[-2:]
        self.inputs = [flat(x, self.heads, 2) for x in (z, i, f, o)]
        self.count, self.R = len(self.inputs[0]), cp.ascontiguousarray(R)
        self.bias = None if bias is None else cp.ascontiguousarray(bias)
        self.exponential = np.int32(forget == "exp")
        self.state = [None] * 4 if state is None else [flat(s, self.heads, 1) for s in state]
        self.kind = z.dtype

    def run(self, keep: bool):
        """h (..., H, T, d), the last state, and what the gradient needs."""
        shape, d = (*self.heads, self.d), self.d
        h = cp.empty((*self.heads, self.T, d), self.kind)
        last = [cp.empty(shape, self.kind) for _ in range(4)]
        saved = [cp.empty((self.count, self.T, n * d), self.kind) for n in (4, 1, 1, 1)] if keep else [None] * 4
        if self.count and d:
            transposed = cp.ascontiguousarray(self.R.transpose(1, 3, 0, 2))  # (H, j, gate, i)
            pointers = (*self.inputs, transposed, *map(or_null, (self.bias, *self.state)), h, *last, *map(or_null, saved))
            self._launch(_FORWARD, pointers)
        return h, chapter.State(*last), saved

    def run_vjp(self, dy, h, saved, dstate):
        """Cotangents of the pre-activations (sequences, T, 4, d) and of the first state."""
        da = cp.empty((self.count, self.T, 4, self.d), self.kind)
        shape = (*self.heads, self.d)
        d_state = [cp.zeros(shape, self.kind) if x is None else cp.array(cp.broadcast_to(x, shape)) for x in dstate or (None,) * 4]
        d_state = [cp.ascontiguousarray(x) for x in d_state]
        if self.count and self.d:
            c, n, _, m = self.state
            self._launch(_BACKWARD, (self.R, *map(or_null, (c, n, m)), h, *saved, dy, da, *d_state))
        return da, d_state

    def _launch(self, kernels, pointers):
        d, size = self.d, self.kind.itemsize
        D = next((D for D in (16, 64) if d <= D), 0)
        padded = D or -(-d // 4) * 4
        words = 8 * padded + 4 * d
        staged = D == 0 and (words + 4 * d * d) * size <= shared_memory() - 1024
        threads = 4 * D if D else min(1024, -(-4 * d // 32) * 32)
        sizes = (np.int64(self.T), np.int32(self.R.shape[1]), np.int32(d), self.exponential, np.int32(staged))
        kernels[self.kind.name, D]((self.count,), (threads,), (*pointers, *sizes), (words + (4 * d * d if staged else 0)) * size)
