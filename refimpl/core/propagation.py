"""How rounding errors travel through a nonlinear recurrence: the analysis behind the bounds of RNNs.

    s_t = F_t(s_{t-1}),      e_t = J_t e_{t-1} + δ_t,      |δ_t| <= local_t,      J_t = dF_t/ds                            (1)

to first order. Worst cases propagate by |J|, and grow like the spectral radius of |J|, which for a matrix of mixed signs is
up to √d times that of J: useless after some steps. Errors of mixed signs propagate by J, and their covariance, if each δ is
taken to be independent, is

    Σ_t = J_t Σ_{t-1} J_tᵀ + diag(local_t²)                                                                            (2)

The bound is the smaller of the worst case and eight standard deviations of (2), where `local` already is a bound and not a
deviation.

References
    N. J. Higham and T. Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41(5), 2019.
"""

import numpy as np

DEVIATIONS = 8


class Propagation:
    """E_t of (1), step by step.

    Parameters
    ----------
    first : ndarray, shape (..., p)
        |e_{-1}|, zeros for a state that is given exactly.

    Examples
    --------
    >>> error = Propagation(np.array([0.0]))
    >>> [error.step(np.array([[0.5]]), np.array([1.0])).item() for _ in range(3)]
    [1.0, 1.5, 1.75]
    """

    def __init__(self, first: np.ndarray):
        self._eye = np.eye(first.shape[-1], dtype=first.dtype)
        self._worst, self._covariance = first, self._eye * (first**2)[..., None, :]

    def step(self, J: np.ndarray, local: np.ndarray) -> np.ndarray:
        """The error after a step with J_t (..., p, p) and local_t (..., p)."""
        self._worst = (abs(J) @ self._worst[..., None])[..., 0] + local
        self._covariance = J @ self._covariance @ np.swapaxes(J, -1, -2) + self._eye * (local**2)[..., None, :]
        variance = (self._covariance * self._eye).sum(axis=-1)
        enough = variance > np.finfo(variance.dtype).tiny / np.finfo(variance.dtype).eps  # else the squares have underflowed
        return np.where(enough, np.minimum(self._worst, DEVIATIONS * np.sqrt(variance)), self._worst)
