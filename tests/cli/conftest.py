"""A tiny model with a tokenizer and a chat template, and the command run in this process."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest
import tokenizers

import jaxinfer as ji
from jaxinfer.cli import main, models, notices
from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.io.checkpoint import Checkpoint, save_checkpoint
from jaxinfer.io.tokenizer import Tokenizer
from jaxinfer.models.params import init_params

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def byte_tokenizer(chat_template: str | None) -> Tokenizer:
    """The 256 bytes, <s> and </s>."""
    vocab = {
        text: i for i, text in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer.from_backend(backend, special=special, chat_template=chat_template)


def save_model(folder: Path, tokenizer: Tokenizer | None, max_positions: int = 4096) -> Path:
    config = ModelConfig(
        family="llama",
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=max_positions,
        rope=RopeConfig(rotary_dim=8),
        bos_token_id=256,
        eos_token_ids=(257,),
    )
    params = init_params(config, jax.random.key(0))
    save_checkpoint(folder, Checkpoint(config, params, tokenizer))
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A model with a chat template."""
    return str(save_model(tmp_path_factory.mktemp("cli") / "tiny", byte_tokenizer(TEMPLATE)))


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory) -> str:
    """The same without a chat template."""
    return str(save_model(tmp_path_factory.mktemp("cli") / "plain", byte_tokenizer(None)))


@pytest.fixture(scope="session")
def bare_model(tmp_path_factory) -> str:
    """The same without a tokenizer."""
    return str(save_model(tmp_path_factory.mktemp("cli") / "bare", None))


@pytest.fixture(scope="session")
def lm(model) -> ji.LM:
    """What the library makes of `model`."""
    return ji.load(model)


@pytest.fixture(scope="session")
def short_model(tmp_path_factory) -> str:
    """A model of 64 positions, without a chat template."""
    folder = tmp_path_factory.mktemp("cli") / "short"
    return str(save_model(folder, byte_tokenizer(None), max_positions=64))


@pytest.fixture(autouse=True)
def warnings_of_checked_functions(monkeypatch):
    """The run-time checks put a frame of jaxtyping between a warning and the module it is for."""
    monkeypatch.setattr(notices, "OURS", "jaxinfer|jaxtyping")


loaded = functools.cache(models._load)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """Commands on the same model share its compiled programs."""
    monkeypatch.setattr(models, "_load", loaded)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys) -> Callable[..., Result]:
    """`run("generate", "text", ...)`."""

    def call(*arguments: str) -> Result:
        capsys.readouterr()
        code = main(arguments)
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def piped(monkeypatch):
    """Sets standard input."""
    import io
    import sys

    def set_input(text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return set_input
