"""Every kernel of the mirror compiles for every architecture, without a GPU; its resources are those of docs/gpu_resources.json."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "gpu_resources.json"
MISSING = [
    name
    for name in ("cupy", "cuda", "cuda.core")
    if importlib.util.find_spec(name.partition(".")[0]) is None or importlib.util.find_spec(name) is None
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not run: {', '.join(MISSING)} not installed; pip install 'refimpl[compile]'")


def _chapters():
    if MISSING:
        return ["any"]
    from refimpl.gpu.launch import kernels

    return sorted(kernels())


def _key(row):
    return row["kernel"], row["file"], row["architecture"]


@pytest.mark.slow
@pytest.mark.parametrize("chapter", _chapters())
def test_every_instance_compiles_without_spills_or_a_stack_and_about_as_the_table_says(chapter):
    """`python -m refimpl.gpu.compile -o docs/gpu_resources.json` writes the table; its numbers are one machine's."""
    from refimpl.gpu.compile import table
    from refimpl.gpu.launch import kernels

    instances = kernels()[chapter]
    rows = table(instances)  # raises with the compiler's message if one does not compile
    allowed = {kernel.name for kernel in instances if kernel.spills}
    spilling = [
        f"{r['kernel']} for {r['architecture']}: {r['spilled bytes']} bytes"
        for r in rows
        if r["spilled bytes"] and r["kernel"] not in allowed
    ]
    assert not spilling, "kernels keep registers in local memory:\n" + "\n".join(spilling)
    stack = {kernel.name: kernel.stack for kernel in instances}
    deep = [f"{r['kernel']} for {r['architecture']}: {r['stack bytes']} bytes" for r in rows if r["stack bytes"] > stack[r["kernel"]]]
    assert not deep, "threads have stacks in local memory:\n" + "\n".join(deep)
    known = {_key(r): r for r in json.loads(TABLE.read_text(encoding="utf-8"))["kernels"]}
    assert {_key(r) for r in rows} <= set(known), "write docs/gpu_resources.json anew"
    # The same compiler allots a few registers more or less on another machine, and pads shared memory now one way, now another:
    # only what would cost a block of a multiprocessor is a change.
    for row in rows:
        was = known[_key(row)]
        assert row["registers"] <= max(was["registers"] * 9 / 8, was["registers"] + 8), f"write docs/gpu_resources.json anew: {row}, was {was}"
        assert row["static shared bytes"] <= was["static shared bytes"] * 9 / 8 + 256, f"write docs/gpu_resources.json anew: {row}, was {was}"


@pytest.mark.thorough
@pytest.mark.parametrize("chapter", _chapters())
def test_every_instance_compiles_for_older_and_newer_devices(chapter):
    from refimpl.gpu.compile import TABLED, table
    from refimpl.gpu.launch import ARCHITECTURES, kernels

    instances = kernels()[chapter]
    rows = table(instances, set(ARCHITECTURES) - set(TABLED))
    assert len(rows) == sum(len(set(k.architectures) - set(TABLED)) for k in set(instances))


def test_the_table_holds_no_other_kernels():
    from refimpl.gpu.compile import TABLED
    from refimpl.gpu.launch import kernels

    instances = {kernel for found in kernels().values() for kernel in found}
    kept = json.loads(TABLE.read_text(encoding="utf-8"))
    assert {_key(r) for r in kept["kernels"]} == {(k.name, k.file, a) for k in instances for a in set(k.architectures) & set(TABLED)}


def test_the_table_says_how_deep_stacks_are():
    from refimpl.gpu.launch import kernels

    stack = {kernel.name: kernel.stack for found in kernels().values() for kernel in found}
    kept = json.loads(TABLE.read_text(encoding="utf-8"))["kernels"]
    assert all(0 <= r["stack bytes"] <= stack[r["kernel"]] for r in kept) and any(r["stack bytes"] for r in kept)


def test_a_stack_is_seen(monkeypatch):
    from refimpl.gpu.compile import resources
    from refimpl.gpu.launch import STACK, Kernel

    code = """template <class X> __global__ void deep(const X* x, X* y, int n) {
        X kept[100];
        for (int i = 0; i < n; ++i) kept[i % 100] = x[i];
        y[threadIdx.x] = kept[int(x[0]) % 100];
    }"""
    monkeypatch.setattr(Kernel, "source", property(lambda self: code))
    assert resources(Kernel("deep.cu", "deep<float>"), "sm_90")["stack bytes"] >= 400 > STACK


@pytest.mark.slow
def test_the_build_for_racecheck_compiles_and_has_other_barriers(monkeypatch):
    from refimpl.gpu.compile import table
    from refimpl.gpu.launch import FOLDER, kernels

    of_file = {kernel.file: kernel for found in kernels().values() for kernel in found}  # one of each
    chosen = [k for file, k in of_file.items() if "will_come(" in (FOLDER / file).read_text(encoding="utf-8")]
    before = {row["kernel"]: row["static shared bytes"] for row in table(chosen, each=1)}
    monkeypatch.setenv("REFIMPL_EVERY_LANE_ARRIVES", "1")
    after = {row["kernel"]: row["static shared bytes"] for row in table(chosen, each=1)}
    assert len(before) >= 7 and all(after[name] >= before[name] + 16 * 8 for name in before)  # the barriers that were the machine's


def test_every_chapter_of_the_mirror_lists_its_kernels():
    from refimpl.gpu.launch import FOLDER, kernels

    used = {kernel.file for instances in kernels().values() for kernel in instances}
    assert {p.name for p in FOLDER.glob("*.cu")} == used


def test_a_kernel_that_does_not_compile_is_an_error():
    from refimpl.gpu.compile import resources
    from refimpl.gpu.launch import Kernel

    with pytest.raises(RuntimeError, match=r"walk_rows<Nothing> \(kernel_linear_recurrence.cu\) does not compile for sm_90"):
        resources(Kernel("kernel_linear_recurrence.cu", "walk_rows<Nothing>"), "sm_90")
