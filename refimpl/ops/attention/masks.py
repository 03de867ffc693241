"""Who may attend to whom: the sparse patterns of the literature, as boolean masks.

    mask_ij = True    where query i may attend to key j                                                         (1)

A mask goes into `attention(..., mask=)`. Used so, a pattern saves nothing: every product is formed and most are thrown
away. What saves is to look at the mask in blocks, and not to touch the blocks in which nothing is True: `block_map` says
which those are, and attention's form ``block_sparse`` (and ``tiled``) skips them.

All positions are those of `attention`: query i stands at P = i + offset, offset = m - n by default (ends aligned), windows
are pairs (left, right), P - left <= j <= P + right, both ends included, None being unbounded.

    pattern               query i sees                                                                   pairs
    sliding_window_mask   P - left ... P + right                                                         n (left + right + 1)
    strided_mask          the last `stride` before it, and every stride-th before it [1, section 4.3]    n (stride + n/stride)
    fixed_mask            its own segment, and the last c of every earlier one [1, section 4.3]          n (stride + c n/stride)
    longformer_mask       a (dilated) window; global tokens see and are seen by all [2, section 3.1]     n (window + 2 global)
    bigbird_mask          blocks: a window, global ones, and some at random [3, section 2]               n block (w + 2g + r)
    segment_mask          its own sequence, of several packed into one                                   Σ length²

Where implementations differ
    Sliding windows: `sliding_window=w` of transformers is window=(w - 1, 0); flash-attn's pairs are ours. Strided: the
    paper's window goes back l positions and so holds l + 1; OpenAI's code has one fewer (the same, once both sets are
    joined). Longformer's w is window=(w // 2, w // 2) here; its global tokens also have projections of their own, which
    no mask can say. BigBird draws other blocks for every head in public code: call once per head and stack. Public packed
    kernels take running sums ("cu_seqlens") where `segment_mask` takes lengths.

References
    [1] R. Child, S. Gray, A. Radford, I. Sutskever, "Generating long sequences with sparse transformers", 2019, section 4.3.
    [2] I. Beltagy, M. E. Peters, A. Cohan, "Longformer: the long-document transformer", 2020, section 3.1 and figure 2.
    [3] M. Zaheer et al., "Big Bird: transformers for longer sequences", NeurIPS 2020, section 2 and appendix D.
    [4] T. Dao, "FlashAttention-2", ICLR 2024 (its code has the packed interface).
"""

import numpy as np

__all__ = [
    "bigbird_mask",
    "block_map",
    "fixed_mask",
    "longformer_mask",
    "segment_mask",
    "sliding_window_mask",
    "strided_mask",
]


def sliding_window_mask(n, m=None, *, window, offset=None):
    """Keys in a window around the query's position.

    Parameters
    ----------
    n, m : int
        Queries and keys; m = n unless given.
    window : tuple (left, right)
        Integers of at least 0, or None for unbounded; (None, 0) is causal.
    offset : int, optional
        Position of query 0 among the keys; m - n by default.

    Returns
    -------
    ndarray of bool, shape (n, m)

    Raises
    ------
    ValueError, TypeError
        If an argument is not as described.

    Examples
    --------
    >>> import numpy as np
    >>> print(sliding_window_mask(4, window=(1, 0)).astype(int))
    [[1 0 0 0]
     [1 1 0 0]
     [0 1 1 0]
     [0 0 1 1]]
    """
    P, j = _positions("sliding_window_mask", n, m, offset)
    left, right = _window("sliding_window_mask", window)
    mask = np.full((P.shape[0], j.shape[-1]), True)
    if left is not None:
        mask &= j >= P - left
    if right is not None:
        mask &= j <= P + right
    return mask


