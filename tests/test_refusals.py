"""A candidate may refuse by a rule that can be named; what it refuses without one leaves it unjudged."""

import pytest

import refimpl

HOW = {"dtypes": ["float32"], "level": "quick"}


def refusing(condition):
    def candidate(a, b, *, state=None, reverse=False, return_state=False):
        if condition(a=a, b=b, state=state, reverse=reverse, return_state=return_state):
            raise NotImplementedError("not this")
        return refimpl.linear_recurrence(a, b, state=state, reverse=reverse, return_state=return_state)

    return candidate


@pytest.mark.parametrize(
    ("condition", "rule"),
    [
        (lambda state, **_: state is not None, "state (it refuses)"),
        (lambda reverse, **_: reverse, "reverse=True (it refuses)"),
        (lambda reverse, **_: not reverse, "reverse=False (it refuses)"),
        (lambda a, **_: a.dtype.kind == "c", "complex arrays (it refuses)"),
        (lambda b, **_: b.shape[-2] == 0, "T = 0 (it refuses)"),
        (lambda b, **_: not b.flags.c_contiguous, "strides (it refuses)"),
        (lambda state, reverse, **_: reverse and state is not None, "reverse=True with state (it refuses)"),
        (lambda state, reverse, **_: reverse and state is None, "reverse=True with no state (it refuses)"),
    ],
)
def test_a_rule_is_named(condition, rule):
    report = refimpl.check("linear_recurrence", refusing(condition), **HOW)
    assert report.verdict == "conforms", str(report)
    assert rule in report.not_checked
    assert rule in str(report)


def test_a_rule_without_exceptions_comes_first():
    """Where nearly everything is refused, what is the same in all calls covers as much as the reason."""

    def one_column(A, B, dt, *, method="zoh"):
        if B.ndim == A.ndim:
            raise NotImplementedError("a matrix B")
        return refimpl.discretize(A, B, dt, method=method)

    report = refimpl.check("discretize", one_column, **HOW, domain=refimpl.Domain(options={"method": ["bilinear"]}))
    assert report.verdict == "conforms", str(report)
    assert "B of shape (n, m) (it refuses)" in report.not_checked


def test_a_precision_that_is_refused_is_named():
    report = refimpl.check("linear_recurrence", refusing(lambda b, **_: b.dtype.name in ("float64", "complex128")), level="quick")
    assert report.verdict == "conforms"
    assert "float64 (it refuses)" in report.not_checked


def test_a_few_values_are_named():
    report = refimpl.check("linear_recurrence", refusing(lambda a, **_: (a == 0).any()), **{**HOW, "level": "standard"})
    assert report.verdict == "conforms"
    assert any("decay exactly 0" in note and "values" in note for note in report.notes)


@pytest.mark.parametrize("condition", [lambda b, **_: b.shape[-2] > 20, lambda b, **_: b.sum() > 0, lambda **_: True])
def test_what_follows_no_rule_leaves_it_unjudged(condition):
    report = refimpl.check("linear_recurrence", refusing(condition), **HOW)
    assert report.verdict == "inconclusive"
    assert not report.ok


def test_sizes_are_declared():
    candidate = refusing(lambda b, **_: b.shape[-2] % 8)
    report = refimpl.check("linear_recurrence", candidate, **HOW, domain=refimpl.Domain(T=refimpl.multiple_of(8)))
    assert report.verdict == "conforms", str(report)


def test_an_unexpected_keyword_of_its_own_signature_is_an_error():
    def candidate(a, b, *, reverse=False):
        if reverse:
            raise TypeError("inner() got an unexpected keyword argument 'reverse'")
        return refimpl.linear_recurrence(a, b)

    assert refimpl.check("linear_recurrence", candidate, **HOW).verdict == "wrong"


def test_one_of_an_unknown_signature_is_a_refusal():
    def candidate(a, b, **options):
        if "reverse" in options:
            raise TypeError("inner() got an unexpected keyword argument 'reverse'")
        return refimpl.linear_recurrence(a, b, **options)

    report = refimpl.check("linear_recurrence", candidate, **HOW)
    assert report.verdict == "conforms"
    assert "reverse=True (it refuses)" in report.not_checked


def test_what_a_single_step_looks_like_is_no_exception():
    """A filter whose decay is constant in time takes any decay of one step."""
    constant = refusing(lambda a, **_: a.ndim > 1 and a.shape[-2] > 1 and not (a == a[..., :1, :]).all())
    report = refimpl.check("linear_recurrence", constant, **HOW)
    assert report.verdict == "conforms", str(report)
    assert "a of shape (T, c) (it refuses)" in report.not_checked


