"""Raw data: every damage is named, and a download survives what networks, servers and kill -9 do to it.

Where a test needs no real pictures, the published files are small random ones, and a server on this machine misbehaves."""

import gzip
import hashlib
import http.server
import io
import json
import os
import random
import signal
import subprocess
import tarfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets  # noqa: F401 - what a download loads late is in the nursery before it forks

from wave_rnns.paper import tasks
from wave_rnns.core import ConfigError, DataError, data_root
from wave_rnns.paper.tasks import (
    ARCHIVE,
    CIFAR_PARTS,
    FOLDERS,
    MANIFEST,
    MNIST_PARTS,
    SIZES,
    fetch,
    gunzip,
    have_data,
    load_raw,
    make_task,
    unpack_cifar10,
)

KILLS = int(os.environ.get("WAVE_RNNS_KILLS", 20))
NOBODY = "http://127.0.0.1:9/"  # a port where nobody answers
NAMES = {"mnist": [f"{part}.gz" for part in MNIST_PARTS], "cifar10": [ARCHIVE]}
mnist = pytest.mark.skipif(not have_data("mnist"), reason="MNIST is not in the data folder (WAVE_RNNS_DATA)")
cifar = pytest.mark.skipif(not have_data("cifar10"), reason="CIFAR-10 is not in the data folder (WAVE_RNNS_DATA)")


def digest(data) -> str:
    return hashlib.sha256(data).hexdigest()


# -------------------------------------------------------------------------------------------------- the real data


@cifar
def test_cifar_read_without_pickle_is_the_published_data():
    "The sums were taken once from the arrays that torchvision unpickles."
    raw = [digest(x.numpy().tobytes()) for x in load_raw("cifar10")]
    assert raw == [
        "9d5c2eddadb0deff02c14c350c0385aab7b1d5ff1edfeb4997c8dc8644960111",
        "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
        "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56",
        "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
    ]


@mnist
def test_mnist_is_the_published_data():
    raw = load_raw("mnist")
    for part, tensor in zip(MNIST_PARTS, raw, strict=True):
        header = [2051, len(tensor), 28, 28] if "images" in part else [2049, len(tensor)]
        assert digest(np.array(header, ">i4").tobytes() + tensor.numpy().tobytes()) == MANIFEST[part]


def linked_copy(name, folder):
    "The raw files of a data set under `folder`, as links: cheap, and a test may replace one of them."
    source, target = data_root() / FOLDERS[name], folder / FOLDERS[name]
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.name in MANIFEST:
            (target / path.name).symlink_to(path.resolve())
    return target


