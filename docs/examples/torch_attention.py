"""Three attentions in torch: the framework's own; the same with its convention spelled out; one by hand that forgets something."""

import torch
import torch.nn.functional as F

import refimpl


def framework(q, k, v, *, causal=False, scale=None):
    """Heads before time, as in the contract: q (..., H, n, d), k and v (..., H, m, d)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[-3] != k.shape[-3])


def by_hand(q, k, v, *, causal=False):
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    s = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1 + k.shape[-2] - q.shape[-2]), -torch.inf)
    return s.half().softmax(-1).to(v.dtype) @ v


torch.set_num_threads(1)

# 1. as it is
print(refimpl.check("attention", framework, framework="torch", dtypes=["float32"], gradients=True), "\n")

# 2. its mask starts where the keys start, which the contract calls offset=0
starts = refimpl.Domain(options={"offset": [0]})
print(refimpl.check("attention", framework, framework="torch", dtypes=["float32"], gradients=True, domain=starts), "\n")

# 3. a softmax in half precision, as a "fast path"
print(refimpl.check("attention", by_hand, framework="torch", dtypes=["float32"], level="quick"))
