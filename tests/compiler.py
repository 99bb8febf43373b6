"A mark for tests that compile CUDA, which not every PyTorch can."

import pytest

from wave_rnns.kernels.launch import KernelError, nvrtc_version

try:
    nvrtc_version()
    reason = ""
except KernelError as error:
    reason = str(error)
needs_compiler = pytest.mark.skipif(bool(reason), reason=reason)
