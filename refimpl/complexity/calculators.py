"""Parameters, bytes and operations of a whole model, from its published sizes: exact counts, no constants fitted.

All functions take a `Config` or the name of a preset. A byte count follows from elements times bits: 16 unless said
otherwise; 1 GB is 10⁹ bytes. Operations count a multiply-add as two, as everywhere in this package.
"""

from numbers import Integral, Real

from refimpl.complexity.presets import MLP, MLSTM, PRESETS, RWKV4, Config, Experts, Mamba, Mamba2


def parameters(config: Config | str) -> int:
    """All parameters of a model, embeddings and norms included.

    Parameters
    ----------
    config : Config or str
        A model, or the name of a preset.

    Raises
    ------
    ValueError
        If there is no preset of that name.

    Notes
    -----
    Exact: equal, to the last parameter, to the number of elements that the published checkpoints hold.

    Examples
    --------
    >>> parameters("llama2-7b")
    6738415616
    >>> parameters("jamba-v0.1")
    51570323328
    """
    config = _config("parameters", config)
    return _outside(config) + sum(
        b.count * (_mixer(config, b) + (b.channel.parameters(config.d) if b.channel else 0)) for b in config.blocks
    )


def active_parameters(config: Config | str) -> int:
    """The parameters that one token meets: of experts, only those it is routed to.

    Examples
    --------
    >>> f"{active_parameters('mixtral-8x7b') / 1e9:.1f} of {parameters('mixtral-8x7b') / 1e9:.1f} billion"
    '12.9 of 46.7 billion'
    """
    config = _config("active_parameters", config)
    return _outside(config) + sum(b.count * (_mixer(config, b) + (b.channel.active(config.d) if b.channel else 0)) for b in config.blocks)


def weight_bytes(config: Config | str, *, bits: float = 16) -> int:
    """Bytes of the weights; all experts must be resident.

    Examples
    --------
    >>> f"{weight_bytes('llama3-70b') / 1e9:.1f} GB"
    '141.1 GB'
    """
    return _bytes("weight_bytes", parameters(_config("weight_bytes", config)), bits)


def kv_cache_bytes(config: Config | str, T: int, *, batch: int = 1, bits: float = 16, rolling: bool = True) -> int:
    """Bytes of the keys and values of T tokens: 2 · layers · kv heads · head size · T elements for each sequence.

    Parameters
    ----------
    config : Config or str
    T : int
        Tokens in the cache, at least 0.
    batch : int
        Sequences.
    bits : float
        Of an element, scales included: 4.5 is four bits with a scale and a zero point of 16 for every 64.
    rolling : bool
        Layers with a window keep the window only; False: they keep all.

    Raises
    ------
    ValueError
        If T or batch is no whole number of that range, or bits is not positive; or there is no such preset.

    Examples
    --------
    >>> kv_cache_bytes("llama3-70b", 131072) / 2**30
    40.0
    >>> kv_cache_bytes("mamba-2.8b", 131072)
    0
    """
    config = _config("kv_cache_bytes", config)
    T, batch = _whole("kv_cache_bytes", "T", T), _whole("kv_cache_bytes", "batch", batch, 1)
    elements = sum(count * 2 * a.kv_heads * a.head_dim * (a.kept(T) if rolling else T) for count, a in config.attention())
    return _bytes("kv_cache_bytes", batch * elements, bits)


def state_bytes(config: Config | str, *, batch: int = 1, bits: float = 16, window: bool = True) -> int:
    """Bytes of the recurrent state, which no number of tokens changes: state space models, matrix memories, RWKV.

    Parameters
    ----------
    config : Config or str
    batch : int
        Sequences.
    bits : float
        Of an element.
    window : bool
        Count the windows of short convolutions and token shifts too.

    Examples
    --------
    >>> state_bytes("mamba-2.8b"), state_bytes("mamba-2.8b", window=False)
    (13107200, 10485760)
    >>> state_bytes("rwkv4-14b", bits=32)
    4096000
    """
    config = _config("state_bytes", config)
    batch = _whole("state_bytes", "batch", batch, 1)
    pairs = [
        (b.count, part.state(config.d))
        for b in config.blocks
        for part in (b.mixer, b.channel)
        if part is not None and hasattr(part, "state")
    ]
    elements = sum(count * (kept + (recent if window else 0)) for count, (kept, recent) in pairs)
    return _bytes("state_bytes", batch * elements, bits)


