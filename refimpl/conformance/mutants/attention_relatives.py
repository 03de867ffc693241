"""Mistakes in what stands around attention: positions, sparse patterns, and its cheaper relatives."""

import functools
import importlib

import ml_dtypes
import numpy as np

from refimpl.conformance.mutants import Mutant, edited

_attention, _block_sparse = (importlib.import_module(f"refimpl.ops.attention.{name}") for name in ("attention", "block_sparse"))
_chapter = lambda name: importlib.import_module(f"refimpl.ops.attention.{name}")
_rope, _relative, _aft, _aft_variants, _linformer = map(_chapter, ("rope", "relative_attention", "aft", "aft_variants", "linformer"))


def _edits(operator, function, name, says, *edits, **kwargs):
    """A chapter's function after edits of the chapter."""
    return Mutant(operator, name, says, edited(function, *edits), **kwargs)


def _written(operator, like, function, says, **kwargs):
    """A function that calls the definition, its name being the mutant's."""
    wrapped = functools.wraps(like)(function)
    return Mutant(operator, function.__code__.co_name.strip("_"), says, lambda: wrapped, **kwargs)


# -- RoPE ------------------------------------------------------------------------------------------------------------


def _in_half(x):
    return np.asarray(np.asarray(x, dtype=np.float32).astype(ml_dtypes.bfloat16), dtype=np.result_type(x.dtype, np.float32))


def positions_in_bfloat16(x, positions, **options):
    return _rope.rope(x, _in_half(positions), **options)


def positions_from_one(x, positions, **options):
    return _rope.rope(x, positions + 1, **options)


def positions_not_looked_at(x, positions, **options):
    return _rope.rope(x, np.arange(x.shape[-2]), **options)


def positions_whole(x, positions, **options):
    return _rope.rope(x, np.floor(positions), **options)


