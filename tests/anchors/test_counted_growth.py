"""How work and depth of recurrences and convolutions grow, counted on real runs, against what the literature says of them.

Blelloch (1990), section 1.4: a scan in O(T) work and O(log T) depth; Hillis and Steele (1986): T log T and log T; a convolution
by transforms: T log T; Dao and Gu (2024), section 6: chunks in O(T).
"""

import math

import pytest

from refimpl.complexity import fit, measure

LINEAR, QUADRATIC, T_LOG_T, LOG_T = (1, 0), (2, 0), (1, 1), (0, 1)


@pytest.mark.parametrize(
    ("op", "form", "work", "depth"),
    [
        ("linear_recurrence", "sequential", LINEAR, LINEAR),
        ("linear_recurrence", "hillis_steele", T_LOG_T, LOG_T),
        ("linear_recurrence", "blelloch", LINEAR, LOG_T),
        ("linear_recurrence", "in_place", LINEAR, LINEAR),
        ("long_conv", "direct", QUADRATIC, LINEAR),
        ("long_conv", "fft", T_LOG_T, LOG_T),
        ("hyena", "direct", QUADRATIC, LINEAR),
        ("hyena", "fft", T_LOG_T, LOG_T),
        ("ssd", "recurrent", LINEAR, LINEAR),
        ("ssd", "chunked", LINEAR, LINEAR),
    ],
)
def test_growth(op, form, work, depth):
    found = fit(op, form)
    assert (found.work.order, found.depth.order) == (work, depth), str(found)


def test_the_dual_form_of_ssd_is_quadratic():
    assert fit("ssd", "quadratic").work.power == 2


@pytest.mark.parametrize("T", [64, 100, 1024, 1500])
def test_blelloch_takes_fewer_than_two_compositions_a_step_in_two_sweeps(T):
    """A composition is two products and a sum; each of the 2 log2 T levels of both sweeps is a product and a sum deep."""
    counts = measure("linear_recurrence", "blelloch", T=T, c=1)
    assert counts.work < 6 * T + 2 * T
    assert counts.depth <= 2 * 2 * math.ceil(math.log2(T)) + 2


@pytest.mark.parametrize("T", [64, 1024])
def test_hillis_and_steele_take_log_rounds(T):
    """Round r composes T - 2^r pairs; so 3 (T log2 T - T + 1) operations for powers of two, and two to absorb the state."""
    counts = measure("linear_recurrence", "hillis_steele", T=T, c=1)
    rounds = int(math.log2(T))
    assert counts.work - 3 * (T * rounds - T + 1) in range(5)
    assert 2 * rounds <= counts.depth <= 2 * rounds + 2
