"""Which calls a candidate is tried on. Structure finds what tolerances cannot: every case names its class.

    sizes      lengths 0, 1, primes, around every power of two, unequal lengths both ways
    options    all pairs of options, optional arrays, states in and out
    shapes     batch axes, head ratios, single and odd numbers of features, all sizes alike
    broadcast  arrays in the other shapes of the contract; one array that serves the whole batch
    hard       the chapter's inputs at which implementations break
    long       many steps; more than ten thousand rows
    strides    the same values behind other strides: transposed, every other element, reversed, repeated with stride 0
    scaled     inputs in which the operator is linear, times powers of two
    integers   small integers throughout, where every partial sum is exact
    random     sizes, options and hard inputs drawn together
"""

import copy
import inspect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refimpl.conformance.domain import Domain
from refimpl.conformance.shapes import reshaped
from refimpl.op import Op

LEVELS = ("quick", "standard", "exhaustive")
CLASSES = ("sizes", "options", "shapes", "broadcast", "hard", "strides", "scaled", "random", "long", "integers", "hygiene", "laws", "gradients")
VIEWS = ("transposed", "strided", "reversed", "repeated")


@dataclass(frozen=True)
class Case:
    """One call: arrays in float64 (or integers, booleans) and options, by name."""

    operator: str
    klass: str
    name: str
    call: dict[str, Any]
    sizes: dict[str, Any]
    view: str = "contiguous"
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.klass}[{self.name}]"


@dataclass(frozen=True)
class Support:
    """The keywords that a candidate takes, as far as one can know; None is all."""

    keywords: frozenset[str] | None = None

    def takes(self, name: str) -> bool:
        return self.keywords is None or name in self.keywords


# -- what an operator's calls are made of ----------------------------------------------------------------------------


def parameters(op: Op) -> tuple[list[str], list[str], dict[str, Any]]:
    """Of the definition: what is passed by position, optional arrays (state excepted), options with their defaults.

    An option without a default (the k of a mixture of experts) has `inspect.Parameter.empty`: every call has it.
    """
    arrays = {a.name.partition(".")[0] for a in op.contract.arrays}
    required, optional, options = [], [], {}
    for p in inspect.signature(op.definition).parameters.values():
        if p.name in ("state", "return_state"):
            continue
        if p.default is p.empty and p.kind is not p.KEYWORD_ONLY:
            required.append(p.name)
        elif p.name in arrays:
            optional.append(p.name)
        else:
            options[p.name] = p.default
    return required, optional, options


def default_sizes(op: Op) -> dict[str, Any]:
    """The sizes of a small call, by letter."""
    return {p.name: p.default for p in inspect.signature(op.sample).parameters.values() if p.kind is p.KEYWORD_ONLY}


def factors(op: Op, support: Support, domain: Domain) -> dict[str, tuple]:
    """Everything about a call that can be chosen beside its sizes, with the choices, the default first."""
    _, optional, defaults = parameters(op)
    found: dict[str, tuple] = {}
    for name in optional:
        if support.takes(name):
            found[name] = tuple(domain.options.get(name, (False, True)))
    if op.stateful:
        if support.takes("state"):
            found["state"] = (False, True)
        if support.takes("return_state"):
            found["return_state"] = (False, True)
    for name in defaults:
        if name in domain.options:
            found[name] = tuple(domain.options[name])
        elif support.takes(name) and name in op.options:
            found[name] = tuple(op.options[name])
    return found


