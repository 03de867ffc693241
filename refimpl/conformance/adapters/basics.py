"""Signatures of the small parts: norms and activations of torch, JAX and transformers."""

from collections.abc import Callable

from refimpl.conformance.adapters.common import like_operator, refuse


@like_operator("softplus")
def elementwise(f: Callable) -> Callable:
    """A function of one array: ``torch.nn.functional.silu``, ``jax.nn.softplus``."""

    def apply(x):
        return f(x)

    return apply


@like_operator("gelu")
def torch_gelu(f: Callable) -> Callable:
    """``torch.nn.functional.gelu``: the contract's options by the contract's names."""

    def gelu(x, *, approximate="none"):
        return f(x, approximate=approximate)

    return gelu


@like_operator("gelu")
def jax_gelu(f: Callable) -> Callable:
    """``jax.nn.gelu``: `approximate` is a bool, and True where nothing is said."""

    def gelu(x, *, approximate="none"):
        return f(x, approximate=approximate == "tanh")

    return gelu


@like_operator("rms_norm")
def torch_rms_norm(f: Callable) -> Callable:
    """``torch.nn.functional.rms_norm``: the shape normalised over comes second."""

    def rms_norm(x, weight=None, *, eps=1e-6):
        return f(x, x.shape[-1:], weight, eps)

    return rms_norm


@like_operator("layer_norm")
def torch_layer_norm(f: Callable) -> Callable:
    """``torch.nn.functional.layer_norm``."""

    def layer_norm(x, weight=None, bias=None, *, eps=1e-5):
        return f(x, x.shape[-1:], weight, bias, eps)

    return layer_norm


@like_operator("group_norm")
def torch_group_norm(f: Callable) -> Callable:
    """``torch.nn.functional.group_norm``: channels are the second axis, so that every token is a batch of its own."""

    def group_norm(x, groups, weight=None, bias=None, *, eps=1e-5):
        refuse(x.numel() == 0, "needs a token")
        refuse(bias is not None and weight is None, "has no gradient of a bias without a weight")
        return f(x.reshape(-1, x.shape[-1]), groups, weight, bias, eps).reshape(x.shape)

    return group_norm


@like_operator("rms_norm")
def norm_module(module: Callable, *, gated: bool = False) -> Callable:
    """A norm of transformers, a module of `hidden_size` and `eps` with one parameter; `gated` ones take a gate second."""

    def run(weight, eps, *inputs):
        import torch

        weight = inputs[0].new_ones(inputs[0].shape[-1]) if weight is None else weight
        net = module(inputs[0].shape[-1], eps=eps).to(inputs[0].dtype)
        return torch.func.functional_call(net, {"weight": weight}, inputs)

    def rms_norm(x, weight=None, *, eps=1e-6):
        return run(weight, eps, x)

    def gated_rms_norm(x, weight=None, *, eps=1e-6, gate=None):
        refuse(gate is None, "takes a gate")
        return run(weight, eps, x, gate)

    return gated_rms_norm if gated else rms_norm