_ANGLES = "    return constant(positions, x)[..., None] * _frequencies(x, base, dims, inv_freq)  # (..., T, dims/2)\n"
_PLACES = 'if layout == "half" else (np.arange(0, dims, 2), np.arange(1, dims, 2))\n'
ROPE = (
    _edits(
        "rope",
        _rope.rope,
        "layouts_swapped",
        "your layouts are the other way round: 'half' pairs feature i with i + dims/2 (Llama), 'interleaved' pairs 2i with 2i + 1 (GPT-J)",
        (
            "    first, second = _places(2 * theta.shape[-1], layout)\n    return x[..., first]",
            '    layout = {"half": "interleaved"}.get(layout, "half")\n'
            "    first, second = _places(2 * theta.shape[-1], layout)\n"
            "    return x[..., first]",
        ),
        (
            '    turned = np.concatenate([a, b], axis=-1) if layout == "half"',
            '    turned = np.concatenate([a, b], axis=-1) if layout != "half"',
        ),
        variant=True,
    ),
    _edits(
        "rope",
        _rope.rope,
        "layout_always_interleaved",
        "you pair feature 2i with 2i + 1 whatever `layout` says; its default is 'half': i with i + dims/2",
        (_PLACES, "if False else (np.arange(0, dims, 2), np.arange(1, dims, 2))\n"),
        ('    turned = np.concatenate([a, b], axis=-1) if layout == "half"', "    turned = np.concatenate([a, b], axis=-1) if False"),
        variant=True,
    ),
    _edits(
        "rope",
        _rope.rope,
        "halves_rotated_pairs_frequencies",
        "you rotate halves but give the frequencies to neighbours, each repeated as for interleaved pairs: "
        "with 'half' both of i and i + dims/2 have ω_i",
        (
            "    return _joined(a * cos - b * sin, a * sin + b * cos, rest, layout)\n\n\n@CONTRACT.form\ndef rope_complex",
            """    if layout == "half":
        every = np.repeat(theta, 2, axis=-1)
        theta, other = np.split(every, 2, axis=-1)
        return _joined(a * np.cos(theta) - b * np.sin(theta), a * np.sin(other) + b * np.cos(other), rest, layout)
    return _joined(a * cos - b * sin, a * sin + b * cos, rest, layout)\n\n\n@CONTRACT.form\ndef rope_complex""",
        ),
    ),
    _edits(
        "rope",
        _rope.rope,
        "turned_backwards",
        "you turn by -θ: y_a = a cos θ - b sin θ, y_b = a sin θ + b cos θ (scores within your own code hide it)",
        (_ANGLES, _ANGLES.replace("return", "return -")),
    ),
    _edits(
        "rope",
        _rope.rope,
        "half_the_exponent",
        "your frequencies are base^(-i/dims); they are base^(-2i/dims), i counting pairs",
        ("** (-2 * i / max(dims, 1))", "** (-1 * i / max(dims, 1))"),
    ),
    _edits(
        "rope",
        _rope.rope,
        "frequencies_of_the_whole_width",
        "in a partial rotation your frequencies are base^(-2i/d), d being all features; they are base^(-2i/dims)",
        ("** (-2 * i / max(dims, 1))", "** (-2 * i / x.shape[-1])"),
    ),
    _edits(
        "rope",
        _rope.rope,
        "base_not_looked_at",
        "you always use the base 10000",
        ("np.full_like(x, base, shape=(dims // 2,))", "np.full_like(x, 10000.0, shape=(dims // 2,))"),
    ),
    _edits(
        "rope",
        _rope.rope,
        "last_features_turned",
        "of a partial rotation you turn the last `dims` features; it is the first",
        (
            "    first, second = _places(2 * theta.shape[-1], layout)\n    return x[..., first]",
            "    x = np.roll(x, 2 * theta.shape[-1] - x.shape[-1], axis=-1)\n"
            "    first, second = _places(2 * theta.shape[-1], layout)\n"
            "    return x[..., first]",
        ),
        ("    return np.concatenate([turned, rest], axis=-1)", "    return np.concatenate([rest, turned], axis=-1)"),
    ),
    _edits(
        "rope",
        _rope.rope,
        "rest_dropped_to_zero",
        "features from `dims` on are left alone; yours are zero",
        ("    return np.concatenate([turned, rest], axis=-1)", "    return np.concatenate([turned, 0 * rest], axis=-1)"),
    ),
    _written("rope", _rope.rope, positions_from_one, "your positions start at 1: you add 1 to those given (scores hide it, caches do not)"),
    _written(
        "rope",
        _rope.rope,
        positions_not_looked_at,
        "you turn row t by t ω whatever `positions` says: wrong for decoding, packed sequences and left padding",
    ),
    _written(
        "rope", _rope.rope, positions_whole, "you round real positions down: interpolated positions (scaled contexts) fall on each other"
    ),
    _written(
        "rope",
        _rope.rope,
        positions_in_bfloat16,
        "your positions (or angles) pass through bfloat16, which has no odd integers above 256; form angles in float32 at least",
    ),
    _edits(
        "rope",
        _rope.rope_vjp,
        "gradient_turned_forwards",
        "your gradient turns by θ as the forward does; the transpose of a rotation turns back, by -θ",
        (
            '"x": _joined(da * cos + db * sin, db * cos - da * sin, rest, layout)',
            '"x": _joined(da * cos - db * sin, db * cos + da * sin, rest, layout)',
        ),
        of_gradient=True,
    ),
    _edits(
        "rope",
        _rope.rope_vjp,
        "gradient_of_the_rest_dropped",
        "features that are not turned pass their cotangent on; yours is zero",
        (
            '"x": _joined(da * cos + db * sin, db * cos - da * sin, rest, layout)',
            '"x": _joined(da * cos + db * sin, db * cos - da * sin, 0 * rest, layout)',
        ),
        of_gradient=True,
    ),
)

# -- relative attention ----------------------------------------------------------------------------------------------


