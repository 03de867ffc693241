"""What every right WKV satisfies beside causality and hand-off: it is a mean, and its exponents have no zero of their own."""

import numpy as np

from refimpl.op import Law


def _mean(f, call, bound, rng):
    """Equal values have that value as their mean, whatever the weights: numerator and denominator are the same sum."""
    like = call["v"].dtype
    value = rng.uniform(1, 2, call["v"].shape[-1]).astype(like)
    call = {**call, "v": np.broadcast_to(value, call["v"].shape).copy(), "return_state": False}
    if call.get("state") is not None:
        den = call["state"].den
        call["state"] = call["state"]._replace(num=den * value.astype(den.dtype))
    y = f(**call)
    yield "y of equal values", y, np.broadcast_to(value, y.shape), 2 * bound(**call)


def _offset(f, call, bound, rng):
    """8 added to all keys, and to the state's max, multiplies every weight by e^8, and changes no mean."""
    keys = np.clip(np.round(call["k"].astype(float) * 4) / 4, -4, 4).astype(call["k"].dtype)  # so that keys and keys + 8 are exact
    call = {**call, "k": keys, "return_state": False}
    other = {**call, "k": keys + keys.dtype.type(8)}
    if call.get("state") is not None:
        m = call["state"].max
        other["state"] = call["state"]._replace(max=m + m.dtype.type(8))
    yield "y with 8 added to all keys", f(**other), f(**call), 2 * bound(**other) + 2 * bound(**call)


def _units(f, call, bound, rng):
    """(num, den, max) and (4 num, 4 den, max - log 4) are the same memory."""
    if call.get("state") is None:
        return
    call = {**call, "return_state": False}
    num, den, m = call["state"]
    other = call["state"]._replace(num=4 * num, den=4 * den, max=m - np.log(np.asarray(4, dtype=m.dtype)))
    yield "y, the state written in other units", f(**{**call, "state": other}), f(**call), 4 * bound(**call)


MEAN = Law("weighted_mean", _mean, ("v",))
OFFSET = Law("offset", _offset, ("k",))
UNITS = Law("same_memory", _units, ("state",))
