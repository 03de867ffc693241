"""Mistakes in norms and activations: what is averaged, where epsilon stands, and what is lost at the ends."""

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.basics import activations as ac
from refimpl.ops.basics import gated as ga
from refimpl.ops.basics import group_norm as gn
from refimpl.ops.basics import layer_norm as ln
from refimpl.ops.basics import rms_norm as rn

_RMS = "    y = x / np.sqrt(_mean(x * x) + constant(eps, x))  # (..., c)\n    return _gained"
_FIRST = "    x = x * silu(gate) if gate is not None and gate_first else x\n    y = x / np.sqrt(_mean(x * x) + constant(eps, x))  # (..., c)\n"


def _rms(new):
    return edited(rn.rms_norm, (_RMS, f"    y = {new}\n    return _gained"))


_RMS_NORM = (
    Mutant("rms_norm", "mean_subtracted", "the mean is subtracted, as in layer norm: RMS norm leaves it", _rms("(x - _mean(x)) / np.sqrt(_mean((x - _mean(x)) ** 2) + constant(eps, x))"), variant=True),
    Mutant("rms_norm", "eps_outside_the_root", "eps is added to the root: it is added to the mean square, inside", _rms("x / (np.sqrt(_mean(x * x)) + constant(eps, x))"), variant=True),
    Mutant("rms_norm", "eps_missing", "eps is ignored: a row of zeros gives NaN, and small rows are blown up", _rms("x / np.sqrt(_mean(x * x))")),
    Mutant("rms_norm", "sum_for_mean", "x is divided by its length: by its root mean square, √c times less", _rms("x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + constant(eps, x))")),
    Mutant("rms_norm", "mean_over_rows", "the mean square is taken over the rows: over the features of a row", edited(rn.rms_norm, (_RMS, "    y = x / np.sqrt(np.sum(x * x, axis=0, keepdims=True) / max(len(x), 1) + constant(eps, x))\n    return _gained"))),
    Mutant("rms_norm", "weight_plus_one", "the gain is 1 + weight (Gemma's): it is weight", edited(rn.rms_norm, ("    y = y if weight is None else y * weight\n    return y if gate is None or", "    y = y if weight is None else y * (1 + weight)\n    return y if gate is None or")), variant=True),
    Mutant(
        "rms_norm",
        "gate_order_exchanged",
        "the gate comes after the norm where gate_first is True, and before it where it is False: Mamba-2's comes first, Qwen3-Next's last",
        edited(rn.rms_norm, (_FIRST, _FIRST.replace("and gate_first", "and not gate_first")), ("gate is None or gate_first else y * silu(gate)", "gate is None or not gate_first else y * silu(gate)")),
        variant=True,
    ),
    Mutant(
        "rms_norm",
        "gate_not_activated",
        "the gate multiplies as it is: silu(gate) does",
        edited(rn.rms_norm, (_FIRST, _FIRST.replace("silu(gate)", "gate")), ("gate is None or gate_first else y * silu(gate)", "gate is None or gate_first else y * gate")),
    ),
    Mutant("rms_norm", "gradient_of_scale_missing", "dx = r dn: the root depends on x as well, -r n mean(n dn)", edited(rn.rms_norm_vjp, ("r * (dn - n * _mean(n * dn))", "r * dn")), of_gradient=True),
    Mutant("rms_norm", "gradient_sums_for_means", "dx lacks a factor 1/c: mean(n dn), not the sum", edited(rn.rms_norm_vjp, ("n * _mean(n * dn)", "n * np.sum(n * dn, axis=-1, keepdims=True)")), of_gradient=True),
    Mutant("rms_norm", "gradient_of_weight_from_one_block", "dweight sums over the first 64 rows only: over all", edited(rn.rms_norm_vjp, ('"weight": last * n}', '"weight": last * n * (np.arange(r.size).reshape(r.shape) < 64)}')), of_gradient=True),
    Mutant("rms_norm", "gradient_of_gate_misses_weight", "dgate lacks the weight where the gate comes last", edited(rn.rms_norm_vjp, ("dy * (n if weight is None else n * weight)", "dy * n")), of_gradient=True),
)  # fmt: skip

_NORMALISED = "    return _affine(normalised(x, eps)[0], weight, bias)\n"
_OUT = "    y = y if weight is None else y * weight\n    return y if bias is None else y + bias\n"