def _of_relative(name, says, *edits, **kwargs):
    return _edits("relative_attention", _relative.relative_attention, name, says, *edits, **kwargs)


def _of_relative_vjp(name, says, *edits):
    return _edits("relative_attention", _relative.relative_attention_vjp, name, says, *edits, of_gradient=True)


_POSITION = "position = ((q + v_bias[:, None])[..., None, :] * of_pairs).sum(axis=-1)"
_CONTENT = "s = np.where(allowed, ((q + u_bias[:, None]) @ k.mT + position) / sqrt_of(q.shape[-1], q), -np.inf)\n    return masked"
_TWO_SIDES = "rows = np.minimum(abs(distance), m - 1) if m == R else distance % max(R, 1)"

RELATIVE = (
    _of_relative(
        "rows_reversed",
        "your rows of r run from the farthest key to the nearest (as Transformer-XL's code keeps them); row x is the distance x",
        ("of_pairs = r[:, rows]", "of_pairs = r[:, ::-1][:, rows]"),
    ),
    _of_relative(
        "distance_from_one",
        "your distances start at 1: a query's own position is distance 0, the first row of r",
        (_TWO_SIDES, "rows = np.minimum(abs(distance) + 1, m - 1) if m == R else (distance + 1) % max(R, 1)"),
    ),
    _of_relative(
        "memory_not_counted",
        "you take i - j for the distance: with a memory query i stands at i + m - n",
        (
            "rows, allowed = _distances(q, k, r, causal)\n    of_pairs",
            "rows, allowed = _distances(q, k, r, causal)\n"
            "    rows = abs(np.arange(q.shape[-2])[:, None] - np.arange(k.shape[-2]))\n"
            "    of_pairs",
        ),
    ),
    _of_relative(
        "biases_swapped",
        "you add v_bias towards content and u_bias towards position: it is (q + u)·k and (q + v)·r",
        (_POSITION, _POSITION.replace("v_bias", "u_bias")),
        (_CONTENT, _CONTENT.replace("u_bias", "v_bias")),
    ),
    _of_relative(
        "biases_left_away",
        "you leave u_bias and v_bias away",
        (_POSITION, _POSITION.replace("(q + v_bias[:, None])", "q")),
        (_CONTENT, _CONTENT.replace("(q + u_bias[:, None])", "q")),
    ),
    _of_relative(
        "position_not_scaled",
        "you divide the content term only by √d; the term of the position is scaled too",
        (
            _CONTENT,
            _CONTENT.replace(
                "((q + u_bias[:, None]) @ k.mT + position) / sqrt_of(q.shape[-1], q)",
                "(q + u_bias[:, None]) @ k.mT / sqrt_of(q.shape[-1], q) + position",
            ),
        ),
    ),
    _of_relative("not_scaled", "you do not divide the scores by √d", (_CONTENT, _CONTENT.replace(" / sqrt_of(q.shape[-1], q)", ""))),
    _of_relative(
        "sign_of_distance_lost",
        "with rows for both signs you look up |P - j|; negative distances have rows of their own, counted from the end",
        (_TWO_SIDES, "rows = np.minimum(abs(distance), m - 1) if m == R else abs(distance) % max(R, 1)"),
    ),
    _of_relative(
        "causal_ignores_memory",
        "your causal mask is aligned at the start (j <= i): with a memory query i sees j <= i + m - n",
        ("return rows, distance >= 0 if causal", "return rows, np.arange(n)[:, None] >= np.arange(m) if causal"),
    ),
    _of_relative(
        "causal_not_looked_at",
        "you mask causally whatever `causal` says",
        ("return rows, distance >= 0 if causal", "return rows, distance >= 0 if True"),
    ),
    _of_relative_vjp(
        "gradient_of_r_not_shifted_back",
        "your gradient of r takes column j of ds for distance j: it must undo the shift, row x gathering all pairs at distance x",
        ("dt[..., np.arange(q.shape[-2]), rows[:, j]] += ds[..., j]", "dt[..., min(j, dt.shape[-1] - 1)] += ds[..., j]"),
    ),
    _of_relative_vjp(
        "gradient_of_q_without_position",
        "your gradient of q has the content term only; the position term adds dt r",
        ('"q": to_content + to_position', '"q": to_content'),
    ),
    _of_relative_vjp(
        "gradient_of_k_without_bias",
        "your gradient of k leaves u away: it is dsᵀ (q + u)",
        ('"k": masked_matmul(ds.mT, q + u_bias[:, None], s.mT)', '"k": masked_matmul(ds.mT, q, s.mT)'),
    ),
    _of_relative_vjp(
        "gradient_not_scaled",
        "your gradients lack the 1/√d of the scores",
        ("ds = weights_vjp(p, dy @ v.mT, s) / root", "ds = weights_vjp(p, dy @ v.mT, s)"),
    ),
)

