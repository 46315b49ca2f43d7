"""A desk for every page: an empty folder, and a tiny model that answers to the real ones' names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from remix_model.credit import CREDITS
from remix_model.routers import ROUTERS
from tests.conftest import ROOT
from tests.remix_cli.helpers import make_model

# Names of models on the hub that pages use.
HUB = ("HuggingFaceTB/SmolLM2-135M",)
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model, in a cache where `smollm2-135m` is looked for."""
    folder = make_model(tmp_path_factory.mktemp("cache") / "smollm2-135m", positions=256)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def desk(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder while a page runs. Only `examples` of the project is seen from there."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REMIX_CACHE", str(tiny_model.parent))
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        _answer_to_hub_names(kind, tiny_model, monkeypatch)
    _cut_answers(monkeypatch)
    threads, credits = torch.get_num_threads(), dict(CREDITS)
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    CREDITS.clear()
    CREDITS.update(credits)  # a page adds one


def _answer_to_hub_names(kind: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = kind.from_pretrained

    def load_tiny(name: str, *args: Any, **kwargs: Any) -> Any:
        return load(folder if name in HUB else name, *args, **kwargs)

    monkeypatch.setattr(kind, "from_pretrained", load_tiny)


def _cut_answers(monkeypatch: pytest.MonkeyPatch, tokens: int = 4) -> None:
    """A random model never ends an answer by itself."""
    generate = transformers.GenerationMixin.generate

    def generate_few(self: Any, *args: Any, max_new_tokens: int, **kwargs: Any) -> Any:
        return generate(self, *args, max_new_tokens=min(max_new_tokens, tokens), **kwargs)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate_few)


@pytest.fixture(autouse=True)
def routers_of_pages_are_forgotten() -> Iterator[None]:
    """A registered class would keep all of its page's names alive."""
    before = dict(ROUTERS)
    yield
    ROUTERS.clear()
    ROUTERS.update(before)
