"""Mistakes in attention, as found in kernels, wrappers and ports."""

import functools
import importlib

import numpy as np

from refimpl.conformance.mutants import Mutant, edited

chapter = importlib.import_module("refimpl.ops.attention.attention")
attention, attention_vjp = chapter.attention, chapter.attention_vjp


def _mutant(name, says, *edits, **kwargs):
    """The definition after edits of the chapter."""
    return Mutant("attention", name, says, edited(attention, *edits), **kwargs)


def _tiled(name, says, *edits):
    """The tiled form with small blocks after edits of the chapter."""
    build = edited(chapter.attention_tiled, *edits)
    return Mutant("attention", name, says, lambda: functools.wraps(attention)(functools.partial(build(), block_q=16, block_k=16)))


def _gradient(name, says, *edits, **kwargs):
    """The gradient after edits of the chapter."""
    return Mutant("attention", name, says, edited(attention_vjp, *edits), of_gradient=True, **kwargs)


def _written(function, says, **kwargs):
    """A function that calls the definition, its name being the mutant's."""
    wrapped = functools.wraps(attention)(function)
    return Mutant("attention", function.__code__.co_name.removesuffix("_"), says, lambda: wrapped, **kwargs)


def gqa_modulo(q, k, v, **options):
    if np.ndim(q) > 2:
        heads = np.arange(q.shape[-3]) % max(k.shape[-3], 1)
        k, v = k[..., heads, :, :], v[..., heads, :, :]
    return attention(q, k, v, **options)


def gqa_first_head(q, k, v, **options):
    return attention(q, k[..., :1, :, :], v[..., :1, :, :], **options) if np.ndim(q) > 2 else attention(q, k, v, **options)


def mqa_of_four(q, k, v, **options):
    if np.ndim(q) > 2 and k.shape[-3] == 1:
        q = q[..., np.minimum(np.arange(q.shape[-3]), 3), :, :]
    return attention(q, k, v, **options)


def padding_keys_counted(q, k, v, *, mask=None, bias=None, offset=None, **options):
    n, m = q.shape[-2], k.shape[-2]
    count = -m % 16

    def padded(x, axis, value):
        if x is None or x.shape[axis] != m:
            return x
        width = [(0, 0)] * x.ndim
        width[axis] = (0, count)
        return np.pad(x, width, constant_values=value)

    return attention(
        q,
        padded(k, -2, 0),
        padded(v, -2, 0),
        mask=padded(mask, -1, True),
        bias=padded(bias, -1, 0),
        offset=m - n if offset is None else offset,
        **options,
    )


def mask_added_as_numbers(q, k, v, *, mask=None, bias=None, **options):
    if mask is not None:
        bias = np.where(mask, np.ones_like(q, shape=()), np.zeros_like(q, shape=())) + (0 if bias is None else bias)
    return attention(q, k, v, bias=bias, **options)


def _of_output(change):
    """The definition, its output changed."""

    def build(q, k, v, **options):
        result = attention(q, k, v, **options)
        o, *lse = result if isinstance(result, tuple) else (result,)
        o = change(o).astype(o.dtype)
        return (o, *lse) if lse else o

    return functools.wraps(attention)(build)


def _every_ten_thousandth(o):
    rows = o.reshape(-1, o.shape[-1]).copy()
    wrong = np.arange(9999, len(rows), 10000)
    rows[wrong] = rows[wrong - 1]
    return rows.reshape(o.shape)


def _tf32(x):
    """Rounded to 11 significant bits."""
    wide = np.asarray(x, dtype=np.float32)
    factor = np.float32(2**13 + 1)
    high = factor * wide
    return (high - (high - wide)).astype(x.dtype)


def tf32(q, k, v, **options):
    return attention(_tf32(q), _tf32(k), _tf32(v), **options)


_SOFTMAX_END = "    total = np.where(total == 0, np.ones_like(total), total)\n    return w / total, lse, w_sink / total"
_LSE = "    lse = shift + np.log(total)\n"
_WINDOW = "left, right = (None, None) if window is None else window"
_CAP_THEN_BIAS = """    if pairs.softcap is not None:
        s = pairs.softcap * np.tanh(s / pairs.softcap)
    if pairs.bias is not None:
        s = s + tile(pairs.bias, rows, keys)
"""
_BIAS_THEN_CAP = """    if pairs.bias is not None:
        s = s + np.where(np.isneginf(tile(pairs.bias, rows, keys)), 0 * s, tile(pairs.bias, rows, keys))
    if pairs.softcap is not None:
        s = pairs.softcap * np.tanh(s / pairs.softcap)
    if pairs.bias is not None:
"""

