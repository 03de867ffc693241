"""Gradients of one argument alone, twice, with another call between, beside a number; and inference: a framework's own ways of asking."""

import pytest

import refimpl

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")


class Scan(torch.autograd.Function):
    """h_t = a_t h_{t-1} + b_t with a backward pass of its own, in which one thing may be wrong."""

    workspace = None

    @staticmethod
    def forward(ctx, a, b, h, wrong):
        hs = [h]
        for t in range(b.shape[-2]):
            hs.append(a[..., t, :] * hs[-1] + b[..., t, :])
        before = torch.stack(hs, -2)[..., :-1, :] if len(hs) > 1 else torch.zeros_like(b)
        ctx.save_for_backward(a, before)
        ctx.wrong, ctx.used = wrong, 0
        Scan.workspace = before
        return torch.stack(hs[1:], -2) if len(hs) > 1 else torch.zeros_like(b), hs[-1].clone()

    @staticmethod
    def backward(ctx, dy, dh):
        a, before = ctx.saved_tensors
        if ctx.wrong == "workspace" and Scan.workspace.shape == before.shape:
            before = Scan.workspace
        ctx.used += 1
        da, db = torch.zeros_like(dy * a.conj()), torch.zeros_like(dy)
        for t in reversed(range(dy.shape[-2])):
            dh = dh + dy[..., t, :]
            da[..., t, :], db[..., t, :] = dh * before[..., t, :].conj(), dh
            dh = dh * a[..., t, :].conj()
        if ctx.wrong == "alone" and not ctx.needs_input_grad[0]:
            dh = torch.zeros_like(dh)
        return (da * ctx.used if ctx.wrong == "twice" else da), db, dh, None


def recurrence(wrong):
    def linear_recurrence(a, b, *, state=None, return_state=False):
        dtype = torch.promote_types(a.dtype, b.dtype)
        a = a[..., None, :] if a.ndim == 1 else a
        shape = torch.broadcast_shapes(a.shape, b.shape)
        h = torch.zeros(shape[:-2] + shape[-1:], dtype=dtype) if state is None else state.to(dtype).expand(shape[:-2] + shape[-1:])
        y, last = Scan.apply(a.to(dtype).expand(shape), b.to(dtype).expand(shape), h, wrong)
        if wrong == "inference" and not torch.is_grad_enabled():
            last = torch.zeros_like(last)
        return (y, last) if return_state else y

    return linear_recurrence


@pytest.mark.parametrize(
    "wrong, where",
    [("", ""), ("workspace", "another call"), ("twice", "the second backward"), ("alone", "alone: state"), ("inference", "random[")],
)
def test_a_mistake_that_one_manner_of_asking_shows(wrong, where):
    report = refimpl.check("linear_recurrence", recurrence(wrong), framework="torch", dtypes=["float32"], level="quick", gradients=True)
    assert report.verdict == ("wrong" if wrong else "conforms"), str(report)
    assert all(where in failure.id for failure in report.failures)


def test_a_number_among_the_arrays_has_no_gradient_in_jax():
    jnp = pytest.importorskip("jax.numpy")

    def group_norm(x, groups, weight=None, bias=None, *, eps=1e-5):
        y = x.reshape(*x.shape[:-1], groups, -1)
        y = y - y.mean(-1, keepdims=True)
        y = (y / jnp.sqrt((y * y).mean(-1, keepdims=True) + eps)).reshape(x.shape)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    report = refimpl.check("group_norm", group_norm, framework="jax", dtypes=["float32"], level="quick", gradients=True)
    assert report.verdict == "conforms", str(report)
