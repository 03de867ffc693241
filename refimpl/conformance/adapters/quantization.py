"""Signatures of quantised layers: transformers."""

from collections.abc import Callable

from refimpl.conformance.adapters.common import like_operator


@like_operator("bitlinear")
def bitnet(layer: Callable) -> Callable:
    """AutoBitLinear of transformers with `online_quant`: output features first. Run as written, without compiling it."""

    def bitlinear(x, w, bias=None):
        import torch

        net = layer(*w.shape, bias=bias is not None, online_quant=True, dtype=x.dtype)
        weights = {"weight": w.T} | ({} if bias is None else {"bias": bias})
        with torch.compiler.set_stance("force_eager"):
            return torch.func.functional_call(net, weights, (x,))

    return bitlinear
