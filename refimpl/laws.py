"""Laws that many operators share, as constructors: ``causal("x", "a")``, ``linear("x")``, ``hand_off()``.

A law looks at an implementation from outside: it makes related calls and says which arrays must then be equal, and
within what error. What equals what is stated by the law, never by a second implementation; so a law can accuse even
where nobody knows the right value. Chapters add laws of their own in the same form.
"""

from collections.abc import Callable, Iterator

import numpy as np

from refimpl.core.contract import Contract
from refimpl.op import Law

Comparison = tuple[str, np.ndarray, np.ndarray, np.ndarray]


def causal(contract: Contract, *names: str, letter: str = "T") -> Law:
    """No result before time t depends on `names` at t or later."""

    def holds(f: Callable, call: dict, bound: Callable, rng) -> Iterator[Comparison]:
        axes, T = _time(contract, call, letter)
        base, limit = _named(contract, f, call), _named_bound(contract, bound, call)
        for cut in sorted({1, T // 2, T - 1} & set(range(1, T))):
            changed = dict(call)
            for name in names:
                if name in axes:
                    changed[name] = _map(lambda x, axis=axes[name], cut=cut: _change_after(x, axis, cut, rng), call[name])
            other = _named(contract, f, changed)
            for name, axis in contract.result_axis(letter, one_head=_one_head(contract, call)).items():
                if name in base:
                    past = _slice(axis, 0, cut)
                    yield f"{name} before t = {cut}", other[name][past], base[name][past], 2 * limit[name][past]

    return Law("causal", holds, names)


def hand_off(contract: Contract, letter: str = "T") -> Law:
    """Cutting the sequence anywhere, and handing the state across, changes nothing."""

    def holds(f: Callable, call: dict, bound: Callable, rng) -> Iterator[Comparison]:
        axes, T = _time(contract, call, letter)
        call = {**call, "return_state": True}
        whole, limit = _named(contract, f, call), _named_bound(contract, bound, call)
        out_axes = contract.result_axis(letter, one_head=_one_head(contract, call))
        inner = int(rng.integers(1, T)) if T > 1 else 0
        for cut in sorted({0, 1, inner, T - 1, T} & set(range(T + 1)), key=lambda cut: (cut in (0, T), cut)):  # empty parts last: not all take them
            first = {n: (v[_slice(axes[n], 0, cut)] if n in axes else v) for n, v in call.items()}
            left = _named(contract, f, first)
            state = _state(contract, f(**first))
            second = {n: (v[_slice(axes[n], cut, T)] if n in axes else v) for n, v in call.items()} | {"state": state}
            right = _named(contract, f, second)
            for name in whole:
                if name in out_axes:
                    got = np.concatenate([left[name], right[name]], axis=out_axes[name])
                else:
                    got = right[name]
                yield f"{name}, cut at t = {cut}", got, whole[name], 2 * limit[name]

    return Law("hand_off", holds, ("state",))


def linear(contract: Contract, *names: str, hides_nothing: bool = True) -> Law:
    """The results are linear in `names` together: f(2x) = 2 f(x) exactly, f(x + x') = f(x) + f(x').

    With `hides_nothing`, they carry NaN too.
    """

    def holds(f: Callable, call: dict, bound: Callable, rng) -> Iterator[Comparison]:
        names_here = [n for n in names if call.get(n) is not None]
        base, limit = _named(contract, f, call), _named_bound(contract, bound, call)
        twice = _named(contract, f, {**call, **{n: _map(lambda v: 2 * v, call[n]) for n in names_here}})
        other = {**call, **{n: _map(lambda v: _shuffled(v, rng), call[n]) for n in names_here}}
        total = {**call, **{n: _map2(np.add, call[n], other[n]) for n in names_here}}
        second, limit2 = _named(contract, f, other), _named_bound(contract, bound, other)
        both, limit3 = _named(contract, f, total), _named_bound(contract, bound, total)
        for name in base:
            yield f"{name} of twice the input", twice[name], 2 * base[name], 4 * limit[name]
            yield f"{name} of a sum", both[name], base[name] + second[name], limit[name] + limit2[name] + limit3[name]
        if hides_nothing:
            yield from carries_nan(contract, *names).holds(f, call, bound, rng)

    return Law("linear", holds, names)


def carries_nan(contract: Contract, *names: str) -> Law:
    """What depends on an element of `names` is not finite where that element is NaN: nothing hides it."""

    def holds(f: Callable, call: dict, bound: Callable, rng) -> Iterator[Comparison]:
        base, limit = _named(contract, f, call), _named_bound(contract, bound, call)
        for changed in (n for n in names if isinstance(call.get(n), np.ndarray) and call[n].size):
            place = tuple(int(rng.integers(size)) for size in call[changed].shape)
            nudged = _named(contract, f, {**call, changed: _with(call[changed], place, 2 * call[changed][place] + 1)})
            carried = _named(contract, f, {**call, changed: _with(call[changed], place, np.nan)})
            for name in base:
                depends = np.abs(nudged[name] - base[name]) > 16 * limit[name]
                yield f"{name} where it depends on a NaN of {changed}", carried[name][depends], np.full_like(base[name][depends], np.nan), limit[name][depends]

    return Law("carries_nan", holds, names)


def time_invariant(contract: Contract, *names: str, letter: str = "T") -> Law:
    """Without a state, zeros before the input (`names`) delay the results and change nothing else.

    Arguments that have the time axis but are not in `names` must be constant in time; the law repeats their first row.
    """

    def holds(f: Callable, call: dict, bound: Callable, rng) -> Iterator[Comparison]:
        axes, T = _time(contract, call, letter)
        call = {n: v for n, v in call.items() if n != "state"}

        def constant(x, axis):
            return np.repeat(x[_slice(axis, 0, 1)], T, axis=axis)

        def later(x, name, axis):
            pad = np.repeat(x[_slice(axis, 0, 1)], delay, axis=axis)
            return np.concatenate([np.zeros_like(pad) if name in names else pad, x], axis=axis)

        delay = 3
        constants = {n: _map(lambda x, axis=axis: constant(x, axis), call[n]) for n, axis in axes.items() if n in call and n not in names}
        steady = {n: constants.get(n, v) for n, v in call.items()}
        late = dict(steady)
        for name, axis in axes.items():
            if name == "state" or name not in steady:
                continue
            late[name] = _map(lambda x, name=name, axis=axis: later(x, name, axis), steady[name])
        base, limit = _named(contract, f, steady), _named_bound(contract, bound, steady)
        delayed = _named(contract, f, late)
        for name, axis in contract.result_axis(letter, one_head=_one_head(contract, call)).items():
            if name in base:
                yield f"{name}, delayed by {delay}", delayed[name][_slice(axis, delay, delay + T)], base[name], 2 * limit[name]

    return Law("time_invariant", holds, names)


# -- what laws are made of -------------------------------------------------------------------------------------------


def _time(contract: Contract, call: dict, letter: str) -> tuple[dict[str, int], int]:
    arrays = _arrays(contract, call)
    axes = {n: a for n, a in contract.axis(letter, **arrays).items() if "." not in n and n != "state"}
    sizes, _ = contract.sizes(**arrays)
    axes = {n: a for n, a in axes.items() if all(np.shape(v)[a] == sizes[letter] for v in _parts(call[n]))}
    return axes, sizes[letter]


def _arrays(contract: Contract, call: dict) -> dict:
    names = {a.name.partition(".")[0] for a in contract.arrays}
    return {n: v for n, v in call.items() if n in names}


def _one_head(contract: Contract, call: dict) -> bool:
    first = contract.arrays[0]
    return first.shapes[0].heads is not None and np.ndim(call[first.name]) == len(first.shapes[0].axes) - 1


def _named(contract: Contract, f: Callable, call: dict) -> dict[str, np.ndarray]:
    return contract.named(f(**call), call.get("return_state", False))


def _named_bound(contract: Contract, bound: Callable, call: dict) -> dict[str, np.ndarray]:
    return contract.named(bound(**call), call.get("return_state", False))


def _state(contract: Contract, result):
    return result[-1]


def _slice(axis: int, start: int, stop: int) -> tuple:
    return (..., slice(start, stop), *(slice(None) for _ in range(-axis - 1)))


def _change_after(x: np.ndarray, axis: int, cut: int, rng) -> np.ndarray:
    """The same past, another future: values of the same kind (halved, in another order), so that they stay legal."""
    x = x.copy()
    future = x[_slice(axis, cut, x.shape[axis])]
    order = rng.permutation(future.shape[axis])
    x[_slice(axis, cut, x.shape[axis])] = np.take(future, order, axis=axis) / 2 if x.dtype.kind in "fc" else np.take(future, order, axis=axis)
    return x


def _with(x: np.ndarray, place: tuple, value) -> np.ndarray:
    x = x.copy()
    x[place] = value
    return x


def _shuffled(x: np.ndarray, rng) -> np.ndarray:
    return rng.permuted(x, axis=-1) / 2 if x.ndim else x / 2


def _parts(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _map(g: Callable, value):
    return type(value)(*map(g, value)) if isinstance(value, tuple) else g(value)


def _map2(g: Callable, a, b):
    return type(a)(*map(g, a, b)) if isinstance(a, tuple) else g(a, b)
