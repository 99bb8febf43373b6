"The page to play with: it computes what PyTorch computes, and works for hands, keys, phones and screen readers, in a real browser."

import json
import re

import pytest
import torch
from conftest import ROOT, run_node
from hypothesis import given
from hypothesis import strategies as st

from wave_rnns.core import ConfigError
from wave_rnns.paper.play import decode, encode, read_address, run

PAGE = ROOT / "wave_rnns/paper/play.html"
DIGITS = json.loads(re.search(r'"digits": ({.*?})', PAGE.read_text(encoding="utf-8"))[1])
ADDRESSES = [
    "scene=copy&in=5861437824",
    "scene=copy&in=5861444824&delay=33&turn=3",
    "scene=copy&in=88A1&delay=0&cut=30",
    "scene=copy&in=1234567812&delay=60&turn=-7&cut=49",
    "scene=ring&in=8I4E2C6K3",
    "scene=ring&in=8I4E2C6K3&nu=0.37&cut=20",
    "scene=ring&in=1234567887654321&nu=0.9&turn=-11&at=40",
    "scene=ring&in=5&nu=0&cut=49",
    f"scene=digit&in={DIGITS['3']}",
    f"scene=digit&in={DIGITS['8']}&cut=100",
    "scene=digit",
]


@pytest.fixture(scope="module")
def browsed(npm_packages, chromium) -> dict:
    "What the page computes, and what a reader would complain about."
    return run_node("play.mjs", chromium, npm_packages, PAGE.as_uri(), json.dumps(ADDRESSES), timeout=300)


@pytest.mark.browser
@pytest.mark.parametrize("number", range(len(ADDRESSES)), ids=[a[:40] for a in ADDRESSES])
def test_the_page_computes_what_pytorch_computes(browsed, number, tally):
    "Against float32 to 1e-4, against float64 (the page's own arithmetic) to 1e-9; relative where numbers are large."
    page = browsed["computed"][number]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        shown = run(ADDRESSES[number], dtype)
        pairs = {
            "wave": shown.wave.flatten(1),
            "bump": shown.bump,
            "waveSays": shown.wave_says,
            "bumpSays": shown.bump_says,
        }
        assert all((page[name] is None) == (ours is None) for name, ours in pairs.items())
        for name, ours in pairs.items():
            if ours is not None:
                theirs = torch.tensor(page[name], dtype=dtype)
                ours = ours[-len(theirs) :]
                torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=tolerance)
                error = ((theirs - ours).abs() / ours.abs().clamp(min=1)).max().item()
                tally(f"play.html against PyTorch {dtype}", largest_error=error)
        assert page["read"] == (None if shown.read is None else shown.read.tolist())


@pytest.mark.browser
def test_in_a_browser(browsed):
    "Autoplay, keyboard, mouse, touch, addresses, phones, contrast, less motion, no console error, no request."
    assert not browsed["problems"], "\n".join(browsed["problems"])


def test_the_page_needs_no_other_file():
    text = PAGE.read_text(encoding="utf-8")
    outside = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w{2,}[^\s\"'<)]*", re.sub(r"(?m)^\s*//.*$", "", text)))
    assert outside == {"https://arxiv.org/abs/2309.08045"}, "links only, and only to the paper"
    assert not re.search(r"<script[^>]+src=|@import|fetch\(|XMLHttpRequest|import\(", text)


@given(st.lists(st.integers(0, 15), max_size=100))
def test_a_code_is_undone(levels):
    assert decode(encode(levels), 100, 15)[: len(levels)] == levels


WRONG = {
    "in=12345678123": "at most 10 steps",
    "scene=ring&nu=2": "nu: expected 0 to 1",
    "scene=ring&nu=nan": "nu: expected 0 to 1",
    "delay=x": "delay: expected a number",
    "cut=50": "cut: expected 0 to 49",
}


@pytest.mark.parametrize("address", WRONG)
def test_a_wrong_address_is_named(address):
    with pytest.raises(ConfigError, match=re.escape(WRONG[address])):
        read_address(address)


def test_turning_shifts_what_is_recited():
    "Not one lucky sequence: over many, answer i of a network turned by r is number i - r."
    generator = torch.Generator().manual_seed(0)
    for r in (-3, -1, 2):
        right = []
        for _ in range(10):
            heard = torch.randint(1, 9, (10,), generator=generator)
            said = run(f"scene=copy&in={encode(heard.tolist())}&turn={r}").wave_says[-10:].argmax(-1)
            right.append((said[max(0, r) : 10 + min(0, r)] == heard[max(0, -r) : 10 - max(0, r)]).float().mean())
        assert torch.stack(right).mean() > 0.97


def test_the_command_finds_the_page(call):
    code, out, err = call("wrnn_show", "--print")
    assert code == 0 and out.strip() == str(PAGE) and err == ""
