"""Mistakes in quantisation: whose scale, which way halves go, and what is left out."""

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.quantization import ternary as te

_ROUND = "_integers(np.clip(np.rint(w / _unit(scale)), -1, 1), 8), scale[..., 0, 0]"
_ABSMAX = "np.clip(np.rint(x / _unit(largest) * Q), -Q - 1, Q)"
_LARGEST = "largest = np.max(abs(x), axis=-1, keepdims=True, initial=0)  # (..., 1)"
_TERNARY_SCALE = "    scale = _mean(abs(w))  # (..., 1, 1)\n    return " + _ROUND


def _ternary(scale: str, q: str = _ROUND):
    return edited(te.ternary_quantize, (_TERNARY_SCALE, f"    scale = {scale}\n    return {q}"))


_WEIGHTS = (
    Mutant(
        "ternary_quantize",
        "by_sign",
        "q is the sign of w, never 0 but for w = 0: it is 0 up to half the mean size",
        _ternary("_mean(abs(w))", "_integers(np.sign(w), 8), scale[..., 0, 0]"),
    ),
    Mutant(
        "ternary_quantize",
        "scale_per_column",
        "every column has a scale of its own for the choice: one mean size serves the whole matrix",
        _ternary("np.sum(abs(w), axis=-2, keepdims=True) / w.shape[-2]", "_integers(np.clip(np.rint(w / _unit(scale)), -1, 1), 8), _mean(abs(w))[..., 0, 0]"),
        variant=True,
    ),
    Mutant(
        "ternary_quantize",
        "largest_for_mean",
        "the scale is the largest size: it is the mean",
        _ternary("np.max(abs(w), axis=(-2, -1), keepdims=True)"),
    ),
    Mutant(
        "ternary_quantize",
        "mean_without_absolute_value",
        "the scale is the mean of w: of |w|",
        _ternary("abs(_mean(w))"),
    ),
    Mutant(
        "ternary_quantize",
        "one_scale_for_all_matrices",
        "a stack of matrices has one scale: each matrix has its own",
        _ternary("0 * _mean(abs(w)) + np.mean(abs(w))"),
    ),
    Mutant(
        "ternary_quantize",
        "floor",
        "w/γ is rounded down: to the nearest",
        _ternary("_mean(abs(w))", _ROUND.replace("np.rint(w / _unit(scale))", "np.floor(w / _unit(scale))")),
    ),
    Mutant(
        "ternary_quantize",
        "half_away_from_zero",
        "half way is rounded away from zero: to the even number, 0",
        _ternary("_mean(abs(w))", _ROUND.replace("np.rint(w / _unit(scale))", "np.sign(w) * np.floor(abs(w) / _unit(scale) + 0.5)")),
        variant=True,
    ),
    Mutant(
        "ternary_quantize",
        "zero_divided_by_zero",
        "a matrix of zeros gives 0/0: it gives zeros, with scale 0",
        edited(te.ternary_quantize, ("w / _unit(scale)", "w / scale"), ("np.where(np.isnan(q), 0, q)", "np.where(np.isnan(q), -1, q)")),
    ),
    Mutant(
        "ternary_quantize",
        "epsilon_in_scale",
        "1e-5 is added to the scale: it is the mean size itself, and zero is treated apart",
        _ternary("_mean(abs(w)) + np.asarray(1e-5, w.dtype)"),
        variant=True,
    ),
    Mutant(
        "binary_quantize",
        "around_zero",
        "q is the sign of w: of w less its mean",
        edited(te.binary_quantize, ("w > _mean(w)", "w > 0")),
        variant=True,
    ),
    Mutant(
        "binary_quantize",
        "zero_for_equals",
        "q is 0 where w equals the mean: it is -1",
        edited(te.binary_quantize, ("np.where(above, np.ones_like(w), -np.ones_like(w))", "np.sign(w - _mean(w))")),
    ),
    Mutant(
        "binary_quantize",
        "equals_go_up",
        "q is +1 where w equals the mean: it is -1",
        edited(te.binary_quantize, ("w > _mean(w)", "w >= _mean(w)")),
        variant=True,
    ),
    Mutant(
        "binary_quantize",
        "scale_of_centred_weights",
        "the scale is the mean size of w less its mean: of w itself",
        edited(te.binary_quantize, ("8), _mean(abs(w))[..., 0, 0]", "8), _mean(abs(w - _mean(w)))[..., 0, 0]")),
        variant=True,
    ),
    Mutant(
        "binary_quantize",
        "one_mean_for_all_matrices",
        "a stack of matrices has one mean: each matrix has its own",
        edited(te.binary_quantize, ("w > _mean(w)", "w > np.sum(w) / max(w.size, 1)")),
    ),
)

_ACTIVATIONS = (
    Mutant(
        "absmax_quantize",
        "128_for_127",
        "the largest element becomes 2^(bits-1), and is clipped: it becomes Q = 2^(bits-1) - 1",
        edited(te.absmax_quantize, ("    Q = 2 ** (int(bits) - 1) - 1\n    largest", "    Q = 2 ** (int(bits) - 1)\n    largest"), (_ABSMAX, "np.clip(np.rint(x / _unit(largest) * Q), -Q, Q - 1)")),
        variant=True,
    ),
    Mutant(
        "absmax_quantize",
        "one_scale_for_all_rows",
        "all rows have one scale: each row has its own",
        edited(te.absmax_quantize, (_LARGEST, "largest = 0 * np.max(abs(x), axis=-1, keepdims=True, initial=0) + np.max(abs(x), initial=0)")),
        variant=True,
    ),
    Mutant(
        "absmax_quantize",
        "towards_zero",
        "x/s is cut towards zero, as a cast does: it is rounded to the nearest integer",
        edited(te.absmax_quantize, (_ABSMAX, "np.clip(np.trunc(x / _unit(largest) * Q), -Q - 1, Q)")),
    ),
    Mutant(
        "absmax_quantize",
        "half_away_from_zero",
        "half way is rounded away from zero: to the even integer",
        edited(te.absmax_quantize, (_ABSMAX, "np.clip(np.sign(x) * np.floor(abs(x) / _unit(largest) * Q + 0.5), -Q - 1, Q)")),
        variant=True,
    ),
    Mutant(
        "absmax_quantize",
        "largest_without_absolute_value",
        "the scale comes from the largest x, and rows of large negative numbers are clipped: it comes from |x|",
        edited(te.absmax_quantize, (_LARGEST, "largest = np.max(x, axis=-1, keepdims=True, initial=0)")),
    ),
    Mutant(
        "absmax_quantize",
        "reciprocal_scale",
        "the scale is Q / max |x|, what x is multiplied by: it is what q is multiplied by",
        edited(te.absmax_quantize, ("largest[..., 0] / Q", "Q / _unit(largest)[..., 0]")),
        variant=True,
    ),
    Mutant(
        "absmax_quantize",
        "bits_ignored",
        "always eight bits: Q = 2^(bits-1) - 1",
        edited(te.absmax_quantize, ("    Q = 2 ** (int(bits) - 1) - 1\n    largest", "    Q = 127\n    largest")),
    ),
)

MUTANTS = _WEIGHTS + _ACTIVATIONS