def pairwise(choices: dict[str, tuple], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Few combinations in which every pair of choices of every two factors occurs (greedy)."""
    names = list(choices)
    index = {n: range(len(choices[n])) for n in names}
    left = {((a, i), (b, j)) for a, b in itertools.combinations(names, 2) for i in index[a] for j in index[b]}
    combos: list[dict[str, int]] = [dict.fromkeys(names, 0)]
    if len(names) == 1:
        combos += [{names[0]: i} for i in index[names[0]][1:]]

    def covered(combo):
        return {((a, combo[a]), (b, combo[b])) for a, b in itertools.combinations(names, 2)}

    left -= covered(combos[0])
    while left:
        best: dict[str, int] = {}
        for _ in range(12):
            seed = sorted(left)[int(rng.integers(len(left)))]
            combo = dict(seed)
            for name in rng.permutation([n for n in names if n not in combo]):
                gain = [sum(_pair(name, i, o, combo[o], names) in left for o in combo) for i in index[name]]
                top = [i for i in index[name] if gain[i] == max(gain)]
                combo[str(name)] = int(rng.choice(top))
            if not best or len(covered(combo) & left) > len(covered(best) & left):
                best = combo
        combos.append(best)
        left -= covered(best)
    return [{n: choices[n][c[n]] for n in names} for c in combos]


def _pair(a, i, b, j, names):
    return ((a, i), (b, j)) if names.index(a) < names.index(b) else ((b, j), (a, i))


def covering(combos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few of the combinations, in which every choice that departs from the plainest occurs (greedy, the richest first)."""
    departs = [frozenset(n for n, v in combo.items() if not _same(v, combos[0][n])) for combo in combos]
    chosen = [{(n, repr(combo[n])) for n in names} for combo, names in zip(combos, departs, strict=True)]
    left, found = set().union(*chosen), []
    while left:
        best = max(range(len(combos)), key=lambda i: (len(chosen[i] & left), len(chosen[i])))
        found.append(combos[best])
        left -= chosen[best]
    return found or combos[:1]


def few(op: Op, choices: dict[str, tuple], combos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is tried where all combinations would be too many: `covering` ones, and as much as goes together."""
    found = covering(combos)
    return [*found, *(full for full in fullest(op, choices) if not any(all(_same(combo[n], full[n]) for n in choices) for combo in found))]


def fullest(op: Op, choices: dict[str, tuple]) -> list[dict[str, Any]]:
    """For each choice that departs from the plainest a combination of as many others as go with it, without repetition.

    An operator may not know two of them together: its `arrange` drops one, or it raises.
    """
    plain = {name: values[0] for name, values in choices.items()}
    departing = {name: values[1] for name, values in choices.items() if len(values) > 1}
    found: list[dict[str, Any]] = []
    for first, value in departing.items():
        if any(not _same(combo[first], plain[first]) for combo in found):
            continue
        combo = plain | {first: value}
        for name, other in departing.items():
            more = combo | {name: other}
            if _holds(op, more, plain):
                combo = more
        found.append(combo)
    return found


def _holds(op: Op, combo: dict[str, Any], plain: dict[str, Any]) -> bool:
    """Whether a call of this combination has everything in which it departs, and the operator takes it."""
    try:
        call = draw(op, np.random.default_rng(0), default_sizes(op), combo)
        op.definition(**call)
    except (Refused, ValueError, IndexError, ZeroDivisionError):
        return False
    return all(name in call for name, value in combo.items() if not _same(value, plain[name]))


def draw(op: Op, rng: np.random.Generator, sizes: dict[str, Any], combo: dict[str, Any]) -> dict[str, Any]:
    """A call of given sizes with the optional arrays and options of a combination."""
    return choose(op, op.sample(rng, **sizes), sizes, combo)


def choose(op: Op, arrays: dict[str, Any], sizes: dict[str, Any], combo: dict[str, Any]) -> dict[str, Any]:
    """Of a sample's arrays those that a combination wants, and its options (those that come with the arrays are kept)."""
    required, optional, defaults = parameters(op)
    call = {name: arrays[name] for name in required}
    for name in [*optional, "state"]:
        if combo.get(name) is True and arrays.get(name) is not None:
            call[name] = arrays[name]
    if combo.get("return_state"):
        call["return_state"] = True
    for name, default in defaults.items():
        value = combo.get(name, arrays.get(name, default))
        if value is inspect.Parameter.empty:
            value = op.options[name][0]
        if callable(value):
            value = value(**{**default_sizes(op), **sizes})
        if not _same(value, default):
            call[name] = value
    return call if op.arrange is None else op.arrange(call)


def _same(a, b) -> bool:
    return a is b or (type(a) is type(b) and not isinstance(a, np.ndarray) and a == b)


# -- the cases -------------------------------------------------------------------------------------------------------

_LENGTHS = {
    "quick": (0, 1, 2, 5, 17, 33, 64, 65, 129),
    "standard": (0, 1, 2, 3, 4, 5, 7, 8, 11, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 97, 127, 128, 129, 160, 192, 255, 256, 257, 384),
    "exhaustive": (*range(35), 47, 48, 49, 63, 64, 65, 66, 95, 96, 97, 100, 127, 128, 129, 130, 159, 160, 192, 193, 255, 256, 257, 320, 384, 511, 512, 513, 640, 769),
}
_UNEQUAL = {
    "quick": ((1, 17), (5, 33), (33, 5), (65, 130)),
    "standard": ((0, 5), (5, 0), (1, 7), (7, 1), (1, 65), (5, 17), (17, 5), (33, 64), (64, 33), (65, 130), (130, 65), (1, 257), (100, 300), (300, 100), (128, 129), (129, 128)),
    "exhaustive": tuple(itertools.product((0, 1, 3, 16, 17, 64, 65, 129, 257), repeat=2)),
}


def cases(op: Op, *, level: str, seed: int, support: Support, domain: Domain) -> Iterator[Case]:
    """All cases of a level, small ones first within each class; the same for the same arguments."""
    rng = np.random.default_rng([seed, *op.name.encode()])
    chosen = factors(op, support, domain)
    combos = pairwise(chosen, rng) if chosen else [{}]
    returned = {"return_state": True} if "return_state" in chosen else {}
    plain = combos[0] | returned
    rich = sorted(combos, key=lambda c: -sum(bool(v) for v in c.values() if not callable(v)))
    turn = itertools.cycle(rich)
    telling = [combo | returned for combo in few(op, chosen, combos)] if level != "quick" else rich[:1]
    seen: set[tuple] = set()

    def case(klass: str, sizes: dict, combo: dict, *, hard: str = "", view: str = "contiguous", label: str = "", scale=None, whole: bool = False):
        sizes = domain.fit({**default_sizes(op), **sizes})
        if sizes is None or not affordable(op, sizes, level, options=combo):
            return
        key = (klass, hard, view, label, scale, repr(sorted(sizes.items())), repr(sorted((k, repr(v) if not callable(v) else id(v)) for k, v in combo.items())))
        if key in seen:
            return
        seen.add(key)
        stream = np.random.default_rng([seed, *repr(key[:5]).encode(), *repr(sorted(sizes.items())).encode()])
        try:
            call = hard_call(op, hard, stream, sizes, combo, support, domain) if hard else draw(op, stream, sizes, combo)
        except (Refused, ValueError, IndexError, ZeroDivisionError):
            return
        if call is None:
            return
        if scale is not None:
            call = {n: _scaled(v, scale[1]) if n in scale[0] else v for n, v in call.items()}
        if whole:
            call = {n: np.asarray(np.sign(np.rint(v))) if isinstance(v, np.ndarray) and v.dtype.kind == "f" else v for n, v in call.items()}
        name = ", ".join(filter(None, [hard or label, described(op, sizes, call)]))
        yield Case(op.name, klass, name, call, sizes, view, {"sizes": sizes, "combo": combo, "hard": hard})

    small = dict(op.sizes[0]) if op.sizes else {}
    for sizes in _lengths(op, level):
        yield from case("sizes", sizes, plain)
        yield from case("sizes", sizes, next(turn))
        if level == "exhaustive":
            yield from case("sizes", sizes, next(turn))
    for steps in (1, 2) if op.lengths and level != "quick" else ():  # a single step, and the first that follows another, with everything
        for combo in combos:
            yield from case("sizes", dict.fromkeys(op.lengths, steps), combo)
        for sizes in op.sizes:
            yield from case("sizes", {**dict.fromkeys(op.lengths, steps), **sizes}, next(turn))
        for combo in telling:  # decoding, of several sequences at once
            yield from case("sizes", {**dict.fromkeys(op.lengths, steps), "batch": (3,)}, combo)
    middle = {letter: n for letter, n in zip(op.lengths, (19, 37, 23), strict=False)}
    for combo in combos:
        yield from case("options", middle, combo)
        if level != "quick":
            yield from case("options", {letter: 70 for letter in op.lengths} | small, combo)
    for sizes in op.sizes:
        yield from case("shapes", dict(sizes), plain)
        yield from case("shapes", {**middle, **sizes}, next(turn))
        for combo in telling if level != "quick" else ():  # what a choice does may hang on a ratio of heads
            yield from case("shapes", {**middle, **sizes}, combo)
    for batch in ((), (2,), (2, 3), (2, 1, 2), (2, 1, 2, 1, 3), (9, 2), (33,)) if level != "quick" else ((), (3,)):
        yield from case("shapes", {**middle, "batch": batch}, next(turn))
        yield from case("shapes", {"batch": batch}, plain)
    if level != "quick":
        for sizes in _features(op):
            yield from case("shapes", sizes, plain)
            yield from case("shapes", {**middle, **sizes}, next(turn))
        for sizes in wide(op):
            yield from case("shapes", {**dict.fromkeys(op.lengths, 5), **sizes}, next(turn))
        for letter in letters(op) if op.lengths else ():
            yield from case("shapes", {**dict.fromkeys(op.lengths, 70), letter: 34}, next(turn))
        for size, combo in itertools.product((16, 64), telling):  # what code that reads several numbers at once was written for
            yield from case("shapes", dict.fromkeys(letters(op), size) | dict.fromkeys(op.lengths, 64), combo)
        if not op.lengths:
            for rows, combo in itertools.product((65, 300), telling):
                yield from case("shapes", {"batch": (rows,)}, combo)
    yield from without_heads(op, seed, combos, domain)
    yield from _broadcast(op, seed, middle, rich, domain, level)
    for hard in op.hard:
        yield from case("hard", {}, plain, hard=hard)
        yield from case("hard", middle, next(turn), hard=hard)
        if level != "quick":
            yield from case("hard", {letter: 67 for letter in op.lengths}, next(turn), hard=hard)
            yield from case("hard", {letter: 130 for letter in op.lengths}, plain, hard=hard)
    for view in VIEWS if level != "quick" else VIEWS[:2]:
        for combo in telling:
            yield from case("strides", {**middle, "batch": (2,)}, combo, view=view, label=view)
        yield from case("strides", {"batch": (2,)}, plain, view=view, label=view)
    for law in op.laws:
        if law.name == "linear" and level != "quick":
            for power in (-20, -12, 9, 16):
                yield from case("scaled", middle, plain, label=f"{', '.join(law.arguments)} times 2^{power}", scale=(law.arguments, power))
    if any(law.name == "linear" for law in op.laws):
        for sizes in ({letter: 9 for letter in op.lengths}, {letter: 33 for letter in op.lengths}):
            yield from case("integers", {**sizes, **({"d": 4} if "d" in default_sizes(op) else {})}, combos[0], label="small integers", whole=True)
    for number in range({"quick": 12, "standard": 90, "exhaustive": 900}[level]):
        sizes, combo, hard = at_random(op, rng, chosen)
        yield from case("random", sizes, combo, hard=hard, label=f"#{number}")
    if level != "quick" and op.lengths:
        yield from case("long", {op.lengths[0]: 1030, **{x: 1030 for x in op.lengths[1:]}}, plain)
        yield from case("long", {op.lengths[0]: 2100, **{x: 70 for x in op.lengths[1:]}}, plain)
        yield from case("long", {**{x: 300 for x in op.lengths}, "batch": (36,)}, plain, label="more than ten thousand rows")
        yield from case("long", {**{x: 300 for x in op.lengths}, **dict.fromkeys(letters(op)[:1], 8), "batch": (36,)}, plain, label="more than 2^16 elements")
        for combo in telling:
            yield from case("long", {**{x: 300 for x in op.lengths}, "batch": (2,)}, combo)
        for hard in op.hard if len(op.lengths) == 1 else ():  # sums that have gone on for long are where few bits, or a limit, show
            yield from case("hard", {x: 390 for x in op.lengths}, plain, hard=hard)
        if op.stateful and "return_state" in chosen:  # states have no axis of time: only many sequences make many numbers
            yield from case("long", {**{x: 9 for x in op.lengths}, "batch": (400,)}, plain, label="many sequences")
    elif not op.lengths and level != "quick":
        for hard in op.hard:
            yield from case("hard", dict.fromkeys(letters(op)[:1], 300), plain, hard=hard)
        yield from case("long", {"batch": (10007,)}, plain, label="more than ten thousand rows")
        yield from case("long", {**dict.fromkeys(letters(op)[:1], 9), "batch": (8009,)}, plain, label="more than 2^16 elements")


def at_random(op: Op, rng: np.random.Generator, chosen: dict[str, tuple]) -> tuple[dict, dict, str]:
    """Sizes, a combination of choices, and in one of three a hard input."""
    sizes: dict[str, Any] = dict(op.sizes[int(rng.integers(len(op.sizes)))]) if op.sizes and rng.random() < 0.5 else {}
    together = int(rng.integers(1, 150))
    for letter in op.lengths:
        sizes[letter] = together if rng.random() < 0.5 else int(rng.integers(1, 150))
    sizes.setdefault("batch", ((), (), (2,), (3, 2))[int(rng.integers(4))])
    combo = {name: values[int(rng.integers(len(values)))] for name, values in chosen.items()}
    hard = list(op.hard)[int(rng.integers(len(op.hard)))] if op.hard and rng.random() < 0.33 else ""
    return sizes, combo, hard


class Refused(Exception):
    """A combination cannot be drawn."""


def _features(op: Op) -> Iterator[dict[str, int]]:
    """Sizes beside the lengths: each odd, single, a whole tile, beyond one of 8 and of 32; all alike, so that axes cannot be told apart."""
    for letter in letters(op):
        yield from ({letter: size} for size in (1, 3, 9, 16, 33, 34))
    if len(letters(op)) + len(op.lengths) > 1:
        yield dict.fromkeys(letters(op), 3)
        yield dict.fromkeys((*op.lengths, *letters(op)), 4)


def letters(op: Op) -> list[str]:
    """The sizes of a call that are neither lengths nor batch axes."""
    return [n for n, v in default_sizes(op).items() if type(v) is int and n not in op.lengths]


def without_heads(op: Op, seed: int, combos: list[dict], domain: Domain) -> Iterator[Case]:
    """One head, without the axis that would say so: two-dimensional inputs."""
    axes = {axis.rstrip("?") for array in op.contract.arrays for shape in array.shapes for axis in shape.axes if axis.endswith("?")}
    heads = {letter: 1 for letter in axes & default_sizes(op).keys()}
    if not heads:
        return
    for number, combo in enumerate(combos):
        sizes = domain.fit({**default_sizes(op), **heads, **dict.fromkeys(op.lengths, 11), "batch": ()})
        if sizes is None or any(sizes[letter] != 1 for letter in heads) or sizes["batch"] != ():
            return
        try:
            call = draw(op, np.random.default_rng([seed, number, 31]), sizes, combo)
        except (Refused, ValueError, IndexError, ZeroDivisionError):
            continue
        for array in op.contract.arrays:
            axis, name = array.shapes[0].heads, array.name.partition(".")[0]
            value = call.get(name)
            if axis is None or value is None:
                continue
            if array in op.contract.states and isinstance(value, tuple):
                parts = list(value)
                place = op.contract.states.index(array)
                parts[place] = np.squeeze(parts[place], axis)
                call[name] = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
            elif "." not in array.name:
                call[name] = np.squeeze(value, axis)
        yield Case(op.name, "shapes", f"one head without its axis, {described(op, sizes, call)}", call, sizes, recipe={"sizes": sizes, "combo": combo, "hard": ""})


def wide(op: Op, sizes: tuple[int, ...] = (32, 48, 64, 66, 80, 96, 128, 130, 260, 520, 1030)) -> Iterator[dict[str, Any]]:
    """Many features, heads or experts: what a block of threads, or two, or a tile, may have been written for, and beyond."""
    for letter in letters(op):
        yield from ({letter: size, "batch": ()} for size in sizes)


def _broadcast(op: Op, seed: int, middle: dict, combos: list[dict], domain: Domain, level: str) -> Iterator[Case]:
    """Every other shape of every array, and each array once for the whole batch, where the candidate's batch axes are free.

    With the most choices at first; with the fewest where there are several blocks of everything; and of a single step.
    """
    if "batch" not in default_sizes(op):
        return
    free = domain.batch is None and domain.batch_rank is None
    rounds: list[tuple[dict, tuple[int, ...], list[dict]]] = [(middle, (2,), combos)]
    if op.lengths and level != "quick":
        rounds += [(dict.fromkeys(op.lengths, 150), (2,), combos[::-1]), (dict.fromkeys(op.lengths, 1), (2,), combos)]
    if free:
        rounds += [(middle, (2, 3), combos)]
    for number, (lengths, batch, turns) in enumerate(rounds):
        seen: set[str] = set()
        for combo in turns:
            sizes = domain.fit({**default_sizes(op), **lengths, "batch": batch})
            if sizes is None or not affordable(op, sizes, level, options=combo):
                continue
            try:
                call = draw(op, np.random.default_rng([seed, len(seen), 5 + number]), sizes, combo)
                variants = list(reshaped(op, call))
            except (Refused, ValueError, IndexError, ZeroDivisionError):
                continue
            for _, label, varied in variants:
                if label not in seen and (free or "batch" not in label) and (len(batch) == 1 or "axis" in label):
                    seen.add(label)
                    name = ", ".join([label, described(op, sizes, varied)])
                    yield Case(op.name, "broadcast", name, varied, sizes, recipe={"sizes": sizes, "combo": combo, "hard": ""})


def _lengths(op: Op, level: str) -> Iterator[dict[str, int]]:
    if not op.lengths:
        yield {}
        return
    for T in _LENGTHS[level]:
        yield dict.fromkeys(op.lengths, T)
    if len(op.lengths) > 1:
        for a, b in _UNEQUAL[level]:
            yield {op.lengths[0]: a, op.lengths[1]: b}


_PRODUCTS = 1000  # operations within products of matrices take a thousandth of the time of others


def affordable(op: Op, sizes: dict, level: str, calls: int = 1, options: dict[str, Any] | None = None) -> bool:
    """Within a second or so of NumPy work for the truth, which takes that many calls; a cost with `**` is told the options, too."""
    alone = {k: v for k, v in sizes.items() if k != "batch"}
    batch = math.prod(sizes.get("batch", ()))
    cost, of_bound = next(iter(op.forms.values())).cost, op.bound_work(**alone, batch=batch) / _PRODUCTS if op.bound_work else 0.0
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(cost).parameters.values()):
        alone = {**(options or {}), **alone}
    try:
        work = cost(**alone, batch=batch).work
    except (TypeError, ZeroDivisionError, ValueError):
        return True
    return calls * max(work, of_bound) <= {"quick": 2e7, "standard": 2e8, "exhaustive": 2e9}[level]


def hard_call(op: Op, name: str, rng, sizes: dict, combo: dict, support: Support, domain: Domain) -> dict | None:
    """A chapter's hard input, with the combination's options where the input leaves them open.

    What makes the input hard is always in the call: an optional array that differs from the sample's is given.
    """
    before = copy.deepcopy(rng)
    try:
        given = op.hard[name](rng, **sizes)
    except (IndexError, ZeroDivisionError, ValueError):
        return None
    # zero times a negative number is -0, which some sort before 0
    given = {n: np.asarray(v + 0.0) if isinstance(v, np.ndarray) and v.dtype.kind in "fc" else v for n, v in given.items()}
    required, optional, defaults = parameters(op)
    changed = _changed(op, before, sizes, given)
    needed = {n for n in changed if n not in required and support.takes(n) and True in domain.options.get(n, (True,))}
    if changed and not needed and not changed & set(required):
        return None
    combo = {**combo, **dict.fromkeys(needed, True)}
    fixed = {k: v for k, v in given.items() if k in defaults}
    sampled = op.sample(copy.deepcopy(before), **sizes)
    for option, value in fixed.items():
        allowed = domain.options.get(option)
        usual = option in sampled and _same(value, defaults[option])  # what only this input names, it is about
        if (allowed is not None and not any(_same(value, a) for a in allowed)) or (allowed is None and not usual and not support.takes(option)):
            return None
    call = choose(op, given, sizes, {k: v for k, v in combo.items() if k not in fixed})
    return call | {k: v for k, v in fixed.items() if not _same(v, defaults[k])}


def _changed(op: Op, rng, sizes: dict, given: dict) -> set[str]:
    """The arrays in which a hard input differs from the sample; none if in all, which says nothing."""
    base = op.sample(rng, **sizes)
    arrays = [n for n, v in given.items() if n in base and v is not None and not np.isscalar(v)]
    changed = {n for n in arrays if not _equal(given[n], base[n])}
    return changed if len(changed) < len(arrays) else set()


def _equal(a, b) -> bool:
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(_equal, a, b))
    return np.array_equal(a, b, equal_nan=isinstance(a, np.ndarray) and a.dtype.kind in "fc")


