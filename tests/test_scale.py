"""Times on paper against the same schedules played event by event, and against measurements where there are any."""

import math
import random

import numpy as np
import pytest
from typer.testing import CliRunner

from refimpl.cli import app
from refimpl.complexity.claims.measurements import Measurement
from refimpl.complexity.scale import (
    MACHINES,
    MIXERS,
    SCANS,
    attention_work,
    compare,
    crossover,
    predict_time,
    ring_all,
    ring_contiguous,
    ring_times,
    scan_hops,
    selective_scan_work,
    ssd_work,
)
from refimpl.complexity.simulate import simulate_ring, simulate_scan, tiles
from refimpl.ops.attention.ring_attention import ring_schedule
from refimpl.ops.recurrence.linear_recurrence import error_bound, linear_recurrence

DEVICES = (1, 2, 3, 4, 8, 13)
TIMES = [(1.0, 0.5, 0.2), (1.0, 0.5, 0.5), (1.0, 0.5, 0.7), (1.0, 0.5, 1.0), (1.0, 0.5, 3.0), (1.0, 0.8, 0.0)]  # tile, half, hop


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("times", TIMES)
def test_the_formulas_of_rings_are_what_the_events_give(devices, times):
    tile, half, hop = times
    played = lambda **kind: simulate_ring(devices, tiles(tile, half, **kind), hop)[0]
    assert played(causal=False) == pytest.approx(ring_all(tile, hop, devices), rel=1e-12)
    assert played(causal=True, schedule="striped") == pytest.approx(ring_all(half, hop, devices), rel=1e-12)
    assert played(causal=True, schedule="contiguous") == pytest.approx(ring_contiguous(tile, half, hop, devices), rel=1e-12)


def test_the_ring_meets_every_shard_in_the_order_of_the_schedule():
    met = {r: [] for r in range(5)}
    simulate_ring(5, lambda r, s: met[r].append(s) or 1.0, 0.1)
    assert np.array_equal(np.array([met[r] for r in range(5)]).T, ring_schedule(5))


def test_a_causal_contiguous_ring_idles():
    seconds, busy = simulate_ring(8, tiles(1.0, 0.5, causal=True, schedule="contiguous"), 0.0)
    assert busy.sum() / (8 * seconds) == pytest.approx(32 / (8 * 7.5))
    seconds, busy = simulate_ring(8, tiles(1.0, 0.5, causal=True), 0.0)
    assert busy.sum() / (8 * seconds) == pytest.approx(1)


def test_uneven_devices_are_waited_for():
    draw = random.Random(0)
    speed = [draw.uniform(1, 2) for _ in range(6)]
    seconds, busy = simulate_ring(6, lambda r, s: speed[r], 0.0)
    assert seconds == pytest.approx(6 * max(speed))
    assert busy == pytest.approx([6 * s for s in speed])


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 6, 8, 12, 16])
def test_the_scan_of_two_levels_is_the_recurrence_and_takes_as_long_as_the_formula_says(devices):
    rng = np.random.default_rng(devices)
    a, b = rng.uniform(-1, 1, (48, 3)), rng.standard_normal((48, 3))
    h, seconds = simulate_scan(a, b, devices, reduce=[2.0] * devices, scan=[3.0] * devices, hop=0.5)
    assert np.all(abs(h - linear_recurrence(a, b)) <= 2 * error_bound(a, b, unit=2.0**-53))
    assert seconds == pytest.approx(2 + 0.5 * scan_hops(devices) + 3)


def test_a_slow_device_is_waited_for_and_one_hop_more():
    a, b = np.full((8, 1), 0.5), np.ones((8, 1))
    _, seconds = simulate_scan(a, b, 4, reduce=[1, 9, 1, 1], scan=[1] * 4, hop=0.5)
    assert seconds == pytest.approx(9 + 0.5 + 1)
    _, seconds = simulate_scan(a, b, 4, reduce=[9, 1, 1, 1], scan=[1] * 4, hop=0.5)
    assert seconds == pytest.approx(9 + 2 * 0.5 + 1)  # to device 3 by way of device 1
    with pytest.raises(ValueError, match="b must have a multiple of 3 steps, got 8"):
        simulate_scan(a, b, 3, reduce=[1] * 3, scan=[1] * 3, hop=1)


@pytest.mark.parametrize("schedule", ["striped", "contiguous"])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("T", [2**12, 2**20, 10**9])
def test_predicted_rings_are_played_ones(schedule, machine, T):
    tile, half, hop, _ = ring_times(T, MACHINES[machine], 8)
    played, _ = simulate_ring(8, tiles(tile, half, causal=True, schedule=schedule), hop)
    assert predict_time("attention", T, machine, devices=8, schedule=schedule).seconds == pytest.approx(played, rel=1e-9)


@pytest.mark.parametrize("mixer", SCANS)
def test_predicted_scans_are_played_ones(mixer):
    result = predict_time(mixer, 2**20, devices=8)
    a, b = np.full((8, 1), 0.5), np.ones((8, 1))
    hop = result.parts["carries"] / scan_hops(8)
    _, played = simulate_scan(a, b, 8, reduce=[result.parts["reduce"]] * 8, scan=[result.parts["scan"]] * 8, hop=hop)
    assert result.seconds == pytest.approx(played, rel=1e-12)


# -- work, against numbers that others wrote down ----------------------------------------------------------------------


