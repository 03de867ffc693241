"""State space models: linear systems in continuous time, sampled, and what becomes of them when they may choose.

One recurrence runs through this part and the one before it, h_t = a_t h_{t-1} + b_t, in four lives: a recurrence, a
convolution, a scan, a product with a matrix. Here is the way from x' = A x + B u to Mamba-2, a step a paragraph; every
step asserts that what it says is equal is equal, and names the chapter that says why.

>>> import numpy as np
>>> from refimpl import OPS, discretize, discretize_diagonal, linear_recurrence, long_conv, selective_scan, ssd, ssm, ssm_kernel
>>> rng = np.random.default_rng(0)
>>> def agree(*sides):
...     return all(np.allclose(sides[0], side, rtol=1e-12, atol=1e-12) for side in sides)

*Time is cut into steps* (`discretize`). A system of n states for each of c channels, x' = A x + B u, y = C x, becomes
x_t = Ā x_{t-1} + B̄ u_t. A diagonal A is discretised elementwise (`discretize_diagonal`), and that is the same:

>>> T, c, n, dt = 48, 3, 4, 0.1
>>> A, B, C, u = -rng.uniform(1, 9, (c, n)), rng.normal(size=(c, n)), rng.normal(size=(c, n)), rng.normal(size=(T, c))
>>> A_bar, B_bar = discretize_diagonal(A, B, dt)
>>> dense = discretize(A[:, :, None] * np.eye(n), B, dt)
>>> agree(dense[0], A_bar[:, :, None] * np.eye(n)) and agree(dense[1], B_bar)
True

*First life, the recurrence* (`ssm`). Elementwise it is a `linear_recurrence` of c·n lanes, h_t = a h_{t-1} + b_t, read by C:

>>> y = ssm(u, A_bar, B_bar, C)
>>> lanes = linear_recurrence(A_bar.ravel(), (B_bar * u[:, :, None]).reshape(T, c * n)).reshape(T, c, n)
>>> agree(y, (C * lanes).sum(axis=-1))
True

*Second life, the convolution* (`ssm_kernel`, `long_conv`, and `s4_kernel` for a matrix that is not diagonal). Nothing
changes in time, so the answer to one impulse says all:

>>> K = ssm_kernel(A_bar, B_bar, C, T)
>>> agree(y, long_conv(u, K), OPS["ssm"].forms["convolution"].function(u, A_bar, B_bar, C))
True

*Third life, the scan* (`linear_recurrence`). Steps compose, (a', b') ∘ (a, b) = (a' a, a' b + b'), so all prefixes come in
log T rounds:

>>> agree(y, OPS["ssm"].forms["scan"].function(u, A_bar, B_bar, C))
True

*Fourth life, the matrix.* The convolution is a product with a Toeplitz matrix, lower triangular, M_ts = K_{t-s}:

>>> delay = np.arange(T)[:, None] - np.arange(T)
>>> M = np.where(delay[:, :, None] >= 0, K[abs(delay)], 0)
>>> agree(y, np.einsum("tsc,sc->tc", M, u))
True

*The system may choose* (`selective_scan`, Mamba). Now dt, B and C depend on the input. As long as they are held, it is still
the system above (with the input map dt B that Mamba's code has):

>>> B, C = B[:1], C[:1]  # shared by all channels
>>> y = ssm(u, *discretize_diagonal(A, B, dt, method="mamba"), C)
>>> held = selective_scan(u, np.full((T, c), dt), A, np.repeat(B, T, axis=0), np.repeat(C, T, axis=0))
>>> agree(y, held)
True

Let go, there is no kernel any more, and the second life ends. The recurrence, the scan and the matrix live on, for the
decays exp(dt_t A) may change as they like if only they do not depend on h:

>>> dt, B, C = rng.uniform(0, 0.5, (T, c)), rng.normal(size=(T, n)), rng.normal(size=(T, n))
>>> y = selective_scan(u, dt, A, B, C)
>>> agree(y, *(OPS["selective_scan"].forms[form].function(u, dt, A, B, C) for form in ("associative", "chunked", "attention")))
True
>>> decays, inputs = np.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, None, :]
>>> lanes = linear_recurrence(decays.reshape(T, c * n), inputs.reshape(T, c * n)).reshape(T, c, n)
>>> agree(y, (lanes * C[:, None, :]).sum(axis=-1))
True

*One rate a head* (`ssd`, Mamba-2). If all states and channels of a head share a rate and a step, c matrices become one,
L ∘ C Bᵀ, a masked attention with queries C, keys B and a decay in place of a softmax:

>>> rate, step = -0.7, dt[:, 0]
>>> y = selective_scan(u, np.repeat(step[:, None], c, axis=1), np.full((c, n), rate), B, C)
>>> agree(y, ssd(u, step, np.array([rate]), B, C))
True
>>> elapsed = np.cumsum(step)[:, None] - np.cumsum(step)
>>> L = np.where(delay >= 0, np.exp(rate * np.where(delay >= 0, elapsed, 0)), 0)
>>> agree(y, (L * (C @ B.T)) @ (step[:, None] * u))
True
>>> agree(y, *(OPS["ssd"].forms[form].function(u, step, np.array([rate]), B, C) for form in ("quadratic", "chunked")))
True

and whatever of that matrix lies below the diagonal, and would have to be carried across a cut, has rank n: the n numbers
of a channel's state, which is how the recurrence came to need no more:

>>> int(np.linalg.matrix_rank((L * (C @ B.T))[T // 2 :, : T // 2])) == n
True

The ends of the thread: `lssl` puts the first two steps together, `bidirectional_scan` runs Mamba from both ends, `lru` and
`rg_lru` are the recurrence without a system behind it, and linear attention is `ssd` by other names.
"""