MUTANTS = (
    # -- which pairs
    _mutant(
        "causal_top_left",
        "your causal mask is aligned at the start; the contract aligns the ends: query i stands at i + offset, and offset is m - n unless given",
        ("offset=m - n if offset is None else offset,", "offset=0 if offset is None else offset,"),
        variant=True,
    ),
    _mutant(
        "causal_strict",
        "a query does not see the key at its own position: j < P; the contract says j <= P",
        ("right=0 if causal else right,", "right=-1 if causal else right,"),
    ),
    _mutant("causal_ignored", "causal=True has no effect", ("right=0 if causal else right,", "right=right,")),
    _mutant(
        "causal_drops_window",
        "with causal=True the window has no effect; both hold",
        ("        left=left,\n", "        left=None if causal else left,\n"),
    ),
    _mutant(
        "causal_drops_mask",
        "with causal or a window the mask has no effect; all of them hold",
        ("return mask if inside is None else mask & inside", "return mask if inside is None else inside"),
    ),
    _mutant(
        "offset_ignored",
        "offset has no effect: query i always stands at i + m - n",
        ("offset=m - n if offset is None else offset,", "offset=m - n,"),
    ),
    _mutant(
        "window_exclusive",
        "your window leaves out its ends, |i - j| < w; the contract includes them: P - left <= j <= P + right",
        (_WINDOW, _WINDOW.replace("else window", "else [side if side is None else side - 1 for side in window]")),
        variant=True,
    ),
    _mutant(
        "window_left_too_long",
        "the window reaches one key too far to the left",
        (_WINDOW, _WINDOW.replace("else window", "else (window[0] if window[0] is None else window[0] + 1, window[1])")),
    ),
    _mutant(
        "window_right_too_short",
        "the window misses its last key on the right",
        (_WINDOW, _WINDOW.replace("else window", "else (window[0], window[1] if window[1] is None else window[1] - 1)")),
    ),
    _mutant(
        "window_at_most_a_block",
        "the window's left side ends after 64 keys, the width of a block; it may be wider",
        (_WINDOW, _WINDOW.replace("else window", "else (window[0] if window[0] is None else min(window[0], 64), window[1])")),
    ),
    _mutant("window_swapped", "left and right of the window are swapped", (_WINDOW, _WINDOW.replace("else window", "else window[::-1]"))),
    _mutant(
        "window_ignores_offset",
        "the window's left end is counted from the query's row number i, not from its position i + offset",
        ("keys.start >= last - pairs.left", "False"),
        ("(j >= P - pairs.left)", "(j >= P - pairs.offset - pairs.left)"),
    ),
    _mutant(
        "mask_inverted",
        "True in your mask means masked; in the contract True means that the query may attend",
        ("mask=_grouped(mask, Hkv, G),", "mask=None if mask is None else ~_grouped(mask, Hkv, G),"),
    ),
    _written(mask_added_as_numbers, "the boolean mask is added to the scores as 0 and 1 instead of removing pairs"),
    _written(padding_keys_counted, "keys that pad the last block to a multiple of 16 count, with score 0: mask the tail"),
    _mutant(
        "masked_rows_nan",
        "a row with nothing allowed gives NaN (0/0); the contract says 0, and lse = -inf",
        (_SOFTMAX_END, "    return w / total, lse, w_sink / total"),
        variant=True,
    ),
    _mutant(
        "masked_rows_mean",
        "masked scores are a large finite number, so a row with nothing allowed gives the mean of v; the contract says 0, and lse = -inf",
        ("return s if allowed is None else np.where(allowed, s, -np.inf)", "return s if allowed is None else np.where(allowed, s, -1e30)"),
        variant=True,
    ),
    # -- scores
    _mutant(
        "scale_missing",
        "scores are not scaled; scale is 1/√d by default",
        ("scale=1 / sqrt_of(q.shape[-1], q) if", "scale=constant(1, q) if"),
    ),
    _mutant(
        "scale_one_over_d",
        "scores are scaled by 1/d; the contract says 1/√d",
        ("scale=1 / sqrt_of(q.shape[-1], q) if", "scale=1 / constant(q.shape[-1], q) if"),
    ),
    _mutant("scale_ignored", "a given scale has no effect", ("else constant(scale, q),", "else 1 / sqrt_of(q.shape[-1], q),")),
    _mutant(
        "scale_twice",
        "the scale is applied twice, to q and to the product",
        (
            "return (pairs.scale * q) @ k.mT if abs(pairs.scale) <= 1 else pairs.scale * (q @ k.mT)",
            "return pairs.scale * pairs.scale * (q @ k.mT)",
        ),
    ),
    _mutant(
        "softcap_after_bias",
        "your softcap squashes score + bias; the contract caps first and then adds the bias (Gemma 2)",
        (_CAP_THEN_BIAS, _BIAS_THEN_CAP),
        variant=True,
    ),
    _mutant(
        "softcap_not_divided",
        "softcap·tanh(s): the score is not divided by the softcap first; softcap·tanh(s / softcap)",
        ("np.tanh(s / pairs.softcap)", "np.tanh(s)"),
    ),
    _mutant(
        "softcap_not_multiplied",
        "tanh(s / softcap): the result is not multiplied by the softcap",
        ("s = pairs.softcap * np.tanh(s / pairs.softcap)", "s = np.tanh(s / pairs.softcap)"),
    ),
    _mutant(
        "softcap_clips",
        "scores are clipped at the softcap; the contract squashes them by tanh",
        ("s = pairs.softcap * np.tanh(s / pairs.softcap)", "s = np.clip(s, -pairs.softcap, pairs.softcap)"),
    ),
    _mutant(
        "softcap_before_scale",
        "the softcap acts on unscaled scores; scale first",
        ("    s = raw\n", "    s = raw / pairs.scale if pairs.softcap is not None else raw\n"),
        ("s = pairs.softcap * np.tanh(s / pairs.softcap)", "s = pairs.scale * pairs.softcap * np.tanh(s / pairs.softcap)"),
    ),
    _mutant(
        "bias_scaled",
        "the bias is multiplied by the scale; it is added to scaled scores as it is",
        ("s = s + tile(pairs.bias, rows, keys)", "s = s + pairs.scale * tile(pairs.bias, rows, keys)"),
    ),
    _mutant(
        "bias_of_first_head",
        "all heads use the first head's bias",
        ("bias=_grouped(bias, Hkv, G),", "bias=bias if bias is None or bias.ndim < 3 else _grouped(bias[..., :1, :, :], Hkv, G),"),
    ),
    _written(gqa_modulo, "query head h reads key head h % Hkv; the contract says h // (Hq // Hkv)"),
    _written(mqa_of_four, "all heads of queries beyond the fourth give what the fourth gives where one key head serves them all"),
    _written(gqa_first_head, "all query heads read the first key head; head h reads h // (Hq // Hkv)"),
    # -- softmax
    _mutant(
        "no_maximum",
        "exponentials are taken without subtracting the row's maximum: they overflow for large scores",
        ("    shift = finite_or_zero(top)\n    w, w_sink", "    shift = np.zeros_like(top)\n    w, w_sink"),
    ),
    _mutant(
        "lse_without_maximum",
        "lse is the logarithm of the sum relative to the row's maximum; the maximum was not added back",
        (_LSE, "    lse = np.log(total)\n"),
    ),
    _mutant(
        "lse_in_log2",
        "lse is in base 2; the contract's is the natural logarithm: multiply by log 2",
        (_LSE, "    lse = (shift + np.log(total)) / np.log(2 * np.ones_like(total))\n"),
    ),
    _mutant(
        "lse_without_sink",
        "lse leaves out the sink; it is the logarithm of the whole denominator",
        (_LSE, "    lse = shift + np.log(w.sum(axis=-1, keepdims=True))\n"),
    ),
    _mutant(
        "lse_of_masked_rows_inf",
        "lse of a row with nothing allowed is +inf (FlashAttention-2); the contract says -inf",
        (_LSE, "    lse = np.where(total == 0, np.inf, shift + np.log(total))\n"),
        variant=True,
    ),
    _mutant("sink_ignored", "the sink has no effect", ("if sink is None else np.atleast_1d(sink)", "if True else np.atleast_1d(sink)")),
    _mutant(
        "sink_scaled",
        "the sink is multiplied by the scale; it is a logit already",
        ("_grouped(logit[:, None, None], Hkv, G)", "_grouped(pairs.scale * logit[:, None, None], Hkv, G)"),
    ),
    _mutant(
        "sink_capped",
        "the sink goes through the softcap; it is neither scaled nor capped",
        (
            "_grouped(logit[:, None, None], Hkv, G)",
            "_grouped(logit[:, None, None] if softcap is None else softcap * np.tanh(logit[:, None, None] / softcap), Hkv, G)",
        ),
    ),
    _mutant(
        "sink_has_a_value",
        "the sink's weight multiplies a value (the first key's); the sink is in the denominator only",
        (
            "    p, lse, _ = _softmax(s, sink)\n    o = masked_matmul(p, v, s)",
            "    p, lse, p_sink = _softmax(s, sink)\n    o = masked_matmul(p, v, s) + p_sink * v[..., :1, :].sum(axis=-2, keepdims=True)",
        ),
    ),
    _mutant(
        "sink_of_first_head",
        "all heads use the first head's sink",
        ("_grouped(logit[:, None, None], Hkv, G)", "_grouped(logit[:1, None, None], Hkv, G)"),
    ),
    _mutant("weights_not_normalised", "the weights are not divided by their sum", (_SOFTMAX_END, "    return w, lse, w_sink")),
    # -- blocks
    _tiled(
        "tail_block_dropped",
        "the last, partial block of keys is never visited",
        ("for keys in blocks(*part, size)]", "for keys in blocks(*part, size) if keys.stop - keys.start == size or keys.start == 0]"),
    ),
    _tiled(
        "sum_not_rescaled",
        "when a block brings a larger maximum, the output summed so far is not rescaled",
        ("acc = keep * acc +", "acc = acc +"),
    ),
    _tiled(
        "denominator_not_rescaled",
        "when a block brings a larger maximum, the denominator summed so far is not rescaled",
        ("total = keep * total +", "total = total +"),
    ),
    _tiled(
        "maximum_of_the_block",
        "the maximum is each block's own, not the running one: earlier blocks are lost when it falls",
        ("larger = np.maximum(top, np.max(s, axis=-1, keepdims=True))", "larger = np.max(s, axis=-1, keepdims=True)"),
        ("np.exp(top - shift)", "np.exp(np.minimum(top - shift, 0))"),
    ),
    Mutant(
        "attention",
        "parts_not_weighted",
        "partial outputs of key ranges are averaged; each counts with the weight e^{lse_part - lse}",
        edited(
            chapter.attention_split_kv,
            (
                "np.where(w == 0, np.zeros_like(o), p * o).sum(axis=0)",
                "np.where(w == 0, np.zeros_like(o), o / (w != 0).sum(axis=0)).sum(axis=0)",
            ),
        ),
    ),
    # -- precision
    _mutant(
        "output_off_by_0.2_percent",
        "the output is 1.002 times what it should be",
        ("    o = masked_matmul(p, v, s)  # (..., Hkv, G, n, e)\n", "    o = 1.002 * masked_matmul(p, v, s)\n"),
    ),
    Mutant(
        "attention",
        "every_ten_thousandth_row",
        "one row in ten thousand is a copy of the row before it",
        lambda: _of_output(_every_ten_thousandth),
    ),
    _written(
        tf32,
        "q, k and v are rounded to TF32's 11 bits, where float32 was promised; half precisions have no more bits than that",
        hidden=("bfloat16", "float16"),
    ),
    # -- gradients
    _gradient(
        "gradient_without_delta",
        "the softmax's gradient lacks delta_i = do_i·o_i: ds = p (dp - delta)",
        ("do @ v.mT, dlse - delta, pairs)", "do @ v.mT, dlse, pairs)"),
    ),
    _gradient(
        "gradient_ignores_dlse",
        "the cotangent of lse is ignored: ds = p (dp - delta + dlse)",
        ("do @ v.mT, dlse - delta, pairs)", "do @ v.mT, -delta, pairs)"),
    ),
    _gradient(
        "gradient_of_k_from_one_head",
        "dk takes the first query head of each group only; sum over all heads that read it",
        ("masked_matmul(draw.mT, q, s.mT)).sum(axis=-3),  # over", "masked_matmul(draw.mT, q, s.mT))[..., 0, :, :],  # over"),
    ),
    _gradient(
        "gradient_of_v_averaged",
        "dv is averaged over the query heads of a group; they add up",
        ('"v": masked_matmul(p.mT, do, s.mT).sum(axis=-3)', '"v": masked_matmul(p.mT, do, s.mT).sum(axis=-3) / q.shape[-3]'),
    ),
    _gradient(
        "gradient_of_q_unscaled",
        "dq lacks the scale: dq = scale ds k",
        ('"q": join(pairs.scale * masked_matmul(draw, k, s))', '"q": join(masked_matmul(draw, k, s))'),
    ),
    _gradient(
        "gradient_without_softcap",
        "the softcap's derivative 1 - tanh² is missing in dq and dk",
        ("return ds, np.where(hidden, np.zeros_like(s), ds * tanh_derivative(raw / pairs.softcap))", "return ds, ds"),
    ),
    _gradient(
        "gradient_of_bias_capped",
        "the bias comes after the softcap, so its gradient has no factor 1 - tanh²",
        ('        "bias": join(ds),\n        "sink": join(p_sink', '        "bias": join(draw),\n        "sink": join(p_sink'),
    ),
    _gradient(
        "gradient_of_sink_positive",
        "the sink's gradient has the wrong sign: it is -p_sink·delta",
        ("join(p_sink * (dlse - delta))", "join(p_sink * (dlse + delta))"),
    ),
)
