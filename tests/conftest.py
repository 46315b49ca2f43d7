"""What every test gets: no network, few threads, fixed seeds, a reason for whatever is skipped.

REMIX_TEST_MODELS  a folder of test models (stories260k); else ../shared/models, seen from the root
REMIX_TEST_DATA    a folder of test data sets;            else ../shared/data
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch: on a shared machine, threads that spin while idle slow small ops a hundredfold.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# HYPOTHESIS_PROFILE=thorough: thousands of random cases instead of a few.
settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=3000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

ROOT = Path(__file__).resolve().parents[1]

# One with pytest-xdist, whose workers share the cores.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# Without a GPU the Triton kernels run in the interpreter, which has to be known before triton is
# imported. Set here rather than in a fixture for that reason.
if not torch.cuda.is_available():
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_remix_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own settings decide nothing here."""
    for name in ("BACKEND", "STRICT", "GEMM", "AUTOTUNE", "CACHE_DIR"):
        monkeypatch.delenv(f"REMIX_{name}", raising=False)
    monkeypatch.setenv("REMIX_CALIBRATION", "shipped")


@pytest.fixture
def strict_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip where there is no Triton; a kernel that fails there raises."""
    pytest.importorskip("triton")
    monkeypatch.setenv("REMIX_STRICT", "1")


@pytest.fixture
def nan_in_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its relatives return, so that an output that nobody wrote fails.

    Patched rather than left to torch's deterministic mode, which would also change the algorithms
    under test.
    """
    places = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    places += [(torch.Tensor, name) for name in ("new_empty", "new_empty_strided")]
    for owner, name in places:
        monkeypatch.setattr(owner, name, _filled(getattr(owner, name)))


def _filled(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_and_fill(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
        elif tensor.dtype != torch.bool and not tensor.is_complex():
            tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return allocate_and_fill


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """The folder of a trained Llama with 260k parameters."""
    return _find("REMIX_TEST_MODELS", "models", "stories260k")


@pytest.fixture(scope="session")
def data_folder() -> Callable[[str], Path]:
    """From the name of a data set to its folder; skips the test where there is none."""
    return lambda name: _find("REMIX_TEST_DATA", "data", name)


def _find(variable: str, kind: str, name: str) -> Path:
    folder = Path(os.environ.get(variable) or ROOT.parent / "shared" / kind) / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not at {folder}: set {variable} to the folder that holds it")
    return folder
