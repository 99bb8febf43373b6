__version__ = "0.1.0"

from .model import IdentityRNN, WaveRNN  # noqa: E402,F401  (the two names users come for)