def attention_map_bytes(config: Config | str, T: int, *, heads: int | None = None, layers: int = 1, bits: float = 16) -> int:
    """Bytes of the maps of attention, T² elements for each head, where an implementation writes them down.

    Parameters
    ----------
    config : Config or str
    T : int
        Queries and keys.
    heads : int, optional
        Heads that are alive at once; the model's by default.
    layers : int
        Layers that are alive at once: 1 in inference, all of them where training keeps them.
    bits : float

    Raises
    ------
    ValueError
        If the model has no attention, or a number is out of range.

    Notes
    -----
    A tiled implementation needs none of it (`refimpl.attention`, form "tiled").

    Examples
    --------
    >>> attention_map_bytes("gpt3-175b", 8192) / 1e9
    12.884901888
    >>> attention_map_bytes("gpt3-175b", 1024, heads=1) / 2**20
    2.0
    """
    config = _config("attention_map_bytes", config)
    if not config.attention():
        raise ValueError(f"attention_map_bytes: config must have attention layers, got {config.name}")
    T, layers = _whole("attention_map_bytes", "T", T), _whole("attention_map_bytes", "layers", layers, 1)
    heads = config.attention()[0][1].heads if heads is None else _whole("attention_map_bytes", "heads", heads, 1)
    return _bytes("attention_map_bytes", heads * layers * T * T, bits)


def flops_per_token(config: Config | str, T: int) -> int:
    """Operations of the forward pass for one token that sees T positions, its own included (decoding with a cache).

    Parameters
    ----------
    config : Config or str
    T : int
        Positions, at least 1.

    Returns
    -------
    int
        Twice the active parameters that multiply (all but the embedding's look-up, norms and biases), plus 4 T per
        feature of attention (scores and weighted values; a window bounds T), plus the recurrence's own work: 7 for each
        element of a selective state space model's state, 5 for one of Mamba-2's or of a matrix memory, 8 of RWKV-4's.

    Examples
    --------
    At 262,144 tokens the four attention layers of Jamba do nearly half of the work:

    >>> long, short = flops_per_token("jamba-v0.1", 262144), flops_per_token("jamba-v0.1", 1)
    >>> round(1 - short / long, 2)
    0.42
    """
    config = _config("flops_per_token", config)
    T = _whole("flops_per_token", "T", T, 1)
    return 2 * _multiplying(config) + _map_flops(config, T) + _recurrent_flops(config)


def sequence_flops(config: Config | str, T: int, *, causal: bool = True) -> int:
    """Operations of the forward pass over T tokens at once (prefill, or a training example; training takes about three times that).

    Parameters
    ----------
    config : Config or str
    T : int
        Tokens, at least 0.
    causal : bool
        Count only the pairs that a causal model may see, T (T + 1) / 2; False counts all T², as dense kernels do.

    Examples
    --------
    >>> sequence_flops("mamba-2.8b", 2048) / sequence_flops("mamba-2.8b", 1024)
    2.0
    >>> round(sequence_flops("gpt3-175b", 2048, causal=False) / sequence_flops("gpt3-175b", 1024, causal=False), 3)
    2.027
    """
    config = _config("sequence_flops", config)
    T = _whole("sequence_flops", "T", T)
    seen = sum(4 * count * a.heads * a.head_dim * attention_pairs(T, window=a.window, causal=causal) for count, a in config.attention())
    return T * (2 * _multiplying(config) + _recurrent_flops(config)) + seen


def attention_pairs(T: int, *, window: int | None = None, causal: bool = True) -> int:
    """Pairs of query and key that attention over T tokens looks at.

    Parameters
    ----------
    T : int
        Tokens, at least 0.
    window : int, optional
        A query sees so many positions at most, its own included.
    causal : bool
        A query sees nothing after itself.

    Examples
    --------
    >>> attention_pairs(1000), attention_pairs(1000, causal=False), attention_pairs(1000, window=100)
    (500500, 1000000, 95050)
    """
    T = _whole("attention_pairs", "T", T)
    w = T if window is None else min(T, _whole("attention_pairs", "window", window, 1))
    return w * (w + 1) // 2 + (T - w) * w if causal else T * w


def layer_flops(T: int, d: int, *, causal: bool = False) -> int:
    """Operations of one Transformer layer of the textbook over T tokens: 24 T d² for its matrices, 4 d for each pair.

    Four square projections (8 T d²), an MLP of width 4d (16 T d²), scores and weighted values (4 T² d; a causal kernel
    does half of it).

    Examples
    --------
    >>> layer_flops(2048, 4096) / layer_flops(1024, 4096)
    2.08
    """
    T, d = _whole("layer_flops", "T", T), _whole("layer_flops", "d", d, 1)
    return 24 * T * d * d + (2 if causal else 4) * T * T * d


