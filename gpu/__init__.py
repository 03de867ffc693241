"""The mirror of `refimpl` on CUDA devices: the same operators, names and arguments on CuPy arrays.

Installed as ``refimpl.gpu``. Its modules are named as the chapters are: ``refimpl.gpu.attention.attention`` mirrors
``refimpl.ops.attention.attention``. Nothing in `refimpl` imports it unless asked for by name.
"""

import importlib.util

if importlib.util.find_spec("cupy") is None:
    raise ImportError(
        "refimpl.gpu needs CuPy, which is not installed. Install the extra that fits the driver: "
        "pip install 'refimpl[cuda12]' for CUDA 12, pip install 'refimpl[cuda13]' for CUDA 13 (never both).",
        name="cupy",
    )