# -- AFT -------------------------------------------------------------------------------------------------------------


def w_transposed(q, k, v, w, **options):
    return _aft.aft(q, k, v, np.swapaxes(w, -1, -2), **options)


def gate_left_away(q, k, v, w, **options):
    return _aft.aft((0 * q + 100).astype(q.dtype), k, v, w, **options)


def weights_not_normalised(q, k, v, w, **options):
    s = _aft.scores(*(x.astype(np.result_type(x.dtype, np.float32)) for x in (k, w)), options.get("causal", False))
    return (
        _aft.sigmoid(q.astype(s.dtype)) * _aft.mean(np.exp(s - np.max(s, axis=-1, keepdims=True, initial=-1e30)), v.astype(s.dtype), s)
    ).astype(q.dtype)


def one_weight_for_all_channels(q, k, v, w, **options):
    return _aft.aft(q, np.broadcast_to(k.mean(axis=-1, keepdims=True), k.shape).astype(k.dtype), v, w, **options)


def maxima_apart(q, k, v, w, *, causal=False):
    wide = lambda x: x.astype(np.result_type(x.dtype, np.float32))
    e_k, e_w = (
        np.exp(wide(k) - wide(k).max(axis=-2, keepdims=True, initial=-1e30)),
        np.exp(wide(w) - wide(w).max(axis=-1, keepdims=True, initial=-1e30)),
    )
    e_w = np.tril(e_w) if causal else e_w
    return (_aft.sigmoid(wide(q)) * (e_w @ (e_k * wide(v))) / (e_w @ e_k)).astype(q.dtype)


def in_plain_exponentials(q, k, v, w, *, causal=False):
    wide = lambda x: x.astype(np.result_type(x.dtype, np.float32))
    e_k, e_w = np.exp(wide(k)), np.tril(np.exp(wide(w))) if causal else np.exp(wide(w))
    return (_aft.sigmoid(wide(q)) * (e_w @ (e_k * wide(v))) / (e_w @ e_k)).astype(q.dtype)


def conv_as_correction(q, k, v, w, *, causal=False):
    """The paper's equation 5."""
    k, v, w = (x.astype(np.result_type(x.dtype, np.float32)) for x in (k, v, w))
    shape = np.broadcast_shapes(q.shape, k.shape, v.shape)
    k, v, w = np.broadcast_to(k, shape), np.broadcast_to(v, shape), w if w.ndim > 1 else w[None]
    heads = k[None] if k.ndim == 2 else k
    W = _aft_variants._toeplitz(w, heads).astype(heads.dtype)
    kernel, everything = np.expm1(W), np.ones(W.shape[-2:], W.dtype)
    if causal:
        kernel, everything = np.tril(kernel), np.tril(everything)
    e = np.exp(heads - heads.max(axis=-2, keepdims=True, initial=-1e30))
    values = (v[None] if v.ndim == 2 else v) * e
    y = _aft.sigmoid(q.astype(e.dtype)) * ((kernel @ values + everything @ values) / (kernel @ e + everything @ e)).reshape(shape)
    return y.astype(q.dtype)


