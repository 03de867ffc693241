"""The records in which a chapter states its operator: Op, Form, Cost, Law.

Every field is true of the mathematics and has at least two readers. Lists, tables, parametrisations and benchmark axes
are derived from these records; expected values never are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from refimpl.core.contract import Contract


@dataclass(frozen=True)
class Cost:
    """What one call costs, as numbers for given sizes: one with the required arrays only, and options at their defaults.

    `refimpl.complexity` counts the same on real runs, and says there what counts for how much. Formulas have the count's
    order of growth, and its leading constant within a factor of 1.5 (work) or 2 (depth, peak); those that a form names
    `exact` are the count itself.

    Attributes
    ----------
    work : float
        Floating-point operations; a multiply-add is two, a transcendental function is one.
    depth : float
        Length of the longest chain of dependent operations: the time on unboundedly many processors.
    peak : float
        The most elements alive at once, arguments excepted.
    """

    work: float
    depth: float
    peak: float


@dataclass(frozen=True)
class Form:
    """One algorithm for an operator.

    Attributes
    ----------
    function : callable
        Takes the operator's arguments, and block sizes as further keyword-only options.
    cost : callable
        ``cost(**sizes) -> Cost`` with sizes named by the contract's letters (and ``batch``, the product of batch axes).
    on_balls : bool
        Runs unchanged on object arrays of intervals.
    stops : str
        Where the form stops being valid ("|a| > 1", "non-finite data"); empty where it never does.
    stabilised : bool
        False for an equation as the textbook writes it, in true units: equal to the definition where it is finite, and its
        state is another (the same times e^m).
    exact : tuple of str
        Those of the cost's numbers ("work", "depth", "peak") that equal what is counted, at all sizes.
    """

    function: Callable
    cost: Callable[..., Cost]
    on_balls: bool = True
    stops: str = ""
    stabilised: bool = True
    exact: tuple[str, ...] = ()


@dataclass(frozen=True)
class Law:
    """A relation between calls of an operator, which every right implementation satisfies.

    Attributes
    ----------
    name : str
        What fails when the law fails: "causal", "hand_off".
    holds : callable
        ``holds(f, call, bound, rng)`` yields ``(what, got, want, tolerance)``, arrays of one shape. `f` is any
        implementation, `call` the arguments of a call by name, `bound(**call)` the error bound of its results. It yields
        nothing for a call that lacks an optional array it speaks of.
    arguments : tuple of str
        The arguments that it speaks of.
    """

    name: str
    holds: Callable
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Op:
    """An operator: everything that the rest of the project knows about it.

    Attributes
    ----------
    name, summary : str
    contract : Contract
        Shapes of arguments and results.
    forms : mapping of str to Form
        The first is the definition.
    gradient : callable or None
        The vjp, or None where the operator has no differentiable argument.
    sample : callable
        ``sample(rng, *, T=7, ..., batch=()) -> dict``: one well-conditioned call's arrays by name, all optional ones
        and a state included. Its keyword-only parameters are the letters of the sizes, its defaults a small call.
    options : mapping of str to tuple
        Values worth covering of each option, the default first. A callable value is called with the sizes by letter.
    hard : mapping of str to callable
        Named inputs at which implementations break: ``f(rng, **sizes) -> dict`` is a whole call (arrays and options).
    error_bound : callable
        ``error_bound(*arguments, unit, store=0.0, **options)``: |computed - exact|, elementwise, in the structure of
        the results, for arithmetic of unit roundoff `unit`. `store` is the unit roundoff to which implementations may
        round intermediate results that they keep in a half precision (0: they don't).
    references : tuple of str
        Keys of the chapter's reference list, with section or equation.
    lengths : tuple of str
        The letters of the sequence lengths, the first being the one along which a state is handed on.
    sizes : tuple of dict
        Combinations of sizes worth covering beyond the lengths: head ratios, wide or single features.
    laws : tuple of Law
    arrange : callable or None
        ``arrange(call) -> call``: a drawn call, its arrays made to fit its options where these exclude or reshape some.
    tangent : callable or None
        ``tangent(call) -> function``: what the gradient at `call` differentiates, where that is not the operator itself
        because its roundings are straight-through: the function equals the operator at `call`, and adds there constants
        where the operator rounds.
    bound_work : callable or None
        ``bound_work(**sizes, batch=1) -> number``: operations of `error_bound`, where products of matrices make it far
        dearer than the operator.
    """

    name: str
    summary: str
    contract: Contract
    forms: Mapping[str, Form]
    gradient: Callable[..., dict[str, Any]] | None
    sample: Callable[..., dict[str, Any]]
    error_bound: Callable
    references: tuple[str, ...]
    options: Mapping[str, tuple] = field(default_factory=dict)
    hard: Mapping[str, Callable] = field(default_factory=dict)
    lengths: tuple[str, ...] = ("T",)
    sizes: tuple[Mapping[str, Any], ...] = ()
    laws: tuple[Law, ...] = ()
    arrange: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    tangent: Callable[[dict[str, Any]], Callable] | None = None
    bound_work: Callable[..., float] | None = None

    @property
    def definition(self) -> Callable:
        """The defining form."""
        return next(iter(self.forms.values())).function

    @property
    def stateful(self) -> bool:
        return bool(self.contract.states)

    def __repr__(self) -> str:
        return f"<Op {self.name}: {', '.join(self.forms)}>"
