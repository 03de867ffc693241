"""What the build measures for an operator's page: the error of every form, the kit's report, the docstring's example."""

import contextlib
import inspect
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from refimpl.conformance.cases import parameters
from refimpl.conformance.precision import precision, rounded
from refimpl.conformance.truth import tolerance, truth
from refimpl.op import Op


@dataclass(frozen=True)
class Accuracy:
    """A form in float32 against the definition in float64, over the sample and the chapter's hard inputs.

    Attributes
    ----------
    form : str
    calls : int
    error : float
        Largest error of the generic calls, relative to the largest entry of the result.
    share : float
        The largest error of all calls, over what the error bound allows.
    worst : str
        The call in which that happened.
    """

    form: str
    calls: int
    error: float
    share: float
    worst: str


def accuracy(op: Op, draws: int = 3) -> list[Accuracy]:
    """Every form's errors in float32."""
    to = precision("float32")
    judged = []
    for label, call in _calls(op, draws):
        call = rounded(op.contract, op.arrange(call) if op.arrange else call, to)
        if call is None:
            continue
        try:
            right = truth(op, call, to)
        except (ValueError, TypeError):
            continue
        judged.append((label, call, right, tolerance(op, call, to, right)))
    rows = []
    for name, form in op.forms.items():
        calls, error, share, worst = 0, 0.0, 0.0, ""
        for label, call, right, allowed in judged:
            try:
                with np.errstate(all="ignore"), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    got = op.contract.named(form.function(**call), call.get("return_state", False))
            except (ValueError, TypeError):
                continue  # a form that does not take this call says so
            calls += 1
            for result, exact in right.items():
                if not np.size(exact) or np.asarray(exact).dtype.kind not in "fc":
                    continue
                with np.errstate(all="ignore"):
                    off = abs(np.asarray(got[result]).astype(exact.dtype) - exact).astype(float)
                    ratio = np.where(np.isfinite(exact), off / allowed[result], 0)
                    size = np.max(abs(exact)[np.isfinite(exact)], initial=0)
                if np.max(np.nan_to_num(ratio)) > share:
                    share, worst = float(np.max(np.nan_to_num(ratio))), label
                if label == "sample" and size:
                    error = max(error, float(np.max(np.nan_to_num(off)) / size))
        rows.append(Accuracy(name, calls, error, share, worst))
    return rows


def _calls(op: Op, draws: int) -> Iterator[tuple[str, dict]]:
    asked = {name: op.options[name][0] for name, default in parameters(op)[2].items() if default is inspect.Parameter.empty}
    for seed in range(draws):
        yield "sample", asked | op.sample(np.random.default_rng(seed))
    for label, draw in op.hard.items():
        yield label, asked | draw(np.random.default_rng(0))


def run(code: str) -> str:
    """What Python code prints, its seconds rounded away."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "<documentation>", "exec"), {"__name__": "documentation"})
    return re.sub(r"\d+\.\d s\b", "0.3 s", out.getvalue()).rstrip()
