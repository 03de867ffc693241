"""Mistakes in convolutions: which sample meets which tap, and what falls off the ends."""

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.recurrence import causal_conv1d as cc
from refimpl.ops.recurrence import long_conv as lc
from refimpl.ops.recurrence import monarch as mo

_LONG_CONV = (
    Mutant(
        "long_conv",
        "circular",
        "the transform is as long as the input, so the tail wraps onto the beginning and the past hears the future: pad to at least T + K - 1",
        edited(
            lc.long_conv_fft,
            ("    length = u.shape[-2] + kernel.shape[-2] - 1\n", "    length = u.shape[-2]\n"),
            ("n = scipy.fft.next_fast_len(length)\n", "n = length\n"),
            ("n = scipy.fft.next_fast_len(length, real=True)\n", "n = length\n"),
        ),
    ),
    Mutant(
        "long_conv",
        "kernel_reversed",
        "the kernel is applied back to front (a correlation, as torch's conv1d computes it): kernel_0 meets the newest sample",
        edited(lc.long_conv, ("kernel[..., s, None, :] * u", "kernel[..., K - 1 - s, None, :] * u")),
    ),
    Mutant(
        "long_conv",
        "looks_ahead",
        "y_t = Σ kernel_s u_{t+s}: the filter runs backwards in time; it must read u_{t-s}",
        edited(
            lc.long_conv,
            (
                "y[..., s:, :] += kernel[..., s, None, :] * u[..., : T - s, :]",
                "y[..., : T - s, :] += kernel[..., s, None, :] * u[..., s:, :]",
            ),
        ),
    ),
    Mutant(
        "long_conv",
        "one_step_late",
        "the output is late by one: kernel_0 must meet u_t, not u_{t-1}",
        edited(
            lc.long_conv,
            (
                "y[..., s:, :] += kernel[..., s, None, :] * u[..., : T - s, :]",
                "y[..., s + 1 :, :] += kernel[..., s, None, :] * u[..., : T - s - 1, :]",
            ),
        ),
    ),
    Mutant(
        "long_conv",
        "last_tap_dropped",
        "the last row of the kernel is not used: s runs to K - 1 inclusive",
        edited(lc.long_conv, ("for s in range(min(T, K)):", "for s in range(min(T, K - 1)):")),
    ),
    Mutant(
        "long_conv",
        "skip_forgotten",
        "skip is ignored: y_t has a term skip·u_t",
        edited(lc.long_conv, ("return y if skip is None else y + skip * u", "return y")),
    ),
    Mutant(
        "long_conv",
        "skip_is_residual",
        "u is added without its coefficient: the direct path is skip·u_t, per channel",
        edited(lc.long_conv, ("return y if skip is None else y + skip * u", "return y if skip is None else y + u")),
    ),
    Mutant(
        "long_conv",
        "skip_multiplies_output",
        "skip multiplies the filtered signal: it multiplies the input u_t, beside the filter",
        edited(lc.long_conv, ("return y if skip is None else y + skip * u", "return y if skip is None else y + skip * y")),
    ),
    Mutant(
        "long_conv",
        "block_tail_lost",
        "what a block adds beyond its own end is thrown away: its last K - 1 rows belong to the blocks after it",
        edited(lc.long_conv_overlap_add, ("for i in range(ahead):", "for i in range(min(ahead, 1)):")),
    ),
    Mutant(
        "long_conv",
        "long_kernel_cut_at_the_wrong_end",
        "a kernel longer than the input keeps its last T rows: the rows that meet an input are the first T",
        edited(
            lc.long_conv_fft,
            (
                "kernel = kernel[..., :T, :]\n    y = _by_transform",
                "kernel = kernel[..., -T:, :] if T else kernel[..., :0, :]\n    y = _by_transform",
            ),
        ),
    ),
    Mutant(
        "long_conv",
        "one_kernel_for_all_channels",
        "every channel is filtered by the first channel's kernel: each has its own",
        edited(lc.long_conv, ("kernel[..., s, None, :] * u", "kernel[..., s, None, :1] * u")),
    ),
    Mutant(
        "long_conv",
        "transform_not_normalised",
        "the output is off by √n: one forward transform is orthonormal and the other is not; F⁻¹ carries 1/n once",
        edited(lc.long_conv_fft, ("scipy.fft.rfft(u, n, axis=-2)", "scipy.fft.rfft(u, n, axis=-2, norm='ortho')")),
    ),
    Mutant(
        "long_conv",
        "gradient_of_input_not_reversed",
        "du is a convolution of dy with the kernel: it is a correlation, du_t = Σ conj(kernel_s) dy_{t+s}",
        edited(
            lc.long_conv_vjp,
            ("du = long_conv(backwards,", "du = long_conv(dy,"),
            ("None if skip is None else np.conj(skip))[..., ::-1, :]", "None if skip is None else np.conj(skip))"),
        ),
        of_gradient=True,
    ),
    Mutant(
        "long_conv",
        "gradient_of_kernel_one_late",
        "dkernel_s is what belongs to s + 1: dkernel_s = Σ conj(u_{t-s}) dy_t, and s = 0 is the sum without a delay",
        edited(lc.long_conv_vjp, ("[..., ::-1, :][..., :K, :]", "[..., ::-1, :][..., [*range(1, T), *[0] * min(T, 1)], :][..., :K, :]")),
        of_gradient=True,
    ),
)

