"""Published models as records: what their layers are made of, and where that is written.

A `Config` is a stack of `Block` groups; a block is a mixer of time (attention, a state space model, a recurrent net) and
a mixer of channels (an MLP, or experts). A record counts its parameters, those that one token meets (`active`), and
the elements of the state that it carries, recurrent and window; `refimpl.complexity.calculators` turns these into bytes
and operations. Only sizes that the cited source states are written down; all else is derived.
"""

from dataclasses import dataclass

# -- mixers of time ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """Softmax attention; `kv_heads` below `heads` are shared by groups, a `window` bounds what is seen and kept."""

    heads: int
    head_dim: int
    kv_heads: int
    window: int | None = None
    bias: bool = False

    def parameters(self, d: int) -> int:
        inner, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 2 * d * inner + 2 * d * shared + (inner + 2 * shared + d if self.bias else 0)

    def kept(self, T: int) -> int:
        """How many positions the cache holds after T tokens."""
        return T if self.window is None else min(T, self.window)

    def cache(self, T: int) -> int:
        """Elements of K and V."""
        return 2 * self.kv_heads * self.head_dim * self.kept(T)

    def state(self, d: int) -> tuple[int, int]:
        return 0, 0


@dataclass(frozen=True)
class Mamba:
    """The selective state space layer of Mamba; `inner_norms` are Jamba's, on dt, B and C."""

    d_inner: int
    dt_rank: int
    n: int = 16
    conv: int = 4
    inner_norms: bool = False

    def parameters(self, d: int) -> int:
        projections = 2 * d * self.d_inner + self.d_inner * (self.dt_rank + 2 * self.n) + self.dt_rank * self.d_inner + self.d_inner * d
        rest = self.d_inner * (self.conv + 1) + self.d_inner + self.d_inner * self.n + self.d_inner  # conv, dt bias, A, D
        return projections + rest + (self.dt_rank + 2 * self.n if self.inner_norms else 0)

    def state(self, d: int) -> tuple[int, int]:
        """Elements of the recurrent state, and of the convolution's window."""
        return self.d_inner * self.n, self.d_inner * self.conv


@dataclass(frozen=True)
class Mamba2:
    """The layer of Mamba-2 (SSD): one decay for each head, B and C shared by groups of heads."""

    d_inner: int
    head_dim: int = 64
    n: int = 128
    groups: int = 1
    conv: int = 4

    @property
    def heads(self) -> int:
        return self.d_inner // self.head_dim

    def parameters(self, d: int) -> int:
        wide = self.d_inner + 2 * self.groups * self.n
        return d * (self.d_inner + wide + self.heads) + wide * (self.conv + 1) + 3 * self.heads + self.d_inner + self.d_inner * d

    def state(self, d: int) -> tuple[int, int]:
        return self.d_inner * self.n, (self.d_inner + 2 * self.groups * self.n) * self.conv


@dataclass(frozen=True)
class MLSTM:
    """The matrix memory of xLSTM: C (d_qk, d_v), normaliser (d_qk) and stabiliser for each head."""

    heads: int
    d_qk: int
    d_v: int

    def parameters(self, d: int) -> int:
        keys, values = self.heads * self.d_qk, self.heads * self.d_v
        return 2 * d * keys + 3 * d * values + 2 * (d + 1) * self.heads + values  # q k, v o out, gates i f, norm

    def state(self, d: int) -> tuple[int, int]:
        return self.heads * (self.d_qk * self.d_v + self.d_qk + 1), 0


@dataclass(frozen=True)
class RWKV4:
    """Time mixing of RWKV-4: numerator, denominator and maximum, and the last input for the token shift."""

    def parameters(self, d: int) -> int:
        return 4 * d * d + 5 * d

    def state(self, d: int) -> tuple[int, int]:
        return 3 * d, d


# -- mixers of channels --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MLP:
    """Two matrices, or three where the hidden layer is gated."""

    width: int
    gated: bool = True
    bias: bool = False

    def parameters(self, d: int) -> int:
        return (3 if self.gated else 2) * d * self.width + (self.width + d if self.bias else 0)

    active = parameters