def damage(path, how):
    data = bytearray(path.read_bytes())
    path.unlink()
    if how == "flipped bit":
        data[len(data) // 2] ^= 1
    path.write_bytes({"truncated": data[:-1], "empty": b"", "junk behind": data + b"x"}.get(how, data))


@pytest.mark.parametrize("how", ["flipped bit", "truncated", "empty", "junk behind"])
@pytest.mark.parametrize(
    ("name", "part"),
    [pytest.param("mnist", "t10k-images-idx3-ubyte", marks=mnist), pytest.param("cifar10", "test_batch", marks=cifar)],
)
def test_damaged_files_are_named_with_both_sums_and_the_remedy(name, part, how, tmp_path, monkeypatch):
    folder = linked_copy(name, tmp_path)
    path = next(folder.glob(f"{part}*"))
    damage(path, how)
    monkeypatch.setenv("WAVE_RNNS_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        make_task({"mnist": "smnist", "cifar10": "nscifar10"}[name]).to("cpu")
    message, found = str(caught.value), digest(path.read_bytes())
    assert str(path) in message and MANIFEST[path.name] in message and found in message and "delete it" in message
    assert "\n" not in message and path.exists()  # nothing is deleted behind the user's back


@pytest.mark.parametrize(
    "name", [pytest.param("mnist", marks=mnist), pytest.param("cifar10", marks=cifar)], ids=["mnist", "cifar10"]
)
def test_a_flipped_bit_anywhere_in_any_file(name, tmp_path, monkeypatch, tally):
    "One bit in a copy of the real files, at a place that chance chooses; the remedy that the message names works."
    chance, folder, flips = random.Random(name), linked_copy(name, tmp_path), 0
    for path in sorted(folder.iterdir()):
        data, original = bytearray(path.read_bytes()), path.resolve()
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.unlink()
        path.write_bytes(data)
        with pytest.raises(DataError) as caught:
            tasks.read_checked(path)
        assert all(word in str(caught.value) for word in (str(path), MANIFEST[path.name], digest(data), "delete it"))
        path.unlink()
        path.symlink_to(original)
        tasks.read_checked(path)
        flips += 1
    tally("one bit flipped in real data", **{f"{name}_files_all_named_with_both_sums": flips})
    assert flips == {"mnist": 4, "cifar10": 6}[name] or name == "mnist"  # MNIST may lie there unpacked too


@mnist
def test_an_unpacked_copy_is_read_and_checked_too(tmp_path, monkeypatch):
    folder = linked_copy("mnist", tmp_path)
    expected = load_raw("mnist").test_labels
    packed = folder / "t10k-labels-idx1-ubyte.gz"
    plain = packed.with_suffix("")
    if not plain.exists():
        plain.write_bytes(gzip.decompress(packed.read_bytes()))
    monkeypatch.setenv("WAVE_RNNS_DATA", str(tmp_path))
    assert torch.equal(load_raw("mnist", download=False).test_labels, expected)
    packed.unlink(missing_ok=True)
    assert torch.equal(load_raw("mnist", download=False).test_labels, expected)
    damage(plain, "flipped bit")
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte: expected sha256"):
        load_raw("mnist")


def test_a_file_of_four_gigabytes_is_not_read(tmp_path):
    with (tmp_path / "test_batch").open("wb") as file:
        file.truncate(2**32)  # a hole: it needs no disk
    start = time.perf_counter()
    with pytest.raises(DataError, match="test_batch: expected sha256 .*more than 67,108,864 bytes"):
        tasks.read_checked(tmp_path / "test_batch")
    assert time.perf_counter() - start < 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = tmp_path / "test_batch"
    path.write_bytes(b"")
    path.chmod(0)
    with pytest.raises(DataError, match="cannot read .*test_batch"):
        tasks.read_checked(path)


def test_files_that_vanish_are_named(tmp_path):
    for read in (tasks.read_mnist, tasks.read_cifar10):
        with pytest.raises(DataError, match="cannot read .*: No such file"):
            read(tmp_path)


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
    asked: list = field(default_factory=list)  # (file, first byte)
    sent: int = 0  # bytes of files
    address: str = ""

    def reply(self, handler):
        name = handler.path.lstrip("/")
        data = self.files.get(name)
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1]) if self.ranges else 0
        self.asked.append((name, start))
        while self.stalls:
            time.sleep(0.01)
        if data is None or self.status != 200:
            return handler.send_error(404 if data is None else self.status)
        if start >= len(data) > 0:
            return handler.send_error(416)
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if self.length:
            handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        end = len(data) if self.most is None else min(len(data), start + self.most)
        for i in range(start, end, 4096):
            time.sleep(self.pace)
            handler.wfile.write(data[i : min(i + 4096, end)])
            self.sent += min(i + 4096, end) - i