def test_floors_that_were_worked_out_by_hand():
    """Products at 700 TFLOP/s, 3.02 TB/s, 3.9e12 exponentials a second: milliseconds of five shapes."""
    attention = attention_work(4096, heads=16, kv_heads=16, batch=4)
    assert attention.products / 700e12 * 1e3 == pytest.approx(0.39, abs=0.006)
    long = attention_work(16384, heads=16, kv_heads=16)
    assert long.products / 700e12 * 1e3 == pytest.approx(1.57, abs=0.01)
    scan = selective_scan_work(2048, c=2048, batch=8)
    assert scan.exponentials / 3.9e12 * 1e3 == pytest.approx(0.14, abs=0.003)
    ssd = ssd_work(8192, heads=32, batch=8)
    assert ssd.moved / 3.02e12 * 1e3 == pytest.approx(0.18, abs=0.02)


def test_growth_with_length_and_devices():
    at = lambda mixer, T, devices=1: predict_time(mixer, T, devices=devices).seconds
    for mixer in MIXERS:
        power = 2 if mixer == "attention" else 1
        assert math.log2(at(mixer, 2**29) / at(mixer, 2**28)) == pytest.approx(power, abs=0.01)
        assert at(mixer, 10**9, 64) < at(mixer, 10**9, 8) < at(mixer, 10**9)
    assert at("attention", 10**9) / at("attention", 10**9, 64) == pytest.approx(64, rel=0.02)


def test_few_blocks_leave_multiprocessors_idle():
    wide, narrow = (attention_work(2**16, heads=h, kv_heads=h) for h in (32, 1))
    machine = MACHINES["h100"]
    assert wide.limits(machine)["products"] == wide.products / machine.tensor
    alone = attention_work(128, heads=1, kv_heads=1)
    assert alone.limits(machine)["products"] == pytest.approx(alone.products / machine.tensor * machine.multiprocessors)
    assert narrow.limits(machine)["products"] == narrow.products / machine.tensor  # 512 blocks of queries


def test_what_decides():
    assert predict_time("attention", 2**20).limit == "products"
    assert predict_time("recurrence", 2**20).limit == "bandwidth"
    assert predict_time("selective_scan", 2**20).limit == "exponentials"
    assert predict_time("ssd", 2**20).limit == "bandwidth"
    assert predict_time("attention", 1024, devices=64).limit == "link"
    assert predict_time("recurrence", 1024, devices=64).limit == "latency"
    assert predict_time("attention", 2**16, "h100-infiniband", devices=64).seconds > predict_time("attention", 2**16, devices=64).seconds


@pytest.mark.parametrize("other", SCANS)
@pytest.mark.parametrize("devices", [1, 8])
def test_crossovers_are_where_the_times_cross(other, devices):
    at = crossover("attention", other, devices=devices)
    longer = lambda T: predict_time("attention", T, devices=devices).seconds > predict_time(other, T, devices=devices).seconds
    assert longer(at) and longer(2 * at) and longer(10**9)
    assert at == devices or not longer(at - 1)
    assert crossover(other, "attention") == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: predict_time("conv", 5), "mixer must be one of attention, recurrence, selective_scan, ssd, got 'conv'"),
        (lambda: predict_time("ssd", 5, "b200"), "machine must be a Machine or one of a100, .* got 'b200'"),
        (lambda: predict_time("ssd", 0), "T must be a whole number of at least 1, one token a device, got 0"),
        (lambda: predict_time("ssd", 7, devices=8), "T must be a whole number of at least 8"),
        (lambda: predict_time("ssd", 7, devices=0), "devices must be a whole number of at least 1, got 0"),
        (lambda: predict_time("attention", 7, schedule="zigzag"), "schedule must be striped or contiguous, got 'zigzag'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- measurements and the command --------------------------------------------------------------------------------------


def test_predictions_beside_measurements():
    about = ("NVIDIA H100 80GB HBM3", "580", "2026-11-21")
    sizes = {"T": 2048, "B": 8, "c": 2048, "n": 16}
    rows = [
        Measurement("selective_scan", "mamba_ssm", 0.595e-3, *about, "bfloat16", sizes),
        Measurement("attention", "kernel", 6.04e-3, *about, "float32", {"T": 4096, "B": 4, "H": 16, "d": 128}),
        Measurement("selective_scan", "on a CPU", 1.0, "some processor", "", "2026-11-21", "", sizes),
        Measurement("lstm", "kernel", 1.0, *about, "", {"T": 5}),
        Measurement("selective_scan", "gradient", 1.0, *about, "bfloat16", sizes, "gradient, bf16"),
    ]
    found = compare(rows)
    assert [row.measurement.implementation for row in found] == ["mamba_ssm", "kernel"]
    assert found[0].predicted == predict_time("selective_scan", 2048, c=2048, batch=8).seconds
    assert found[0].ratio == pytest.approx(0.595e-3 / found[0].predicted)
    assert all(row.ratio > 1 for row in found)
    full, causal = (compare([Measurement("attention", "k", 1.0, *about, "bfloat16", {"T": 4096}, w)])[0] for w in ("full", "causal"))
    assert full.predicted > 1.9 * causal.predicted
    assert compare([]) == []


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    run = lambda *a: CliRunner().invoke(app, ["scale", *a])
    result = run("--devices", "1", "--devices", "64")
    assert result.exit_code == 0, result.output
    assert "1,000,000,000" in result.stdout and "64 devices" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    for arguments, message in (
        (("--machine", "tpu"), "--machine takes one of"),
        (("--devices", "0"), "--devices takes"),
        (("--plot", "no/x.png"), "no folder"),
    ):
        wrong = run(*arguments)
        assert wrong.exit_code == 2 and message in wrong.stderr and wrong.stderr.count("\n") == 1
    pytest.importorskip("matplotlib")
    assert run("--plot", "x.png").exit_code == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
