"""Mistakes in quantisation: whose scale, which way halves go, and what is left out."""

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.quantization import bitlinear as bl
from refimpl.ops.quantization import ternary as te

_ROUND = "_integers(np.clip(np.rint(w / unit_of(scale)), -1, 1), 8), scale[..., 0, 0]"
_ABSMAX = "np.clip(np.rint(x / unit_of(largest) * Q), -Q - 1, Q)"
_LARGEST = "largest = np.max(abs(x), axis=-1, keepdims=True, initial=0)  # (..., 1)"
_TERNARY_SCALE = "    scale = mean_of(abs(w))  # (..., 1, 1)\n    return " + _ROUND


def _ternary(scale: str, q: str = _ROUND):
    return edited(te.ternary_quantize, (_TERNARY_SCALE, f"    scale = {scale}\n    return {q}"))


_WEIGHTS = (
    Mutant(
        "ternary_quantize",
        "by_sign",
        "q is the sign of w, never 0 but for w = 0: it is 0 up to half the mean size",
        _ternary("mean_of(abs(w))", "_integers(np.sign(w), 8), scale[..., 0, 0]"),
    ),
    Mutant(
        "ternary_quantize",
        "scale_per_column",
        "every column has a scale of its own for the choice: one mean size serves the whole matrix",
        _ternary("np.sum(abs(w), axis=-2, keepdims=True) / w.shape[-2]", "_integers(np.clip(np.rint(w / unit_of(scale)), -1, 1), 8), mean_of(abs(w))[..., 0, 0]"),
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
        _ternary("abs(mean_of(w))"),
    ),
    Mutant(
        "ternary_quantize",
        "one_scale_for_all_matrices",
        "a stack of matrices has one scale: each matrix has its own",
        _ternary("0 * mean_of(abs(w)) + np.mean(abs(w))"),
    ),
    Mutant(
        "ternary_quantize",
        "floor",
        "w/γ is rounded down: to the nearest",
        _ternary("mean_of(abs(w))", _ROUND.replace("np.rint(w / unit_of(scale))", "np.floor(w / unit_of(scale))")),
    ),
    Mutant(
        "ternary_quantize",
        "half_away_from_zero",
        "half way is rounded away from zero: to the even number, 0",
        _ternary("mean_of(abs(w))", _ROUND.replace("np.rint(w / unit_of(scale))", "np.sign(w) * np.floor(abs(w) / unit_of(scale) + 0.5)")),
        variant=True,
    ),
    Mutant(
        "ternary_quantize",
        "zero_divided_by_zero",
        "a matrix of zeros gives 0/0: it gives zeros, with scale 0",
        edited(te.ternary_quantize, ("w / unit_of(scale)", "w / scale"), ("np.where(np.isnan(q), 0, q)", "np.where(np.isnan(q), -1, q)")),
    ),
    Mutant(
        "ternary_quantize",
        "epsilon_in_scale",
        "1e-5 is added to the scale: it is the mean size itself, and zero is treated apart",
        _ternary("mean_of(abs(w)) + np.asarray(1e-5, w.dtype)"),
        variant=True,
    ),
    Mutant(
        "binary_quantize",
        "around_zero",
        "q is the sign of w: of w less its mean",
        edited(te.binary_quantize, ("w > mean_of(w)", "w > 0")),
        variant=True,
    ),
    Mutant(
        "binary_quantize",
        "zero_for_equals",
        "q is 0 where w equals the mean: it is -1",
        edited(te.binary_quantize, ("np.where(above, np.ones_like(w), -np.ones_like(w))", "np.sign(w - mean_of(w))")),
    ),
    Mutant(
        "binary_quantize",
        "equals_go_up",
        "q is +1 where w equals the mean: it is -1",
        edited(te.binary_quantize, ("w > mean_of(w)", "w >= mean_of(w)")),
        variant=True,
    ),
    Mutant(
        "binary_quantize",
        "scale_of_centred_weights",
        "the scale is the mean size of w less its mean: of w itself",
        edited(te.binary_quantize, ("8), mean_of(abs(w))[..., 0, 0]", "8), mean_of(abs(w - mean_of(w)))[..., 0, 0]")),
        variant=True,
    ),
    Mutant(
        "binary_quantize",
        "one_mean_for_all_matrices",
        "a stack of matrices has one mean: each matrix has its own",
        edited(te.binary_quantize, ("w > mean_of(w)", "w > np.sum(w) / max(w.size, 1)")),
    ),
)

