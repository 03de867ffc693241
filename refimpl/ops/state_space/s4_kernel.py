"""The S4 kernel: the convolution kernel of a system that is diagonal plus low rank, by Cauchy sums.

A memory such as HiPPO needs a matrix that no well-conditioned basis diagonalises; but A = V (Λ - P Pᴴ) Vᴴ with a unitary V
(`nplr`), and in the basis of V the kernel of the system, discretised by the bilinear rule with step Δ, is

    A = diag(Λ) - P Pᴴ,    Ā = (I - Δ/2 A)⁻¹ (I + Δ/2 A),    B̄ = (I - Δ/2 A)⁻¹ Δ B                       (1)
    K_k = Re(C Ā^k B̄),        k = 0 ... L-1                                                              (2)

Powers of Ā cost n² operations a row. S4 [1, section 3] never forms them: it takes the kernel's generating function, cut off
after L terms, at the roots of unity z^L = 1, where the transform of K is

    K̂(z) = Σ_k C Ā^k B̄ z^k = C̃ (I - z Ā)⁻¹ B̄,        C̃ = C (I - Ā^L)                                     (3)
         = Δ C̃ (D(z) + s P Pᴴ)⁻¹ B,    D(z) = 1 - z - s Λ,    s = (1 + z) Δ/2                              (4)

(multiply by I - Δ/2 A). D is diagonal, so Woodbury's identity leaves sums Σ_n x_n y_n / D_n(z), Cauchy's kernel:

    K̂(z) = Δ (C̃ D⁻¹ B - s C̃ D⁻¹ P (I + s Pᴴ D⁻¹ P)⁻¹ Pᴴ D⁻¹ B)                                          (5)

and an inverse transform gives K: L n products in place of L n².

Glossary
    Lambda, P, B, C   system in the basis of V         Λ, P (= Q), B, C ([1], algorithm 1)
    dt                step                             Δ
    length            rows of the kernel               L

Where implementations differ
    S4 trains C̃ in place of C, so its code has no Ā^L; here C is C, and does not come conjugated (some code holds conj(C)).
    All n eigenvalues are given here; code that keeps one of each conjugate pair takes twice the real part, and must do so in
    (5) before the division, since pairs meet in P Pᴴ. The paper divides (4) by (1 + z)/2, which has a pole at z = -1; (4) has none.

References
    [1] A. Gu, K. Goel and C. Ré, "Efficiently modeling long sequences with structured state spaces", ICLR 2022, section 3,
        algorithm 1 and appendix C.3.
    [2] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, sections 3.5, 9.3 and 24.1.
"""

import numpy as np

from refimpl.core import linalg
from refimpl.core.contract import Contract
from refimpl.core.costs import fft_depth, fft_work, log2_ceil
from refimpl.core.numerics import constant, pi_of
from refimpl.laws import linear
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.state_space import discretize as bilinear
from refimpl.ops.state_space.hippo import nplr


def _check(arguments, sizes):
    """A length that is not there, because only shapes or precision are asked about, is not looked at."""
    if np.iscomplexobj(arguments.get("dt")):
        raise ValueError(f"s4_kernel: dt must be real, got dtype {arguments['dt'].dtype}")
    if "length" in arguments:
        length = arguments["length"]
        if isinstance(length, bool) or not isinstance(length, int | np.integer) or length < 0:
            raise ValueError(f"s4_kernel: length must be an integer of at least 0, got {length!r}")
        sizes["L"] = int(length)


CONTRACT = Contract("s4_kernel", takes="Lambda (n); P (n) | (n, r); B (n); C (n); dt ()", gives="K (L)", check=_check)