def _of_aft(function, says, **kwargs):
    return _written("aft", _aft.aft, function, says, **kwargs)


def _variant(operator, name, says, *edits, **kwargs):
    return _edits(operator, getattr(_aft_variants, operator), name, says, *edits, **kwargs)


def _variant_vjp(operator, name, says, *edits):
    return _edits(operator, getattr(_aft_variants, f"{operator}_vjp"), name, says, *edits, of_gradient=True)


_BAND = "return np.where(abs(_lags(w.shape[-1])) < s, w, np.zeros_like(w))"
_SPREAD = "return np.where(abs(lags) < s, spread, np.zeros_like(spread))"
AFT = (
    _of_aft(w_transposed, "you read w as [key, query]: w[t, j] belongs to query t and key j"),
    _of_aft(gate_left_away, "you leave the gate σ(q) away"),
    _of_aft(weights_not_normalised, "you do not divide by the sum of the weights"),
    _of_aft(one_weight_for_all_channels, "your weights are the same in all channels: each channel has its own softmax, over its own keys"),
    _of_aft(
        maxima_apart,
        "you subtract the maxima of k and of w apart: where no pair has both, everything underflows to 0/0; take that of k_j + w_tj",
    ),
    _of_aft(in_plain_exponentials, "you take e^k and e^w without subtracting a maximum: they overflow though the mean is representable"),
    _edits(
        "aft",
        _aft.aft,
        "causal_not_looked_at",
        "you ignore `causal`: query t then sees only keys j <= t",
        ("s = scores(k, w, causal)\n    return", "s = scores(k, w, False)\n    return"),
    ),
    _edits(
        "aft",
        _aft.aft,
        "gate_of_tanh",
        "your gate is tanh; it is the sigmoid",
        ("return sigmoid(q) * mean(weights(s), v, s)", "return np.tanh(q) * mean(weights(s), v, s)"),
    ),
    _edits(
        "aft",
        _aft.aft_vjp,
        "gradient_of_w_of_one_channel",
        "your gradient of w looks at one channel; w is shared, so it is the sum over them",
        ('{"w": ds.sum(axis=-3)}', '{"w": ds[..., 0, :, :] * 1}'),
        of_gradient=True,
    ),
    _edits(
        "aft",
        _aft.aft_vjp,
        "gradient_of_q_without_gate",
        "your gradient of q is dy o; the gate's slope is σ(q) σ(-q)",
        ('return gradients | {"w"', 'gradients["q"] = gradients["q"] / (sigmoid(q) * sigmoid(-q))\n    return gradients | {"w"'),
        of_gradient=True,
    ),
    _variant(
        "aft_local",
        "far_pairs_masked",
        "pairs beyond the band are masked in yours; they attend, with a bias of 0",
        (_BAND, "return np.where(abs(_lags(w.shape[-1])) < s, w, np.full_like(w, -np.inf))"),
    ),
    _variant("aft_local", "band_one_wider", "your band is |t - j| <= s; it is |t - j| < s", (_BAND, _BAND.replace("< s", "<= s"))),
    _variant(
        "aft_local",
        "band_of_the_past",
        "your band holds only t - j = 0 ... s - 1; it is |t - j| < s on both sides",
        (_BAND, _BAND.replace("abs(_lags(w.shape[-1])) < s", "(_lags(w.shape[-1]) < s) & (_lags(w.shape[-1]) >= 0)")),
    ),
    _variant("aft_local", "s_not_looked_at", "you use all of w: it counts only for |t - j| < s", (_BAND, "return w")),
    _variant_vjp(
        "aft_local",
        "gradient_beyond_the_band",
        "biases beyond the band are not looked at, and have no gradient",
        ('"w": _banded(ds.sum(axis=-3), s)', '"w": ds.sum(axis=-3)'),
    ),
    _variant(
        "aft_simple",
        "causal_by_the_whole",
        "you ignore `causal`: query t then sees only keys j <= t",
        ("    scored = scores(k, _no_bias(k), causal)", "    scored = scores(k, _no_bias(k), False)"),
    ),
    _variant(
        "aft_simple",
        "own_key_left_out",
        "causal: query t sees keys j <= t, its own too",
        (
            "    scored = scores(k, _no_bias(k), causal)",
            "    own = np.where(np.eye(k.shape[-2]) > 0, -np.inf, _no_bias(k)) if causal else _no_bias(k)\n"
            "    scored = scores(k, own, causal)",
        ),
    ),
    _variant(
        "aft_simple",
        "softmax_over_channels",
        "your softmax runs over the channels; it runs over time, in every channel",
        (
            "    return sigmoid(q) * mean(weights(scored), v, scored)\n\n\n@SIMPLE.form\n@as_data\ndef aft_simple_scan",
            "    e = np.exp(k - np.max(k, axis=-1, keepdims=True))\n"
            "    mixed = e / e.sum(axis=-1, keepdims=True) * v\n"
            "    return sigmoid(q) * (np.cumsum(mixed, axis=-2) if causal else mixed.sum(axis=-2, keepdims=True))\n"
            "\n"
            "\n"
            "@SIMPLE.form\n"
            "@as_data\n"
            "def aft_simple_scan",
        ),
    ),
    _variant_vjp(
        "aft_simple",
        "gradient_of_v_only",
        "the weights depend on k: your gradient of k is zero",
        (
            "    return vjp(dy, q, k, v, scores(k, _no_bias(k), causal))[0]",
            '    return vjp(dy, q, k, v, scores(k, _no_bias(k), causal))[0] | {"k": 0 * k}',
        ),
    ),
    _variant(
        "aft_conv",
        "kernel_reversed",
        "your kernel runs the other way: w[h, t - j + s - 1], the last bias meets the farthest earlier key",
        ("spread = w[:, np.clip", "spread = w[:, ::-1][:, np.clip"),
    ),
    _variant(
        "aft_conv",
        "beyond_the_kernel_masked",
        "keys beyond the kernel are masked in yours; they attend, with a bias of 0",
        (_SPREAD, "return np.where(abs(lags) < s, spread, np.full_like(spread, -np.inf))"),
    ),
    _variant(
        "aft_conv",
        "one_kernel_for_all_heads",
        "you use the first head's kernel for all",
        ("spread = w[:, np.clip", "spread = w[:1, np.clip"),
    ),
    _written(
        "aft_conv",
        _aft_variants.aft_conv,
        conv_as_correction,
        "you add (e^w - 1) e^k to a sum over all keys: where w silences a large key, its weight is added and taken away again, "
        "and all digits of the others with it",
    ),
    _variant_vjp(
        "aft_conv",
        "gradient_kernel_reversed",
        "your gradient of w runs the other way than w",
        ("dw[..., lag + s - 1] = ds", "dw[..., s - 1 - lag] = ds"),
    ),
)