_ACTIVATIONS = (
    Mutant(
        "absmax_quantize",
        "128_for_127",
        "the largest element becomes 2^(bits-1), and is clipped: it becomes Q = 2^(bits-1) - 1",
        edited(te.absmax_quantize, ("    Q = 2 ** (int(bits) - 1) - 1\n    largest", "    Q = 2 ** (int(bits) - 1)\n    largest"), (_ABSMAX, "np.clip(np.rint(x / unit_of(largest) * Q), -Q, Q - 1)")),
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
        edited(te.absmax_quantize, (_ABSMAX, "np.clip(np.trunc(x / unit_of(largest) * Q), -Q - 1, Q)")),
    ),
    Mutant(
        "absmax_quantize",
        "half_away_from_zero",
        "half way is rounded away from zero: to the even integer",
        edited(te.absmax_quantize, (_ABSMAX, "np.clip(np.sign(x) * np.floor(abs(x) / unit_of(largest) * Q + 0.5), -Q - 1, Q)")),
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
        edited(te.absmax_quantize, ("largest[..., 0] / Q", "Q / unit_of(largest)[..., 0]")),
        variant=True,
    ),
    Mutant(
        "absmax_quantize",
        "bits_ignored",
        "always eight bits: Q = 2^(bits-1) - 1",
        edited(te.absmax_quantize, ("    Q = 2 ** (int(bits) - 1) - 1\n    largest", "    Q = 127\n    largest")),
    ),
)

_Y = "    y = (x_q @ w_q) * (step * scale)\n    return y if bias is None else y + bias\n\n\n@CONTRACT.form\ndef bitlinear_dequantised("
_X_Q = "return np.clip(np.rint(x / _nonzero(largest) * Q), -Q - 1, Q), largest / Q"
_ROW = "    largest = np.max(abs(x), axis=-1, keepdims=True, initial=0)  # (..., 1)\n    return np.clip("
_W_Q = "return np.clip(np.rint(w / _nonzero(scale)), -1, 1), scale"
_Q = "    Q = 2 ** (int(bits) - 1) - 1\n"

