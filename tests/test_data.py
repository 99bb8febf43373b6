"""Raw data: every damage is named, and a download survives what networks, servers and kill -9 do to it.

Small files of the published names and formats take the place of the real ones; a server on this machine has them, and misbehaves."""

import contextlib
import gzip
import http.server
import io
import os
import pickle
import random
import shutil
import signal
import tarfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets  # noqa: F401 - what a download loads late is in the nursery before it forks

from wave_rnns.paper import data
from wave_rnns.core import DataError, data_root, sha256
from wave_rnns.paper.data import ARCHIVE, FILES, FOLDERS, PARTS, fetch, have_data, load_raw

KILLS = int(os.environ.get("WAVE_RNNS_KILLS", 20))
NOBODY = "http://127.0.0.1:9/"  # a port where nobody answers
WHOLE = {name: len(parts) for name, parts in PARTS.items()}
ADDRESSES = ("WAVE_RNNS_MNIST_URL", "WAVE_RNNS_CIFAR10_URL")


def test_the_shipped_files_name_their_sources_and_licences():
    words = str(np.load(data.DIGITS_FILE)["about"]) + (data.SHIPPED / "README.md").read_text()
    shipped = {"README.md", "digits.npz", "seattle_weather.csv"}  # the digits can be made again: notebook 12_data
    assert {p.name for p in data.SHIPPED.iterdir()} == shipped and data.DIGITS_FILE.stat().st_size < 500_000
    for word in ("LeCun", "Cortes", "Burges", "CC BY-SA 3.0", "NOAA", "public domain", *shipped - {"README.md"}):
        assert word in words


# ------------------------------------------------------------------------------------- a small world, and its server


@dataclass
class Mirror:
    "A web server of this test's own. What it does wrong can be changed while it runs."

    files: dict[str, bytes]
    ranges: bool = True  # does it understand Range?
    most: int | None = None  # it hangs up after so many bytes of an answer
    pace: float = 0.0  # seconds before each 4 kB
    status: int = 200
    length: bool = True  # does it say how much will come?
    stalls: bool = False  # it accepts, and is silent
    spoils: bool = False  # the last bit is another
    asked: list = field(default_factory=list)  # (file, first byte)

    def reply(self, handler):
        name = handler.path.lstrip("/")
        content = self.files.get(name)
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1]) if self.ranges else 0
        self.asked.append((name, start))
        while self.stalls:
            time.sleep(0.01)
        if content is None or self.status != 200:
            return handler.send_error(404 if content is None else self.status)
        if self.spoils:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if start >= len(content) > 0:
            return handler.send_error(416)
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.length:
            handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        end = len(content) if self.most is None else min(len(content), start + self.most)
        for i in range(start, end, 4096):
            time.sleep(self.pace)
            handler.wfile.write(content[i : min(i + 4096, end)])


def idx(values: np.ndarray) -> bytes:
    "MNIST's raw format, of images [N, 28, 28] or labels [N]."
    return np.array([2051 if values.ndim == 3 else 2049, *values.shape], ">i4").tobytes() + values.tobytes()


