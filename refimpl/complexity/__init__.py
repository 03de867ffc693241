"""What algorithms cost, counted and not timed; and the ledger of what the field claims about it.

Names are imported on first use: ``refimpl.complexity.kv_cache_bytes`` loads the calculators and nothing else.
"""

import importlib
from typing import Any

_LAZY = {
    "Counts": "refimpl.complexity.counter",
    "Uncounted": "refimpl.complexity.counter",
    "fit": "refimpl.complexity.growth",
    "leading_term": "refimpl.complexity.growth",
    "measure": "refimpl.complexity.runs",
    "costs": "refimpl.complexity.table",
    "predict": "refimpl.complexity.table",
    "MACHINES": "refimpl.complexity.scale",
    "Machine": "refimpl.complexity.scale",
    "crossover": "refimpl.complexity.scale",
    "predict_time": "refimpl.complexity.scale",
    "simulate_ring": "refimpl.complexity.simulate",
    "simulate_scan": "refimpl.complexity.simulate",
    "Config": "refimpl.complexity.presets",
    "PRESETS": "refimpl.complexity.presets",
    "active_parameters": "refimpl.complexity.calculators",
    "attention_map_bytes": "refimpl.complexity.calculators",
    "attention_pairs": "refimpl.complexity.calculators",
    "flops_per_token": "refimpl.complexity.calculators",
    "kv_cache_bytes": "refimpl.complexity.calculators",
    "layer_flops": "refimpl.complexity.calculators",
    "longest_context": "refimpl.complexity.calculators",
    "parameters": "refimpl.complexity.calculators",
    "sequence_flops": "refimpl.complexity.calculators",
    "state_bytes": "refimpl.complexity.calculators",
    "weight_bytes": "refimpl.complexity.calculators",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'refimpl.complexity' has no attribute {name!r}; it has {', '.join(_LAZY)}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