_BITLINEAR = (
    Mutant(
        "bitlinear",
        "ternary_by_sign",
        "ternary weights are the signs of w: they are 0 up to half the mean size",
        edited(bl.bitlinear, (_W_Q, "return np.sign(w), scale")),
    ),
    Mutant(
        "bitlinear",
        "mean_size_per_output",
        "every output has a weight scale of its own: one mean size serves the whole matrix",
        edited(bl.bitlinear, ("    scale = _mean(abs(w))\n", "    scale = np.sum(abs(w), axis=0, keepdims=True) / max(w.shape[0], 1)\n")),
        variant=True,
    ),
    Mutant(
        "bitlinear",
        "weight_scale_forgotten",
        "y lacks γ: the integers' product is multiplied by max|x|/Q and by γ",
        edited(bl.bitlinear, (_Y, _Y.replace("(step * scale)", "step"))),
    ),
    Mutant(
        "bitlinear",
        "activation_scale_forgotten",
        "y lacks max|x|/Q: the integers' product is multiplied by it and by γ",
        edited(bl.bitlinear, (_Y, _Y.replace("(step * scale)", "scale"))),
    ),
    Mutant(
        "bitlinear",
        "one_activation_scale_for_all",
        "all tokens share one scale: each token has its own",
        edited(bl.bitlinear, (_ROW, "    largest = 0 * np.max(abs(x), axis=-1, keepdims=True, initial=0) + np.max(abs(x), initial=0)\n    return np.clip(")),
        variant=True,
    ),
    Mutant(
        "bitlinear",
        "128_for_127",
        "the largest element becomes 2^(bits-1), and is clipped: it becomes Q = 2^(bits-1) - 1",
        edited(bl.bitlinear, (_Q, "    Q = 2 ** (int(bits) - 1)\n"), (_X_Q, "return np.clip(np.rint(x / _nonzero(largest) * Q), -Q, Q - 1), largest / Q")),
        variant=True,
    ),
    Mutant(
        "bitlinear",
        "towards_zero",
        "activations are cut towards zero, as a cast does: they are rounded to the nearest integer",
        edited(bl.bitlinear, (_X_Q, _X_Q.replace("np.rint", "np.trunc"))),
    ),
    Mutant(
        "bitlinear",
        "halves_up",
        "half way between two integers goes up, as Math.round does and floor(x + 1/2): it goes to the even one",
        edited(bl.bitlinear, (_X_Q, _X_Q.replace("np.rint(", "np.floor(1 / 2 + "))),
    ),
    Mutant(
        "bitlinear",
        "floor",
        "activations are rounded down: to the nearest integer",
        edited(bl.bitlinear, (_X_Q, _X_Q.replace("np.rint", "np.floor"))),
    ),
    Mutant(
        "bitlinear",
        "activations_not_quantised",
        "only the weights are quantised: the activations are too",
        edited(bl.bitlinear, (_X_Q, "return x / _nonzero(largest) * Q, largest / Q")),
        variant=True,
    ),
    Mutant(
        "bitlinear",
        "bits_ignored",
        "activation_bits is ignored: Q = 2^(activation_bits - 1) - 1",
        edited(bl.bitlinear, (_Q, "    Q = 127\n")),
    ),
    Mutant(
        "bitlinear",
        "binary_around_zero",
        "binary weights are the signs of w: of w less its mean",
        edited(bl.bitlinear, ("np.where(w > _mean(w), np.ones_like(w)", "np.where(w > 0, np.ones_like(w)")),
        variant=True,
    ),
    Mutant(
        "bitlinear",
        "zero_token_gives_nan",
        "a token of zeros is divided by its largest size, 0: it gives 0 (and the bias)",
        edited(bl.bitlinear, (_X_Q, _X_Q.replace("_nonzero(largest)", "largest"))),
    ),
    Mutant(
        "bitlinear",
        "bias_scaled",
        "the bias is added to the integers' product, and scaled with it: it is added to the result",
        edited(bl.bitlinear, (_Y, _Y.replace("    y = (x_q @ w_q) * (step * scale)\n    return y if bias is None else y + bias\n", "    return (x_q @ w_q + (0 if bias is None else bias)) * (step * scale)\n"))),
    ),
    Mutant(
        "bitlinear",
        "epsilon_in_scale",
        "1e-5 is added to γ: it is the mean size itself, and zero is treated apart",
        edited(bl.bitlinear, ("    scale = _mean(abs(w))\n", "    scale = _mean(abs(w)) + np.asarray(1e-5, w.dtype)\n")),
        variant=True,
    ),
    Mutant(
        "bitlinear",
        "gradient_of_full_precision",
        "dx = dy wᵀ and dw = xᵀ dy, of the weights and activations before rounding: the forward pass saw ŵ and x̂",
        edited(bl.bitlinear_vjp, ("    x_hat, w_hat = _values(x, w, weights, activation_bits)\n    dw", "    x_hat, w_hat = x, w\n    dw")),
        of_gradient=True,
    ),
    Mutant(
        "bitlinear",
        "gradient_without_scale",
        "dx lacks γ: it is dy (w_q γ)ᵀ",
        edited(bl.bitlinear_vjp, ("dy @ w_hat.T", "dy @ _weights(w, weights)[0].T")),
        of_gradient=True,
    ),
    Mutant(
        "bitlinear",
        "gradient_clipped",
        "weights that were clipped get no gradient: rounding and clipping are straight-through together",
        edited(bl.bitlinear_vjp, ("{\"x\": dy @ w_hat.T, \"w\": dw,", "{\"x\": dy @ w_hat.T, \"w\": np.where(abs(w) <= _mean(abs(w)), dw, 0 * dw),")),
        of_gradient=True,
        variant=True,
    ),
    Mutant(
        "bitlinear",
        "rounding_has_no_gradient",
        "the derivative of rounding is taken for 0, and nothing is learnt: it is taken for 1, straight-through",
        edited(bl.bitlinear_vjp, ("{\"x\": dy @ w_hat.T, \"w\": dw,", "{\"x\": 0 * x, \"w\": 0 * w,")),
        of_gradient=True,
    ),
)

MUTANTS = _WEIGHTS + _ACTIVATIONS + _BITLINEAR