@pytest.fixture
def small(tmp_path, monkeypatch):
    "Small files take the place of the published ones, known to the manifest; returns their `Mirror`."
    noise, archive = np.random.RandomState(7), io.BytesIO()
    images, labels = noise.randint(0, 256, (50, 28, 28), "u1"), np.arange(50, dtype="u1") % 10
    plain = {p: idx(images + k if "images" in p else labels + k) for k, p in enumerate(PARTS["mnist"])}
    batch = lambda: {"data": noise.randint(0, 256, (6, 3072), "u1"), "labels": list(range(6))}  # noqa: E731
    parts = {part: pickle.dumps(batch()) for part in PARTS["cifar10"]}
    # torchvision compares its own sums of the published batches
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    files = {part: gzip.compress(content, mtime=0) for part, content in plain.items()}
    with tarfile.open(fileobj=archive, mode="w:gz", compresslevel=1) as tar:
        for part, content in {**parts, "readme.html": b"hello"}.items():
            member = tarfile.TarInfo(f"{FOLDERS['cifar10']}/{part}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    files[ARCHIVE] = archive.getvalue()
    for name, content in {**files, **parts}.items():
        monkeypatch.setitem(FILES, name, (len(content), sha256(content)))
    mirror = Mirror(files)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(ConnectionError):  # the other side was killed
                mirror.reply(self)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("WAVE_RNNS_DATA", str(tmp_path / "root"))
    for variable in ADDRESSES:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{server.server_port}/")
    yield mirror
    mirror.stalls = False
    server.shutdown()
    server.server_close()


def nothing_half(done: bool = False) -> int:
    "Every file under a real name is whole; returns how many there are. When done, nothing else is there."
    found = [p for p in data_root().rglob("*") if p.is_file() and p.suffix != ".lock"]
    real = [p for p in found if p.name in FILES]
    for path in real:
        assert sha256(path) == FILES[path.name][1], f"{path} is not whole"
    assert not done or found == real
    return len(real)


def live(name: str, files: dict, environment: dict, slow_disk: float) -> int:
    "A process that fetches (see the fixture `nursery`)."
    FILES.update({file: tuple(facts) for file, facts in files.items()})
    os.environ.update(environment)
    real = os.fsync
    os.fsync = lambda fd: (real(fd), time.sleep(slow_disk))
    fetch(name)
    return 0


@pytest.fixture
def start(nursery, small):
    "A function that starts a process which fetches a data set of the small world."
    variables = {k: os.environ[k] for k in ("WAVE_RNNS_DATA", *ADDRESSES)}
    return lambda name, slow_disk=0.0: nursery("test_data:live", name, FILES, variables, slow_disk)


def test_what_is_read_is_what_lies_there(small):
    mnist, cifar = load_raw("mnist"), load_raw("cifar10")
    tensors = (v for split in ("train", "test") for v in mnist[split])
    for part, values in zip(PARTS["mnist"], tensors, strict=True):
        content = idx((values[:, 0] if "images" in part else values).numpy())
        assert gzip.compress(content, mtime=0) == small.files[part]
    (images, _), (_, labels) = cifar["train"], cifar["test"]
    assert images.dtype == labels.dtype == torch.uint8
    assert images.shape == (30, 3, 32, 32) and labels.tolist() == [0, 1, 2, 3, 4, 5]
    batch = pickle.loads((data_root() / FOLDERS["cifar10"] / "data_batch_2").read_bytes())
    assert np.array_equal(images[6:12].flatten(1), batch["data"])


DAMAGES = {
    "flipped bit": lambda content: bytes([content[0] ^ 4]) + content[1:],
    "truncated": lambda content: content[:-1],
    "empty": lambda content: b"",
    "junk behind": lambda content: content + b"x",
    "a pickle that leaves a mark": lambda content: b"cposix\nmkdir\n(S'OPENED'\ntR.",
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FOLDERS)
def test_damaged_files_are_named_with_both_sums_and_the_remedy(name, how, small, tmp_path, monkeypatch):
    "The last one first: the error is about the first that is damaged. Nothing is unpickled before it was compared."
    monkeypatch.chdir(tmp_path)
    assert load_raw(name)
    folder = data_root() / FOLDERS[name]
    for part in reversed(PARTS[name]):
        path = folder / part
        path.write_bytes(DAMAGES[how](path.read_bytes()))
        with pytest.raises(DataError) as caught:
            load_raw(name)
        found, message = "none, it is longer" if how == "junk behind" else sha256(path), str(caught.value)
        assert all(word in message for word in (str(path), FILES[path.name][1], found, "delete it"))
        assert "\n" not in message and path.exists()  # nothing is deleted behind the user's back
    for path in folder.iterdir():
        path.unlink()
    assert load_raw(name)  # the remedy works
    assert not Path("OPENED").exists()


def test_a_file_that_changes_after_it_was_compared_is_not_read(small, monkeypatch):
    "What torchvision opens is a private copy of the bytes that were compared."
    expected, read = load_raw("mnist"), data.read_images

    def swapped(name, root):
        for path in (data_root() / FOLDERS["mnist"]).iterdir():
            path.write_bytes(b"something else")
        return read(name, root)

    monkeypatch.setattr(data, "read_images", swapped)
    found = load_raw("mnist")
    assert all(torch.equal(a, b) for split in found for a, b in zip(found[split], expected[split], strict=True))


# -------------------------------------------------------------------------------------------- fetching


@pytest.mark.parametrize("name", FOLDERS)
def test_fetch_once_and_never_again(small, name):
    fetch(name)
    assert have_data(name) and nothing_half(done=True) == WHOLE[name]
    assert sorted(n for n, _ in small.asked) == sorted(PARTS["mnist"] if name == "mnist" else [ARCHIVE])
    small.asked.clear()
    fetch(name)
    assert small.asked == []
    if name == "mnist":  # and only what is missing
        (data_root() / FOLDERS["mnist"] / PARTS["mnist"][3]).unlink()
        fetch("mnist")
        assert small.asked == [(PARTS["mnist"][3], 0)] and have_data("mnist")


@pytest.mark.parametrize("name", FOLDERS)
def test_kill_9_in_the_middle_of_a_download(start, small, name, tally):
    chance, kills, completed = random.Random(name), 0, 1
    small.pace = 0.005
    while kills < KILLS // 2:
        asked = len(small.asked)
        life = start(name, slow_disk=0.02)
        while life.alive() and len(small.asked) == asked:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.12))
        life.send(signal.SIGKILL)
        code = life.end()
        assert nothing_half(done=code == 0) <= WHOLE[name]
        if code == 0:  # it was faster: begin anew
            completed += 1
            shutil.rmtree(data_root())
        kills += code != 0
    assert start(name).end() == 0
    assert nothing_half(done=True) == WHOLE[name]
    went_on = sum(begin > 0 for _, begin in small.asked)
    tally(f"kill -9 while {name} is fetched", kills=kills, requests_that_went_on=went_on, data_sets_completed=completed)