def _scaled(value, power: int):
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_scaled(v, power) for v in value))
    return value * 2.0**power if value is not None else None


def repeated(call: dict) -> dict:
    """All batch entries alike, so that a stride of 0 can stand for them."""
    return {n: np.repeat(v[:1], v.shape[0], axis=0) if isinstance(v, np.ndarray) and v.ndim > 1 and v.shape[0] == 2 else v for n, v in call.items()}


def described(op: Op, sizes: dict, call: dict) -> str:
    """A call in words: sizes that are not the usual ones, optional arrays, options."""
    basic = default_sizes(op)
    shown = [f"{k}={v}" for k, v in sizes.items() if k in op.lengths or (v != basic.get(k) and (k != "batch" or v))]
    required = parameters(op)[0]
    for name, value in call.items():
        if name in required:
            continue
        if value is True:
            shown.append(name)
        elif isinstance(value, np.ndarray) or (isinstance(value, tuple) and hasattr(value, "_fields")):
            shown.append(name)
        else:
            shown.append(f"{name}={value!r}")
    return ", ".join(shown)


def recall(
    operator: str, id: str, *, dtype: str, level: str = "standard", seed: int = 0, keywords: list[str] | None = None, domain: Domain | None = None
) -> dict[str, Any]:
    """The call of a case by its id, in a precision: what a report's snippet draws again.

    Raises
    ------
    ValueError
        If there is no such case.
    """
    from refimpl.catalogue import operator as find
    from refimpl.conformance.precision import precision, rounded

    op = find(operator)
    support = Support(None if keywords is None else frozenset(keywords))
    for case in cases(op, level=level, seed=seed, support=support, domain=domain or Domain()):
        if case.id == id:
            call = rounded(op.contract, repeated(case.call) if case.view == "repeated" else case.call, precision(dtype))
            if call is not None:
                return call
    raise ValueError(f"recall: {operator} has no case {id!r} at level {level!r}, seed {seed}")