_MONARCH_MATMUL = (
    Mutant(
        "monarch_matmul",
        "permutation_missing",
        "the two factors are multiplied without the transposition between them: y = P L Pᵀ R x",
        edited(mo.monarch_matmul, ("    z = z[..., _transposed(r, l)]  # Pᵀ: (..., lr)\n", "")),
    ),
    Mutant(
        "monarch_matmul",
        "permutation_of_the_output_missing",
        "the output stands block by block: the last P writes it as a table (s, l), the blocks' rows first",
        edited(mo.monarch_matmul, ("return y[..., _transposed(l, s)]", "return y")),
    ),
    Mutant(
        "monarch_matmul",
        "permutation_transposed",
        "the table between the factors has its rows and columns confused: z_kq is read as z_rl, l running fastest",
        edited(mo.monarch_matmul, ("z = z[..., _transposed(r, l)]", "z = z[..., _transposed(l, r)]")),
    ),
    Mutant(
        "monarch_matmul",
        "one_block_for_all",
        "every block is the first one: the factors have a block of their own on each place of the diagonal",
        edited(mo.monarch_matmul, ("full[i, :, i, :] = blocks[i]", "full[i, :, i, :] = blocks[0]")),
    ),
    Mutant(
        "monarch_matmul",
        "gradient_not_conjugated",
        "the gradient of x goes back through L without conjugating it: Re<dy, J dx> = Re<g, dx> needs conj(L)",
        edited(mo.monarch_matmul_vjp, ("_apply(np.conj(np.swapaxes(L, -1, -2)), dy)", "_apply(np.swapaxes(L, -1, -2), dy)")),
        of_gradient=True,
    ),
)

_TAPS = "z = sum(weight[:, j] * seen[..., j : j + T, :] for j in range(W))"
_END = """y = silu(z) if activation == "silu" else z"""
_LAST = "return (y, memory.copy()) if return_state else y"

_CAUSAL_CONV1D = (
    Mutant(
        "causal_conv1d",
        "weight_reversed",
        "weight_0 meets the newest sample: the last tap does, as in torch's layout",
        edited(cc.causal_conv1d, (_TAPS, "z = sum(weight[:, W - 1 - j] * seen[..., j : j + T, :] for j in range(W))")),
    ),
    Mutant(
        "causal_conv1d",
        "looks_ahead",
        "the window is centred (padding on both sides, cut at the start): a step sees only the past, so all W - 1 rows of padding stand before the input",
        edited(
            cc.causal_conv1d,
            (
                _TAPS,
                "seen = np.concatenate([seen[..., W // 2 :, :], 0 * seen[..., : W // 2, :]], axis=-2)\n    z = sum(weight[:, j] * seen[..., j : j + T, :] for j in range(W))",
            ),
        ),
    ),
    Mutant(
        "causal_conv1d",
        "state_ignored",
        "the inputs before the first step are taken as zeros though a state is given",
        edited(cc.causal_conv1d, ("if state is None else state\n    batch", "if True else state\n    batch")),
    ),
    Mutant(
        "causal_conv1d",
        "state_newest_first",
        "the state's rows are used newest first: they stand as the inputs did, oldest first",
        edited(cc.causal_conv1d, ("if state is None else state\n    batch", "if state is None else state[..., ::-1, :]\n    batch")),
    ),
    Mutant(
        "causal_conv1d",
        "final_state_newest_first",
        "the final state has the newest input first: oldest first, so that it can be put before the next inputs",
        edited(cc.causal_conv1d, (_LAST, "return (y, memory[..., ::-1, :].copy()) if return_state else y")),
    ),
    Mutant(
        "causal_conv1d",
        "final_state_forgets_the_old_one",
        "after fewer than W - 1 steps the final state is padded with zeros: what is left of the state before belongs there",
        edited(
            cc.causal_conv1d,
            (
                _LAST,
                "memory = memory.copy()\n    memory[..., : max(memory.shape[-2] - y.shape[-2], 0), :] = 0\n    return (y, memory) if return_state else y",
            ),
        ),
    ),
    Mutant(
        "causal_conv1d",
        "final_state_is_filtered",
        "the final state holds the last outputs: it holds the last inputs",
        edited(
            cc.causal_conv1d,
            (
                _LAST,
                "rows = np.concatenate([memory, y], axis=-2)\n    return (y, rows[..., rows.shape[-2] - memory.shape[-2] :, :]) if return_state else y",
            ),
        ),
    ),
    Mutant(
        "causal_conv1d",
        "bias_after_activation",
        "the bias is added after the activation: silu acts on the sum with it",
        edited(
            cc.causal_conv1d,
            ("    z = z if bias is None else z + bias\n", ""),
            (_END, "y = silu(z) if activation == 'silu' else z\n    y = y if bias is None else y + bias"),
        ),
    ),
    Mutant(
        "causal_conv1d",
        "bias_forgotten",
        "bias is ignored",
        edited(cc.causal_conv1d, ("    z = z if bias is None else z + bias\n", "")),
    ),
    Mutant(
        "causal_conv1d",
        "sigmoid_for_silu",
        "the activation is a sigmoid: silu is x·σ(x)",
        edited(cc.causal_conv1d, (_END, "y = 1 / (1 + np.exp(-z)) if activation == 'silu' else z")),
    ),
    Mutant(
        "causal_conv1d",
        "final_state_has_no_gradient",
        "dstate is dropped: the last W - 1 inputs are part of the result",
        edited(cc.causal_conv1d_vjp, ("        dseen[..., T:, :] += dstate\n", "        pass\n")),
        of_gradient=True,
    ),
    Mutant(
        "causal_conv1d",
        "gradient_of_bias_from_one_sequence",
        "the gradient of the bias is the first sequence's: it sums over the batch as well",
        edited(cc.causal_conv1d_vjp, ('"bias": dz.sum(axis=-2)', '"bias": dz.sum(axis=-2) * (np.indices(dz.shape[:-2]).sum(axis=0) == 0)[..., None]')),
        of_gradient=True,
    ),
)

MUTANTS = _LONG_CONV + _MONARCH_MATMUL + _CAUSAL_CONV1D
