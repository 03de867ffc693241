"""LSSL, the linear state space layer: a continuous system, discretised, and run as a recurrence or as a convolution.

    x' = A x + B u,    y = C x + D u        ->        (Ā, B̄) = discretize(A, B, dt),    y = ssm(u, Ā, B̄, C, D)       (1)

The layer that came before S4 [1], and the composition that every state space model after it is a special way to compute:
one input sequence for each channel, a system for it (A often from `hippo`, for all channels), and a step dt of its own,
which says how fast the channel's time runs. Doubling dt is playing the sequence at twice the speed. The three readings
of [1, section 3.1] are the chapter's asserted equalities: continuous (a step can be cut in two: a law of `discretize`),
recurrent and convolutional (the forms of `ssm`). It was slow, for Ā is dense: T c n² work for the recurrence or, for the
convolution, powers of a matrix. `s4_kernel` takes a basis in which that costs T + n; `selective_scan` takes A diagonal,
and lets dt, B and C depend on the input.

Where implementations differ
    [1] discretises by the bilinear method with an α that it leaves open, trains dt and, in one variant, A; its layers have
    several outputs for each channel (C of shape (m, n)), then a nonlinearity and a mix of the channels.

References
    [1] A. Gu, I. Johnson, K. Goel, K. Saab, T. Dao, A. Rudra and C. Ré, "Combining recurrent, convolutional, and
        continuous-time models with linear state-space layers", NeurIPS 2021, sections 2.2 and 3.1.
"""

import numpy as np

from refimpl.ops.state_space.discretize import discretize
from refimpl.ops.state_space.ssm import ssm

__all__ = ["lssl"]


def lssl(u, A, B, C, D=None, *, dt, method="bilinear", state=None, return_state=False):
    """Linear state space layer: `discretize`, then `ssm`, equation (1) of this module's docstring.

    Parameters
    ----------
    u : ndarray, shape (..., T, c)
        Input, real.
    A : ndarray, shape (n, n) or (c, n, n)
        State matrix of the continuous system, for all channels or for each.
    B : ndarray, shape (n,) or (c, n)
        Input map, likewise.
    C : ndarray, shape (c, n)
        Output map; a first axis of 1 is shared.
    D : ndarray, shape (c,), optional
        Skip connection.
    dt : float or ndarray, shape (c,)
        Step.
    method : {"bilinear", "zoh", "backward_euler", "euler", "mamba"}
        As for `discretize`.
    state : ndarray, shape (..., c, n), optional
        x before the first step; 0 by default.
    return_state : bool
        Also return the last x, to go on from.

    Returns
    -------
    y : ndarray, shape (..., T, c)
    state : ndarray, shape (..., c, n), only with `return_state`

    Raises
    ------
    ValueError, TypeError
        As `discretize` and `ssm`, in whose names the messages are.

    Notes
    -----
    The cost and the error are those of `ssm` with a dense matrix, where the errors of Ā and B̄ count as changes of the
    system. The convolution is ``refimpl.OPS["ssm"].forms["convolution"]`` of the same Ā and B̄.

    References
    ----------
    [1] of the module's docstring.

    Examples
    --------
    A memory of the mean: HiPPO's first coefficient of a constant, once it has been seen for long enough.

    >>> import numpy as np
    >>> from refimpl import hippo
    >>> A, B = hippo("legs", 4)
    >>> y = lssl(np.ones((200, 1)), A, B, C=np.eye(1, 4), dt=0.1)
    >>> y[[0, 9, 199], 0].round(3)
    array([0.095, 0.632, 1.   ])
    """
    A, B, dt = (np.asarray(x) for x in (A, B, dt))
    A_bar, B_bar = discretize(A if A.ndim == 3 else A[None], B if B.ndim == 2 else B[None], dt, method=method)
    return ssm(u, A_bar, B_bar, C, D, state=state, return_state=return_state)
