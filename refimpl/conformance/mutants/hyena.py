"""Mistakes in operators made of long convolutions and gates: hyena, its filters, and H3."""

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.recurrence import h3 as h3_chapter
from refimpl.ops.recurrence import hyena as hy
from refimpl.ops.recurrence import hyena_filter as hf

_STAGE = "z = gate * long_conv(z, kernel, skip)  # (..., T, c)"
_WITHIN = "for gate, kernel, skip in _stages(gates, kernels, skips):\n        z = gate * long_conv(z"

_HYENA = (
    Mutant(
        "hyena",
        "gates_first",
        "each stage multiplies by its gate and then convolves, as the published code does after its first gate: here z is convolved first and gated last (that code's gates but the first, and v times the first, give this operator)",
        edited(hy.hyena, (_STAGE, "z = long_conv(gate * z, kernel, skip)")),
        variant=True,
    ),
    Mutant(
        "hyena",
        "gates_reversed",
        "the gates are applied last first, filters in order: the first gate of the tuple belongs to the first filter",
        edited(hy.hyena, (_WITHIN, _WITHIN.replace("_stages(gates,", "_stages(gates[::-1],"))),
    ),
    Mutant(
        "hyena",
        "filters_reversed",
        "the filters are applied last first, gates in order: kernels[0] belongs to the first gate",
        edited(hy.hyena, (_WITHIN, _WITHIN.replace("kernels, skips", "kernels[::-1], None if skips is None else skips[::-1]"))),
    ),
    Mutant(
        "hyena",
        "one_filter_for_all_stages",
        "every stage uses the first filter: each gate has a filter of its own",
        edited(hy.hyena, (_WITHIN, _WITHIN.replace("kernels, skips", "[kernels[0] for _ in gates], skips"))),
    ),
    Mutant(
        "hyena",
        "last_gate_missing",
        "the output of the last filter is not gated: N gates for N filters, the last one included",
        edited(
            hy.hyena,
            (
                _STAGE + "\n    return z\n",
                "z, ungated = gate * long_conv(z, kernel, skip), long_conv(z, kernel, skip)\n    return ungated if len(gates) else z\n",
            ),
        ),
    ),
    Mutant(
        "hyena",
        "skip_beside_the_gate",
        "the skip passes the gate by: it is part of the filter, gate · (kernel * z + skip z), and is gated with it",
        edited(hy.hyena, (_STAGE, "z = gate * long_conv(z, kernel) + (0 if skip is None else skip * z)")),
    ),
    Mutant(
        "hyena",
        "skips_forgotten",
        "the direct paths are ignored: every filter has a term skip·z_t",
        edited(hy.hyena, (_STAGE, "z = gate * long_conv(z, kernel)")),
    ),
    Mutant(
        "hyena",
        "circular",
        "the transforms are as long as the input, so the tails wrap onto the beginning and the past hears the future: pad to at least T + K - 1",
        edited(hy.hyena_fft, ("    length = u.shape[-2] + kernel.shape[-2] - 1\n", "    length = u.shape[-2]\n")),
    ),
    Mutant(
        "hyena",
        "residual",
        "every stage adds its input: z_{k+1} is the gated convolution alone",
        edited(hy.hyena, (_STAGE, "z = z + gate * long_conv(z, kernel, skip)")),
    ),
    Mutant(
        "hyena",
        "matrices_in_the_wrong_order",
        "the factors of the matrix are multiplied from the other side: the first filter meets v first, so it stands last, H = D_N S_N ... D_1 S_1",
        edited(hy.hyena_matrix, ("factor @ H", "H @ factor")),
    ),
    Mutant(
        "hyena",
        "gradient_of_gate_unfiltered",
        "the gradient of a gate is taken with what entered the filter: dgate_k = conj(kernel_k * z_k + skip_k z_k) g",
        edited(hy.hyena_vjp, ("np.conj(filtered) * g", "np.conj(z) * g")),
        of_gradient=True,
    ),
    Mutant(
        "hyena",
        "gradient_passes_the_gate",
        "what goes back through a filter was not multiplied by the gate behind it",
        edited(hy.hyena_vjp, ("long_conv_vjp(np.conj(gate) * g,", "long_conv_vjp(g + 0 * gate,")),
        of_gradient=True,
    ),
)