def strided_mask(n, m=None, *, stride, part=None, offset=None):
    """Sparse Transformer, strided: the last `stride` positions before the query, and every stride-th before it.

    With l = stride: {P - l, ..., P} and {j <= P: (P - j) mod l = 0}; for what has a period, such as the rows of an image.

    Parameters
    ----------
    n, m : int
        Queries and keys; m = n unless given.
    stride : int
        At least 1; near √n in the paper, so that two steps reach every earlier position.
    part : {None, "local", "strided"}
        Both sets in one head, or one of them (the paper's heads p = 1 and 2).
    offset : int, optional
        Position of query 0 among the keys; m - n by default.

    Returns
    -------
    ndarray of bool, shape (n, m)

    Raises
    ------
    ValueError, TypeError
        If an argument is not as described.

    Examples
    --------
    >>> print(strided_mask(6, stride=2)[5].astype(int))
    [0 1 0 1 1 1]
    """
    P, j = _positions("strided_mask", n, m, offset)
    _count("strided_mask", "stride", stride, 1)
    local, strided = j >= P - stride, (P - j) % stride == 0
    return (j <= P) & _part("strided_mask", part, local=local, strided=strided)


def fixed_mask(n, m=None, *, stride, c=1, part=None, offset=None):
    """Sparse Transformer, fixed: the query's own segment of `stride` positions, and the last `c` of every segment.

    With l = stride: {j <= P: ⌊j/l⌋ = ⌊P/l⌋} and {j <= P: j mod l >= l - c}; the last positions of a segment sum it up for
    all that come later.

    Parameters
    ----------
    n, m : int
        Queries and keys; m = n unless given.
    stride : int
        Length of a segment, at least 1.
    c : int
        Positions of a segment that later ones see; 0 <= c <= stride.
    part : {None, "local", "summary"}
        Both sets in one head, or one of them (the paper's heads p = 1 and 2).
    offset : int, optional
        Position of query 0 among the keys; m - n by default.

    Returns
    -------
    ndarray of bool, shape (n, m)

    Raises
    ------
    ValueError, TypeError
        If an argument is not as described.

    Examples
    --------
    >>> print(fixed_mask(6, stride=3)[4].astype(int))
    [0 0 1 1 1 0]
    """
    P, j = _positions("fixed_mask", n, m, offset)
    _count("fixed_mask", "stride", stride, 1)
    _count("fixed_mask", "c", c, 0)
    if c > stride:
        raise ValueError(f"fixed_mask: c must be at most stride = {stride}, got {c}")
    return (j <= P) & _part("fixed_mask", part, local=j // stride == P // stride, summary=j % stride >= stride - c)


def longformer_mask(n, *, window, global_tokens=(), dilation=1):
    """Longformer: a window, and tokens that see all and are seen by all.

    Parameters
    ----------
    n : int
        Length of the sequence, which attends to itself.
    window : tuple (left, right)
        In steps of `dilation`; the paper's w is (w // 2, w // 2).
    global_tokens : sequence of int
        Their positions, from 0 (from the end where negative).
    dilation : int
        Gap between the positions of the window; at least 1.

    Returns
    -------
    ndarray of bool, shape (n, n)

    Raises
    ------
    ValueError, TypeError
        If an argument is not as described.

    Examples
    --------
    >>> print(longformer_mask(5, window=(1, 1), global_tokens=[0]).astype(int))
    [[1 1 1 1 1]
     [1 1 1 0 0]
     [1 1 1 1 0]
     [1 0 1 1 1]
     [1 0 0 1 1]]
    """
    P, j = _positions("longformer_mask", n, None, None)
    left, right = _window("longformer_mask", window)
    _count("longformer_mask", "dilation", dilation, 1)
    tokens = _indices("longformer_mask", "global_tokens", global_tokens, n)
    mask = (P - j) % dilation == 0
    if left is not None:
        mask &= j >= P - left * dilation
    if right is not None:
        mask &= j <= P + right * dilation
    mask[tokens, :] = mask[:, tokens] = True
    return mask


def bigbird_mask(n, *, block, window_blocks=3, global_blocks=(0, -1), random_blocks=3, rng=None):
    """BigBird: blocks of positions see their neighbours, global blocks, and some blocks at random.

    Parameters
    ----------
    n : int
        Length of the sequence, which attends to itself; the last block may be shorter.
    block : int
        Positions in a block, at least 1.
    window_blocks : int
        Odd: the block itself and as many on each side.
    global_blocks : sequence of int
        Blocks that see all and are seen by all: first and last in the paper's BigBird-ITC.
    random_blocks : int
        Blocks drawn for every block that is not global, without replacement from those that it does not see already (all
        of them, if they are fewer).
    rng : numpy.random.Generator, optional
        Needed if random_blocks > 0, and refused if not.

    Returns
    -------
    ndarray of bool, shape (n, n)

    Raises
    ------
    ValueError, TypeError
        If an argument is not as described.

    Examples
    --------
    >>> import numpy as np
    >>> mask = bigbird_mask(64, block=4, random_blocks=2, rng=np.random.default_rng(0))
    >>> print(mask[24:28].sum(axis=1))  # three blocks of the window, two global, two at random
    [28 28 28 28]
    """
    _count("bigbird_mask", "n", n, 0)
    for name, value, least in (("block", block, 1), ("window_blocks", window_blocks, 1), ("random_blocks", random_blocks, 0)):
        _count("bigbird_mask", name, value, least)
    if window_blocks % 2 == 0:
        raise ValueError(f"bigbird_mask: window_blocks must be odd (a block and as many on each side), got {window_blocks}")
    if random_blocks and not isinstance(rng, np.random.Generator):
        raise TypeError(f"bigbird_mask: rng must be a numpy.random.Generator where random_blocks > 0, got {rng!r}")
    if not random_blocks and rng is not None:
        raise ValueError(f"bigbird_mask: rng must be None where random_blocks = 0, since nothing is drawn; got {rng!r}")
    blocks = -(-n // block)
    side = window_blocks // 2
    seen = longformer_mask(blocks, window=(side, side), global_tokens=_indices("bigbird_mask", "global_blocks", global_blocks, blocks))
    for row in seen:
        others = np.flatnonzero(~row)
        if random_blocks and others.size:
            row[rng.choice(others, min(random_blocks, others.size), replace=False)] = True
    return np.repeat(np.repeat(seen, block, axis=0), block, axis=1)[:n, :n]


def segment_mask(lengths, key_lengths=None, *, n=None, m=None, causal=False):
    """Several sequences packed into one: each attends within itself.

    Parameters
    ----------
    lengths : sequence of int
        Of the packed sequences, in order, at least 0 each.
    key_lengths : sequence of int, optional
        Where keys are packed differently (caches, cross-attention): their lengths, as many. `lengths` by default.
    n, m : int, optional
        Length of the whole, if it is longer than the sequences together: what is left is padding, which sees and is seen
        by nothing.
    causal : bool
        In addition, each sequence is causal, its last query standing at its last key. (`attention(causal=True)` would
        count positions from the whole; that is the same if queries and keys are packed alike.)

    Returns
    -------
    ndarray of bool, shape (n, m)

    Raises
    ------
    ValueError, TypeError
        If a length is negative or not an integer, or the lengths together exceed n or m and so would overlap.

    Examples
    --------
    >>> print(segment_mask([2, 1], n=4).astype(int))
    [[1 1 0 0]
     [1 1 0 0]
     [0 0 1 0]
     [0 0 0 0]]
    """
    queries = _lengths("lengths", lengths, "n", n)
    if key_lengths is None:
        keys = _lengths("lengths", lengths, "m", n if m is None else m)
    else:
        keys = _lengths("key_lengths", key_lengths, "m", m)
    if queries[0].size != keys[0].size:
        raise ValueError(f"segment_mask: key_lengths must be as many as lengths, got {keys[0].size} and {queries[0].size}")
    if not isinstance(causal, bool):
        raise TypeError(f"segment_mask: causal must be True or False, got {causal!r}")
    (ends_q, segment_q), (ends_k, segment_k) = queries, keys
    mask = (segment_q[:, None] == segment_k) & (segment_q[:, None] >= 0)
    if causal:
        to_end_q = np.append(ends_q, 0)[segment_q] - np.arange(segment_q.size)  # how far the sequence's end is
        to_end_k = np.append(ends_k, 0)[segment_k] - np.arange(segment_k.size)
        mask &= to_end_q[:, None] <= to_end_k
    return mask


def block_map(mask, block_q, block_k):
    """Which blocks of a mask hold anything: what a block-sparse kernel visits.

    Parameters
    ----------
    mask : ndarray of bool, shape (..., n, m)
    block_q, block_k : int
        Size of a block; the last ones may be smaller.

    Returns
    -------
    ndarray of bool, shape (..., ⌈n / block_q⌉, ⌈m / block_k⌉)

    Raises
    ------
    ValueError, TypeError
        If the mask is not boolean, has fewer than two axes, or a block is not a positive integer.

    Examples
    --------
    >>> print(block_map(sliding_window_mask(6, window=(1, 0)), 2, 2).astype(int))
    [[1 0 0]
     [1 1 0]
     [0 1 1]]
    """
    mask = np.asarray(mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"block_map: mask must be boolean, got dtype {mask.dtype}")
    if mask.ndim < 2:
        raise ValueError(f"block_map: mask must have shape (..., n, m), got {mask.shape}")
    for axis, name, size in ((-2, "block_q", block_q), (-1, "block_k", block_k)):
        _count("block_map", name, size, 1)
        mask = np.logical_or.reduceat(mask, range(0, mask.shape[axis], size), axis=axis) if mask.shape[axis] else mask
    return mask


# -- what the patterns share -----------------------------------------------------------------------------------------


def _count(who, name, value, least):
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise TypeError(f"{who}: {name} must be an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{who}: {name} must be an integer of at least {least}, got {value!r}")


def _positions(who, n, m, offset):
    """P (n, 1) and j (1, m)."""
    m = n if m is None else m
    _count(who, "n", n, 0)
    _count(who, "m", m, 0)
    if offset is not None and (isinstance(offset, bool) or not isinstance(offset, int | np.integer)):
        raise TypeError(f"{who}: offset must be an integer or None (aligned ends, m - n), got {offset!r}")
    return np.arange(n)[:, None] + (m - n if offset is None else offset), np.arange(m)[None]


def _window(who, window):
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise ValueError(f"{who}: window must be a pair (left, right), got {window!r}")
    for side in window:
        if side is not None:
            _count(who, "window", side, 0)
    return window


def _part(who, part, **parts):
    if part is None:
        return np.logical_or(*parts.values())
    if part not in parts:
        raise ValueError(f"{who}: part must be one of None, {', '.join(map(repr, parts))}, got {part!r}")
    return parts[part]


def _integers(who, name, values):
    values = np.asarray(values)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise TypeError(f"{who}: {name} must be a sequence of integers, got {values.dtype} of shape {values.shape}")
    return values.astype(np.int64)


def _indices(who, name, values, n):
    values = _integers(who, name, values)
    wrong = values[(values < -n) | (values >= n)] if n else values[:0]
    if wrong.size:
        raise ValueError(f"{who}: {name} must lie in {-n} ... {n - 1}, got {wrong[0]}")
    return values % n if n else values[:0]


def _lengths(name, lengths, total_name, total):
    """Where each segment ends, and each position's segment (-1 for padding)."""
    lengths = _integers("segment_mask", name, lengths)
    if np.any(lengths < 0):
        raise ValueError(f"segment_mask: {name} must be at least 0, got {lengths[lengths < 0][0]}")
    ends = np.cumsum(lengths)
    used = int(ends[-1]) if ends.size else 0
    if total is not None:
        _count("segment_mask", total_name, total, 0)
        if used > total:
            raise ValueError(f"segment_mask: {name} must sum to at most {total_name} = {total}, or segments overlap; got a sum of {used}")
    segments = np.repeat(np.arange(lengths.size), lengths)
    return ends, np.append(segments, np.full((used if total is None else total) - used, -1))
