"""Every form of every operator on NumPy, all forms on the same call: which algorithm is quick at which length."""

import tracemalloc

from . import calls

BACKEND = ("numpy",)


class Forms:
    """End-to-end time of one call."""

    params = (calls.FORMS, BACKEND, calls.DTYPES, calls.LENGTHS)
    param_names = ("form", "backend", "dtype", "T")
    timeout = 120
    timer = staticmethod(calls.seconds)

    def setup(self, form, backend, dtype, T):
        op, name = calls.split(form)
        self.call, self.function = calls.draw(form, dtype, T), op.forms[name].function

    def time_call(self, form, backend, dtype, T):
        self.function(**self.call)


class Gradients(Forms):
    """The same of every operator's gradient."""

    params = ([op.name for op in calls.refimpl.OPS.values() if op.gradient], BACKEND, calls.DTYPES[:1], calls.LENGTHS)

    def setup(self, form, backend, dtype, T):
        op, _ = calls.split(form)
        calls.draw(form, dtype, T)  # what is too much for the definition is too much for its gradient
        self.call, self.function = calls.gradient_call(form, dtype, T), op.gradient


class Memory(Forms):
    """What one call allocates, in one precision."""

    params = (calls.FORMS, BACKEND, calls.DTYPES[:1], calls.LENGTHS)
    time_call = None

    def peakmem_call(self, form, backend, dtype, T):
        self.function(**self.call)

    def track_peak(self, form, backend, dtype, T):
        """The most bytes of arrays alive at once, arguments excepted: NumPy tells `tracemalloc`, the system is not asked."""
        tracemalloc.start()
        try:
            self.function(**self.call)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    track_peak.unit = "bytes"