# -- Linformer -------------------------------------------------------------------------------------------------------


def _of_linformer(name, says, *edits, **kwargs):
    return _edits("linformer_attention", _linformer.linformer_attention, name, says, *edits, **kwargs)


def _of_linformer_vjp(name, says, *edits):
    return _edits("linformer_attention", _linformer.linformer_attention_vjp, name, says, *edits, of_gradient=True)


_PROJECTED = "keys, values = E @ k, F @ v  # (..., H, r, d), (..., H, r, e)"
_SCORED = "s = _scale(q, scale) * (q @ keys.mT)  # (..., H, n, r)"
LINFORMER = (
    _of_linformer(
        "projections_swapped", "E projects the keys and F the values; yours are swapped", (_PROJECTED, "keys, values = F @ k, E @ v")
    ),
    _of_linformer("one_projection", "you project the values with E too; F is theirs", (_PROJECTED, "keys, values = E @ k, E @ v")),
    _of_linformer(
        "projected_after_the_softmax",
        "you take the softmax over all positions and mix afterwards; mixtures are scored first, and the softmax is over them",
        (_SCORED, "s = _scale(q, scale) * (q @ k.mT)\n    return (weights(s) @ E.T) @ values"),
    ),
    _of_linformer(
        "scaled_by_rank",
        "you scale by 1/√r; it is 1/√d, the features of a key",
        (_SCORED, "s = (1 / sqrt_of(max(E.shape[0], 1), q) if scale is None else scale) * (q @ keys.mT)"),
    ),
    _of_linformer(
        "not_scaled", "you do not scale the scores (1/√d unless given)", (_SCORED, "s = (1 if scale is None else scale) * (q @ keys.mT)")
    ),
    _of_linformer("scale_not_looked_at", "you scale by 1/√d whatever `scale` says", (_SCORED, "s = _scale(q, None) * (q @ keys.mT)")),
    _of_linformer(
        "first_positions_only",
        "you drop positions beyond the first r; all m are mixed",
        (_PROJECTED, "at = slice(0, E.shape[0])\n    keys, values = E[:, at] @ k[..., at, :], F[:, at] @ v[..., at, :]"),
    ),
    _of_linformer(
        "mean_in_place_of_sum",
        "you divide the projections by m; a row of E is a sum over positions as it stands",
        (_PROJECTED, "keys, values = E @ k / max(k.shape[-2], 1), F @ v / max(k.shape[-2], 1)"),
    ),
    _of_linformer_vjp(
        "gradient_of_F_is_that_of_E", "your gradient of F is that of E; F has dṽ vᵀ", ('"F": dvalues @ v.mT', '"F": dkeys @ k.mT')
    ),
    _of_linformer_vjp(
        "gradient_of_k_by_F",
        "your gradient of k goes back to the positions by Fᵀ; keys were projected by E, so it is Eᵀ",
        ('"k": E.T @ dkeys', '"k": F.T @ dkeys'),
    ),
    _of_linformer_vjp(
        "gradient_scaled_twice",
        "your gradients of q and k have the scale twice",
        (
            "s = scale * (q @ keys.mT)\n    p = weights(s)\n    ds = scale",
            "s = scale * (q @ keys.mT)\n    p = weights(s)\n    ds = scale * scale",
        ),
    ),
)