def test_one_is_killed_while_two_wait(start, small):
    "The lock of a killed process is free; one of the others goes on, the last finds everything there."
    small.pace = 0.1  # seconds before each 4 kB
    lives, part = [start("cifar10") for _ in range(3)], data_root() / f"{ARCHIVE}.part"
    while not (part.exists() and part.stat().st_size):
        time.sleep(0.001)
    assert [n for n, _ in small.asked] == [ARCHIVE]  # by one of them, whichever it is
    open_files = lambda pid: (p.resolve() for p in Path(f"/proc/{pid}/fd").iterdir())  # noqa: E731
    next(life for life in lives if part in open_files(life.pid)).send(signal.SIGKILL)
    small.pace = 0
    assert sorted(life.end() for life in lives) == [-signal.SIGKILL, 0, 0]
    assert nothing_half(done=True) == 6 and len(small.asked) == 2


def test_a_server_that_hangs_up(small):
    small.most = 30_000
    fetch("cifar10")
    assert nothing_half(done=True) == 6  # and not one byte came twice:
    assert [begin for _, begin in small.asked] == list(range(0, len(small.files[ARCHIVE]), 30_000))


PAGE = {ARCHIVE: b"<html>please log in</html>"}
MISBEHAVIOUR = {  # of the server, what is said of it, and how much of 5,000 bytes that were here is left
    "refuses": (dict(status=503), "HTTP Error 503", 5000),
    "sends elsewhere": (dict(status=301), "HTTP Error 301", 5000),
    "says nothing": (dict(stalls=True), "timed out", 5000),
    "hangs up and cannot go on": (dict(most=30_000, ranges=False), "ended after 30,000 .* next attempt goes on", 30_000),
    "shows a page": (dict(files=PAGE, ranges=False), "26 bytes are offered.*goes on from byte 5,000", 5000),
    "a page without end": (dict(files=PAGE, ranges=False, length=False), "an unknown number of bytes", 5000),
    "changes a bit": (dict(spoils=True), "what came has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}", 0),
}  # fmt: skip