@dataclass(frozen=True)
class Experts:
    """`count` MLPs, of which a router picks `top` for every token."""

    count: int
    top: int
    expert: MLP

    def parameters(self, d: int) -> int:
        return d * self.count + self.count * self.expert.parameters(d)

    def active(self, d: int) -> int:
        return d * self.count + self.top * self.expert.parameters(d)


@dataclass(frozen=True)
class ChannelMix:
    """RWKV-4's MLP, which sees the step before: its last input is one more state."""

    width: int

    def parameters(self, d: int) -> int:
        return 2 * d * self.width + d * d + 2 * d

    active = parameters

    def state(self, d: int) -> tuple[int, int]:
        return 0, d


Mixer = Attention | Mamba | Mamba2 | MLSTM | RWKV4
Channel = MLP | Experts | ChannelMix


@dataclass(frozen=True)
class Block:
    """`count` equal layers."""

    count: int
    mixer: Mixer
    channel: Channel | None = None


@dataclass(frozen=True)
class Config:
    """A model.

    Attributes
    ----------
    name : str
    d : int
        Width of the residual stream.
    vocabulary : int
        Rows of the embedding.
    blocks : tuple of Block
    source : str
        The paper, or the published configuration, that states these numbers.
    tied : bool
        The output projection is the embedding.
    positions : int
        Rows of a learned position embedding, 0 without one.
    norm : int
        Vectors of d elements in a norm: 1 (RMS), 2 (layer norm: weight and bias).
    extra : int
        Vectors of d elements that stand nowhere else.
    context : int or None
        Tokens that the published model was made for.
    """

    name: str
    d: int
    vocabulary: int
    blocks: tuple[Block, ...]
    source: str
    tied: bool = False
    positions: int = 0
    norm: int = 1
    extra: int = 0
    context: int | None = None

    @property
    def layers(self) -> int:
        return sum(block.count for block in self.blocks)

    def attention(self) -> list[tuple[int, Attention]]:
        """(how many layers, what kind of attention); empty without attention."""
        return [(block.count, block.mixer) for block in self.blocks if isinstance(block.mixer, Attention)]

    def __repr__(self) -> str:
        return f"<Config {self.name}: {self.layers} layers, d {self.d}>"


