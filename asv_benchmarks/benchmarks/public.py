"""Our fastest form over public implementations: both on the same call, taking turns in one process. Below 1: ours is faster."""

import inspect

import numpy as np
import peers

from refimpl.conformance.candidate import given
from refimpl.conformance.cases import parameters
from refimpl.conformance.frameworks import framework
from refimpl.conformance.public import IMPLEMENTATIONS

from . import calls

LENGTH = 256
KNOWN = {f"{i.operator}: {i.package} {i.function}": i for i in IMPLEMENTATIONS if "float32" in i.dtypes and i.expected == "conforms"}


class Ratios:
    """Everything that `refimpl survey` knows, at one length, in float32 on the CPU."""

    params = list(KNOWN)
    param_names = ("implementation",)
    timeout = 300
    unit = "ratio"

    def setup(self, known):
        theirs = KNOWN[known]
        if theirs.missing:
            raise NotImplementedError(f"{theirs.missing} is not installed")
        self.ours, self.theirs = contenders(theirs)

    def track_ratio(self, known):
        found = peers.race(self.ours | {"theirs": self.theirs}, rounds=3)
        return min(found[form] for form in self.ours) / found["theirs"]


class Contests:
    """The contests of `peers.py`, at sizes that matter: the best of ours over the best of theirs."""

    params = list(peers.CONTESTS)
    param_names = ("operator",)
    timeout = 600
    unit = "ratio"

    def setup(self, operator):
        try:
            self.ours, self.theirs = peers.CONTESTS[operator](np.random.default_rng(0))
        except ImportError as missing:
            raise NotImplementedError(str(missing)) from None

    def track_ratio(self, operator):
        found = peers.race(self.ours | self.theirs, rounds=3)
        return min(found[name] for name in self.ours) / min(found[name] for name in self.theirs)


def contenders(theirs) -> tuple[dict, object]:
    """Our forms by name, and theirs, each a function of nothing.

    Raises
    ------
    NotImplementedError
        If theirs does not take the call, or gives something else.
    """
    op = calls.refimpl.OPS[theirs.operator]
    domain = dict(theirs.domain)
    options = {name: values[0] for name, values in domain.pop("options", {}).items()}
    fixed = {name: value for name, value in domain.items() if isinstance(value, int)}
    at = calls.sizes(op, LENGTH) | fixed
    also = [name for name, value in options.items() if value is True and name not in op.options]
    defaults = parameters(op)[2]
    chosen = {name: value for name, value in options.items() if name in op.options and value != defaults.get(name)}
    ours = {}
    for form in op.forms:
        try:
            call = calls.arguments(op, form, give=also, **at)
        except ValueError:
            continue
        call = {name: calls.rounded(value, "float32") for name, value in call.items()} | chosen
        if not calls.refused(op, form, call):
            ours[form] = lambda f=op.forms[form].function, call=call: f(**call)
    if not ours:
        raise NotImplementedError(f"no form of {op.name} takes the call")
    arrays, function, required = framework(theirs.framework), theirs.build(), parameters(op)[0]
    put = given(op.name, call, framework=theirs.framework)
    takes = inspect.signature(function).parameters  # an option that it has only one value of, it may not have
    positional, keywords = [put[n] for n in required], {n: v for n, v in put.items() if n not in required and (n in takes or n not in chosen)}
    first = lambda y: arrays.numpy(y[0] if isinstance(y, tuple) else y)
    run = lambda: first(function(*positional, **keywords))  # read, since what nobody asks for may not be computed yet

    try:
        got = run()
    except (TypeError, ValueError, NotImplementedError) as refusal:
        raise NotImplementedError(f"{theirs.function} does not take the call: {refusal}") from None
    want = next(iter(ours.values()))()
    want = np.asarray(want[0] if isinstance(want, tuple) else want)
    if got.shape != want.shape or not np.allclose(got, want, rtol=0, atol=1e-3 * np.max(abs(want))):
        raise NotImplementedError(f"{theirs.function} gives something else for this call; `refimpl survey` says what")
    return ours, run