@pytest.fixture
def small(tmp_path, monkeypatch):
    "Small random files take the place of the published ones; returns their `Mirror`."
    noise, folder = random.Random(7), FOLDERS["cifar10"]
    parts = {part: noise.randbytes(20_000 + 100 * k) for k, part in enumerate(CIFAR_PARTS)}
    files = {name: noise.randbytes(40_000 + 100 * k) for k, name in enumerate(NAMES["mnist"])}
    files[ARCHIVE] = archive_of({f"{folder}/{part}": data for part, data in parts.items()})
    for name, data in {**files, **parts}.items():
        monkeypatch.setitem(MANIFEST, name, digest(data))
    for name, data in files.items():
        monkeypatch.setitem(SIZES, name, len(data))
    mirror = Mirror(files)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            try:
                mirror.reply(self)
            except ConnectionError:
                pass  # the other side was killed

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    mirror.address = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setenv("WAVE_RNNS_DATA", str(tmp_path / "root"))
    for variable in tasks.ADDRESSES.values():
        monkeypatch.setenv(variable, mirror.address)
    yield mirror
    mirror.stalls = False
    server.shutdown()
    server.server_close()


def archive_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def lying_there() -> dict[str, int]:
    "File -> size in the data folder, locks aside."
    paths = [p for p in data_root().rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {str(p.relative_to(data_root())): p.stat().st_size for p in paths}


def nothing_half(done: bool = False) -> int:
    "Every file under a real name is whole; returns how many there are. When done, nothing else is there."
    real = {n: s for n, s in lying_there().items() if Path(n).name in MANIFEST}
    for name in real:
        assert digest((data_root() / name).read_bytes()) == MANIFEST[Path(name).name], f"{name} is not whole"
    if done:
        assert lying_there() == real
    return len(real)


def live(name: str, manifest: dict, sizes: dict, environment: dict, slow_disk: float = 0.0) -> int:
    "A process that fetches (see the fixture `nursery`)."
    MANIFEST.update(manifest)
    SIZES.update(sizes)
    os.environ.update(environment)
    real = os.fsync
    os.fsync = lambda fd: (real(fd), time.sleep(slow_disk))
    try:
        fetch(name)
    except DataError as error:
        Path(environment["WAVE_RNNS_DATA"], "error.lock").write_text(str(error))
        return 1
    return 0


@pytest.fixture
def start(nursery, small):
    "A function that starts a process which fetches a data set of the small world."
    variables = {k: os.environ[k] for k in ("WAVE_RNNS_DATA", *tasks.ADDRESSES.values())}
    plain = json.loads(json.dumps([MANIFEST, SIZES]))
    return lambda name, slow_disk=0.0: nursery("test_data:live", name, *plain, variables, slow_disk)


# -------------------------------------------------------------------------------------------- fetching, when all is well


@pytest.mark.parametrize("name", FOLDERS)
def test_fetch_once_and_never_again(small, name):
    fetch(name)
    assert have_data(name) and nothing_half(done=True) == {"mnist": 4, "cifar10": 6}[name]
    assert sorted(n for n, _ in small.asked) == sorted(NAMES[name])
    small.asked.clear()
    fetch(name)
    assert small.asked == []


@mnist
def test_the_published_sizes_and_sums_are_right_for_mnist(tmp_path, monkeypatch):
    "The real files come over a real connection, and are what they should be."
    folder = data_root() / FOLDERS["mnist"]
    if not all((folder / name).is_file() for name in NAMES["mnist"]):
        pytest.skip("the data folder has MNIST only unpacked")
    monkeypatch.setenv("WAVE_RNNS_MNIST_URL", folder.resolve().as_uri())
    monkeypatch.setenv("WAVE_RNNS_DATA", str(tmp_path))
    assert len(load_raw("mnist").train_labels) == 60_000 and nothing_half(done=True) == 4


def test_only_what_is_missing_is_fetched(small):
    fetch("mnist")
    (data_root() / FOLDERS["mnist"] / NAMES["mnist"][3]).unlink()
    small.asked.clear()
    fetch("mnist")
    assert small.asked == [(NAMES["mnist"][3], 0)] and have_data("mnist")


def test_addresses(monkeypatch):
    monkeypatch.delenv("WAVE_RNNS_CIFAR10_URL", raising=False)
    published = tasks.addresses("cifar10", ARCHIVE)
    assert len(published) > 1 and all(a.startswith("https://") and a.endswith(f"/{ARCHIVE}") for a in published)
    monkeypatch.setenv("WAVE_RNNS_CIFAR10_URL", f"http://a/folder  http://b/{ARCHIVE} http://c/x/")
    assert tasks.addresses("cifar10", ARCHIVE) == [f"http://{x}/{ARCHIVE}" for x in ("a/folder", "b", "c/x")]
    monkeypatch.setenv("WAVE_RNNS_MNIST_URL", "http://a")
    assert tasks.addresses("mnist", "x.gz") == ["http://a/x.gz"]


def test_progress_is_shown_from_where_it_goes_on(small, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **told):
            bars.append(told | {"moved": 0})

        __enter__, __exit__ = lambda self: self, lambda self, *_: None

        def update(self, n):
            bars[-1]["moved"] += n

    monkeypatch.setattr(tasks, "progress", Bar)
    left_there(small, 30_000)
    fetch("cifar10")
    size = len(small.files[ARCHIVE])
    (bar,) = bars
    assert (bar["total"], bar["initial"], bar["moved"], bar["desc"]) == (size, 30_000, size - 30_000, ARCHIVE)


# ---------------------------------------------------------------------------------------------------- when it is not


def left_there(small, n: int, data: bytes | None = None) -> Path:
    "What an earlier attempt left of the archive."
    data_root().mkdir(exist_ok=True)
    part = data_root() / f"{ARCHIVE}.part"
    part.write_bytes((small.files[ARCHIVE] if data is None else data)[:n])
    return part


@pytest.mark.parametrize("name", FOLDERS)
def test_kill_9_in_the_middle_of_a_download(start, small, name, tally):
    chance, kills, first, began = random.Random(name), 0, 0, []
    small.pace, wanted = 0.005, KILLS - KILLS // 2 if name == "mnist" else KILLS // 2
    while kills < wanted:
        asked = len(small.asked)
        life = start(name, slow_disk=0.02)
        while life.alive() and len(small.asked) == asked:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.12))
        life.send(signal.SIGKILL)
        code = life.end()
        began += [begin for _, begin in small.asked[asked:]]
        nothing_half()
        if code == 0:  # it was faster: begin anew
            first += 1
            assert nothing_half(done=True)
            for path in sorted(data_root().rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            continue
        kills += 1
    assert start(name).end() == 0
    assert nothing_half(done=True) == {"mnist": 4, "cifar10": 6}[name]
    tally(
        f"kill -9 while {name} is fetched",
        kills=kills,
        requests_that_went_on=sum(b > 0 for b in began),
        half_files_taken_for_whole_ones=0,
        data_sets_completed=first + 1,
    )
    assert sum(b > 0 for b in began) >= wanted // 3


def test_one_is_killed_while_two_wait(start, small):
    "The lock of a killed process is free; one of the others goes on, the last finds everything there."
    small.pace = 0.003
    lives = [start("cifar10") for _ in range(3)]
    part = data_root() / f"{ARCHIVE}.part"
    while not (part.exists() and part.stat().st_size):
        time.sleep(0.001)
    time.sleep(0.03)
    assert [n for n, _ in small.asked] == [ARCHIVE]  # by one of them, whichever it is
    holder = next(life for life in lives if str(part) in open_files(life.pid))
    holder.send(signal.SIGKILL)
    assert sorted(life.end() for life in lives) == [-signal.SIGKILL, 0, 0]
    assert nothing_half(done=True) == 6 and len(small.asked) == 2 and small.asked[1][1] > 0


def open_files(pid):
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(fd))
        except FileNotFoundError:
            pass  # closed in the meantime
    return found


