"What the whole suite shares: one thread (two cores are busy enough), the checkout, a copy of it to work on, npm's packages."

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported anywhere

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WEB = ROOT / "nbs/_web"
SKIP = {
    ".git",
    ".venv",
    "_docs",
    "_proc",
    "node_modules",
    "__pycache__",
    "build",
    "dist",
    ".pytest_cache",
    ".ruff_cache",
    "demo_out",
}


@pytest.fixture(scope="session")
def checkout() -> Path:
    "The project's root."
    return ROOT


@pytest.fixture
def copied(tmp_path) -> Path:
    "A copy of the checkout that a test may change."
    target = tmp_path / "copy"
    shutil.copytree(ROOT, target, ignore=lambda _, names: SKIP & set(names), symlinks=True)
    return target


def run_python(*args: str, cwd: Path, timeout: int = 300) -> str:
    "Run this Python with the copy's own package in front; returns what it printed, fails with it."
    env = {**os.environ, "PYTHONPATH": str(cwd), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{' '.join(args)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def npm_packages() -> Path:
    "node_modules with KaTeX, fonts and the browser's driver; installed on first use, skipped where that cannot be."
    modules = WEB / "node_modules"
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("Node and npm are not installed: apt-get install nodejs npm")
    lock, stamp = WEB / "package-lock.json", modules / ".package-lock.json"
    if not stamp.exists() or stamp.stat().st_mtime < lock.stat().st_mtime:
        done = subprocess.run(
            ["npm", "ci", "--no-audit", "--no-fund", "--loglevel=error"], cwd=WEB, capture_output=True, text=True
        )
        if done.returncode and os.environ.get("CI"):
            pytest.fail(f"npm ci failed: {done.stderr[-1000:]}")
        if done.returncode:
            pytest.skip(f"npm ci failed (no network?): {done.stderr.strip().splitlines()[-1]}")
        stamp.touch()
    return modules


@pytest.fixture(scope="session")
def chromium() -> str:
    "Path of a Chromium; in CI its absence is a failure, elsewhere a reason to skip."
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "chrome"]
    found = next((p for n in names if n and (p := shutil.which(n))), None)
    if found is None and os.environ.get("CI"):
        pytest.fail("Chromium is missing; .ci/run installs it")
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium, or name one in $CHROMIUM")
    return found


@pytest.fixture(scope="session")
def site(npm_packages, tmp_path_factory) -> Path:
    "The documentation site, built once from this checkout."
    out = tmp_path_factory.mktemp("docs") / "site"
    print(run_python(str(WEB / "build.py"), str(out), cwd=ROOT, timeout=600))
    return out