@CONTRACT.form
def s4_kernel(Lambda, P, B, C, dt, length):
    """Kernel of a diagonal plus low-rank state space model, equations (1) and (2), a power at a time.

    Parameters
    ----------
    Lambda : ndarray, shape (n,)
        All eigenvalues of the normal part; the real parts should be negative.
    P : ndarray, shape (n,) or (n, r)
        The low-rank part: A = diag(Lambda) - P Pᴴ.
    B, C : ndarray, shape (n,)
        Input and output map, C neither conjugated nor multiplied by I - Ā^L. All four real or complex.
    dt : float or ndarray, shape ()
        Step, real.
    length : int
        Rows of the kernel.

    Returns
    -------
    K : ndarray, shape (length,)
        Real.

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, an array is not numeric, dt is complex, I - dt/2 A has no inverse, or `length` is not an
        integer of at least 0.

    Notes
    -----
    11 n³ + 8 L n² operations. K_k is off by a few (n + k) u of ‖C‖ ‖Ā‖^k ‖B̄‖; see ``error_bound``.

    References
    ----------
    [1] of the module's docstring, equations (3)-(5).

    Examples
    --------
    One eigenvalue, and no correction: (1 - dt/2)/(1 + dt/2) = 1/3 is left at every step.

    >>> import numpy as np
    >>> s4_kernel(np.array([-1 + 0j]), np.array([0j]), np.array([2 + 0j]), np.array([1 + 0j]), 1.0, 3).round(6)
    array([1.333333, 0.444444, 0.148148])
    """
    A_bar, x = bilinear.discretize(_dense(Lambda, P), B, dt, method="bilinear")
    rows = []
    for _ in range(length):
        rows.append((C * x).sum())
        x = A_bar @ x
    return np.stack(rows).real if rows else (C * x).real[:0]


@CONTRACT.form
def s4_kernel_cauchy(Lambda, P, B, C, dt, length):
    """The same by (3)-(5): Cauchy sums at the roots of unity, then an inverse transform.

    8 n³ log2 L operations for C Ā^L, which code that trains C̃ saves, then 8 (r + 1)² L n and a transform. What cancels
    in 1 - Ā^L where little decays in L steps is multiplied by (1 - Ā)⁻¹: the error grows with the memory.
    """
    if length == 0:
        return (Lambda * P.T * B * C * dt).real[..., :0].reshape(0)
    P = _columns(P)
    A_bar, _ = bilinear.discretize(_dense(Lambda, P), B, dt, method="bilinear")
    C = C - C @ np.linalg.matrix_power(A_bar, length)  # C̃
    z = np.exp(-2j * pi_of(dt) * constant(np.arange(length), dt) / length)  # (L,)
    s = (1 + z) * dt / 2
    D = 1 - z[:, None] - s[:, None] * Lambda  # (L, n)
    left = np.stack([C + 0 * D[0], *(np.conj(P).T + 0 * D[0])])  # (1 + r, n)
    right = np.stack([B + 0 * D[0], *(P.T + 0 * D[0])], axis=-1)  # (n, 1 + r)
    sums = (left / D[:, None, :]) @ right  # (L, 1 + r, 1 + r), every Cauchy sum
    M = np.eye(P.shape[-1], dtype=sums.dtype) + s[:, None, None] * sums[:, 1:, 1:]
    corrected = s[:, None] * (sums[:, :1, 1:] @ linalg.solve(M, sums[:, 1:, :1]))[..., 0]  # (L, 1)
    return np.fft.ifft(dt * (sums[:, 0, 0] - corrected[:, 0])).real


@CONTRACT.gradient
def s4_kernel_vjp(dy, Lambda, P, B, C, dt, length):
    """Gradient of `s4_kernel`: the adjoint of the recurrence, then of the discretisation. With x_k = Ā^k B̄, backwards,

        g_k = conj(C) dK_k + Āᴴ g_{k+1},    dB̄ = g_0,    dĀ = Σ_{k>=1} g_k x_{k-1}ᴴ,    dC = Σ_k dK_k conj(x_k)

    (dĀ, dB̄) go through `discretize` to dA, dB, dΔ; and A = diag(Λ) - P Pᴴ gives dΛ = diag(dA), dP = -(dA + dAᴴ) P.

    Parameters
    ----------
    dy : ndarray, shape (length,)
        Cotangent of K.

    Returns
    -------
    dict
        "Lambda", "P", "B", "C", "dt".
    """
    A, columns = _dense(Lambda, P), _columns(P)
    A_bar, B_bar = bilinear.discretize(A, B, dt, method="bilinear")
    x = [B_bar]
    for _ in range(length - 1):
        x.append(A_bar @ x[-1])
    g, dA_bar, dC = 0 * B_bar, 0 * A_bar, 0 * B_bar * np.conj(C)
    for k in reversed(range(length)):
        if k < length - 1:
            dA_bar = dA_bar + g[:, None] * np.conj(x[k])
            g = np.conj(A_bar).T @ g
        g = np.conj(C) * dy[k] + g
        dC = dC + dy[k] * np.conj(x[k])
    # where A is real and C complex, say, the discretisation's gradient must not drop imaginary parts: B may be complex
    through = bilinear.discretize_vjp((dA_bar, g), A + 0 * g, B + 0 * g, dt, method="bilinear")
    dA = through["A"]
    dP = -(dA + np.conj(dA).T) @ columns
    return {"Lambda": np.diagonal(dA), "P": dP.reshape(P.shape), "B": through["B"], "C": dC, "dt": through["dt"]}


