__version__ = "0.1.0"

__all__ = ["IdentityRNN", "WaveRNN"]  # the two names users come for


def __getattr__(name):
    if name in __all__:  # fetched when asked for: `wrnn_train --help` need not wait for torch
        from wave_rnns import layer

        return getattr(layer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
