"""Recurrent networks that remember by letting the past travel.

What users come for:

WaveRNN      the layer, with the interface of torch.nn.RNN: rings of neurons that hand their state on
IdentityRNN  the network it is compared with: every neuron keeps its own state
load         a network that was trained with the paper's settings: load("psmnist-wrnn")
wave_scan    the whole recurrence of a WaveRNN as one function of tensors
dense_scan   the same for an ordinary RNN

`wave_rnns.waves` measures waves, `wave_rnns.memory` what a state remembers; `wave_rnns.paper` reruns the paper.
"""

__version__ = "0.1.0"

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers
    from .layer import IdentityRNN, WaveRNN
    from .paper.weights import load
    from .scan import dense_scan, wave_scan

__all__ = ["IdentityRNN", "WaveRNN", "dense_scan", "load", "wave_scan"]


def __getattr__(name: str):
    if name in __all__:  # fetched when asked for: `wrnn_train --help` need not wait for torch
        home = {"load": "paper.weights", "dense_scan": "scan", "wave_scan": "scan"}.get(name, "layer")
        return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if "torch" in sys.modules:  # nothing to wait for: register the operators that exported programs name
    importlib.import_module("wave_rnns.layer")