def _layer(new):
    return edited(ln.layer_norm, (_NORMALISED, "    _mean = lambda v: np.sum(v, axis=-1, keepdims=True) / max(v.shape[-1], 1)\n" + new + "    return _affine(away * r, weight, bias)\n"))


_LAYER_NORM = (
    Mutant("layer_norm", "mean_not_subtracted", "the mean stays, as in RMS norm: layer norm subtracts it", _layer("    away = x\n    r = 1 / np.sqrt(_mean(away * away) + constant(eps, x))\n"), variant=True),
    Mutant("layer_norm", "divided_by_c_minus_1", "the variance is divided by c - 1: by c", _layer("    away = x - _mean(x)\n    r = 1 / np.sqrt(_mean(away * away) * (x.shape[-1] / max(x.shape[-1] - 1, 1)) + constant(eps, x))\n"), variant=True),
    Mutant("layer_norm", "eps_outside_the_root", "eps is added to the root: it is added to the variance, inside", _layer("    away = x - _mean(x)\n    r = 1 / (np.sqrt(_mean(away * away)) + constant(eps, x))\n"), variant=True),
    Mutant("layer_norm", "eps_missing", "eps is ignored: a constant row gives NaN", _layer("    away = x - _mean(x)\n    r = 1 / np.sqrt(_mean(away * away))\n")),
    Mutant(
        "layer_norm",
        "difference_of_squares",
        "the variance is mean x² - μ², which cancels where the mean is large: mean (x - μ)², or Welford's sums",
        _layer("    away = x - _mean(x)\n    r = 1 / np.sqrt(np.maximum(_mean(x * x) - _mean(x) ** 2, 0) + constant(eps, x))\n"),
        hidden=("bfloat16", "float8_e4m3fn", "float8_e5m2"),  # whose numbers far from 0 are so short that their squares are exact
    ),
    Mutant("layer_norm", "not_divided", "the mean is subtracted and nothing divided: √(var + eps) divides", _layer("    away = x - _mean(x)\n    r = 1 + 0 * away\n")),
    Mutant("layer_norm", "bias_before_weight", "the bias is added before the weight multiplies: after it", edited(ln.layer_norm, (_OUT, "    y = y if bias is None else y + bias\n    return y if weight is None else y * weight\n"))),
    Mutant("layer_norm", "bias_ignored", "the bias is ignored: it is added last", edited(ln.layer_norm, (_OUT, "    return y if weight is None else y * weight\n"))),
    Mutant("layer_norm", "gradient_of_mean_missing", "dx lacks -r mean dn: the mean depends on x", edited(ln.layer_norm_vjp, ("r * (dn - _mean(dn) - n * _mean(n * dn))", "r * (dn - n * _mean(n * dn))")), of_gradient=True),
    Mutant("layer_norm", "gradient_of_deviation_missing", "dx lacks -r n mean(n dn): the deviation depends on x", edited(ln.layer_norm_vjp, ("r * (dn - _mean(dn) - n * _mean(n * dn))", "r * (dn - _mean(dn))")), of_gradient=True),
    Mutant("layer_norm", "gradient_misses_weight", "dx is that of the norm without its weight: dn = dy weight", edited(ln.layer_norm_vjp, ("normalised_vjp(dy if weight is None else dy * weight, n, r)", "normalised_vjp(dy, n, r)")), of_gradient=True),
)  # fmt: skip

_GROUPS = "    y = normalised(_split(x, groups), eps)[0].reshape(x.shape)\n"
_STRIDED = "np.swapaxes(x.reshape(*x.shape[:-1], x.shape[-1] // groups, groups), -1, -2)"