def llama(
    name: str,
    layers: int,
    d: int,
    heads: int,
    kv_heads: int,
    width: int,
    vocabulary: int,
    source: str,
    context: int,
    window: int | None = None,
) -> Config:
    """A decoder in Llama's form: RMS norms, rotary positions, gated MLP, no bias."""
    mixer = Attention(heads, d // heads, kv_heads, window)
    return Config(name, d, vocabulary, (Block(layers, mixer, MLP(width)),), source, context=context)


def _gpt3() -> Config:
    dense = Attention(96, 128, 96, bias=True)
    mlp = MLP(4 * 12288, gated=False, bias=True)
    source = (
        "brown2020, table 2.1 and section 2.1: half of the layers are locally banded, of a width that is not published; all count as dense"
    )
    return Config("gpt3-175b", 12288, 50257, (Block(96, dense, mlp),), source, tied=True, positions=2048, norm=2, context=2048)


def _mixtral() -> Config:
    mixer, experts = Attention(32, 128, 8), Experts(8, 2, MLP(14336))
    return Config("mixtral-8x7b", 4096, 32000, (Block(32, mixer, experts),), "jiang2024, table 1", context=32768)


def _jamba() -> Config:
    """Periods of eight layers: attention at 4, Mamba elsewhere; experts at the odd ones, one MLP at the even ones."""
    attention, mamba = Attention(32, 128, 8), Mamba(8192, dt_rank=256, inner_norms=True)
    mlp = MLP(14336)
    blocks = (Block(4, attention, mlp), Block(12, mamba, mlp), Block(16, mamba, Experts(16, 2, mlp)))
    return Config("jamba-v0.1", 4096, 65536, blocks, "lieber2024, section 3; configuration of ai21labs/Jamba-v0.1", context=262144)


def _rwkv() -> Config:
    block = Block(40, RWKV4(), ChannelMix(4 * 5120))
    return Config("rwkv4-14b", 5120, 50277, (block,), "peng2023, table 2 and appendix", norm=2, extra=2, context=8192)


def _transformer() -> Config:
    mixer, mlp = Attention(32, 64, 32), MLP(4 * 2048, gated=False)
    source = "gu2023, section 4.5: the Transformer of 1.3 billion, sized as in brown2020, that it is timed with"
    return Config("transformer-1.3b", 2048, 50280, (Block(24, mixer, mlp),), source, tied=True, context=2048)


_MISTRAL = "jiang2023, table 1"
PRESETS: dict[str, Config] = {
    config.name: config
    for config in (
        _gpt3(),
        llama("llama2-7b", 32, 4096, 32, 32, 11008, 32000, "touvron2023, table 1; configuration of meta-llama/Llama-2-7b", 4096),
        llama("llama2-13b", 40, 5120, 40, 40, 13824, 32000, "touvron2023, table 1; configuration of meta-llama/Llama-2-13b", 4096),
        llama("llama2-70b", 80, 8192, 64, 8, 28672, 32000, "touvron2023, table 1; configuration of meta-llama/Llama-2-70b", 4096),
        llama("llama3-70b", 80, 8192, 64, 8, 28672, 128256, "grattafiori2024, table 3; configuration of "
            "meta-llama/Meta-Llama-3-70B", 8192),
        llama("mistral-7b", 32, 4096, 32, 8, 14336, 32000, _MISTRAL, 8192, window=4096),
        _mixtral(),
        Config("mamba-2.8b", 2560, 50280, (Block(64, Mamba(5120, dt_rank=160)),), "gu2023, table 3; configuration of "
            "state-spaces/mamba-2.8b", tied=True),
        Config("mamba2-2.7b", 2560, 50288, (Block(64, Mamba2(5120)),), "dao2024, table 1; configuration of "
            "state-spaces/mamba2-2.7b", tied=True),
        _jamba(),
        Config("xlstm-7b", 4096, 50304, (Block(32, MLSTM(8, 256, 512), MLP(10944)),), "beck2025, section 3; configuration of "
            "NX-AI/xLSTM-7b"),
        _rwkv(),
        Config("mamba-1.4b", 2048, 50280, (Block(48, Mamba(4096, dt_rank=128)),), "gu2023, table 12; section 4.5 compares it with a "
            "Transformer of that size", tied=True),
        _transformer(),
    )
}  # fmt: skip

REFERENCES = {
    "brown2020": "Brown et al. (2020). Language models are few-shot learners. arXiv:2005.14165",
    "touvron2023": "Touvron et al. (2023). Llama 2: open foundation and fine-tuned chat models. arXiv:2307.09288",
    "grattafiori2024": "Grattafiori et al. (2024). The Llama 3 herd of models. arXiv:2407.21783",
    "jiang2023": "Jiang et al. (2023). Mistral 7B. arXiv:2310.06825",
    "jiang2024": "Jiang et al. (2024). Mixtral of experts. arXiv:2401.04088",
    "gu2023": "Gu, Dao (2023). Mamba: linear-time sequence modeling with selective state spaces. arXiv:2312.00752",
    "dao2024": "Dao, Gu (2024). Transformers are SSMs. arXiv:2405.21060",
    "lieber2024": "Lieber et al. (2024). Jamba: a hybrid Transformer-Mamba language model. arXiv:2403.19887",
    "beck2025": "Beck et al. (2025). xLSTM 7B: a recurrent LLM for fast and efficient inference. arXiv:2503.13427",
    "peng2023": "Peng et al. (2023). RWKV: reinventing RNNs for the Transformer era. arXiv:2305.13048",
}