@pytest.mark.parametrize("name", FOLDERS)
def test_programs_that_start_at_once_download_once(start, small, name):
    small.pace = 0.001
    lives = [start(name) for _ in range(3)]
    assert [life.end() for life in lives] == [0, 0, 0]
    assert sorted(small.asked) == sorted((n, 0) for n in NAMES[name]) and nothing_half(done=True)


def test_a_server_that_hangs_up(small):
    small.most = 30_000
    fetch("cifar10")
    assert nothing_half(done=True) == 6 and small.sent == len(small.files[ARCHIVE])  # not one byte came twice
    assert [begin for _, begin in small.asked] == list(range(0, len(small.files[ARCHIVE]), 30_000))


def test_a_server_that_hangs_up_and_cannot_go_on(small):
    small.most, small.ranges = 30_000, False
    with pytest.raises(DataError, match="the connection ended after 30,000 of") as caught:
        fetch("cifar10")
    assert "30,000 of" in str(caught.value) and "the next attempt goes on from there" in str(caught.value)
    assert len(small.asked) == 2 and not have_data("cifar10")  # it does not go round in circles
    small.most = None
    fetch("cifar10")
    assert nothing_half(done=True) == 6


@pytest.mark.parametrize("length", [True, False], ids=["says its length", "does not say its length"])
@pytest.mark.parametrize("name", FOLDERS)
def test_an_error_page_with_status_200(small, name, length):
    page = b"<html>please log in</html>"
    whole, small.files, small.length = small.files, dict.fromkeys(small.files, page), length
    with pytest.raises(DataError, match=f"{'26' if length else 'an unknown number of'} bytes are offered") as caught:
        load_raw(name)
    assert tasks.ADDRESSES[name] in str(caught.value) and small.address in str(caught.value)
    assert not have_data(name) and not nothing_half()
    small.files, small.length = whole, True
    fetch(name)
    assert nothing_half(done=True)


