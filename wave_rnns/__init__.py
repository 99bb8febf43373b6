__version__ = "0.1.0"

import importlib
import sys

__all__ = ["IdentityRNN", "WaveRNN", "dense_scan", "load", "wave_scan"]  # what users come for


def __getattr__(name):
    if name in __all__:  # fetched when asked for: `wrnn_train --help` need not wait for torch
        home = "wave_rnns.paper.weights" if name == "load" else "wave_rnns.layer"
        return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "torch" in sys.modules:  # nothing to wait for: register the operators that exported programs name
    importlib.import_module("wave_rnns.layer")
