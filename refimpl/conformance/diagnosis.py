"""What the mistake is: the known mistake whose results the candidate's equal wherever that mistake shows.

Every mutant of the operator is run on failing and on passing cases. It is named if each failing case gives the mutant's
results, and if it would pass what the candidate passes. Two mistakes at once are named where each shows by itself in some
cases, or where a mutant with both gives the candidate's results. What explains some failures and not others is said to be
alike there, and no more. A legitimate variant that explains everything makes the verdict "deviates".
"""

import itertools
from dataclasses import dataclass

from refimpl.conformance.likeness import OTHER, SAME, SILENT, UNKNOWN, Evidence, likeness
from refimpl.conformance.mutants import Mutant, mutants, together
from refimpl.conformance.relations import relations
from refimpl.op import Op

_FAILING, _PASSING = 20, 40  # cases looked at
_GLANCE = 6  # failing cases, the cheap half, that decide whether a mistake is looked at further
_LARGE = 60_000  # elements of a case that is not looked at where there are others
_NAMES = 3  # mistakes that no case tells apart
_EXCEPTIONS = 0.1  # of the failing cases
_ALIKE = 0.4  # of the failing cases: from there on a mistake is said to be alike
_AGAINST = 0.2  # of the passing cases
_PARTNERS = 4  # mistakes that are tried together with every other


def explain(op: Op, evidence: list[Evidence]) -> tuple[list[str], str]:
    """Sentences, best explanation first, and the legitimate variants, joined by " and ", that explain every failure, if any do."""
    failing, passing = chosen(evidence)
    if not failing:
        return [], ""
    table = _Table(op)
    results, gradients = ([e for e in failing if (e.cotangents is None) == plain] for plain in (True, False))
    fine, fine_gradients = ([e for e in passing if (e.cotangents is None) == plain] for plain in (True, False))
    sentences, found = _named(table, [m for m in mutants(op.name) if not m.of_gradient], results, fine, "")
    if gradients and not (found and all(any(table(m, e) in (SAME, UNKNOWN) for m in found) for e in gradients)):
        more, of_gradient = _named(table, list(mutants(op.name)), gradients, fine_gradients + fine, "its gradient " if results else "")
        sentences += [s for s in more if s not in sentences]
        found = (found or not results) and of_gradient and [*found, *of_gradient]
    variants = _variants(table, [m for m in mutants(op.name) if m.variant], failing, passing)
    if found and not any(m.variant for m in found) and any(table(m, e) == OTHER for m in mutants(op.name) if m.name in variants for e in fine):
        variants = []
    sentences.sort(key=lambda s: not any(f"`{v}`" in s for v in variants))
    return sentences + relations(op, failing, passing), " and ".join(variants)


def chosen(evidence: list[Evidence]) -> tuple[list[Evidence], list[Evidence]]:
    """Failing and passing cases to look at: of every kind, of middling size first."""
    found: list[list[Evidence]] = []
    for failed, most in ((True, _FAILING), (False, _PASSING)):
        of = [e for e in evidence if e.failed == failed]
        of = [e for e in of if e.elements < _LARGE] or sorted(of, key=lambda e: e.elements)[:3]
        kinds: dict[tuple, list[Evidence]] = {}
        for e in sorted(of, key=lambda e: max(e.elements / 1000, 1000 / (e.elements + 1))):
            kinds.setdefault(e.kind, []).append(e)
        rounds = itertools.chain.from_iterable(itertools.zip_longest(*kinds.values()))
        found.append(list(itertools.islice((e for e in rounds if e is not None), most)))
    return found[0], found[1]


class _Table:
    """How every mistake and case compare, each computed once."""

    def __init__(self, op: Op):
        self.op = op
        self.known: dict[tuple[int, int], str] = {}

    def __call__(self, mutant: Mutant, e: Evidence) -> str:
        key = id(mutant), id(e)
        if key not in self.known:
            self.known[key] = likeness(self.op, mutant, e)
        return self.known[key]

    def explains(self, mutant: Mutant, failing: list[Evidence], passing: list[Evidence]) -> bool:
        """Whether a mistake gives the candidate's results in every failing case, and passes what the candidate passes.

        Hard inputs, at which the mistake in other hands loses other digits, may be exceptions where they are few.
        """
        found = [self(mutant, e) for e in failing]
        exceptions = self.exceptions(mutant, failing)
        if found.count(SILENT) + found.count(OTHER) > len(exceptions) or len(exceptions) > _EXCEPTIONS * len(failing):
            return False
        return 2 * found.count(SAME) >= len(failing) and not any(self(mutant, e) == OTHER for e in passing)

    def exceptions(self, mutant: Mutant, failing: list[Evidence]) -> list[Evidence]:
        """Hard inputs at which the candidate's results are others than a mistake's."""
        return [e for e in failing if e.case.startswith("hard[") and self(mutant, e) in (OTHER, SILENT)]