_GROUP_NORM = (
    Mutant("group_norm", "every_gth_feature", "a group is every G-th feature: groups are of neighbours", edited(gn.group_norm, (_GROUPS, f"    y = np.swapaxes(normalised({_STRIDED}, eps)[0], -1, -2).reshape(x.shape)\n"))),
    Mutant("group_norm", "groups_for_width", "`groups` is taken for the width of a group: it is their number", edited(gn.group_norm, (_GROUPS, "    y = normalised(_split(x, x.shape[-1] // groups), eps)[0].reshape(x.shape)\n"))),
    Mutant("group_norm", "one_group", "all features are one group, as in layer norm", edited(gn.group_norm, (_GROUPS, "    y = normalised(x, eps)[0]\n"))),
    Mutant(
        "group_norm",
        "statistics_over_the_sequence",
        "the statistics run over the positions as well, as torch's GroupNorm on (N, C, L) does: each position has its own",
        edited(
            gn.group_norm,
            (_GROUPS, "    z = np.moveaxis(_split(x, groups), -2, 0).reshape(groups, -1)\n    y = np.moveaxis(normalised(z, eps)[0].reshape(groups, *x.shape[:-1], -1) if z.size else z.reshape(groups, *x.shape[:-1], x.shape[-1] // groups), 0, -2).reshape(x.shape)\n"),
        ),
        variant=True,
    ),
    Mutant("group_norm", "mean_not_subtracted", "the mean stays: RMS norm of each group, as some linear-attention layers have it", edited(gn.group_norm, (_GROUPS, "    z = _split(x, groups)\n    y = (z / np.sqrt(np.mean(z * z, axis=-1, keepdims=True) + np.asarray(eps, z.dtype))).reshape(x.shape)\n")), variant=True),
    Mutant("group_norm", "gradient_of_one_group", "dx is that of layer norm over all features: of each group", edited(gn.group_norm_vjp, ("    n, r = normalised(_split(x, groups), eps)\n    dn", "    n, r = normalised(_split(x, 1), eps)\n    dn"), ("normalised_vjp(_split(np.broadcast_to(dn, x.shape), groups), n, r)", "normalised_vjp(_split(np.broadcast_to(dn, x.shape), 1), n, r)")), of_gradient=True),
)  # fmt: skip

HALVES = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")  # where code that rounds erf is off by more
_SOFTPLUS = "    return numerics.softplus(x)\n"
_SILU = "    return numerics.silu(x)\n"
_GELU = "    return numerics.gelu(x) if approximate == \"none\" else x * sigmoid(2 * _inner(x)[0])\n"
_SWIGLU = "    return numerics.silu(gate) * up\n"
_GEGLU = "    return gelu(gate, approximate=approximate) * up\n"

