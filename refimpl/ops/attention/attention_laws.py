"""What every softmax attention obeys, whoever computes it: relations between calls that need no right value.

Not a chapter: the laws of one, kept apart because they are as long as it. Each is a generator of
``(what, got, want, tolerance)`` (`refimpl.op.Law`), and speaks of an implementation only through its calls.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.laws import linear
from refimpl.op import Law


def attention_laws(contract: Contract) -> tuple[Law, ...]:
    """The laws of an operator with attention's contract."""

    def sizes(call):
        return contract.sizes(**_arrays(contract, call))[0]

    def named(f, call):
        return contract.named(f(**call))

    def linear_in_values(f, call, bound, rng):
        # rows without a key are often cleared by turning every NaN into 0: not a fault worth a verdict
        yield from linear(contract, "v", hides_nothing=False).holds(f, _without(call, "return_lse"), bound, rng)

    def causal(f, call, bound, rng):
        """Keys from `cut` on do not reach queries that stand before it."""
        n, m = (sizes(call)[letter] for letter in "nm")
        call = {**call, "causal": True}
        offset = m - n if call.get("offset") is None else call["offset"]
        base, limit = named(f, call), contract.named(bound(**call))
        for cut in sorted({1, m // 2, m - 1} & set(range(1, m))):
            past = slice(0, min(max(cut - offset, 0), n))
            if past.stop == 0:
                continue
            future = (np.arange(m) >= cut)[:, None]
            for what, factor in (("other", -0.5), ("much larger", 64)):
                other = named(f, {**call, **{name: np.where(future, _times(call[name], factor), call[name]) for name in "kv"}})
                for name, rows in (("o", (..., past, slice(None))), ("lse", (..., past))):
                    if name in base:
                        yield (
                            f"{name} of queries before key {cut}, {what} keys from there on",
                            other[name][rows],
                            base[name][rows],
                            2 * limit[name][rows],
                        )

    def masked_is_absent(f, call, bound, rng):
        """What stands behind the mask does not matter, however large."""
        m = sizes(call)["m"]
        if call.get("mask") is None or m == 0:
            return
        hidden = np.arange(m) == rng.integers(m)
        call = {**call, "mask": call["mask"] & ~hidden}
        base, limit = named(f, call), contract.named(bound(**call))
        other = named(f, {**call, **{name: np.where(hidden[:, None], _times(call[name], 64), call[name]) for name in "kv"}})
        for name in base:
            yield f"{name} with larger numbers in a key that the mask hides", other[name], base[name], 2 * limit[name]

    def mask_is_bias(f, call, bound, rng):
        """A mask is a bias of -∞ (and 0 elsewhere)."""
        if call.get("mask") is None:
            return
        bias = call.get("bias", np.zeros_like(call["q"], shape=call["mask"].shape))
        shut = np.full_like(bias, -np.inf)
        if np.any(np.isnan(shut)):  # a format without infinities
            return
        base, limit = named(f, call), contract.named(bound(**call))
        other = named(f, _without(call, "mask") | {"bias": np.where(call["mask"], bias, shut)})
        for name in base:
            yield f"{name} with the mask as a bias of -inf", other[name], base[name], 2 * limit[name]

    def shift(f, call, bound, rng):
        """A constant added to all scores (the sink's too) leaves o and is added to lse. In integers: exact in any format."""
        if call.get("bias") is None:
            return
        names = [name for name in ("bias", "sink") if call.get(name) is not None]
        call = {**call, **{name: _integers(call[name]) for name in names}}
        moved = {**call, **{name: _plus(call[name], 4) for name in names}}
        base, other = named(f, call), named(f, moved)
        limit, more = contract.named(bound(**call)), contract.named(bound(**moved))
        for name in base:
            want = _plus(base[name], 4) if name == "lse" else base[name]
            yield f"{name} with 4 added to every score", other[name], want, 2 * (limit[name] + more[name])

    def key_order(f, call, bound, rng):
        """Without positions, keys are a set."""
        call = _without(call, "causal", "window", "offset")
        order = rng.permutation(sizes(call)["m"])
        moved = dict(call)
        for name, axis in contract.axis("m", **_arrays(contract, call)).items():
            if call[name].shape[axis] == order.size:
                moved[name] = np.take(call[name], order, axis=axis)
        base, other, limit = named(f, call), named(f, moved), contract.named(bound(**call))
        for name in base:
            yield f"{name} with keys in another order", other[name], base[name], 2 * limit[name]

    def query_split(f, call, bound, rng):
        """Queries do not know of each other: the later ones alone, at their position, give the same (decoding)."""
        n, m = (sizes(call)[letter] for letter in "nm")
        offset = m - n if call.get("offset") is None else call["offset"]
        base, limit = named(f, call), contract.named(bound(**call))
        for cut in sorted({1, n // 2, n - 1} & set(range(1, n))):
            later = {**call, "offset": offset + cut}
            for name, axis in contract.axis("n", **_arrays(contract, call)).items():
                if call[name].shape[axis] == n:
                    later[name] = np.take(call[name], np.arange(cut, n), axis=axis)
            other = named(f, later)
            for name, rows in (("o", (..., slice(cut, n), slice(None))), ("lse", (..., slice(cut, n)))):
                if name in base:
                    yield f"{name} of queries {cut} to {n - 1} alone", other[name], base[name][rows], 2 * limit[name][rows]

    def hull(f, call, bound, rng):
        """A mean of values lies between the least and the largest (with 0 among them: the sink, or no key at all)."""
        call = _without(call, "return_lse")
        got, limit, v = f(**call), bound(**call), call["v"]
        if v.shape[-2] == 0:
            return
        low, high = (
            np.broadcast_to(c, (*v.shape[:-2], 1, v.shape[-1]))
            for c in (np.minimum(v.min(-2, keepdims=True), 0), np.maximum(v.max(-2, keepdims=True), 0))
        )
        if v.ndim > 2:
            group = got.shape[-3] // max(v.shape[-3], 1)
            low, high = np.repeat(low, group, axis=-3), np.repeat(high, group, axis=-3)
        yield "o between the least and the largest value", got, np.clip(got, low, high), limit

    return (
        Law("causal", causal, ("causal",)),
        Law("linear", linear_in_values, ("v",)),
        Law("masked_is_absent", masked_is_absent, ("mask",)),
        Law("mask_is_bias", mask_is_bias, ("mask", "bias")),
        Law("shift", shift, ("bias",)),
        Law("key_order", key_order, ("k", "v")),
        Law("query_split", query_split, ("q", "offset")),
        Law("hull", hull, ("v",)),
    )


def _times(x, factor):
    return (x * factor).astype(x.dtype)


def _plus(x, number):
    return (x + number).astype(x.dtype)


def _integers(x):
    """Rounded to -3 ... 3."""
    return np.clip(np.rint(x.astype(np.result_type(x.dtype, np.float32))), -3, 3).astype(x.dtype)


def _arrays(contract: Contract, call: dict) -> dict:
    return {a.name: call[a.name] for a in contract.inputs if call.get(a.name) is not None}


def _without(call: dict, *names: str) -> dict:
    return {n: x for n, x in call.items() if n not in names}