def _named(table: _Table, candidates: list[Mutant], failing: list[Evidence], passing: list[Evidence], whose: str) -> tuple[list[str], list[Mutant]]:
    """Sentences about these failures, and the mistakes that explain them all."""
    if not failing:
        return [], []
    cheap = sorted(failing, key=lambda e: e.elements)
    glance = cheap[: len(cheap) // 2 + 1 : max(1, len(cheap) // (2 * _GLANCE))]
    more = {e.kind: e for e in reversed(cheap) if e.kind not in {g.kind for g in glance}}
    worth = [m for m in candidates if _may_explain(table, m, glance, [*more.values(), cheap[-1]])]
    some = {id(m): sum(table(m, e) == SAME for e in failing) if m in worth else 0 for m in candidates}
    candidates = sorted((m for m in candidates if some[id(m)]), key=lambda m: -some[id(m)])
    whole = [m for m in candidates if table.explains(m, failing, passing)]
    if whole:
        best = [m for m in whole if some[id(m)] == some[id(whole[0])]]
        best.sort(key=lambda m: m.variant)
        besides = {m.name: table.exceptions(m, failing) for m in best}
        but = {name: f", except in {', '.join(e.case for e in cases)}" if cases else "" for name, cases in besides.items()}
        return [f"{whose}matches `{m.name}`{but[m.name]}: {m.says}" for m in best[:_NAMES]], best[:1]
    pair = _pair(table, candidates, failing, passing)
    if pair:
        return [f"{whose}matches `{a.name}`, together with `{b.name}`: {a.says}" for a, b in (pair, pair[::-1])], list(pair)
    return _alike(table, candidates, failing, passing, whose), []


def _may_explain(table: _Table, mutant: Mutant, glance: list[Evidence], more: list[Evidence]) -> bool:
    """Whether a mistake explains one of a few cheap cases; or shows in none of them, and explains one of another kind, or the largest."""
    found = [table(mutant, e) for e in glance]
    return SAME in found or (OTHER not in found and any(table(mutant, e) == SAME for e in more))


# -- two mistakes at once ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Share:
    """How many failing cases are one mistake's alone, the other's alone, and show both."""

    first: int
    second: int
    mixed: int


def _pair(table: _Table, candidates: list[Mutant], failing: list[Evidence], passing: list[Evidence]) -> tuple[Mutant, Mutant] | None:
    """Two mistakes that explain the failures together."""
    for a in candidates[:_PARTNERS]:
        left = [e for e in failing if table(a, e) in (OTHER, SILENT)]
        for b in mutants(table.op.name):
            if b is a or b.of_gradient != a.of_gradient:
                continue
            both = _joined(a, b)
            if both is not None and all(table(both, e) in (SAME, UNKNOWN) for e in left) and table.explains(both, failing, passing):
                return a, b
    found: list[tuple] = []
    for a, b in itertools.combinations(candidates[: 3 * _PARTNERS], 2):
        share = _apart(table, a, b, failing)
        if share is None or _joined(a, b) is not None or any(OTHER in (table(a, e), table(b, e)) for e in passing):
            continue
        found.append((share.mixed, -share.first - share.second, len(found), (a, b)))
    return min(found)[-1] if found else None


def _apart(table: _Table, a: Mutant, b: Mutant, failing: list[Evidence]) -> _Share | None:
    """Two mistakes in cases that show one of them, or both; None where these are not the candidate's."""
    first = second = mixed = 0
    for e in failing:
        found = {table(a, e), table(b, e)}
        if found == {SILENT} or found == {OTHER, SILENT}:
            return None
        if found <= {SAME, SILENT, UNKNOWN}:
            first += table(a, e) == SAME and table(b, e) != SAME
            second += table(b, e) == SAME and table(a, e) != SAME
        else:
            mixed += 1
    return _Share(first, second, mixed) if min(first, second) >= 2 and mixed <= first + second else None


_JOINED: dict[tuple[str, ...], Mutant | None] = {}


def _joined(a: Mutant, b: Mutant) -> Mutant | None:
    """A mutant that makes both mistakes; None where they cannot be made in one function."""
    key = a.operator, *sorted((a.name, b.name))
    if key not in _JOINED:
        _JOINED[key] = together(a, b)
    return _JOINED[key]


# -- what explains some cases only -------------------------------------------------------------------------------------


def _alike(table: _Table, candidates: list[Mutant], failing: list[Evidence], passing: list[Evidence], whose: str) -> list[str]:
    """The mistake that explains most failures, with where it does and where it does not."""
    for m in candidates:
        same, not_same = ([e for e in failing if (table(m, e) == SAME) == yes] for yes in (True, False))
        against = [e for e in passing if table(m, e) == OTHER]
        if len(same) < max(2, _ALIKE * len(failing)) or len(against) > _AGAINST * len(passing):
            continue
        if not_same:
            contrast = f"but not {_what_tells(same, not_same) or 'in others'} ({not_same[0].case})"
        else:
            contrast = f"but this passes cases that it would fail ({against[0].case})"
        return [f"{whose}is like `{m.name}` in {len(same)} of {len(failing)} failures ({same[0].case}), {contrast}: {m.says}"]
    return []


def _what_tells(some: list[Evidence], others: list[Evidence]) -> str:
    """An option, an array or a hard input that all the other cases have and none of these, in words."""
    common = set.intersection(*(set(e.kind[2:]) for e in others)) - set.union(*(set(e.kind[2:]) for e in some))
    return f"with {sorted(common)[0]}" if common else ""


def _variants(table: _Table, variants: list[Mutant], failing: list[Evidence], passing: list[Evidence]) -> list[str]:
    """Few legitimate variants of which each failure is one or the other; empty where some failure is none.

    A variant that many passing cases speak against, and more than speak for it, is not what the candidate computes.
    """
    explained = {m.name: {i for i, e in enumerate(failing) if table(m, e) == SAME} for m in variants}
    against = {m.name: sum(table(m, e) == OTHER for e in passing) for m in variants if explained[m.name]}
    explained = {name: cases for name, cases in explained.items() if cases and against[name] <= max(len(cases), _AGAINST * len(passing))}
    left, names = set(range(len(failing))), []
    while left:
        name = max(explained, key=lambda n: len(explained[n] & left), default=None)
        if name is None or not explained[name] & left:
            return []
        names.append(name)
        left -= explained.pop(name)
    return names
