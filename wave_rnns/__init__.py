__version__ = "0.1.0"

import importlib
import sys

__all__ = ["IdentityRNN", "WaveRNN", "dense_scan", "wave_scan"]  # what users come for


def __getattr__(name):
    if name in __all__:  # fetched when asked for: `wrnn_train --help` need not wait for torch
        return getattr(importlib.import_module("wave_rnns.layer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "torch" in sys.modules:  # nothing to wait for: register the operators that exported programs name
    importlib.import_module("wave_rnns.layer")