_SINE = "h = np.sin(frequency * (h @ w + b))  # (K, f)"
_WINDOW = "return np.exp(-rates[:, None, :] * t[:, None]) + shift"

_HYENA_FILTER = (
    Mutant(
        "hyena_filter",
        "frequency_missing",
        "the sines are not scaled: their argument is frequency · (h W + b)",
        edited(hf.hyena_filter, (_SINE, "h = np.sin(h @ w + b)")),
    ),
    Mutant(
        "hyena_filter",
        "frequency_after_the_sine",
        "frequency multiplies the sine: it multiplies its argument",
        edited(hf.hyena_filter, (_SINE, "h = frequency * np.sin(h @ w + b)")),
    ),
    Mutant(
        "hyena_filter",
        "bias_not_scaled",
        "the frequency multiplies h W and not the bias: it multiplies their sum",
        edited(hf.hyena_filter, (_SINE, "h = np.sin(frequency * (h @ w) + b)")),
    ),
    Mutant(
        "hyena_filter",
        "window_without_floor",
        "shift is ignored: the window is exp(-decay t) + shift",
        edited(hf.hyena_filter, (_WINDOW, "return np.exp(-rates[:, None, :] * t[:, None])")),
    ),
    Mutant(
        "hyena_filter",
        "floor_added_to_the_kernel",
        "shift is added to the kernel: it is part of the window, which multiplies the network's output",
        edited(
            hf.hyena_filter,
            (_WINDOW, "return np.exp(-rates[:, None, :] * t[:, None])"),
            ("return (h @ w_out) * _window(t, decay, shift)  # (N, K, c)", "return (h @ w_out) * _window(t, decay, shift) + shift"),
        ),
    ),
    Mutant(
        "hyena_filter",
        "window_grows",
        "the window is exp(+decay t): what is long ago counts more, where it should fade",
        edited(hf.hyena_filter, (_WINDOW, "return np.exp(rates[:, None, :] * t[:, None]) + shift")),
    ),
    Mutant(
        "hyena_filter",
        "window_of_the_first_filter",
        "all filters fade like the first: decay has a rate for each channel of each filter",
        edited(
            hf.hyena_filter,
            (
                "rates = decay if decay.ndim == 2 else decay[None, :]\n    return np.exp",
                "rates = decay[:1] if decay.ndim == 2 else decay[None, :]\n    return np.exp",
            ),
        ),
    ),
    Mutant(
        "hyena_filter",
        "last_layer_without_sine",
        "the last hidden layer is linear: every hidden layer ends in a sine, only the readout does not",
        edited(hf.hyena_filter, (_SINE + "\n", "h, before = np.sin(frequency * (h @ w + b)), h @ w + b\n    h = before\n")),
    ),
    Mutant(
        "hyena_filter",
        "layer_transposed",
        "inner layers multiply by the transpose (torch's Linear holds it so): h W with W of shape (in, out)",
        edited(hf.hyena_filter, ("*zip(w_inner, b_inner, strict=True)]", "*zip(np.swapaxes(w_inner, -1, -2), b_inner, strict=True)]")),
    ),
    Mutant(
        "hyena_filter",
        "gradient_without_frequency",
        "the factor ω is missing in what goes back through a sine: the derivative of sin(ω a) is ω cos(ω a)",
        edited(hf.hyena_filter_vjp, ("da = frequency * bent  # (K, f)", "da = bent")),
        of_gradient=True,
    ),
    Mutant(
        "hyena_filter",
        "gradient_of_rate_takes_the_floor",
        "the derivative of the window is taken as the window itself, floor included: only exp(-decay t) depends on the rate",
        edited(hf.hyena_filter_vjp, ("through_window * (window - shift)", "through_window * window")),
        of_gradient=True,
    ),
)

