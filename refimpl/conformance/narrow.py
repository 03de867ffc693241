"""Sizes that a candidate raises on: the rule that they follow, found by trying.

Chunked kernels want lengths that are multiples of a block, tensor cores heads of 64 or 128 features. Who says so with
`domain` is tried inside it; who says nothing, and raises, is asked at a few dozen sizes. Where the answers follow a rule that
kernels have, multiples of a number, powers of two, or for features a few sizes that are multiples of 8, all cases are drawn
inside it, and the report says at its top what was not checked. Anything else is no rule: a function that takes only short
sequences, or only those that it gets right, is left to `weigh`.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from refimpl.conformance.cases import choose, default_sizes
from refimpl.conformance.domain import ALIKE, multiple_of
from refimpl.conformance.invoke import Answer
from refimpl.conformance.precision import Precision, rounded
from refimpl.conformance.trial import Trial

_LENGTHS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 31, 32, 33, 48, 63, 64, 65, 80, 96, 127, 128, 129, 192, 255, 256, 257, 320, 384, 512)
_FEATURES = (1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 24, 32, 34, 40, 48, 64, 66, 72, 80, 96, 128, 130, 160, 192, 256)
_GLANCE = (9, 34)  # features that a kernel of tiles does not take
_KNOWN = 4  # lengths that must be taken for a rule to be one
_FRIENDLY = ((128, 64), (128, 128), (128, 32), (256, 64), (64, 16))  # lengths and features that most kernels take
_POWERS = tuple(2**i for i in range(13))
ACCIDENTS = (  # what says that a program went wrong, not that it declines
    "IndexError", "KeyError", "ZeroDivisionError", "UnboundLocalError", "NameError", "AttributeError", "OverflowError", "FloatingPointError", "LinAlgError",
    "cannot reshape", "could not be broadcast", "could not broadcast", "not aligned", "core dimension", "must match the size", "shape mismatch",
    "must match exactly", "equal division", "don't multiply up", "is invalid for input of size", "shapes cannot be multiplied", "incompatible shapes", "setting an array element",
)  # fmt: skip


def declines(answer: Answer) -> bool:
    """Whether a call was turned down: an exception that does not look like an accident."""
    return answer.status == "NOT_APPLICABLE" or (answer.status == "ERROR" and not any(sign in answer.message for sign in ACCIDENTS))


def friendly(trial: Trial) -> Iterator[dict[str, int]]:
    """Sizes at which a kernel of blocks and tiles may run: the usual ones first."""
    yield {}
    for length, width in _FRIENDLY:
        yield dict.fromkeys(_features(trial), width) | dict.fromkeys(trial.op.lengths, length)


def narrow(trial: Trial, to: Precision, base: dict[str, int], combo: dict[str, Any]) -> None:
    """Find rules of size around a call that works, keep to them from here on, and say so in the report."""
    found: dict[str, tuple[Any, str]] = {}
    free = [letter for letter in trial.op.lengths if letter not in trial.domain.sizes]
    if base and free:
        rule = _rule({size: _ask(trial, to, base | dict.fromkeys(free, size), combo) for size in _LENGTHS}, features=False)
        odd = {letter: _ask(trial, to, base | {letter: base[letter] - 1}, combo) for letter in free}
        found |= {letter: rule for letter in free if rule is not None and odd[letter] is not True}
    for letter in _features(trial):
        if base or any(_ask(trial, to, {letter: size}, combo) is False for size in _GLANCE):
            asked = _widths(trial, to, base, letter, combo)
            rule = _rule(asked, features=True)
            found |= {letter: rule} if rule is not None else {}
    for letter in [other for other in dict(trial.domain.equal) if other in found]:
        del found[letter]
    for letter, (rule, words) in found.items():
        trial.domain.keep_to(letter, rule)
        said = f"refimpl.{rule!r}" if isinstance(rule, multiple_of) else repr(rule)
        trial.report.not_checked.append(f"{letter} other than {words} (it raises; domain=Domain({letter}={said}) says so)")


def _widths(trial: Trial, to: Precision, base: dict[str, int], letter: str, combo: dict[str, Any]) -> dict[int, bool | None]:
    """Which sizes of a letter are taken; if but one is, which are where another size that may have to be the same is the same."""
    asked = {size: _ask(trial, to, base | {letter: size}, combo) for size in _FEATURES}
    before = trial.domain.equal
    for pair in ALIKE:
        if sum(map(bool, asked.values())) > 1 or pair[1] != letter or pair[0] not in _features(trial):
            continue
        trial.domain.equal = (*before, pair)
        rest = {other: size for other, size in base.items() if other != pair[0]}
        together = {size: _ask(trial, to, rest | {letter: size}, combo) for size in _FEATURES}
        if sum(map(bool, together.values())) > 1:
            trial.report.not_checked.append(f"{pair[0]} other than {letter} (it raises)")
            return together
        trial.domain.equal = before
    return asked


def _features(trial: Trial) -> list[str]:
    """Letters of features, of which kernels make tiles: not heads, groups or experts, nor what must be as another."""
    letters = [n for n, v in default_sizes(trial.op).items() if type(v) is int and n.islower() and n not in trial.op.lengths]
    return [n for n in letters if n not in trial.domain.sizes and n not in dict(trial.domain.equal)]


def _ask(trial: Trial, to: Precision, sizes: dict[str, Any], combo: dict[str, Any]) -> bool | None:
    """Whether a call of these sizes is answered; None where there is no such call, or it goes wrong in another way."""
    fitted = trial.domain.fit({**default_sizes(trial.op), **sizes})
    if fitted is None or any(fitted[letter] != size for letter, size in sizes.items()):
        return None
    try:
        call = rounded(trial.op.contract, choose(trial.op, trial.op.sample(np.random.default_rng(0), **fitted), fitted, combo), to)
    except (ValueError, TypeError, IndexError, ZeroDivisionError):
        return None
    if call is None:
        return None
    answer = trial.subject.call(call)
    return True if answer.status == "OK" else False if declines(answer) else None


def _rule(asked: dict[int, bool | None], features: bool) -> tuple[Any, str] | None:
    """The rule that these answers follow, and its words; None where none is refused, or they follow none."""
    taken, refused = ([size for size, answer in asked.items() if answer is yes] for yes in (True, False))
    if not taken or not refused or (None in asked.values() and len(taken) + len(refused) < 0.7 * len(asked)):
        return None
    factor = math.gcd(*taken)
    if factor > 1 and len(taken) >= (2 if features else _KNOWN) and all(size % factor for size in refused):
        return multiple_of(factor), f"multiples of {factor}"
    powers = [p for p in _POWERS if min(taken) <= p]
    if len(taken) >= _KNOWN and set(taken) <= set(powers) and not set(refused) & set(powers):
        return powers, f"powers of two{f' from {powers[0]}' if powers[0] > 1 else ''}"
    if features and factor % 8 == 0 and max(taken) >= 16:
        return taken, f"{', '.join(map(str, taken[:-1]))}{' and ' if taken[1:] else ''}{taken[-1]}"
    return None