_ACTIVATIONS = (
    Mutant("softplus", "overflows", "log(1 + e^x) as it is written overflows to the right, and is 0 to the left of -37 (-17 in float32): max(x, 0) + log1p(e^-|x|)", edited(ac.softplus, (_SOFTPLUS, "    return np.log(1 + np.exp(x))\n"))),
    Mutant("softplus", "tail_lost", "log(1 + e^-|x|) without log1p: to the left nothing is left of e^x", edited(ac.softplus, (_SOFTPLUS, "    return np.maximum(x, 0) + np.log(1 + np.exp(-abs(x)))\n"))),
    Mutant("softplus", "relu", "max(x, 0): softplus is smooth, log 2 at 0", edited(ac.softplus, (_SOFTPLUS, "    return np.maximum(x, 0)\n"))),
    Mutant("softplus", "binary_logarithm", "the logarithm has the base 2: e", edited(ac.softplus, (_SOFTPLUS, "    return numerics.softplus(x) / np.log(np.asarray(2, x.dtype))\n"))),
    Mutant(
        "softplus",
        "threshold_20",
        "x itself above 20 (torch's threshold): e^-20 = 2e-9 is lost, which shows in float64 only",
        edited(ac.softplus, (_SOFTPLUS, "    return np.where(x > 20, x, numerics.softplus(x))\n")),
        variant=True,
        hidden=("float32", *HALVES),
    ),
    Mutant("softplus", "gradient_of_relu", "the gradient is that of relu: σ(x)", edited(ac.softplus_vjp, ("dy * sigmoid(x)", "dy * (x > 0)")), of_gradient=True),
    Mutant("softplus", "gradient_mirrored", "the gradient is dy σ(-x): dy σ(x)", edited(ac.softplus_vjp, ("dy * sigmoid(x)", "dy * sigmoid(-x)")), of_gradient=True),
    Mutant("silu", "sigmoid", "σ(x), without the factor x", edited(ac.silu, (_SILU, "    return sigmoid(x)\n"))),
    Mutant("silu", "quick_gelu", "x σ(1.702 x), which approximates gelu: silu is x σ(x)", edited(ac.silu, (_SILU, "    return x * sigmoid(np.asarray(1.702, x.dtype) * x)\n"))),
    Mutant("silu", "hard", "x clip(x + 3, 0, 6)/6, the piecewise substitute (hardswish): x σ(x)", edited(ac.silu, (_SILU, "    return x * np.clip(x + 3, 0, 6) / 6\n"))),
    Mutant("silu", "gradient_of_sigmoid_only", "the gradient is dy σ(x): the factor σ depends on x too, and gives x σ(x) σ(-x)", edited(ac.silu_vjp, ("dy * silu_derivative(x)", "dy * sigmoid(x)")), of_gradient=True),
    Mutant("gelu", "tanh_for_erf", "approximate=\"none\" gives the approximation with tanh: x Φ(x)", edited(ac.gelu, (_GELU, "    return x * sigmoid(2 * _inner(x)[0])\n")), variant=True, hidden=HALVES),
    Mutant("gelu", "erf_for_tanh", "approximate=\"tanh\" gives x Φ(x): the approximation, which differs by up to 5e-4", edited(ac.gelu, (_GELU, "    return numerics.gelu(x)\n")), variant=True, hidden=HALVES),
    Mutant("gelu", "sigmoid_approximation", "x σ(1.702 x) (quick gelu): x Φ(x) or its approximation with tanh", edited(ac.gelu, (_GELU, "    return x * sigmoid(np.asarray(1.702, x.dtype) * x)\n")), variant=True),
    Mutant("gelu", "root_2_missing", "Φ(√2 x): erf's argument is x/√2", edited(ac.gelu, (_GELU, "    return x * numerics.normal_cdf(x * np.sqrt(np.asarray(2, x.dtype))) if approximate == \"none\" else x * sigmoid(2 * _inner(x)[0])\n"))),
    Mutant("gelu", "gradient_without_density", "the gradient is dy Φ(x): x φ(x) is missing", edited(ac.gelu_vjp, ("dy * _slope(x, approximate)", "dy * numerics.normal_cdf(x)")), of_gradient=True),
    Mutant("gelu", "gradient_of_the_other", "the gradient of x Φ(x) for the approximation with tanh", edited(ac.gelu_vjp, ("dy * _slope(x, approximate)", "dy * _slope(x, \"none\")")), of_gradient=True, hidden=("bfloat16", "float8_e4m3fn", "float8_e5m2")),
    Mutant("swiglu", "branches_exchanged", "silu(up)·gate: the gate is the first argument, and is activated", edited(ga.swiglu, (_SWIGLU, "    return numerics.silu(up) * gate\n"))),
    Mutant("swiglu", "sigmoid_for_silu", "σ(gate)·up, the plain GLU: silu(gate)", edited(ga.swiglu, (_SWIGLU, "    return numerics.sigmoid(gate) * up\n"))),
    Mutant("swiglu", "gelu_for_silu", "gelu(gate)·up: that is geglu", edited(ga.swiglu, (_SWIGLU, "    return numerics.gelu(gate) * up\n"))),
    Mutant("swiglu", "both_activated", "silu of the product: of the gate alone", edited(ga.swiglu, (_SWIGLU, "    return numerics.silu(gate * up)\n"))),
    Mutant("swiglu", "gradients_exchanged", "the gradients of gate and up are exchanged", edited(ga.swiglu_vjp, ("{\"gate\": dy * up * silu_derivative(gate), \"up\":", "{\"up\": dy * up * silu_derivative(gate), \"gate\":")), of_gradient=True),
    Mutant("geglu", "branches_exchanged", "gelu(up)·gate: the gate is the first argument, and is activated", edited(ga.geglu, (_GEGLU, "    return gelu(up, approximate=approximate) * gate\n"))),
    Mutant("geglu", "tanh_for_erf", "approximate=\"none\" gives the approximation with tanh", edited(ga.geglu, (_GEGLU, "    return gelu(gate, approximate=\"tanh\") * up\n")), variant=True, hidden=HALVES),
    Mutant("geglu", "silu_for_gelu", "silu(gate)·up: that is swiglu", edited(ga.geglu, (_GEGLU, "    return numerics.silu(gate) * up\n"))),
    Mutant("geglu", "gate_not_multiplied", "Φ(gate)·up: gelu(gate) is gate Φ(gate)", edited(ga.geglu, (_GEGLU, "    return numerics.normal_cdf(gate) * up\n"))),
    Mutant("geglu", "gradient_misses_up", "dgate lacks the factor up", edited(ga.geglu_vjp, ("dy * up * slope", "dy * slope")), of_gradient=True),
)  # fmt: skip

MUTANTS = _RMS_NORM + _LAYER_NORM + _GROUP_NORM + _ACTIVATIONS