# -- block-sparse attention ------------------------------------------------------------------------------------------


def _in_blocks(name, says, *edits):
    """The form in small blocks after edits of its chapter."""
    build = edited(_block_sparse.attention_block_sparse, *edits)
    wrap = functools.wraps(_attention.attention)
    return Mutant("attention", name, says, lambda: wrap(functools.partial(build(), block_q=16, block_k=16)))


BLOCKS = (
    _in_blocks(
        "blocks_seen_wholly",
        "of a block that holds anything you let all pairs attend; inside of a block the mask still decides",
        ("k[keys], pairs), pairs, rows, keys)", "k[keys], pairs), pairs._replace(mask=None), rows, keys)"),
    ),
    _in_blocks(
        "block_judged_by_its_corner",
        "you skip a block if its first pair is masked; it may be skipped only if all are",
        (
            "(layout is None or layout[i, j])",
            "(layout is None or np.broadcast_to(pairs.mask, (q.shape[-2], k.shape[-2]))[rows.start, keys.start])",
        ),
    ),
    _in_blocks(
        "window_judged_by_the_last_query",
        "you skip blocks by the window of a tile's last query; those that only its first sees are lost",
        ("keys.stop - 1 >= first - pairs.left", "keys.stop - 1 >= last - pairs.left"),
    ),
    _in_blocks(
        "diagonal_block_skipped",
        "you skip the block on the causal diagonal: it is visible in part",
        ("keys.start <= last + pairs.right", "keys.stop - 1 <= last + pairs.right"),
    ),
)

MUTANTS = ROPE + RELATIVE + AFT + LINFORMER + BLOCKS
