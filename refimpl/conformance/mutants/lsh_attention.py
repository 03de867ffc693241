"""Mistakes in LSH attention."""

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.attention import lsh_attention as lsh


def _mutant(name, says, form, *edits, **more):
    return Mutant("lsh_attention", name, says, edited(form, *edits), **more)


MUTANTS = (
    _mutant(
        "keys_not_normalised",
        "keys are not normalised: the contract scores q·k/|k|",
        lsh.lsh_attention,
        ("    return factor * (qk @ _normalised(qk).mT)", "    return factor * (qk @ qk.mT)"),
    ),
    _mutant(
        "scale_left_out",
        "scores are not scaled; the contract's scale is 1/√d (one public port leaves it out)",
        lsh.lsh_attention,
        ("    factor = 1 / sqrt_of(qk.shape[-1], qk) if scale is None else constant(scale, qk)\n    return", "    factor = 1.0 if scale is None else constant(scale, qk)\n    return"),
        variant=True,
    ),
    _mutant(
        "attends_to_itself",
        "a position attends to itself although it meets others; the contract allows that only where there is nothing else",
        lsh.lsh_attention,
        ("    return others | (self_ & ~others.any(axis=-1, keepdims=True))", "    return allowed"),
    ),
    _mutant(
        "never_itself",
        "a position that meets nothing gives 0; the contract lets it attend to itself",
        lsh.lsh_attention,
        ("    return others | (self_ & ~others.any(axis=-1, keepdims=True))", "    return others"),
    ),
    _mutant(
        "no_chunk_before",
        "a chunk sees only itself; the contract also shows it the chunk before",
        lsh.lsh_attention,
        ("(behind == 0) | (behind == 1)", "behind == 0"),
    ),
    _mutant(
        "chunk_after",
        "a chunk sees the one after it instead of the one before",
        lsh.lsh_attention,
        ("(behind == 0) | (behind == 1)", "(behind == 0) | (behind == -1)"),
    ),
    _mutant(
        "other_buckets_seen",
        "neighbours in sorted order attend to each other across buckets; only equal buckets may",
        lsh.lsh_attention,
        ("(bucket_q[..., :, None] == bucket_k[..., None, :]) & near", "(bucket_q[..., :, None] >= -1) & (bucket_k[..., None, :] >= -1) & near"),
    ),
    _mutant(
        "rounds_averaged",
        "rounds are averaged; the contract merges them by their log-sum-exps",
        lsh.lsh_attention,
        ("logs.append(np.broadcast_to(lse, o.shape[:-1]))", "logs.append(np.broadcast_to(0 * lse, o.shape[:-1]))"),
    ),
    _mutant(
        "one_sided_hash",
        "the bucket is argmax of x R alone; the contract's is of [x R, -x R]",
        lsh.lsh_attention,
        ("np.argmax(np.concatenate([x, -x], axis=-1), axis=-1)", "np.argmax(x, axis=-1)"),
    ),
    _mutant(
        "not_sorted_back",
        "results are left in sorted order",
        lsh.lsh_attention_chunked,
        ("np.take_along_axis(o, back[..., None], axis=-2)", "np.take_along_axis(o, order[..., None], axis=-2)"),
    ),
    _mutant(
        "grad_norm_forgotten",
        "the gradient stops at the normalised key: it lacks the projection and the division by |k|",
        lsh.lsh_attention_vjp,
        ("through = (dk - k * (k * dk).sum(axis=-1, keepdims=True)) / np.where(norm == 0, np.ones_like(norm), norm)", "through = dk"),
        of_gradient=True,
    ),
    _mutant(
        "grad_of_query_only",
        "qk receives the gradient of the query alone; it is also the key",
        lsh.lsh_attention_vjp,
        ("factor * (ds @ k) + np.where(norm == 0, np.zeros_like(through), through)", "factor * (ds @ k)"),
        of_gradient=True,
    ),
    _mutant(
        "grad_counts_rounds_once",
        "a pair that meets in several rounds is counted once in the gradient",
        lsh.lsh_attention_vjp,
        ("weight = count * np.exp(hidden - top)", "weight = (count > 0) * np.exp(hidden - top)"),
        of_gradient=True,
    ),
)
