"""Block-sparse attention: of a sparse pattern, only the blocks that hold anything.

    o_i = Σ_{j in J(I)} p_ij v_j,    J(I) = the keys of all blocks that some query of block I may see             (1)

Equation (3) of `attention`, summed over fewer terms: a key outside J(I) is hidden from every query of the block I, and has
weight 0. Which blocks these are is decided before any product (`block_map`, from the mask, the window and causality); the
keys and values of J(I) are then gathered and take part in one softmax, as in a dense problem of that size. With a pattern of
w visible keys a query the work is O(n w) where `dense` takes O(n m), so for windows, global tokens and random blocks it
grows in proportion to the length. Nothing is approximated.

The form `tiled` skips masked blocks as well, with a running maximum where this form gathers; here the layout is a thing of
its own, fixed before the data, as it is in the kernels for patterns of that kind.

Glossary
    rows, keys    a block of queries, and the blocks of keys that it sees
    layout        the map of blocks                          "layout" in Triton's and OpenAI's blocksparse kernels

References
    [1] R. Child, S. Gray, A. Radford, I. Sutskever, "Generating long sequences with sparse transformers", 2019, section 5.4.
    [2] M. Zaheer et al., "Big Bird: transformers for longer sequences", NeurIPS 2020, appendix D (blockified attention).
"""

import numpy as np

from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import masked_matmul
from refimpl.core.options import positive_int
from refimpl.op import Cost, Form
from refimpl.ops.attention import attention as chapter
from refimpl.ops.attention.masks import block_map

__all__ = ["attention_block_sparse"]


@chapter.CONTRACT.form
@np.errstate(all="ignore")
def attention_block_sparse(
    q,
    k,
    v,
    *,
    causal=False,
    offset=None,
    window=None,
    mask=None,
    bias=None,
    scale=None,
    softcap=None,
    sink=None,
    return_lse=False,
    block_q=64,
    block_k=64,
):
    """Softmax attention from the blocks that hold an allowed pair, equation (1); `attention` has the arguments.

    Equal to `dense`, since what is left out has weight 0 there. Products, exponentials and sums are formed for visible
    blocks only; the layout costs one look at every element of the mask, and none where there is no mask.

    Parameters
    ----------
    block_q, block_k : int
        Sizes of a block. Small ones fit the pattern better, large ones make larger products.

    Examples
    --------
    >>> import numpy as np
    >>> from refimpl import attention, sliding_window_mask
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 100, 4))
    >>> mask = sliding_window_mask(100, window=(9, 0))
    >>> bool(np.allclose(attention_block_sparse(q, k, v, mask=mask, block_q=10, block_k=10), attention(q, k, v, mask=mask)))
    True
    """
    positive_int("attention", "block_q", block_q)
    positive_int("attention", "block_k", block_k)
    q, k, v, sink, pairs = chapter.prepare(q, k, v, causal, offset, window, mask, bias, scale, softcap, sink)
    o, lse = chapter._per_head(_head, (q, k, v, sink), pairs, block_q, block_k)
    return chapter._finish(o, lse, return_lse)


def _head(q, k, v, sink, pairs, block_q, block_k):
    """One head: q (n, d), k (m, d), v (m, e), sink (1, 1)."""
    layout = (
        None
        if pairs.mask is None or q.shape[-2] == 0
        else block_map(np.broadcast_to(pairs.mask, (q.shape[-2], k.shape[-2])), block_q, block_k)
    )
    blocks = chapter.blocks(0, k.shape[-2], block_k)
    o, lse = [], []
    for i, rows in enumerate(chapter.blocks(0, q.shape[-2], block_q) or [slice(0, 0)]):
        in_window = _in_window(pairs, rows, blocks)
        visible = [keys for j, keys in enumerate(blocks) if in_window[j] and (layout is None or layout[i, j])] or [slice(0, 0)]
        tiles = [chapter.scores(chapter.products(q[rows], k[keys], pairs), pairs, rows, keys) for keys in visible]
        s = np.concatenate(tiles, axis=-1)  # (block_q, keys of all visible blocks)
        p, log, _ = chapter._softmax(s, sink)
        o.append(masked_matmul(p, np.concatenate([v[keys] for keys in visible]), s))
        lse.append(log)
    return np.concatenate(o), np.concatenate(lse)


def _in_window(pairs, rows, blocks):
    """Whether some query of the block sees some key of each block, by position."""
    first, last = rows.start + pairs.offset, rows.stop - 1 + pairs.offset
    reaches = lambda keys: pairs.left is None or keys.stop - 1 >= first - pairs.left
    reached = lambda keys: pairs.right is None or keys.start <= last + pairs.right
    return [reaches(keys) and reached(keys) for keys in blocks]


def _cost(n, m, d, e, Hq, Hkv, batch=1, block_q=64, block_k=64, seen=1.0):
    """`seen`: the share of blocks that are visible."""
    return Cost(
        batch * Hq * n * (m * seen * (2 * d + 2 * e + 5) + d + 6),
        log2_ceil(d) + 3 * log2_ceil(m * seen) + 9,
        batch * Hq * n * (e + 1) + min(n, block_q) * m * seen * 3,
    )


FORMS = {"attention": {"block_sparse": Form(attention_block_sparse, _cost, exact=("depth",))}}
