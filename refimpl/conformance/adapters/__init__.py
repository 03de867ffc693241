"""Well-known signatures, turned into the contract's.

An adapter takes a function with a published signature and returns one that `refimpl.check` can call: it moves axes, says
the contract's names, and translates conventions that both sides document (where a mask starts, how a state is scaled).
It never repairs a result. What a signature cannot express, its adapter leaves out of its own, or refuses with
NotImplementedError: not applicable, and counted as such.

    refimpl.check("attention", refimpl.adapters.flash_attn(my_kernel), framework="torch", device="cuda", dtypes=["bfloat16"])

`refimpl.conformance.survey` holds the public functions themselves against the reference by these.
"""

from refimpl.conformance.adapters.attention import (
    eager_attention,
    flash_attn,
    jax_attention,
    llama_rope,
    onnx_attention,
    onnx_operator,
    torch_sdpa,
)
from refimpl.conformance.adapters.basics import (
    elementwise,
    jax_gelu,
    norm_module,
    torch_gelu,
    torch_group_norm,
    torch_layer_norm,
    torch_rms_norm,
)
from refimpl.conformance.adapters.experts import mixtral_block, mixtral_router
from refimpl.conformance.adapters.gated_rnn import mlstm_kernels, onnx_gru, onnx_lstm, torch_gru, torch_lstm, xlstm_cell, xlstm_slstm
from refimpl.conformance.adapters.linear_attention import gated_delta_rule, onnx_linear_attention, rwkv_attention
from refimpl.conformance.adapters.quantization import bitnet
from refimpl.conformance.adapters.recurrence import (
    associative_scan,
    causal_conv1d_fn,
    fftconvolve,
    gates_and_tokens,
    gemma_scan,
    lfilter,
    onnx_causal_conv,
    pscan,
)
from refimpl.conformance.adapters.state_space import chunk_scan, cont2discrete, mamba_ssm, mambapy_scan

__all__ = [
    "associative_scan",
    "bitnet",
    "causal_conv1d_fn",
    "chunk_scan",
    "cont2discrete",
    "eager_attention",
    "elementwise",
    "fftconvolve",
    "flash_attn",
    "gated_delta_rule",
    "gates_and_tokens",
    "gemma_scan",
    "jax_attention",
    "jax_gelu",
    "lfilter",
    "llama_rope",
    "mamba_ssm",
    "mambapy_scan",
    "mixtral_block",
    "mixtral_router",
    "mlstm_kernels",
    "norm_module",
    "onnx_attention",
    "onnx_causal_conv",
    "onnx_gru",
    "onnx_linear_attention",
    "onnx_lstm",
    "onnx_operator",
    "pscan",
    "rwkv_attention",
    "torch_gelu",
    "torch_group_norm",
    "torch_gru",
    "torch_layer_norm",
    "torch_lstm",
    "torch_rms_norm",
    "torch_sdpa",
    "xlstm_cell",
    "xlstm_slstm",
]