# -- sizes: a rule is found by trying, and what lies inside it is judged -------------------------------------------------


def of_sizes(condition, error=ValueError, factor=1.0):
    def candidate(a, b, *, state=None, reverse=False, return_state=False):
        if not condition(b.shape):
            raise error("unsupported sizes")
        return refimpl.linear_recurrence(a, b.dtype.type(factor) * b, state=state, reverse=reverse, return_state=return_state)

    return candidate


def power_of_two(size):
    return size > 0 and size & (size - 1) == 0


SIZES = [
    (lambda shape: shape[-2] % 64 == 0, "T other than multiples of 64", "T=refimpl.multiple_of(64)"),
    (lambda shape: shape[-2] % 8 == 0 and shape[-1] % 16 == 0, "c other than multiples of 16", "c=refimpl.multiple_of(16)"),
    (lambda shape: power_of_two(shape[-2]) and shape[-2] > 8, "T other than powers of two from 16", "T=[16, 32, 64,"),
    (lambda shape: shape[-1] in (64, 128), "c other than 64 and 128", "c=[64, 128]"),
    (lambda shape: shape[-1] in (64, 128) and len(shape) == 3, "c other than 64 and 128", "c=[64, 128]"),
]


@pytest.mark.parametrize(("condition", "rule", "said"), SIZES)
@pytest.mark.parametrize("error", [ValueError, NotImplementedError, RuntimeError], ids=lambda e: e.__name__)
def test_sizes_that_follow_a_rule_are_found(condition, rule, said, error):
    report = refimpl.check("linear_recurrence", of_sizes(condition, error), **HOW)
    assert report.verdict == "conforms", str(report)
    assert rule in str(report).splitlines()[2] and said in str(report)
    assert sum(c.status == "PASS" for c in report.cases) > 40
    report = refimpl.check("linear_recurrence", of_sizes(condition, error, 1.01), **HOW)
    assert report.verdict == "wrong", str(report)


ODD = [
    (lambda shape: shape[-2] <= 20, ValueError),
    (lambda shape: shape[-2] in (7, 64, 100, 128), ValueError),
    (lambda shape: shape[-1] <= 8, ValueError),
    (lambda shape: shape[-2] % 64 == 0, IndexError),
]


@pytest.mark.parametrize(("condition", "error"), ODD)
def test_sizes_that_follow_none_are_not_excused(condition, error):
    report = refimpl.check("linear_recurrence", of_sizes(condition, error), **HOW)
    assert report.verdict == "wrong", str(report)


def test_what_goes_wrong_by_accident_is_no_rule():
    def candidate(a, b):
        blocks = b.reshape(*b.shape[:-2], -1, 16, b.shape[-1])  # raises where 16 does not divide T
        return refimpl.linear_recurrence(a, blocks.reshape(b.shape))

    assert refimpl.check("linear_recurrence", candidate, **HOW).verdict == "wrong"


def test_as_many_values_as_keys_in_sizes_of_a_tile():
    def candidate(q, k, v):
        if q.shape[-1] not in (32, 64, 128) or v.shape[-1] != q.shape[-1] or q.shape[-2] % 64 or k.shape[-2] % 64:
            raise ValueError("unsupported sizes")
        return refimpl.attention(q, k, v)

    report = refimpl.check("attention", candidate, **HOW)
    assert report.verdict == "conforms", str(report)
    found = ", ".join(report.not_checked)
    assert all(words in found for words in ("n other than multiples of 64", "m other than multiples of 64", "d other than 32, 64 and 128", "e other than d"))


def test_what_a_signature_demands_is_given_or_named():
    """An option gets the contract's default; where an array is demanded, calls without it are a rule."""

    def rms_norm(x, weight, eps):
        return refimpl.rms_norm(x, weight, eps=eps)

    report = refimpl.check("rms_norm", rms_norm, **HOW)
    assert report.verdict == "conforms", str(report)
    assert "no weight (it refuses)" in report.not_checked and "eps" not in report.not_checked


def test_an_argument_that_nobody_knows_is_an_error():
    assert refimpl.check("rms_norm", lambda x, weight, width: refimpl.rms_norm(x, weight), **HOW).verdict != "conforms"


def test_one_who_answers_little_is_told_what_to_say():
    def capped(q, k, v, *, softcap=None, scale=None):
        if softcap is None or q.shape[:-2] != k.shape[:-2]:
            raise NotImplementedError("without a cap")
        return refimpl.attention(q, k, v, softcap=softcap, scale=scale)

    report = refimpl.check("attention", capped, **HOW)
    assert report.verdict == "inconclusive" and "softcap=None" in report.reason and "domain=" in report.reason, str(report)
