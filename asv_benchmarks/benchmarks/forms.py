"""Every form of every operator, on the same call: which algorithm is quick at which length."""

import numpy as np

import refimpl

LENGTHS = (64, 512)


class Forms:
    """Time of one call in float32, all optional arrays given."""

    params = ([f"{op.name}.{form}" for op in refimpl.OPS.values() for form in op.forms], LENGTHS)
    param_names = ("form", "length")
    timeout = 120

    def setup(self, form, length):
        op = refimpl.OPS[form.partition(".")[0]]
        call = op.sample(np.random.default_rng(0), **dict.fromkeys(op.lengths, length))
        self.call = {name: _narrow(value) for name, value in call.items() if value is not None}
        self.function = op.forms[form.partition(".")[2]].function
        try:
            self.function(**self.call)
        except (TypeError, ValueError) as refused:  # a form that does not take what the sample holds
            raise NotImplementedError(str(refused)) from None

    def time_form(self, form, length):
        self.function(**self.call)


def _narrow(value):
    if isinstance(value, tuple):
        return type(value)(*map(_narrow, value)) if hasattr(value, "_fields") else tuple(map(_narrow, value))
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    return value.astype({"f": np.float32, "c": np.complex64}[kind]) if kind in ("f", "c") else value
