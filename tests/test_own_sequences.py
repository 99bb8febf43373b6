"The trainers of others, and the Hub: the code that notebook 30 shows runs as printed, and what it trains has learned."

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


@pytest.fixture
def shown(tmp_path, monkeypatch):
    "Runs the notebook's block that imports `package`, in an empty folder, on sequences whose label is in their last step: shown(package) -> its names."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cells = json.loads((ROOT / "nbs/30_your_own_sequences.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]

    def run(package: str) -> dict:
        if not os.environ.get("CI"):  # the extra `dev` brings all of them
            pytest.importorskip(package)
        blocks = [block for source in sources for block in re.findall(r"```python\n(.*?)```", source, re.S)]
        (block,) = (block for block in blocks if re.search(rf"^(from|import) {package}\b", block, re.M))
        last_state = next(s for s in sources if "class LastState" in s).split("\n\n\ndef ")[0]
        x = torch.randn(256, 30, 4, generator=torch.Generator().manual_seed(0))
        names = dict(torch=torch, nn=nn, F=F, DataLoader=DataLoader, WaveRNN=WaveRNN)
        names["parts"] = [TensorDataset(x, (x[:, -1, 0] > 0).long())]
        torch.manual_seed(0)
        exec(last_state, names)
        names["models"] = models = []

        class Kept(names["LastState"]):
            def __init__(self, *args):
                super().__init__(*args)
                models.append(self)

        names["LastState"] = Kept
        exec(block, names)
        return names

    return run


@pytest.mark.parametrize("package", ["lightning", "transformers"])
def test_the_trainers_of_others_train(package, shown):
    names = shown(package)
    (model,), (x, y) = names["models"], names["parts"][0].tensors
    with torch.no_grad():
        assert model.cpu()(x).argmax(-1).eq(y).float().mean() > 0.9


def test_a_layer_travels_with_its_options(shown):
    names = shown("huggingface_hub")
    layer, again = names["layer"], names["again"]
    assert repr(again) == repr(layer) and again.batch_first
    x = names["parts"][0].tensors[0][:3]
    assert torch.equal(again(x)[0], layer(x)[0])
