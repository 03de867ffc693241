"""Memory and operations of published models, against counts that others published or that other code makes."""

import dataclasses

import numpy as np
import pytest

import refimpl.complexity as kit
from refimpl.complexity.calculators import _recurrent_flops
from refimpl.complexity.presets import MLP, PRESETS, REFERENCES, Attention, Block, Config
from refimpl.complexity.runs import measure, run

# Elements in the published checkpoints; those of GPT-3, whose weights are not public, in Hugging Face's GPT-2 at its sizes.
CHECKPOINTS = {
    "gpt3-175b": 174_604_259_328,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "mamba-2.8b": 2_768_345_600,
    "mamba2-2.7b": 2_702_599_680,
    "jamba-v0.1": 51_570_323_328,
    "xlstm-7b": 6_865_424_896,
    "rwkv4-14b": 14_148_597_760,
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_parameters_are_those_of_the_checkpoint(name):
    assert kit.parameters(name) == CHECKPOINTS[name]


@pytest.mark.peers
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_parameters_are_those_that_transformers_allocates(name):
    torch = pytest.importorskip("torch")
    tf = pytest.importorskip("transformers")
    config = PRESETS[name]
    common = {"hidden_size": config.d, "num_hidden_layers": config.layers, "vocab_size": config.vocabulary}
    mixer, channel = config.blocks[0].mixer, config.blocks[0].channel
    if name.startswith(("llama", "mistral", "mixtral", "jamba")):
        common |= {"num_attention_heads": mixer.heads, "num_key_value_heads": mixer.kv_heads}
    made = {
        "gpt3": lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(n_embd=config.d, n_layer=config.layers, n_head=96, n_positions=config.positions, vocab_size=config.vocabulary)
        ),
        "llama2": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**common, intermediate_size=channel.width)),
        "llama3": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**common, intermediate_size=channel.width)),
        "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**common, intermediate_size=channel.width)),
        "mixtral": lambda: tf.MixtralForCausalLM(
            tf.MixtralConfig(**common, intermediate_size=channel.expert.width, num_local_experts=channel.count)
        ),
        "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(**common, state_size=mixer.n, conv_kernel=mixer.conv)),
        "mamba2": lambda: tf.Mamba2ForCausalLM(
            tf.Mamba2Config(
                **common, state_size=mixer.n, num_heads=mixer.heads, head_dim=mixer.head_dim, n_groups=1, tie_word_embeddings=True
            )
        ),
        "jamba": lambda: tf.JambaForCausalLM(tf.JambaConfig()),
        "xlstm": lambda: tf.xLSTMForCausalLM(tf.xLSTMConfig()),
        "rwkv4": lambda: tf.RwkvForCausalLM(tf.RwkvConfig(**common, context_length=1024)),
    }[name.partition("-")[0]]
    with torch.device("meta"):
        model = made()
    assert sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()) == kit.parameters(name)


def test_active_parameters():
    assert kit.active_parameters("mixtral-8x7b") == pytest.approx(12.9e9, rel=0.002)  # jiang2024, table 1: 13B
    assert kit.active_parameters("jamba-v0.1") == pytest.approx(12e9, rel=0.02)  # lieber2024: 12B
    assert kit.active_parameters("llama2-7b") == kit.parameters("llama2-7b")


@pytest.mark.parametrize(
    ("name", "GiB"),
    [("jamba-v0.1", 4), ("mixtral-8x7b", 32), ("mistral-7b", 32), ("llama2-7b", 128)],
)
def test_caches_at_256k_are_those_of_jambas_table(name, GiB):
    """lieber2024, table 1: 4, 32, 32 and 128 GB."""
    assert kit.kv_cache_bytes(name, 256 * 1024, rolling=False) == GiB * 2**30