def longest_context(config: Config | str, memory: float, *, weight_bits: float = 16, kv_bits: float = 16) -> int:
    """The most tokens of one sequence whose cache fits beside weights and state; activations are not counted.

    Parameters
    ----------
    config : Config or str
    memory : float
        Bytes.
    weight_bits, kv_bits : float

    Returns
    -------
    int
        Tokens; 0 where the weights alone do not fit.

    Raises
    ------
    ValueError
        If the model's memory does not grow with the sequence, so that no length is the longest.

    Examples
    --------
    >>> longest_context("llama2-7b", 24e9)
    20071
    """
    config = _config("longest_context", config)
    each = kv_cache_bytes(config, 1, bits=kv_bits, rolling=False)
    if not each or all(a.window is not None for _, a in config.attention()):
        raise ValueError(f"longest_context: config must keep something for every token, got {config.name}")
    free = _positive("longest_context", "memory", memory) - weight_bytes(config, bits=weight_bits) - state_bytes(config)
    return max(0, int(free // each))


# -- what they share ---------------------------------------------------------------------------------------------------


def _outside(config: Config) -> int:
    """Embeddings, output projection, the last norm and what stands nowhere else."""
    tables = config.vocabulary * (1 if config.tied else 2) + config.positions
    return config.d * (tables + config.norm + config.extra)


def _mixer(config: Config, block) -> int:
    """A layer's mixer of time, and a norm before each of its parts."""
    norms = (1 + (block.channel is not None)) * config.norm * config.d
    return block.mixer.parameters(config.d) + norms


def _multiplying(config: Config) -> int:
    """Entries of the matrices that one token is multiplied by."""
    d = config.d
    total = config.vocabulary * d
    for block in config.blocks:
        mixer, channel = block.mixer, block.channel
        if isinstance(mixer, RWKV4):
            own = 4 * d * d
        elif isinstance(mixer, MLSTM):
            own = mixer.parameters(d) - (2 + mixer.d_v) * mixer.heads
        elif isinstance(mixer, Mamba):
            own = 3 * d * mixer.d_inner + mixer.d_inner * (2 * mixer.dt_rank + 2 * mixer.n + mixer.conv)
        elif isinstance(mixer, Mamba2):
            wide = mixer.d_inner + 2 * mixer.groups * mixer.n
            own = d * (2 * mixer.d_inner + wide + mixer.heads) + wide * mixer.conv
        else:
            own = 2 * d * mixer.head_dim * (mixer.heads + mixer.kv_heads)
        if isinstance(channel, Experts):
            own += d * channel.count + channel.top * (3 if channel.expert.gated else 2) * d * channel.expert.width
        elif isinstance(channel, MLP):
            own += (3 if channel.gated else 2) * d * channel.width
        elif channel is not None:
            own += 2 * d * channel.width + d * d
        total += block.count * own
    return total


def _map_flops(config: Config, T: int) -> int:
    return sum(4 * count * a.heads * a.head_dim * a.kept(T) for count, a in config.attention())


def _recurrent_flops(config: Config) -> int:
    """For each element of a state: decay, product of inputs, addition, product with C and sum; Mamba has dt A and its exp for each too,
    RWKV-4's stabilised mean 24 for a channel. Counts of the recurrent forms agree (tests/test_calculators.py)."""
    each = {Mamba: 7, Mamba2: 5, MLSTM: 5, RWKV4: 8}
    return sum(b.count * each[type(b.mixer)] * b.mixer.state(config.d)[0] for b in config.blocks if type(b.mixer) in each)


def _config(function: str, config) -> Config:
    if isinstance(config, Config):
        return config
    if not isinstance(config, str):
        raise TypeError(f"{function}: config must be a Config or the name of a preset, got {type(config).__name__}")
    if config not in PRESETS:
        raise ValueError(f"{function}: config must be a Config or one of {', '.join(PRESETS)}, got {config!r}")
    return PRESETS[config]


def _whole(function: str, name: str, value, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{function}: {name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def _positive(function: str, name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < float("inf"):
        raise ValueError(f"{function}: {name} must be a positive number, got {value!r}")
    return float(value)


def _bytes(function: str, elements: int, bits) -> int:
    """Whole bytes, rounded up."""
    return -int(-elements * _positive(function, "bits", bits) // 8) if bits != 16 else 2 * elements