@pytest.mark.parametrize("wrong, says, left", MISBEHAVIOUR.values(), ids=MISBEHAVIOUR)
def test_a_server_that_misbehaves_is_named_and_costs_nothing(small, monkeypatch, wrong, says, left):
    "A wrong beginning is of no use to anybody; everything else is kept, and the next attempt goes on from there."
    data_root().mkdir()
    part = data_root() / f"{ARCHIVE}.part"
    part.write_bytes(small.files[ARCHIVE][:5000])
    with monkeypatch.context() as patched:
        for name, value in wrong.items():
            patched.setattr(small, name, value)
        if small.stalls:
            patched.setattr(data, "PATIENCE", 0.2)
        with pytest.raises(DataError, match=says) as caught:
            load_raw("cifar10")
    assert all(word in str(caught.value) for word in ("WAVE_RNNS_CIFAR10_URL", os.environ["WAVE_RNNS_CIFAR10_URL"]))
    assert not have_data("cifar10")
    assert (part.stat().st_size if part.exists() else 0) == left
    fetch("cifar10")
    assert nothing_half(done=True) == 6 and small.asked[-1] == (ARCHIVE, left)


LEFT = {  # by an earlier attempt: its bytes, and the first byte of each request; a beginning: notebook 12_data
    "whole": (lambda whole: whole, []),
    "whole but wrong": (lambda whole: bytes(len(whole)), [0]),
    "too long": (lambda whole: whole + b"x", [0]),
    "nothing": (lambda whole: b"", [0]),
}


@pytest.mark.parametrize("left, begins", LEFT.values(), ids=LEFT)
def test_whatever_an_earlier_attempt_left(small, left, begins):
    data_root().mkdir()
    (data_root() / f"{ARCHIVE}.part").write_bytes(left(small.files[ARCHIVE]))
    fetch("cifar10")
    assert nothing_half(done=True) == 6 and [begin for _, begin in small.asked] == begins


def test_the_next_address_may_do_and_so_does_an_archive_of_ones_own(small, monkeypatch):
    monkeypatch.setenv("WAVE_RNNS_MNIST_URL", f"{NOBODY} {os.environ['WAVE_RNNS_MNIST_URL']}")
    fetch("mnist")
    assert nothing_half(done=True) == 4
    monkeypatch.setenv("WAVE_RNNS_CIFAR10_URL", NOBODY)
    (data_root() / ARCHIVE).write_bytes(bytes(99))
    with pytest.raises(DataError, match=f"{ARCHIVE}: expected sha256 .*delete it"):
        load_raw("cifar10")
    (data_root() / ARCHIVE).write_bytes(small.files[ARCHIVE])
    fetch("cifar10")
    assert nothing_half(done=True) == 4 + 7  # six batches, and the archive: it is the user's


WRONG = {NOBODY: "refused", "http://no-such-host.invalid/": "no-such-host", "not an address": "unknown url type"}


@pytest.mark.parametrize("name, address", [*(("mnist", address) for address in WRONG), ("cifar10", NOBODY)])
def test_no_network_and_no_address(name, address, tmp_path, monkeypatch):
    monkeypatch.setenv("WAVE_RNNS_DATA", str(tmp_path / "new"))
    monkeypatch.setenv(f"WAVE_RNNS_{name.upper()}_URL", address)
    assert not have_data(name)
    with pytest.raises(DataError, match=f"(?i){WRONG[address]}") as caught:
        load_raw(name)
    message, place = str(caught.value), str(tmp_path / "new" / FOLDERS[name])
    for word in (place, "could not be downloaded", "WAVE_RNNS_DATA", f"WAVE_RNNS_{name.upper()}_URL"):
        assert word in message
    assert "\n" not in message and not nothing_half(done=True)


def test_a_full_disk(small, small_disk, monkeypatch):
    monkeypatch.setenv("WAVE_RNNS_DATA", str(small_disk("64k")))
    with pytest.raises(DataError, match="No space left on device"):
        fetch("cifar10")
    assert not nothing_half()
    small_disk("1m")
    fetch("cifar10")
    assert nothing_half(done=True) == 6 and small.asked[-1][1] > 0


def test_no_home_directory(monkeypatch):
    "A container's user may have none: the error says what to set."
    monkeypatch.delenv("WAVE_RNNS_DATA", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987_654)
    for call in (data_root, lambda: have_data("mnist"), lambda: load_raw("cifar10"), lambda: fetch("mnist")):
        with pytest.raises(DataError, match="no home directory .*set WAVE_RNNS_DATA"):
            call()
    assert len(data.load_digits()) == 3  # which need no data folder