def test_cache_by_hand():
    small = Config("small", 8, 10, (Block(3, Attention(4, 2, 2), MLP(16)),), "none")
    assert kit.kv_cache_bytes(small, 5) == 3 * 2 * 2 * 2 * 5 * 2
    assert kit.kv_cache_bytes(small, 5, batch=7) == 7 * 3 * 2 * 2 * 2 * 5 * 2
    assert kit.kv_cache_bytes(small, 5, bits=4) == 60
    assert kit.kv_cache_bytes(small, 5, bits=4.5) == 68  # 67.5 rounded up
    assert kit.kv_cache_bytes(small, 0) == 0


def test_a_window_bounds_the_cache():
    assert kit.kv_cache_bytes("mistral-7b", 100_000) == kit.kv_cache_bytes("mistral-7b", 4096)
    assert kit.kv_cache_bytes("mistral-7b", 100) < kit.kv_cache_bytes("mistral-7b", 4096)


def test_states_by_hand():
    assert kit.state_bytes("mamba-2.8b", window=False) == 64 * 5120 * 16 * 2
    assert kit.state_bytes("mamba-2.8b") == 64 * 5120 * (16 + 4) * 2
    assert kit.state_bytes("mamba2-2.7b", window=False) == 64 * 80 * 64 * 128 * 2
    assert kit.state_bytes("xlstm-7b", bits=32, window=False) == 32 * 8 * (256 * 512 + 256 + 1) * 4
    assert kit.state_bytes("rwkv4-14b", bits=32) == 5 * 5120 * 40 * 4  # peng2023: five vectors a layer
    assert kit.state_bytes("jamba-v0.1", window=False) == 28 * 8192 * 16 * 2
    assert kit.state_bytes("llama2-7b") == 0
    assert kit.state_bytes("mamba-2.8b", batch=3) == 3 * kit.state_bytes("mamba-2.8b")


def test_maps_by_hand():
    assert kit.attention_map_bytes("gpt3-175b", 8192) == 96 * 8192**2 * 2
    assert kit.attention_map_bytes("gpt3-175b", 8192, heads=1, layers=96, bits=32) == 96 * 8192**2 * 4
    with pytest.raises(ValueError, match=r"config must have attention layers, got mamba-2\.8b"):
        kit.attention_map_bytes("mamba-2.8b", 8)


def test_operations_of_a_token():
    """Twice the matrices, and 4 n_layer n_ctx d_attn for the context (kaplan2020, table 1, has half of it: scores only)."""
    gpt3 = PRESETS["gpt3-175b"]
    matrices = 96 * 12 * 12288**2
    assert kit.flops_per_token(gpt3, 2048) == 2 * (matrices + 50257 * 12288) + 4 * 96 * 2048 * 12288
    assert kit.flops_per_token("mistral-7b", 4096) == kit.flops_per_token("mistral-7b", 10**6)
    assert kit.flops_per_token("mamba-2.8b", 1) == kit.flops_per_token("mamba-2.8b", 10**9)
    growth = kit.flops_per_token("llama2-7b", 2000) - kit.flops_per_token("llama2-7b", 1000)
    assert growth == 4 * 32 * 4096 * 1000


def test_a_layers_operations_are_those_that_are_counted():
    def layer(x, wq, wk, wv, wo, w_in, w_out):
        return (((x @ wq) @ (x @ wk).T @ (x @ wv)) @ wo) @ w_in @ w_out

    rng = np.random.default_rng(0)
    for n, d in ((12, 8), (5, 16)):
        call = {name: rng.standard_normal((d, d)) for name in ("wq", "wk", "wv", "wo")}
        call |= {"x": rng.standard_normal((n, d)), "w_in": rng.standard_normal((d, 4 * d)), "w_out": rng.standard_normal((4 * d, d))}
        assert run(layer, call).work == kit.layer_flops(n, d)