def test_an_error_page_does_not_cost_what_is_here(small):
    part = left_there(small, 50_000)
    whole, small.files, small.ranges = small.files, {ARCHIVE: b"<html>please log in</html>"}, False
    with pytest.raises(DataError, match="50,000 of .* bytes are here, the next attempt goes on from there"):
        fetch("cifar10")
    assert part.stat().st_size == 50_000
    small.files, small.ranges = whole, True
    fetch("cifar10")
    assert small.asked[-1] == (ARCHIVE, 50_000)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_wrong_file_of_the_right_size(small, name):
    whole, small.files = small.files, {n: bytes(len(data)) for n, data in small.files.items()}
    with pytest.raises(DataError, match="what came has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        fetch(name)
    assert lying_there() == {}  # a wrong beginning is of no use to anybody
    small.files = whole
    fetch(name)
    assert nothing_half(done=True)


@pytest.mark.parametrize("left", ["right", "wrong", "whole", "whole but wrong", "too long", "nothing"])
def test_whatever_an_earlier_attempt_left(small, left):
    data = small.files[ARCHIVE]
    choices = {"right": data[:9000], "wrong": bytes(9000), "whole": data, "nothing": b""}
    choices |= {"whole but wrong": bytes(len(data)), "too long": data + b"x"}
    left_there(small, 10**9, choices[left])
    fetch("cifar10")
    assert nothing_half(done=True) == 6
    begins = {"right": [9000], "wrong": [9000, 0], "whole": []}.get(left, [0])
    assert [begin for _, begin in small.asked] == begins


@pytest.mark.parametrize("left", [0, 50_000])
def test_a_server_that_would_send_for_ever(small, left):
    "Who does not say where the end is gets nothing written."
    left_there(small, left)
    small.files[ARCHIVE] = bytes(10**8)
    small.length = small.ranges = False
    with pytest.raises(DataError, match="an unknown number of bytes are offered, 122303 expected"):
        fetch("cifar10")
    assert lying_there() == {f"{ARCHIVE}.part": left} and small.sent < 10**7


def test_the_next_address_may_do(small, monkeypatch):
    monkeypatch.setenv("WAVE_RNNS_MNIST_URL", f"{NOBODY} {small.address}empty {small.address}")
    fetch("mnist")
    assert nothing_half(done=True) == 4


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (NOBODY, "refused"),
        ("http://no-such-host.invalid/", "no-such-host.invalid"),
        ("not an address", "unknown url type"),
        ("http://[/", "Invalid"),
        ("http://127.0.0.1:notaport/", "nonnumeric port"),
        ("gopher://old/", "unknown url type"),
        ("file:///no/such/folder", "No such file"),
    ],
)
@pytest.mark.parametrize("name", FOLDERS)
def test_no_network_and_no_address(name, address, reason, tmp_path, monkeypatch):
    monkeypatch.setenv("WAVE_RNNS_DATA", str(tmp_path / "new"))
    monkeypatch.setenv(f"WAVE_RNNS_{name.upper()}_URL", address)
    assert not have_data(name)
    with pytest.raises(DataError, match="call fetch"):
        load_raw(name, download=False)
    with pytest.raises(DataError, match=f"(?i){reason}") as caught:
        load_raw(name)
    message = str(caught.value)
    for word in (str(tmp_path / "new" / FOLDERS[name]), "could not be downloaded", "WAVE_RNNS_DATA"):
        assert word in message
    assert f"WAVE_RNNS_{name.upper()}_URL" in message and "\n" not in message
    assert lying_there() == {}


