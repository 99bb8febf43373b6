"Text to machine code: the sections of the CUDA files, the compiler, its cache on disk, and what happens where there is no place for one."

import contextlib
import ctypes
import errno
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from compiler import needs_compiler
from conftest import ROOT

from wave_rnns.kernels import launch

FILES = sorted(p.name for p in (ROOT / "wave_rnns/kernels").glob("*.cu*"))
TINY = 'extern "C" __global__ void k(float *a) { a[0] = N; }'
ELF = b"\x7fELF"

# ------------------------------------------------------------------------------------------------- sections


def shown():
    "What the notebooks show: (file, section) of each call of show_section, and the output stored under it."
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                calls = re.findall(r'^show_section\("([\w.]+)", "(\w+)"\)$', "".join(cell["source"]), re.M)
                for call in calls:
                    assert len(calls) == 1, "one section a cell"
                    yield call, ["".join(out["data"]["text/markdown"]) for out in cell["outputs"]]


def test_every_section_is_shown_once_and_as_it_is():
    seen = list(shown())
    sections = [(file, name) for file in FILES for name in launch.cuda_sections(file)]
    assert FILES == ["common.cuh", "dense.cu", "wave.cu"] and len(sections) > 30
    assert Counter(call for call, _ in seen) == Counter(sections)
    for call, outputs in seen:
        assert outputs == [launch.show_section(*call).data], f"{call}: run the notebook again and commit it"


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_its_sections(file):
    text = (ROOT / "wave_rnns/kernels" / file).read_text()
    head = text[: text.index("// --- section:")]
    assert all(line.startswith("//") for line in head.splitlines() if line), "code before the first section"
    marks = re.findall(r"^// --- section: (\w+)$", text, re.M)
    assert marks == list(launch.cuda_sections(file)), "two sections of one name"
    assert max(map(len, text.splitlines())) <= 95
    assert text.count("// --- section") == len(marks)


# ------------------------------------------------------------------------------------------------- compiler and cache


def test_no_helper_is_written_twice():
    named = re.compile(r"^(?:template <[^>]*> ?)?DEVICE [\w ]+?\*?(\w+)\(", re.M)
    common = set(named.findall(launch.cuda_source("common.cuh")))
    assert {"mma", "act", "smem", "copy_async", "pack"} <= common
    for file in FILES[1:]:
        assert not common & set(named.findall(launch.cuda_source(file)))


@needs_compiler
def test_the_cache_is_hit(tmp_path, monkeypatch, capfd):
    "A damaged file is not run: notebook 04_kernels_launch."
    monkeypatch.setenv("WAVE_RNNS_DATA", str(tmp_path))
    code = launch.compile_kernel(TINY, {"N": 3}, "sm_90", "tiny")
    assert "compiling tiny for sm_90 (N=3), once; cached in" in capfd.readouterr().err
    assert launch.compile_kernel(TINY, {"N": 3}, "sm_90", "tiny") == code
    assert capfd.readouterr().err == ""
    assert launch.compile_kernel(TINY, {"N": 4}, "sm_90", "tiny") != code


@needs_compiler
@pytest.mark.parametrize("full", [True, False])
def test_a_full_disk_or_no_folder_costs_the_cache_only(tmp_path, monkeypatch, full):
    monkeypatch.setenv("WAVE_RNNS_DATA", str(tmp_path))
    if full:
        monkeypatch.setattr(launch, "atomic_write", Mock(side_effect=OSError(errno.ENOSPC, "no space left")))
    else:
        (tmp_path / "kernels").write_text("a file where the folder should be")
    assert launch.compile_kernel(TINY, {"N": 3}, "sm_90")[:4] == ELF
    assert not list(tmp_path.rglob("*.cubin"))


@needs_compiler
def test_no_home_directory_no_cache(monkeypatch, capfd):
    "As in a container whose user has no entry: expanding ~ raises RuntimeError."

    def homeless(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("WAVE_RNNS_DATA", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.setattr(Path, "home", classmethod(homeless))
    assert launch.compile_kernel(TINY, {"N": 3}, "sm_90")[:4] == ELF
    assert "not cached: set WAVE_RNNS_DATA" in capfd.readouterr().err


@needs_compiler
def test_architecture_choice():
    assert launch.architecture_for((8, 0)) == "sm_80"
    assert launch.architecture_for((9, 0)) == "sm_90"
    assert launch.architecture_for((8, 9)).startswith("sm_8")
    assert launch.architecture_for((99, 0)).startswith("compute_")  # a chip newer than the compiler: PTX
    with pytest.raises(launch.KernelError, match=r"2\.0"):
        launch.architecture_for((2, 0))


def test_import_touches_neither_cuda_nor_the_compiler():
    code = "import torch, wave_rnns.kernels.dense, wave_rnns.kernels.wave, wave_rnns.kernels.launch as L"
    code += "; assert not torch.cuda.is_initialized() and not L.bindings.cache_info().currsize"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_arguments_are_words_of_64_bits(monkeypatch):
    "What the driver gets: tensors by address, None as null, a list as one struct; dimensions filled up to three."
    seen = []

    class Driver:
        "Takes what cuda.bindings.driver takes and keeps it."

        def cuCtxSetCurrent(self, context):
            return (0,)

        def cuLaunchKernel(self, f, *rest):
            *dims, shared, stream, pointers, extra = rest
            structs = (ctypes.c_void_p * 2).from_address(pointers)
            struct = list((ctypes.c_int64 * 4).from_address(structs[0]))
            seen.extend((dims, shared, struct, ctypes.c_int64.from_address(structs[1]).value))
            return (0,)

    module = object.__new__(launch.Module)
    module.device, module.name, module.context, module._functions = torch.device("cuda", 0), "m", None, {"k": [1, 64]}
    monkeypatch.setattr(launch, "bindings", lambda module: Driver())
    monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    stream = type("Stream", (), {"cuda_stream": 0})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    x = torch.ones(2)
    module.launch("k", (5,), (32, 2), 64, [x, None, -7, 2**40], 3)
    assert seen == [[5, 1, 1, 32, 2, 1], 64, [x.data_ptr(), 0, -7, 2**40], 3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: tests/gpu launches in earnest")
def test_cuda_bindings_takes_these_arguments():
    "Without a GPU as far as the driver's absence: a wrong number or type of arguments is noticed before."
    words = (ctypes.c_void_p * 1)()
    for name, args in {
        "cuDevicePrimaryCtxRetain": (0,),
        "cuCtxSetCurrent": (None,),
        "cuModuleLoadData": (b"code",),
        "cuModuleGetFunction": (None, b"k"),
        "cuLaunchKernel": (None, 1, 1, 1, 32, 1, 1, 0, 0, ctypes.addressof(words), 0),
    }.items():
        with pytest.raises(launch.KernelError, match="NVIDIA driver library"):
            launch.call("driver", name, *args)
