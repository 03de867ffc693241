"""Vision Mamba's bidirectional scan: two selective scans over one sequence, one from each end, added.

    y = S(u) + R S'(R u),        (R u)_t = u_{T-1-t}                                                            (1)

An image has no direction. A causal scan of its patches hides the lower right corner from the upper left one; a second
scan, from the last patch to the first, with parameters of its own, sees what the first does not. As matrices of
`selective_scan` (its form `attention`), S is lower triangular and R S' R upper triangular, so that their sum relates
every patch to every other, still in linear time. A step's own input is in both, and counts twice.

Glossary
    S, S'       the two scans                              SSM, forward and backward, in [1, algorithm 1]
    backward    what S' has of its own                     its Δ, A, B, C and the output of its own short convolution

Where implementations differ
    [1] convolves each direction by a short `causal_conv1d` of its own first, so that u differs too, and gates both by the
    same z. A later version of its code halves the sum. Other vision models scan columns as well, or exchange halves of the
    channels: sums of the same kind.

References
    [1] L. Zhu, B. Liao, Q. Zhang, X. Wang, W. Liu and X. Wang, "Vision Mamba: efficient visual representation learning with
        bidirectional state space model", ICML 2024, section 3.3 and algorithm 1.
"""

import numpy as np

from refimpl.ops.state_space.selective_scan import CONTRACT, selective_scan

__all__ = ["bidirectional_scan"]


def bidirectional_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus=False, backward=None):
    """Selective scans from both ends, added: equation (1) of this module's docstring.

    Parameters
    ----------
    u, delta, A, B, C, D, z, delta_bias, delta_softplus
        As for `selective_scan`: what the scan from the first step reads.
    backward : mapping of str to ndarray, optional
        By argument name, what the scan from the last step reads in place of it; in the order of time, like the others.
        What is missing is shared by both.

    Returns
    -------
    y : ndarray, shape (..., T, c)

    Raises
    ------
    ValueError, TypeError
        As `selective_scan`, and if `backward` names an argument that it does not have.

    Notes
    -----
    Twice the cost of a scan, and its error: the sum of the errors of two, and a rounding. No step can be given out before
    the last was read, so there is no state to hand on.

    References
    ----------
    [1, algorithm 1] of the module's docstring.

    Examples
    --------
    A needle is seen from both sides, and twice from where it is:

    >>> import numpy as np
    >>> u, one = np.array([[0.0], [0.0], [1.0], [0.0]]), np.ones((4, 1))
    >>> bidirectional_scan(u, one, np.array([[-np.log(2)]]), B=one, C=one)[:, 0]
    array([0.25, 0.5 , 2.  , 0.5 ])
    """
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    given = dict(zip(names, (u, delta, A, B, C, D, z, delta_bias), strict=True))
    own = dict(backward or {})
    if unknown := own.keys() - given.keys():
        raise TypeError(f"bidirectional_scan: backward has no argument {min(unknown)!r}; the arguments are {', '.join(names)}")
    forwards = selective_scan(**given, delta_softplus=delta_softplus)
    from_the_end = selective_scan(**_reversed(given | own), delta_softplus=delta_softplus)
    return forwards + from_the_end[..., ::-1, :]


def _reversed(arguments):
    """The arguments with time, wherever an array has it, backwards."""
    given = {name: np.asarray(x) for name, x in arguments.items() if x is not None}
    return given | {name: np.flip(given[name], axis) for name, axis in CONTRACT.axis("T", **given).items()}