_H3 = (
    Mutant(
        "h3",
        "key_not_shifted",
        "the key is used as it comes: it goes through the shift filter before it meets the value",
        edited(
            h3_chapter.h3,
            (
                "written = long_conv(k, shift_kernel, skip) * v  # (..., T, c)\n    return q * ssm(written",
                "written = k * v\n    return q * ssm(written",
            ),
        ),
    ),
    Mutant(
        "h3",
        "product_shifted",
        "the product of key and value is shifted: only the key is, and the value is multiplied to it afterwards",
        edited(
            h3_chapter.h3,
            (
                "written = long_conv(k, shift_kernel, skip) * v  # (..., T, c)\n    return q * ssm(written",
                "written = long_conv(k * v, shift_kernel, skip)\n    return q * ssm(written",
            ),
        ),
    ),
    Mutant(
        "h3",
        "value_shifted",
        "key and value have changed places: the shift filter belongs to the key",
        edited(
            h3_chapter.h3,
            (
                "written = long_conv(k, shift_kernel, skip) * v  # (..., T, c)\n    return q * ssm(written",
                "written = long_conv(v, shift_kernel, skip) * k\n    return q * ssm(written",
            ),
        ),
    ),
    Mutant(
        "h3",
        "query_inside",
        "the query multiplies what goes into the state space model: it multiplies what comes out",
        edited(
            h3_chapter.h3,
            ("return q * ssm(written, A_bar, B_bar, C, D, pairs=pairs)", "return ssm(q * written, A_bar, B_bar, C, D, pairs=pairs)"),
        ),
    ),
    Mutant(
        "h3",
        "skips_exchanged",
        "D and skip have changed places: skip is the shift filter's direct path, D the state space model's",
        edited(
            h3_chapter.h3,
            (
                "written = long_conv(k, shift_kernel, skip) * v  # (..., T, c)\n    return q * ssm(written, A_bar, B_bar, C, D, pairs=pairs)",
                "written = long_conv(k, shift_kernel, None if D is None else D + 0 * shift_kernel[:1].sum(axis=0)) * v\n"
                "    return q * ssm(written, A_bar, B_bar, C, skip, pairs=pairs)",
            ),
        ),
    ),
    Mutant(
        "h3",
        "d_forgotten",
        "D is ignored: the state space model has a direct path D u_t",
        edited(
            h3_chapter.h3, ("return q * ssm(written, A_bar, B_bar, C, D, pairs", "return q * ssm(written, A_bar, B_bar, C, None, pairs")
        ),
    ),
    Mutant(
        "h3",
        "skip_forgotten",
        "skip is ignored: the shift filter has a direct path skip·k_t",
        edited(
            h3_chapter.h3,
            (
                "written = long_conv(k, shift_kernel, skip) * v  # (..., T, c)\n    return q * ssm(",
                "written = long_conv(k, shift_kernel) * v\n    return q * ssm(",
            ),
        ),
    ),
    Mutant(
        "h3",
        "pairs_count_once",
        "with pairs=True the answer is the real part once: it is twice the real part, since the conjugate half of the states is not given",
        edited(
            h3_chapter.h3, ("C, D, pairs=pairs)\n\n\n@CONTRACT.form\ndef h3_convolution", "C, D)\n\n\n@CONTRACT.form\ndef h3_convolution")
        ),
    ),
    Mutant(
        "h3",
        "sees_ahead",
        "the matrix is not masked: what lies ahead is read through the kernel of |t - s|; s runs to t only",
        edited(h3_chapter.h3_attention, ("np.where(delay >= 0, terms,", "np.where(delay >= -(T + 1), terms,")),
    ),
    Mutant(
        "h3",
        "gradient_of_key_not_shifted_back",
        "the gradient of k is what reaches the shifted key: it must go back through the filter, which runs it backwards",
        edited(h3_chapter.h3_vjp, ('"k": through_shift["u"]', '"k": v * g')),
        of_gradient=True,
    ),
    Mutant(
        "h3",
        "gradient_of_query_without_d",
        "the gradient of q is taken with the states' part of the answer: y = q · (Re(C x) + D u)",
        edited(
            h3_chapter.h3_vjp, ('{"q": dy * ssm(shifted * v, A_bar, B_bar, C, D,', '{"q": dy * ssm(shifted * v, A_bar, B_bar, C, None,')
        ),
        of_gradient=True,
    ),
)

MUTANTS = (*_HYENA, *_HYENA_FILTER, *_H3)