@pytest.mark.parametrize("status", [301, 403, 429, 500, 503])
def test_a_server_that_refuses(small, status):
    part = left_there(small, 5000)
    small.status = status
    with pytest.raises(DataError, match=f"HTTP Error {status}"):
        fetch("cifar10")
    assert part.stat().st_size == 5000 and not have_data("cifar10")


def test_a_server_that_says_nothing(small, monkeypatch):
    monkeypatch.setattr(tasks, "PATIENCE", 0.2)
    small.stalls, begin = True, time.perf_counter()
    with pytest.raises(DataError, match="timed out"):
        fetch("cifar10")
    assert time.perf_counter() - begin < 5


def test_a_full_disk(small, monkeypatch, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    monkeypatch.setenv("WAVE_RNNS_DATA", str(disk))
    try:
        with pytest.raises(DataError, match="No space left on device"):
            fetch("cifar10")
        assert not nothing_half()
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        fetch("cifar10")
        assert nothing_half(done=True) == 6 and small.asked[-1][1] > 0
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_data_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("WAVE_RNNS_DATA", str(tmp_path / "file"))
    with pytest.raises(DataError, match="could not be downloaded"):
        load_raw("mnist")


def test_a_folder_in_the_place_of_the_part(small):
    (data_root() / f"{ARCHIVE}.part").mkdir(parents=True)
    with pytest.raises(DataError, match="Is a directory"):
        fetch("cifar10")


@pytest.mark.parametrize("name", ["data", "MNIST", "", "../mnist"])
def test_unknown_data_set(name):
    for call in (have_data, fetch, load_raw):
        with pytest.raises(ConfigError, match="data set: expected one of 'mnist', 'cifar10'"):
            call(name)


# ----------------------------------------------------------------------------------------------------------- archives


@cifar
def test_an_archive_of_ones_own_is_taken(tmp_path, monkeypatch):
    archive = tmp_path / "root" / ARCHIVE
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz", compresslevel=0) as tar:
        for part in CIFAR_PARTS:
            tar.add(data_root() / FOLDERS["cifar10"] / part, f"{FOLDERS['cifar10']}/{part}")
    expected = load_raw("cifar10").test_labels
    monkeypatch.setenv("WAVE_RNNS_DATA", str(tmp_path / "root"))
    monkeypatch.setenv("WAVE_RNNS_CIFAR10_URL", NOBODY)  # an archive that is already there needs no network
    assert torch.equal(load_raw("cifar10").test_labels, expected)
    assert archive.exists()  # it is the user's


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is no tar archive"),
        (b"\x1f\x8b\x08\x00garbage", "is damaged"),
        (random.Random(0).randbytes(5000), "is damaged"),
        (gzip.compress(random.Random(0).randbytes(5000)), "is no tar archive"),
        (gzip.compress(bytes(5000)), "holds no cifar-10-batches-py/data_batch_1"),
    ],
    ids=["empty", "torn gzip", "random bytes", "random bytes in a gzip", "zeros in a gzip"],
)
def test_broken_archives_are_named(content, reason, tmp_path, monkeypatch):
    (tmp_path / ARCHIVE).write_bytes(content)
    monkeypatch.setenv("WAVE_RNNS_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"{ARCHIVE} {reason}.*delete it") as caught:
        load_raw("cifar10")
    assert "\n" not in str(caught.value) and (tmp_path / ARCHIVE).read_bytes() == content


def evil(small, tmp_path) -> dict[str, bytes]:
    "Archives that would do harm to who unpacks them."
    folder, parts = FOLDERS["cifar10"], {}
    with tarfile.open(fileobj=io.BytesIO(small.files[ARCHIVE])) as tar:
        parts = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    outside = tmp_path / "outside"

    def with_member(first, **changes):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            member = tarfile.TarInfo(first)
            for key, value in changes.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(b"evil") if member.size else None)
        return buffer.getvalue()

    many = archive_of({f"{i}": b"" for i in range(3000)} | parts)
    link = dict(type=tarfile.SYMTYPE, linkname=str(outside))
    return {
        "leaves the folder": archive_of({"../outside": b"evil", f"{folder}/../../outside": b"evil"} | parts),
        "absolute": archive_of({str(outside): b"evil"} | parts),
        "a link out": with_member(f"{folder}/data_batch_1", **link),
        "a hard link out": with_member(f"{folder}/data_batch_1", type=tarfile.LNKTYPE, linkname=str(outside)),
        "a folder that is a link": with_member(folder, **link),
        "a device": with_member(f"{folder}/data_batch_1", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        "a size that lies": with_member(f"{folder}/data_batch_1", size=4)[:-20],
        "another content": archive_of(parts | {f"{folder}/data_batch_1": b"evil"}),
        "too many members": many,
    }


def test_archives_that_would_do_harm(small, tmp_path, tally):
    kinds = evil(small, tmp_path)
    for kind, data in kinds.items():
        target = tmp_path / kind
        (target / FOLDERS["cifar10"]).mkdir(parents=True)
        (target / ARCHIVE).write_bytes(data)
        try:
            unpack_cifar10(target / ARCHIVE, target / FOLDERS["cifar10"])
            assert kind in ("leaves the folder", "absolute")  # the six were in it as well, and nothing else was taken
        except DataError as error:
            assert ARCHIVE in str(error)
        found = {str(p.relative_to(target)) for p in target.rglob("*") if not p.is_dir()}
        assert found <= {ARCHIVE, *(f"{FOLDERS['cifar10']}/{part}" for part in CIFAR_PARTS)}
        assert not (tmp_path / "outside").exists() and not [p for p in target.rglob("*") if p.is_symlink()]
    tally("archives that would do harm", kinds=len(kinds), files_outside=0)


def test_a_gigabyte_of_zeros_is_not_unpacked(tmp_path):
    "A megabyte on disk that swells to a gigabyte: refused for what MNIST may have, and for what the archive may have."
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(2**24))
    assert path.stat().st_size < 2**23
    for most in (2**16, tasks.LARGEST):
        with path.open("rb") as file, pytest.raises(DataError, match="bomb.gz unpacks to more than"):
            gunzip(path, file, most)
    begin = time.perf_counter()
    with pytest.raises(DataError, match="unpacks to more than 268,435,456 bytes"):
        unpack_cifar10(path, tmp_path)
    assert time.perf_counter() - begin < 30
