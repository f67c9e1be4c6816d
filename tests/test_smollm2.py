"""The real default model against transformers on torch, and its published figures."""

import math

import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.io.model_index import ModelUnavailable
from tests.raw_texts import raw_text
from tests.torch_reference import torch_llama

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at",
    "The most important idea in computer science is",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "1, 2, 3, 4,",
    "In the beginning God created",
]


@pytest.fixture(scope="module")
def lm():
    try:
        return ji.load("smollm2-135m")
    except ModelUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def reference(lm):
    return torch_llama(lm)


@pytest.fixture(scope="module")
def greedy(lm):
    """The plain greedy continuations of all prompts, one batch for every test that needs one."""
    return lm.generate(PROMPTS, max_new_tokens=64, ignore_eos=True)


def test_logits_equal_transformers_in_full(lm, reference):
    import torch

    tokens = np.array([lm.encode("Rome was not built in a day, and neither was Paris. " * 3)])
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)).logits.numpy()
    difference = np.abs(np.asarray(lm.logits(tokens)) - expected).max()
    assert difference < 1e-4 * np.abs(expected).max()


def test_greedy_text_is_token_identical_to_transformers_on_eight_prompts(lm, greedy, reference):
    import torch

    for prompt, completion in zip(PROMPTS, greedy, strict=True):
        tokens = lm.encode(prompt)
        with torch.no_grad():
            # One forward over our text gives every greedy choice of the reference at once.
            whole = torch.tensor([tokens + completion.tokens])
            logits = reference(whole).logits[0, len(tokens) - 1 : -1].numpy()
        for step, (row, token) in enumerate(zip(logits, completion.tokens, strict=True)):
            if row.argmax() == token:
                continue
            gap = row.max() - row[token]
            print(f"tie at step {step} of {prompt!r}: gap {gap}")
            assert gap < 1e-4 * np.abs(row).max()


def test_the_trained_draft_gives_the_same_text_in_fewer_steps(lm, greedy):
    draft = ji.load_draft(lm, "draft-smollm2-135m")
    assert isinstance(draft, ji.RecurrentDraft)
    tree = ji.Topology.optimal([0.35, 0.1, 0.06, 0.04], nodes=8, levels=3)
    options = {"max_new_tokens": 64, "ignore_eos": True}
    (guessed,) = ji.speculate(lm, draft, tree).generate([PROMPTS[5]], **options)
    assert guessed.tokens == greedy[5].tokens
    assert guessed.stats.tokens_per_step > 1.3


def test_weights_of_8_bits_cost_little_perplexity(lm):
    small = ji.load("smollm2-135m", weights="int8")
    text = raw_text("ca01")[:1500]
    exact, found = (one.score([text])[0].nll for one in (lm, small))
    assert abs(found - exact) < 0.04


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "length", "expected"),
    [
        ("ca01", 2048, 38.47),
        ("secA1", 2048, 16.84),
        ("secA1", 1024, 18.61),
        ("worked", 2048, 22.02),
        ("genesis", 2048, 4.71),
        ("controlflow", 2048, 7.85),
        ("argparse", 2048, 7.55),
        ("gpl", 1024, 19.28),
    ],
)
def test_perplexity_is_the_recorded_one(lm, name, length, expected):
    # recorded once, outside this library: float32, without BOS
    tokens = lm.encode(raw_text(name))[:length]
    perplexity = lm.score(tokens)[0].perplexity
    print(f"{name}, {len(tokens)} tokens: {perplexity:.3f}, recorded {expected}")
    assert math.isclose(perplexity, expected, rel_tol=0.005)
