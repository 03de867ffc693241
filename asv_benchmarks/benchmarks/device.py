"""Every mirrored operator on a GPU: from call to result, on the device alone, and what it allocates there."""

import importlib
import importlib.util

from . import calls

DTYPES = ("float32", "bfloat16")
LENGTHS = (1024, 8192)
BATCH = (16,)


class Mirror:
    """One call of `refimpl.gpu` on arrays that are on the device already."""

    params = (calls.MIRRORED, ("cupy",), DTYPES, LENGTHS)
    param_names = ("form", "backend", "dtype", "T")
    timeout = 300
    timer = staticmethod(calls.seconds)

    def setup(self, form, backend, dtype, T):
        cp = device()
        mirror = importlib.import_module("refimpl.gpu")
        form, _, method = form.partition(":")
        op, _ = calls.split(form)
        call = calls.arguments(op, next(iter(op.forms)), **calls.sizes(op, T, BATCH))
        self.call = {name: moved(cp, calls.rounded(value, dtype)) for name, value in call.items()}
        self.call |= {"method": method} if method else {}
        self.cp, self.function = cp, getattr(mirror, form)
        self.run()  # compiles
        cp.cuda.get_current_stream().synchronize()

    def run(self):
        return self.function(**self.call)

    def time_call(self, form, backend, dtype, T):
        self.run()

    def track_device_time(self, form, backend, dtype, T):
        from cupyx.profiler import benchmark

        return float(benchmark(self.run, n_repeat=20, n_warmup=3).gpu_times.mean())

    def track_peak(self, form, backend, dtype, T):
        """The most bytes allocated at once, arguments excepted."""

        class Live(self.cp.cuda.MemoryHook):
            name = "Live"
            now = peak = 0

            def malloc_postprocess(self, **event):
                self.now += event["mem_size"]
                self.peak = max(self.peak, self.now)

            def free_postprocess(self, **event):
                self.now -= event["mem_size"]

        with Live() as hook:
            self.run()
        return hook.peak

    track_device_time.unit = "seconds"
    track_peak.unit = "bytes"


class Methods(Mirror):
    """Operators that the mirror computes in several ways: ``ssd:fused``, ``ssd:chunkwise``, ``ssd:tensor``."""

    params = ([f"{op}:{method}" for op in ("ssd", "mlstm", "linear_attention") for method in ("fused", "chunkwise", "tensor")], *Mirror.params[1:])

    def setup(self, form, backend, dtype, T):
        if form.endswith(":tensor") and dtype != "bfloat16":
            raise NotImplementedError(f"{form} computes in bfloat16 only: in {dtype} it would be timed as chunks")
        super().setup(form, backend, dtype, T)


def device():
    """CuPy, where it is installed and has a device to run on.

    Raises
    ------
    NotImplementedError
        Otherwise, with what is missing: asv leaves the benchmark out.
    """
    if importlib.util.find_spec("cupy") is None:
        raise NotImplementedError("CuPy is not installed")
    import cupy as cp

    try:
        cp.cuda.Device().use()
    except cp.cuda.runtime.CUDARuntimeError as error:
        raise NotImplementedError(f"no CUDA device: {error}") from None
    return cp


def moved(cp, value):
    """An argument on the device: arrays of NumPy, also those in tuples."""
    if isinstance(value, tuple):
        parts = [moved(cp, v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return cp.asarray(value) if hasattr(value, "dtype") and value.ndim else value