def error_bound(Lambda, P, B, C, dt, length, *, unit, store=0.0):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`.

    Powers: (1 + √n) u times the condition of I - Δ/2 A for the solve [2, section 9.3], what the roundings of A do to it, and
    (2 + √n) u a product (sums of n round like √n), each carried to step k by the norms of the powers of Ā [2, section 3.5]. Transform: at every z, each Cauchy term is off by
    (8 + 2 √n) u of itself and 2 u (2 + Δ|Λ|) / |D|, carried through (5); C̃ by the error of Ā^L, times the resolvent; the
    mean over z of all that reaches every K_k, with 3 log2(4L) u ‖K‖ of the transform [2, section 24.1]. Operands kept
    in a half precision add `store`, to the powers only.
    """
    Lambda, P, B, C, dt = map(np.asarray, (Lambda, P, B, C, dt))
    if length == 0:
        return abs(C * B)[:0]
    P, n = _columns(P), Lambda.shape[-1]
    A = _dense(Lambda, P)
    A_bar, B_bar = bilinear.discretize(A, B, dt, method="bilinear")
    M = np.eye(n, dtype=A.dtype) - dt / 2 * A
    inverse = _spectral(linalg.solve(M, np.eye(n, dtype=A.dtype)))
    of_A = (P.shape[-1] + 3) * unit * (abs(Lambda).max(initial=0) + _norm(P) ** 2) * abs(dt) / 2 * inverse
    solved = ((1 + np.sqrt(n)) * unit + store) * inverse * _spectral(M) + of_A
    off_A, off_B = solved * (1 + _spectral(A_bar)), solved * _norm(B_bar)
    powers, states, power = [np.ones_like(off_A)], [_norm(B_bar)], A_bar
    for _ in range(length):
        powers.append(_spectral(power))
        states.append(_norm(power @ B_bar))
        power = A_bar @ power
    a, x, c = np.stack(powers), np.stack(states), _norm(C)  # (L + 1,)
    k = np.arange(length)
    rounding = ((2 + np.sqrt(n)) * unit + store / 64) * np.maximum(a[1:2], a[:1])
    spread = np.convolve(a, x)[:length]  # Σ ‖Ā^i‖ ‖Ā^j B̄‖ over i + j = k
    before = np.concatenate([0 * spread[:1], spread[:-1]])
    by_powers = c * (off_A * before + off_B * a[:-1] + rounding * spread + (n * unit + 2 * store) * x[:-1])
    of_last = (off_A + rounding) * np.convolve(a, a)[length - 1] + 4 * unit * (1 + a[-1])
    return by_powers + _transform_bound(Lambda, P, B, C - C @ np.linalg.matrix_power(A_bar, length), dt, c * of_last, unit, k)


def _transform_bound(Lambda, P, B, C, dt, off_C, unit, k):
    """Errors of (5) and of the transform, the same for every k. C is C̃, off_C its error in norm."""
    L, n, r = len(k), len(Lambda), P.shape[-1]
    z = np.exp(-2j * pi_of(abs(dt)) * k / L)
    s = (1 + z) * dt / 2
    D = 1 - z[:, None] - s[:, None] * Lambda  # (L, n)
    G = (np.conj(P).T / D[:, None, :]) @ P  # (L, r, r)
    inverse = linalg.solve(np.eye(r) + s[:, None, None] * G, np.eye(r, dtype=G.dtype))
    Q = (P @ inverse) * s[:, None, None]  # (L, n, r)
    resolved = (B - (Q @ ((np.conj(P).T / D[:, None, :]) @ B)[..., None])[..., 0]) / D  # (L, n)
    size = 1 / abs(D)
    off = unit * (8 + 2 * np.sqrt(n) + 2 * (2 + abs(dt * Lambda)) * size) * size  # (L, n)
    s, inverse, P, B, C = abs(s)[:, None, None], abs(inverse), abs(P), abs(B)[:, None], abs(C)
    sums = lambda x, w, y: (x * w[:, None, :]) @ y
    row, off_row = sums(C, size, P) @ inverse * s, sums(C, off, P) @ inverse * s  # (L, 1, r)
    column, off_column = sums(P.T, size, B), sums(P.T, off, B)  # (L, r, 1)
    core = s * sums(P.T, off, P) + (4 + r) * unit * (np.eye(r) + s * sums(P.T, size, P))
    off_sums = sums(C, off, B) + off_row @ column + row @ off_column + row @ core @ inverse @ column + (4 + r) * unit * row @ column
    off_z = abs(dt) * (off_sums[:, 0, 0] + off_C * np.sqrt((abs(resolved) ** 2).sum(axis=-1)))
    values = dt * (resolved * C).sum(axis=-1)
    return off_z.mean() + 3 * np.log2(4 * L) * unit * np.sqrt((abs(values) ** 2).mean())


# -- what the forms share --------------------------------------------------------------------------------------------


def _columns(P):
    """(n,) or (n, r) -> (n, r)."""
    return P[:, None] if P.ndim == 1 else P


def _dense(Lambda, P):
    """A of (1)."""
    P, n = _columns(P), Lambda.shape[-1]
    return Lambda * (np.arange(n)[:, None] == np.arange(n)) - P @ np.conj(P).T


def _norm(x):
    return np.sqrt((abs(x) ** 2).sum())


def _spectral(x):
    """The largest singular value (of which float64 knows enough), in the precision of x."""
    return constant(np.linalg.norm(np.asarray(x, dtype=np.complex128), 2) if x.size else 0.0, abs(x))


# -- laws ------------------------------------------------------------------------------------------------------------


def _time_scale(f, call, bound, rng):
    """Everything four times as fast, for a quarter of the step: Ā stays, B̄ is a quarter."""
    fast = {**call, "Lambda": 4 * call["Lambda"], "P": 2 * call["P"], "dt": call["dt"] / 4}
    yield "K of a faster system", 4 * f(**fast), f(**call), 2 * bound(**call)


def _basis(f, call, bound, rng):
    """A change of the phases of the basis changes nothing: P and B turn with it, C against it."""
    turn = rng.choice(np.array([1, 1j, -1, -1j]), len(call["Lambda"]))
    P = (call["P"].T * turn).T
    turned = {**call, "P": P, "B": turn * call["B"], "C": np.conj(turn) * call["C"]}
    turned = {n: v.astype(np.result_type(call[n], np.complex64)) if n in ("P", "B", "C") else v for n, v in turned.items()}
    yield "K in another basis", f(**turned), f(**call), 2 * bound(**call)


def _conjugate(f, call, bound, rng):
    """The conjugate of a system has the conjugate kernel, of the same real part."""
    yield (
        "K of the conjugate",
        f(**{n: np.conj(v) if n in ("Lambda", "P", "B", "C") else v for n, v in call.items()}),
        f(**call),
        2 * bound(**call),
    )


def _prefix(f, call, bound, rng):
    """The first rows do not depend on how many follow."""
    half = {**call, "length": call["length"] // 2}
    yield "K of half the length", f(**half), f(**call)[: half["length"]], bound(**call)[: half["length"]] + bound(**half)


# -- the record ------------------------------------------------------------------------------------------------------


def _sample(rng, *, L=7, n=4, r=2, matrix=False, batch=()):
    """Eigenvalues, not in pairs, that decay and turn; P so large that it matters. There are no batch axes: `batch` changes nothing."""

    def normal(*shape):
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / np.sqrt(2)

    return {
        "Lambda": -rng.uniform(0.3, 1.5, n) + 1j * np.sort(rng.uniform(-3, 3, n)),
        "P": 1.4 * (normal(n, r) / np.sqrt(max(r, 1)) if matrix else normal(n)) / np.sqrt(max(n, 1)),
        "B": normal(n),
        "C": normal(n),
        "dt": np.asarray(rng.uniform(0.2, 0.6)),
        "length": L,
    }


def _with(**changes):
    """A hard call: the sample, with some arrays replaced."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {name: np.asarray(change(rng, call[name])) for name, change in changes.items()}

    return draw


def _legs(rng, **sizes):
    call = _sample(rng, **sizes)
    Lambda, P, B, _ = nplr("legs", len(call["Lambda"]))
    return call | {"Lambda": Lambda, "P": P[:, 0], "B": B, "dt": np.asarray(1 / 16)}


def _real(rng, v):
    return v.real.copy()


def _dense_cost(n, L=7, r=1, batch=1, **_):
    return Cost(
        32 * n**3 / 3 + 24 * n * n + L * (8 * n * n + 8 * n - 2), 8 * n + L + L * log2_ceil(n), max(12 * n * n + 4 * n, 2 * L + 3 * n * n)
    )


def _cauchy_cost(n, L=7, r=1, batch=1, matrix=True, **_):
    r = r if matrix else 1
    sums = 8 * L * n * ((1 + r) ** 2 + 4) + 40 * L * r**3
    return Cost(
        (10 + 8 * log2_ceil(L)) * n**3 + sums + 2 * fft_work(L),
        8 * n + (1 + log2_ceil(n)) * (log2_ceil(L) + 2) + 5 + fft_depth(L),
        2 * L * (n * (3 + r) + (1 + r) ** 2) + 4 * n * n,
    )


OPS = (
    Op(
        name="s4_kernel",
        summary="K_k = Re(C Ā^k B̄) of a diagonal plus low-rank system, directly and by Cauchy sums (S4)",
        contract=CONTRACT,
        forms={
            "dense": Form(s4_kernel, _dense_cost),
            "cauchy": Form(
                s4_kernel_cauchy,
                _cauchy_cost,
                on_balls=False,
                stops="Re Λ >= 0: a root of unity may meet an eigenvalue, where D = 0",
            ),
        },
        gradient=s4_kernel_vjp,
        sample=_sample,
        hard={
            "HiPPO-LegS": _legs,
            "hardly any decay": _with(Lambda=lambda rng, v: v.real / 64 + 1j * v.imag, P=lambda rng, P: P / 8),
            "no low-rank part": _with(P=lambda rng, P: 0 * P),
            "a large low-rank part": _with(P=lambda rng, P: 4 * P),
            "equal eigenvalues": _with(Lambda=lambda rng, v: 0 * v + v[:1]),
            "short steps": _with(dt=lambda rng, dt: dt / 64),
            "long steps": _with(dt=lambda rng, dt: dt * 16),
            "a real system": _with(Lambda=_real, P=_real, B=_real, C=_real),
        },
        error_bound=error_bound,
        references=("gu2022s4, section 3, algorithm 1", "higham2002, sections 3.5, 9.3, 24.1"),
        lengths=("L",),
        sizes=({"n": 1}, {"matrix": True}, {"matrix": True, "r": 1, "n": 3}, {"n": 24}, {"matrix": True, "r": 3, "n": 2}),
        laws=(
            linear(CONTRACT, "B"),
            linear(CONTRACT, "C"),
            Law("time_scale", _time_scale, ("Lambda", "P", "dt")),
            Law("change_of_basis", _basis, ("P", "B", "C")),
            Law("conjugate", _conjugate, ("Lambda", "P", "B", "C")),
            Law("prefix", _prefix, ("Lambda",)),
        ),
    ),
)
