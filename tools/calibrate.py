"""The readings of every gate on right and wrong implementations: the evidence for the kit's constants.

    python tools/calibrate.py [-o docs/calibration.json] [OPERATOR ...]

For every operator, precision and length: the largest reading of a gate over the forms (right) and, over the mutants, the
share that each gate sees and the smallest reading that any gate has of one. A reading is a ratio to what is allowed: right
implementations must stay below 1. The mutants that one ordinary call does not show are for the hard inputs, laws, states
and gradients of a whole check; this table is of the gates alone.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import numpy as np

import refimpl
from refimpl.conformance import gates, truth
from refimpl.conformance.cases import Support, choose, default_sizes, factors
from refimpl.conformance.domain import Domain
from refimpl.conformance.ensemble import readings as emulated
from refimpl.conformance.mutants import mutants
from refimpl.conformance.precision import precision, rounded
from refimpl.op import Op

DTYPES = ("float64", "float32", "tf32", "float16", "bfloat16")
LENGTHS = (17, 130, 520)


def readings(op: Op, function, call: dict, to, right: dict, limits: dict, peers: dict) -> dict[str, float] | None:
    """What G1, G2 and G3 read on one function's results and states, as ratios to what they allow; None where it refuses the call."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            got = op.contract.named(function(**call), call.get("return_state", False))
        except Exception:
            return None
    found = {"G1": 0.0}
    for name, exact in right.items():
        if np.shape(got.get(name)) != exact.shape:
            return {"G1": np.inf}
        if exact.dtype.kind in "iub":
            found["G1"] = max(found["G1"], np.inf if np.any(got[name] != exact) else 0.0)
        else:
            wild = bool(np.any(np.isfinite(got[name].astype(exact.dtype)) != np.isfinite(exact)))
            found["G1"] = max(found["G1"], np.inf if wild else float(np.max(gates.error_ratio(got[name], exact, limits[name]), initial=0.0)))
    for name, others in peers.items():
        y, exact = got[name], right[name]
        floor = 0.5 * to.unit * np.abs(exact).astype(np.float64) + truth.smallest(to)
        error, allowed = gates.slice_errors(y, exact), gates.allowed_error(others, floor)
        if error is not None and allowed is not None:
            found["G2"] = max(found.get("G2", 0.0), float(np.max(error / allowed)))
        apart = gates.row_apart(y, exact, others, limits[name])
        if apart is not None:
            found["G2"] = max(found.get("G2", 0.0), float(np.max(apart)))
        for (_, at), slope in zip(gates.parts(exact.shape), others.slopes, strict=True):
            ours, allowed_bias = gates.bias(y[at], exact[at], float(slope), to.common, whole=not at)
            found["G3"] = max(found.get("G3", 0.0), abs(ours) / allowed_bias)
    return found


def rows(op: Op) -> list[dict]:
    """One row for each precision and length."""
    table = []
    for dtype in DTYPES:
        to = precision(dtype)
        for length in LENGTHS if op.lengths else (0,):
            sizes = {**default_sizes(op), **dict.fromkeys(op.lengths, length)}
            combo = {name: values[-1] if values[0] is False else values[0] for name, values in factors(op, Support(), Domain()).items() if name != "return_state"}
            try:
                call = rounded(op.contract, choose(op, op.sample(np.random.default_rng(5), **sizes), sizes, combo), to)
                right = truth.truth(op, call, to)
            except ValueError:
                continue
            limits = truth.tolerance(op, call, to, right)
            peers = emulated(op, call, to, right, keep=True) if to.coarse else {}
            forms = {n: readings(op, f.function, call, to, right, limits, peers) for n, f in op.forms.items() if f.stabilised}
            wrong = {m.name: readings(op, m.function, call, to, right, limits, peers) for m in mutants(op.name) if not m.of_gradient and dtype not in m.hidden}
            seen = {name: max(r.values()) for name, r in wrong.items() if r is not None}
            shown = [v for v in seen.values() if v > 1e-3 or v > 1]
            table.append(
                {
                    "operator": op.name, "dtype": dtype, "length": length,
                    "right": {g: max((r[g] for r in forms.values() if r is not None and g in r), default=None) for g in ("G1", "G2", "G3")},
                    "forms": len([r for r in forms.values() if r is not None]),
                    "wrong": len(seen),
                    "caught by": {g: sum(1 for r in wrong.values() if r is not None and r.get(g, 0) > 1) for g in ("G1", "G2", "G3")},
                    "caught": sum(v > 1 for v in seen.values()),
                    "nearest": min((v for v in shown if v > 1), default=None),
                }
            )  # fmt: skip
    return table


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", type=Path, help="write the rows as JSON")
    parser.add_argument("operators", nargs="*", metavar="OPERATOR")
    chosen = parser.parse_args(arguments)
    table = []
    for name in chosen.operators or refimpl.OPS:
        for row in rows(refimpl.OPS[name]):
            table.append(row)
            right = "  ".join(f"{g} {v:.3f}" if v is not None else f"{g}   -  " for g, v in row["right"].items())
            print(f"{row['operator']:20} {row['dtype']:9} {row['length']:4}  right: {right}   wrong: {row['caught']} of {row['wrong']} {row['caught by']}", flush=True)
    if chosen.o:
        chosen.o.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
