"""The public implementations that the survey knows: whose function, for which operator, by which adapter.

Each record says in which precisions, within which domain, and what is expected. A deviation that its authors document or
chose is expected, with the reason; anything else is news.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from refimpl.conformance import adapters
from refimpl.conformance.domain import multiple_of


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """A public function, and how to hold it against an operator.

    Attributes
    ----------
    operator, package, function : str
        What it computes; the distribution that holds it; its name there, for people.
    build : callable
        ``build() -> candidate``: imports the package, and adapts the function.
    needs : tuple of str
        Modules that must be installed.
    framework : str
    dtypes : tuple of str
    gradients : bool
        Also check gradients, by the framework's differentiation.
    domain : mapping
        What it supports, as keyword arguments of `refimpl.Domain`.
    expected : str
        The verdict to expect.
    reason : str
        Why, where that is not "conforms".
    """

    operator: str
    package: str
    function: str
    build: Callable[[], Callable]
    needs: tuple[str, ...] = ()
    framework: str = "torch"
    dtypes: tuple[str, ...] = ("float32",)
    gradients: bool = False
    domain: Mapping[str, Any] = field(default_factory=dict)
    expected: str = "conforms"
    reason: str = ""

    @property
    def missing(self) -> str:
        """The first module that is not installed, or ""."""
        for name in (*self.needs, *((self.framework,) if self.framework != "numpy" else ())):
            try:
                if importlib.util.find_spec(name) is None:
                    return name
            except ImportError:
                return name
        return ""

    @property
    def version(self) -> str:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return ""


def _from(module: str, name: str) -> Any:
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _adapted(adapter: Callable, module: str, name: str) -> Callable:
    return adapter(_from(module, name))


def _compiled(module: str, name: str, *options: str) -> Callable:
    """A JAX function, compiled as a whole for each shape rather than operation by operation."""
    import jax

    return jax.jit(_from(module, name), static_argnames=options)


def _one_group(norm: Callable) -> Callable:
    """A norm over groups of channels, with one group."""
    return lambda channels, eps: norm(channels, channels, eps)


def _mlstm_kernel(path: str, name: str, options: dict[str, Any]) -> Callable:
    return adapters.mlstm_kernels(_from(f"mlstm_kernels.torch.{path}", name), **options)


def _mambapy(method: str) -> Callable:
    """A method of MambaBlock that needs no more of its block than two sizes."""
    import types

    function = _from("mambapy.mamba", f"MambaBlock.{method}")

    def scan(x, delta, A, B, C, D):
        config = types.SimpleNamespace(d_inner=A.shape[0], d_state=A.shape[1])
        return function(types.SimpleNamespace(config=config), x, delta, A, B, C, D)

    return adapters.mambapy_scan(scan)


SIGMOID = {"options": {"forget": ["sigmoid"]}}
SQUARE = {"d": 8, "e": 8}
MASKED_ROWS = "transformers masks with the most negative number, so that a row with nothing allowed gives the mean of v"
DELTA_RULE = {"Hq": 2, "Hkv": 2, "options": {"feature_map": [None], "normalize": [False], "beta": [True]}}
TIES = "equal logits go where torch.topk sends them, which promises no order; the contract takes the lower index"
THRESHOLD = "torch takes softplus(x) = x beyond x = 20, as its documentation says: 2e-9 is lost there, which float64 and gradients see"
PLAIN = {"options": {"feature_map": [None], "normalize": [False]}}

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    # -- attention
    Implementation(
        operator="attention",
        package="onnx",
        function="Attention (reference)",
        build=lambda: adapters.onnx_attention(adapters.onnx_operator("Attention")),
        needs=("onnx",),
        framework="numpy",
        dtypes=("float64", "float32"),
    ),
    Implementation(
        operator="attention",
        package="torch",
        function="scaled_dot_product_attention",
        build=lambda: adapters.torch_sdpa(_from("torch.nn.functional", "scaled_dot_product_attention")),
        dtypes=("float64", "float32", "bfloat16"),
        gradients=True,
    ),
    Implementation(
        operator="attention",
        package="jax",
        function="nn.dot_product_attention",
        build=lambda: adapters.jax_attention(_from("jax.nn", "dot_product_attention")),
        framework="jax",
        domain=SQUARE,
        expected="deviates",
        reason="JAX masks with a large negative number, so that a row with nothing allowed gives the mean of v",
    ),
    Implementation(
        operator="attention",
        package="transformers",
        function="eager_attention_forward (llama)",
        build=lambda: adapters.eager_attention(_from("transformers.models.llama.modeling_llama", "eager_attention_forward")),
        needs=("transformers",),
        expected="deviates",
        reason=MASKED_ROWS,
    ),
    Implementation(
        operator="attention",
        package="transformers",
        function="eager_attention_forward (gemma2)",
        build=lambda: adapters.eager_attention(_from("transformers.models.gemma2.modeling_gemma2", "eager_attention_forward"), softcap=True),
        needs=("transformers",),
        expected="deviates",
        reason=MASKED_ROWS,
    ),
    Implementation(
        operator="attention",
        package="transformers",
        function="eager_attention_forward (gpt_oss)",
        build=lambda: adapters.eager_attention(_from("transformers.models.gpt_oss.modeling_gpt_oss", "eager_attention_forward"), sinks=True),
        needs=("transformers",),
    ),
    Implementation(
        operator="attention",
        package="flash-attn",
        function="flash_attn_func",
        build=lambda: adapters.flash_attn(_from("flash_attn", "flash_attn_func")),
        needs=("flash_attn",),
        dtypes=("bfloat16",),
    ),
    Implementation(
        operator="rope",
        package="transformers",
        function="LlamaRotaryEmbedding, apply_rotary_pos_emb",
        build=lambda: adapters.llama_rope(
            *(_from("transformers.models.llama.modeling_llama", n) for n in ("LlamaRotaryEmbedding", "apply_rotary_pos_emb", "LlamaConfig"))
        ),
        needs=("transformers",),
        gradients=True,
        domain={"options": {"layout": ["half"], "dims": [None], "inv_freq": [False]}},
    ),
    # -- recurrences and convolutions
    Implementation(
        operator="linear_recurrence",
        package="scipy",
        function="signal.lfilter",
        build=lambda: adapters.lfilter(_from("scipy.signal", "lfilter")),
        framework="numpy",
        dtypes=("float64", "float32"),
    ),
    Implementation(
        operator="linear_recurrence",
        package="jax",
        function="lax.associative_scan",
        build=lambda: adapters.associative_scan(_compiled("jax.lax", "associative_scan", "fn", "reverse", "axis")),
        framework="jax",
    ),
    Implementation(
        operator="linear_recurrence",
        package="mambapy",
        function="pscan",
        build=lambda: adapters.pscan(_from("mambapy.pscan", "pscan")),
        needs=("mambapy",),
        gradients=True,
    ),
    Implementation(
        operator="linear_recurrence",
        package="accelerated-scan",
        function="ref.scan",
        build=lambda: adapters.gates_and_tokens(_from("accelerated_scan.ref", "scan")),
        needs=("accelerated_scan",),
        gradients=True,
    ),
    Implementation(
        operator="long_conv",
        package="scipy",
        function="signal.fftconvolve",
        build=lambda: adapters.fftconvolve(_from("scipy.signal", "fftconvolve")),
        framework="numpy",
        dtypes=("float64", "float32"),
    ),
    Implementation(
        operator="long_conv",
        package="scipy",
        function="signal.oaconvolve",
        build=lambda: adapters.fftconvolve(_from("scipy.signal", "oaconvolve")),
        framework="numpy",
        dtypes=("float64", "float32"),
    ),
    Implementation(
        operator="long_conv",
        package="jax",
        function="scipy.signal.fftconvolve",
        build=lambda: adapters.fftconvolve(_from("jax.scipy.signal", "fftconvolve")),
        framework="jax",
    ),
    Implementation(
        operator="causal_conv1d",
        package="onnx",
        function="CausalConvWithState (reference)",
        build=lambda: adapters.onnx_causal_conv(adapters.onnx_operator("CausalConvWithState")),
        needs=("onnx", "onnx.reference.ops.op_causal_conv_with_state"),
        framework="numpy",
    ),
    Implementation(
        operator="causal_conv1d",
        package="transformers",
        function="causal_conv1d_fn (mamba)",
        build=lambda: adapters.causal_conv1d_fn(_from("transformers.models.mamba.modeling_mamba", "causal_conv1d_fn")),
        needs=("transformers",),
        dtypes=("float64", "float32"),
        gradients=True,
    ),
    Implementation(
        operator="linear_recurrence",
        package="transformers",
        function="RecurrentGemmaRglru._rnn_scan",
        build=lambda: adapters.gemma_scan(_from("transformers.models.recurrent_gemma.modeling_recurrent_gemma", "RecurrentGemmaRglru._rnn_scan")),
        needs=("transformers",),
        dtypes=("float64", "float32"),
        gradients=True,
    ),
    # -- state space models
    Implementation(
        operator="discretize",
        package="scipy",
        function="signal.cont2discrete",
        build=lambda: adapters.cont2discrete(_from("scipy.signal", "cont2discrete")),
        framework="numpy",
        dtypes=("float64",),
        domain={"options": {"method": ["zoh", "bilinear", "euler", "backward_euler"]}},
    ),
    Implementation(
        operator="selective_scan",
        package="mamba-ssm",
        function="selective_scan_ref",
        build=lambda: adapters.mamba_ssm(_from("mamba_ssm.ops.selective_scan_interface", "selective_scan_ref")),
        needs=("mamba_ssm",),
    ),
    Implementation(
        operator="selective_scan",
        package="transformers",
        function="mamba_selective_scan",
        build=lambda: adapters.mamba_ssm(_from("transformers.models.mamba.modeling_mamba", "mamba_selective_scan"), groups=False),
        needs=("transformers",),
        gradients=True,
    ),
    Implementation(
        operator="selective_scan",
        package="mambapy",
        function="MambaBlock.selective_scan",
        build=lambda: _mambapy("selective_scan"),
        needs=("mambapy",),
        gradients=True,
    ),
    Implementation(
        operator="selective_scan",
        package="mambapy",
        function="MambaBlock.selective_scan_seq",
        build=lambda: _mambapy("selective_scan_seq"),
        needs=("mambapy",),
        gradients=True,
    ),
    Implementation(
        operator="ssd",
        package="transformers",
        function="mamba2_chunk_scan",
        build=lambda: adapters.chunk_scan(_from("transformers.models.mamba2.modeling_mamba2", "mamba2_chunk_scan")),
        needs=("transformers",),
        gradients=True,
    ),
    Implementation(
        operator="ssd",
        package="mamba-ssm",
        function="mamba_chunk_scan_combined",
        build=lambda: adapters.chunk_scan(_from("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"), chunk=64),
        needs=("mamba_ssm",),
    ),
    Implementation(
        operator="selective_scan",
        package="transformers",
        function="mamba_selective_scan (jamba)",
        build=lambda: adapters.mamba_ssm(_from("transformers.models.jamba.modeling_jamba", "mamba_selective_scan"), groups=False),
        needs=("transformers",),
        gradients=True,
    ),
    # -- gated recurrent networks
    *(
        Implementation(
            operator="mlstm",
            package="mlstm_kernels",
            function=name,
            build=functools.partial(_mlstm_kernel, path, name, options),
            needs=("mlstm_kernels",),
            dtypes=dtypes,
            gradients=gradients,
            domain=SIGMOID | sizes,
        )
        for path, name, options, dtypes, gradients, sizes in (
            ("parallel", "mlstm_parallel__native_autograd", {"states": False}, ("float64", "float32"), True, {}),
            ("parallel", "mlstm_parallel__native_stablef_autograd", {"states": False}, ("float64", "float32"), True, {}),
            ("recurrent", "mlstm_recurrent_sequence__native_fw", {}, ("float64", "float32"), False, {}),
            ("chunkwise", "mlstm_chunkwise__native_autograd", {"chunk": 16}, ("float64", "float32"), False, {"T": multiple_of(16)}),
        )
    ),
    Implementation(
        operator="mlstm",
        package="mlstm_kernels",
        function="jax mlstm_parallel__native_autograd",
        build=lambda: adapters.mlstm_kernels(_compiled("mlstm_kernels.jax.parallel", "mlstm_parallel__native_autograd", "eps"), states=False),
        needs=("mlstm_kernels",),
        framework="jax",
        domain=SIGMOID,
    ),
    Implementation(
        operator="mlstm",
        package="xlstm",
        function="parallel_stabilized_simple",
        build=lambda: adapters.xlstm_cell(_from("xlstm.blocks.mlstm.backends", "parallel_stabilized_simple"), columns=True),
        needs=("xlstm",),
        dtypes=("float64", "float32"),
        domain=SIGMOID | SQUARE,
    ),
    Implementation(
        operator="mlstm",
        package="xlstm",
        function="chunkwise_simple",
        build=lambda: adapters.xlstm_cell(_from("xlstm.blocks.mlstm.backends", "chunkwise_simple"), chunk=16),
        needs=("xlstm",),
        dtypes=("float64", "float32"),
        domain=SIGMOID | SQUARE | {"T": multiple_of(16)},
    ),
    Implementation(
        operator="slstm",
        package="xlstm",
        function="slstm_forward (vanilla)",
        build=lambda: adapters.xlstm_slstm(
            _from("xlstm.blocks.slstm.src.vanilla", "slstm_forward"), _from("xlstm.blocks.slstm.src.vanilla.slstm", "slstm_forward_pointwise")
        ),
        needs=("xlstm",),
        domain=SIGMOID,
    ),
    Implementation(
        operator="lstm",
        package="onnx",
        function="LSTM (reference)",
        build=lambda: adapters.onnx_lstm(adapters.onnx_operator("LSTM")),
        needs=("onnx",),
        framework="numpy",
        dtypes=("float64", "float32"),
    ),
    Implementation(
        operator="lstm",
        package="torch",
        function="nn.LSTM",
        build=lambda: adapters.torch_lstm(_from("torch.nn", "LSTM")),
        dtypes=("float64", "float32"),
        gradients=True,
    ),
    Implementation(
        operator="gru",
        package="onnx",
        function="GRU (reference)",
        build=lambda: adapters.onnx_gru(adapters.onnx_operator("GRU")),
        needs=("onnx",),
        framework="numpy",
        dtypes=("float64", "float32"),
    ),
    Implementation(
        operator="gru",
        package="torch",
        function="nn.GRU",
        build=lambda: adapters.torch_gru(_from("torch.nn", "GRU")),
        dtypes=("float64", "float32"),
        gradients=True,
    ),
    # -- linear attention
    Implementation(
        operator="linear_attention",
        package="onnx",
        function="LinearAttention (reference)",
        build=lambda: adapters.onnx_linear_attention(adapters.onnx_operator("LinearAttention")),
        needs=("onnx", "onnx.reference.ops.op_linear_attention"),
        framework="numpy",
        domain=PLAIN,
    ),
    Implementation(
        operator="linear_attention",
        package="opengdn",
        function="gated_delta",
        build=lambda: adapters.gated_delta_rule(_from("opengdn.reference", "gated_delta"), alpha=True),
        needs=("opengdn",),
        gradients=True,
        domain=DELTA_RULE,
    ),
    Implementation(
        operator="linear_attention",
        package="opengdn",
        function="gated_delta_chunkwise",
        build=lambda: adapters.gated_delta_rule(_from("opengdn.chunkwise", "gated_delta_chunkwise"), alpha=True),
        needs=("opengdn",),
        domain=DELTA_RULE,
    ),
    Implementation(
        operator="linear_attention",
        package="transformers",
        function="torch_recurrent_gated_delta_rule",
        build=lambda: adapters.gated_delta_rule(_from("transformers.models.qwen3_next.modeling_qwen3_next", "torch_recurrent_gated_delta_rule")),
        needs=("transformers",),
        domain=DELTA_RULE,
    ),
    Implementation(
        operator="linear_attention",
        package="transformers",
        function="torch_chunk_gated_delta_rule",
        build=lambda: adapters.gated_delta_rule(_from("transformers.models.qwen3_next.modeling_qwen3_next", "torch_chunk_gated_delta_rule")),
        needs=("transformers",),
        domain=DELTA_RULE,
    ),
    Implementation(
        operator="linear_attention",
        package="fla-core",
        function="fused_recurrent_gated_delta_rule",
        build=lambda: adapters.gated_delta_rule(_from("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule")),
        needs=("fla.ops", "triton"),
        domain=DELTA_RULE,
    ),
    Implementation(
        operator="wkv",
        package="transformers",
        function="rwkv_linear_attention_cpu",
        build=lambda: adapters.rwkv_attention(_from("transformers.models.rwkv.modeling_rwkv", "rwkv_linear_attention_cpu")),
        needs=("transformers",),
        gradients=True,
    ),
    # -- mixture of experts
    Implementation(
        operator="moe",
        package="transformers",
        function="MixtralSparseMoeBlock",
        build=lambda: adapters.mixtral_block(
            _from("transformers.models.mixtral.modeling_mixtral", "MixtralSparseMoeBlock"),
            _from("transformers.models.mixtral.configuration_mixtral", "MixtralConfig"),
        ),
        needs=("transformers",),
        gradients=True,
        expected="deviates",
        reason=TIES,
        domain={"options": {"order": ["softmax_topk"], "renormalize": [True], "activation": ["silu", "gelu", "relu"]}},
    ),
    Implementation(
        operator="route",
        package="transformers",
        function="MixtralTopKRouter",
        build=lambda: adapters.mixtral_router(_from("transformers.models.mixtral.modeling_mixtral", "MixtralTopKRouter")),
        needs=("transformers",),
        gradients=True,
        expected="deviates",
        reason=TIES,
        domain={"options": {"order": ["softmax_topk"], "renormalize": [True], "noise": [None]}},
    ),
    # -- quantisation
    Implementation(
        operator="bitlinear",
        package="transformers",
        function="AutoBitLinear (online_quant)",
        build=lambda: adapters.bitnet(_from("transformers.integrations.bitnet", "AutoBitLinear")),
        needs=("transformers",),
        expected="deviates",
        reason="scales are at least 1e-5, so that matrices and tokens of smaller numbers become zero",
        domain={"options": {"weights": ["ternary"], "activation_bits": [8]}},
    ),
    # -- the small parts
    *(
        Implementation(
            operator=operator,
            package="torch",
            function=f"nn.functional.{operator}",
            build=functools.partial(_adapted, adapter, "torch.nn.functional", operator),
            dtypes=("float64", "float32", "bfloat16"),
            gradients=True,
            expected="deviates" if operator == "softplus" else "conforms",
            reason=THRESHOLD if operator == "softplus" else "",
        )
        for operator, adapter in (
            ("rms_norm", adapters.torch_rms_norm),
            ("layer_norm", adapters.torch_layer_norm),
            ("group_norm", adapters.torch_group_norm),
            ("softplus", adapters.elementwise),
            ("silu", adapters.elementwise),
            ("gelu", adapters.torch_gelu),
        )
    ),
    *(
        Implementation(
            operator=operator,
            package="jax",
            function=f"nn.{operator}",
            build=functools.partial(_adapted, adapter, "jax.nn", operator),
            framework="jax",
            dtypes=("float32", "bfloat16"),
            gradients=True,
        )
        for operator, adapter in (("softplus", adapters.elementwise), ("silu", adapters.elementwise), ("gelu", adapters.jax_gelu))
    ),
    Implementation(
        operator="rms_norm",
        package="transformers",
        function="LlamaRMSNorm",
        build=lambda: adapters.norm_module(_from("transformers.models.llama.modeling_llama", "LlamaRMSNorm")),
        needs=("transformers",),
        dtypes=("float32", "bfloat16"),
        gradients=True,
    ),
    Implementation(
        operator="rms_norm",
        package="transformers",
        function="MambaRMSNormGated (mamba2)",
        build=lambda: adapters.norm_module(_one_group(_from("transformers.models.mamba2.modeling_mamba2", "MambaRMSNormGated")), gated=True),
        needs=("transformers",),
        dtypes=("float32", "bfloat16"),
        gradients=True,
    ),
    Implementation(
        operator="rms_norm",
        package="transformers",
        function="Qwen3NextRMSNormGated",
        build=lambda: adapters.norm_module(_from("transformers.models.qwen3_next.modeling_qwen3_next", "Qwen3NextRMSNormGated"), gated=True),
        needs=("transformers",),
        dtypes=("float32", "bfloat16"),
        gradients=True,
        domain={"options": {"gate_first": [False]}},
    ),
)
