"""Mistakes in what stands around attention: positions, sparse patterns, and its cheaper relatives."""

import functools
import importlib

import ml_dtypes
import numpy as np

from refimpl.conformance.mutants import Mutant, edited

_chapter = lambda name: importlib.import_module(f"refimpl.ops.attention.{name}")
_rope = _chapter("rope")


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
            '    layout = {"half": "interleaved"}.get(layout, "half")\n    first, second = _places(2 * theta.shape[-1], layout)\n    return x[..., first]',
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
        "you rotate halves but give the frequencies to neighbours (each repeated, as for interleaved pairs): with 'half' both of i and i + dims/2 have ω_i",
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
            "    x = np.roll(x, 2 * theta.shape[-1] - x.shape[-1], axis=-1)\n    first, second = _places(2 * theta.shape[-1], layout)\n    return x[..., first]",
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

MUTANTS = ROPE
