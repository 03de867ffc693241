"""Forms of the book against public implementations on the CPU: float32, one process, as many threads for both.

    OMP_NUM_THREADS=2 REFIMPL_NUM_THREADS=2 python asv_benchmarks/peers.py [linear_recurrence] [long_conv] [ssd] [--rounds 7]

Contestants take turns, so that whatever else the machine does falls on all of them; what is printed is the median of each
and its ratio to the peer's (below 1: ours is faster). The results are compared before anything is timed.
"""

import argparse
import statistics
import time

import numpy as np

import refimpl


def race(contestants, rounds, clock=time.perf_counter, summary=statistics.median):
    """Seconds of each function, run in turn: the median, or another summary, of rounds of which the first is not counted."""
    seconds = {name: [] for name in contestants}
    for round_ in range(rounds + 1):
        for name, run in contestants.items():
            start = clock()
            run()
            if round_:
                seconds[name].append(clock() - start)
    return {name: summary(s) for name, s in seconds.items()}


def same(name, got, want, bound):
    worst = float(np.max(abs(got - want) / bound))
    if worst > 2:
        raise SystemExit(f"{name}: the peer's result is {worst:.3g} bounds away; nothing was timed")


def linear_recurrence(rng, T=65536, c=1024):
    """Against jax.lax.scan and jax.lax.associative_scan."""
    import jax
    import jax.numpy as jnp

    a, b = rng.uniform(0.5, 1, (T, c)).astype("f4"), rng.standard_normal((T, c)).astype("f4")
    on_jax = jnp.asarray(a), jnp.asarray(b)

    def one_step(h, row):
        h = row[0] * h + row[1]
        return h, h

    scan = jax.jit(lambda a, b: jax.lax.scan(one_step, jnp.zeros(c, jnp.float32), (a, b))[1])
    tree = jax.jit(lambda a, b: jax.lax.associative_scan(lambda x, y: (y[0] * x[0], y[0] * x[1] + y[1]), (a, b))[1])
    op, few = refimpl.OPS["linear_recurrence"], slice(0, 200)
    bound = op.error_bound(a[few].astype("f8"), b[few].astype("f8"), unit=2.0**-24)
    same("jax.lax.scan", op.forms["in_place"].function(a[few], b[few]), np.asarray(scan(*on_jax))[few], bound)
    ours = {form: (lambda f=op.forms[form].function: f(a, b)) for form in ("sequential", "chunked", "in_place")}
    theirs = {
        "jax.lax.scan": lambda: scan(*on_jax).block_until_ready(),
        "jax.lax.associative_scan": lambda: tree(*on_jax).block_until_ready(),
    }
    return ours, theirs


def long_conv(rng, T=16384, c=512):
    """Against torch.fft, with time where it is here and, contiguous, where torch likes it."""
    import torch

    u, kernel = (rng.standard_normal((T, c)).astype("f4") for _ in range(2))

    def product(u, kernel, dim):
        spectrum = torch.fft.rfft(u, n=2 * T, dim=dim) * torch.fft.rfft(kernel, n=2 * T, dim=dim)
        return torch.fft.irfft(spectrum, n=2 * T, dim=dim).narrow(dim, 0, T)

    here = torch.from_numpy(u), torch.from_numpy(kernel)
    there = tuple(x.T.contiguous() for x in here)
    op = refimpl.OPS["long_conv"]
    norms = np.linalg.norm(u.astype("f8"), axis=0) * np.linalg.norm(kernel.astype("f8"), axis=0)  # transforms alone: the bound's last term
    same("torch.fft", op.forms["fft"].function(u, kernel), product(*here, 0).numpy(), 3 * 2.0**-24 * np.log2(4 * T) * norms)
    ours = {form: (lambda f=op.forms[form].function: f(u, kernel)) for form in ("fft", "overlap_add")}
    return ours, {"torch.fft (T, c)": lambda: product(*here, 0), "torch.fft (c, T)": lambda: product(*there, 1)}


def ssd(rng, H=16, T=2048, p=64, n=64, chunk=64):
    """Against products of blocks in torch, as the paper's short listing has them: diagonal blocks, states, carries, reading."""
    import torch

    x, dt = rng.standard_normal((1, H, T, p)).astype("f4"), rng.uniform(0.001, 0.1, (1, H, T)).astype("f4")
    A, B, C = -rng.uniform(1, 8, H).astype("f4"), *(rng.standard_normal((1, 1, T, n)).astype("f4") for _ in range(2))
    X, steps, keys, queries = (torch.from_numpy(v) for v in (x, dt, B, C))
    rates = torch.from_numpy(A)[None, :, None]
    X, keys, queries = X * steps[..., None], keys.expand(1, H, T, n).contiguous(), queries.expand(1, H, T, n).contiguous()
    logs = steps * rates
    within = torch.ones(chunk, chunk).tril().bool()

    def blocks():
        cut = lambda v: v.reshape(1, H, T // chunk, chunk, *v.shape[3:])
        xs, ks, qs, sums = cut(X), cut(keys), cut(queries), cut(logs).cumsum(-1)
        L = torch.where(within, sums[..., :, None] - sums[..., None, :], -torch.inf).exp()
        y = torch.einsum("bhkln,bhksn,bhkls,bhksp->bhklp", qs, ks, L, xs)
        ends = torch.einsum("bhkln,bhkl,bhklp->bhknp", ks, (sums[..., -1:] - sums).exp(), xs)
        carry, entering = torch.zeros_like(ends[:, :, 0]), []
        for k in range(T // chunk):
            entering.append(carry)
            carry = sums[:, :, k, -1].exp()[..., None, None] * carry + ends[:, :, k]
        return (y + torch.einsum("bhkln,bhknp,bhkl->bhklp", qs, torch.stack(entering, 2), sums.exp())).reshape(1, H, T, p)

    op = refimpl.OPS["ssd"]
    call = x, dt, A, B, C
    few = (x[:, :, :128], dt[:, :, :128], A, B[:, :, :128], C[:, :, :128])
    bound = 16 * op.error_bound(*(v.astype("f8") for v in few), unit=2.0**-24)  # its decays are differences of running sums
    same("four products", op.forms["chunked"].function(*few), blocks().numpy()[:, :, :128], bound)
    return {"chunked": lambda: op.forms["chunked"].function(*call)}, {"four products in torch": blocks}


CONTESTS = {f.__name__: f for f in (linear_recurrence, long_conv, ssd)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operator", nargs="*", help=f"of {', '.join(CONTESTS)}; all by default")
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    if unknown := set(asked.operator) - set(CONTESTS):
        parser.error(f"no contest is called {min(unknown)!r}; there are {', '.join(CONTESTS)}")
    for name in asked.operator or CONTESTS:
        ours, theirs = CONTESTS[name](np.random.default_rng(0))
        seconds = race(ours | theirs, asked.rounds)
        for form in ours:
            ratios = ", ".join(f"{seconds[form] / seconds[peer]:.2f} of {peer} ({seconds[peer]:.4f} s)" for peer in theirs)
            print(f"{name}, {form}: {seconds[form]:.4f} s, {ratios}", flush=True)


if __name__ == "__main__":
    main()