@pytest.mark.parametrize(
    ("name", "operator", "fixed", "letters"),
    [
        ("mamba-2.8b", "selective_scan", {}, ("c", "n")),
        ("mamba2-2.7b", "ssd", {"H": 1, "G": 1}, ("p", "n")),
        ("xlstm-7b", "mlstm", {"H": 1}, ("d", "e")),
    ],
)
def test_operations_of_a_recurrence_are_those_that_are_counted(name, operator, fixed, letters):
    """By how much the recurrent form's work grows with rows times columns of the state, and with the steps."""
    T, a, b = 16, *letters
    work = lambda rows, columns: measure(operator, T=T, **fixed, **{a: rows, b: columns}).work
    each = (work(8, 8) - work(8, 4) - work(4, 8) + work(4, 4)) / (4 * 4 * T)
    config = PRESETS[name]
    (block,) = config.blocks
    elements, _ = block.mixer.state(config.d)
    assert _recurrent_flops(config) == each * block.count * elements


def test_operations_of_rwkv_are_those_that_are_counted():
    work = lambda c: measure("wkv", T=16, c=c).work
    each = (work(8) - work(4)) / (4 * 16)
    assert _recurrent_flops(PRESETS["rwkv4-14b"]) == each * 40 * 5120


@pytest.mark.parametrize("name", PRESETS)
def test_a_sequence_costs_what_its_tokens_cost(name):
    assert kit.sequence_flops(name, 40) == sum(kit.flops_per_token(name, t) for t in range(1, 41))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_sources_and_no_more_matrices_than_parameters(name):
    config = PRESETS[name]
    assert config.source.partition(",")[0] in REFERENCES
    assert kit.flops_per_token(config, 1) < 2.2 * kit.active_parameters(config)
    assert kit.flops_per_token(config, 1) > 1.5 * (kit.active_parameters(config) - 2 * config.vocabulary * config.d)


def test_pairs_by_enumeration():
    for T in (0, 1, 7):
        for window in (None, 1, 3, 20):
            for causal in (False, True):
                w = T if window is None else window
                seen = sum(1 for i in range(T) for j in range(T) if (0 <= i - j < w if causal else True))
                if causal:
                    assert kit.attention_pairs(T, window=window) == seen
    assert kit.attention_pairs(10, window=3, causal=False) == 30


def test_longest_context():
    T = kit.longest_context("llama2-7b", 24e9)
    total = lambda n: kit.weight_bytes("llama2-7b") + kit.kv_cache_bytes("llama2-7b", n)
    assert total(T) <= 24e9 < total(T + 1)
    assert kit.longest_context("llama2-70b", 80e9) == 0
    for name in ("mamba-2.8b", "mistral-7b"):
        with pytest.raises(ValueError, match=f"config must keep something for every token, got {name}"):
            kit.longest_context(name, 80e9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kit.kv_cache_bytes("llama2-7b", -1), "kv_cache_bytes: T must be a whole number of at least 0, got -1"),
        (lambda: kit.kv_cache_bytes("llama2-7b", 1.5), "T must be a whole number"),
        (lambda: kit.kv_cache_bytes("llama2-7b", True), "T must be a whole number"),
        (lambda: kit.kv_cache_bytes("llama2-7b", 1, batch=0), "batch must be a whole number of at least 1, got 0"),
        (lambda: kit.kv_cache_bytes("llama2-7b", 1, bits=0), "bits must be a positive number, got 0"),
        (lambda: kit.state_bytes("mamba-2.8b", bits=float("nan")), "state_bytes: bits must be a positive number, got nan"),
        (lambda: kit.parameters("llama9"), "parameters: config must be a Config or one of gpt3-175b, .* got 'llama9'"),
        (lambda: kit.flops_per_token("llama2-7b", 0), "flops_per_token: T must be a whole number of at least 1, got 0"),
        (lambda: kit.layer_flops(5, 0), "layer_flops: d must be a whole number of at least 1, got 0"),
        (lambda: kit.longest_context("llama2-7b", -1), "longest_context: memory must be a positive number, got -1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_config_of_ones_own():
    with pytest.raises(TypeError, match="parameters: config must be a Config or the name of a preset, got int"):
        kit.parameters(7)
    doubled = dataclasses.replace(PRESETS["llama2-7b"], blocks=(dataclasses.replace(PRESETS["llama2-7b"].blocks[0], count=64),))
    assert kit.kv_cache_bytes(doubled, 10) == 2 * kit.kv_cache_bytes("llama2-7b", 10)
