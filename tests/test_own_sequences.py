"The trainers of others that notebook 30 shows: its own code runs, where Lightning and transformers are installed."

import json
import os
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from wave_rnns import WaveRNN


@pytest.mark.parametrize("package", ["lightning", "transformers"])
def test_the_code_that_is_shown_runs(package, tmp_path, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    cells = json.loads((ROOT / "nbs/30_your_own_sequences.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    blocks = [block for source in sources for block in re.findall(r"```python\n(.*?)```", source, re.S)]
    (block,) = (block for block in blocks if package in block)
    last_state = next(s for s in sources if "class LastState" in s).split("\n\n\ndef ")[0]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(192, 30, 4, generator=g)
    parts = [TensorDataset(x, (x[:, -1, 0] > 0).long())]
    space = dict(torch=torch, nn=nn, F=F, DataLoader=DataLoader, WaveRNN=WaveRNN, parts=parts)
    models = []
    monkeypatch.setattr(WaveRNN, "__init__", remember(WaveRNN.__init__, models))
    exec(last_state, space)
    exec(block, space)
    (layer,) = models
    fresh = [p for p in layer.parameters() if p.grad is not None or p.requires_grad]
    assert fresh and all(p.isfinite().all() for p in fresh)
    assert any(not torch.equal(a, b) for a, b in zip(layer.parameters(), layer.at_first, strict=True))


def remember(init, models):
    "What a layer's weights were when it was made."

    def wrapped(self, *args, **kwargs):
        init(self, *args, **kwargs)
        models.append(self)
        self.__dict__["at_first"] = [p.detach().clone() for p in self.parameters()]

    return wrapped
