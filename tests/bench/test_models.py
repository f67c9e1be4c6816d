"""The peers' weights: what is exported for torch is the same model."""

import json

import numpy as np
import pytest

from bench.models import TINY, export_llama, llama_config, load_model, prompts
from bench.routines.decode import agreement


def test_exported_weights_give_the_same_logits_in_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    lm = load_model(TINY)
    export_llama(lm, tmp_path)
    tokens = prompts(0, 2, 7, lm.config.vocab_size)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    ours = np.asarray(lm.logits(tokens))
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_exported_config_reads_back_as_ours():
    from jaxinfer.models.registry import config_from_hf

    config = load_model(TINY).config
    found = config_from_hf(json.loads(json.dumps(llama_config(config)))).to_dict()
    ignored = ("bos_token_id", "eos_token_ids")
    expected = {k: v for k, v in config.to_dict().items() if k not in ignored}
    assert {k: v for k, v in found.items() if k not in ignored} == expected


def test_models_that_are_not_plain_llamas_are_refused():
    from dataclasses import replace

    config = replace(load_model(TINY).config, family="falcon")
    with pytest.raises(ValueError, match="plain Llama models, got family 'falcon'"):
        llama_config(config)


def test_prompts_depend_on_the_seed_only():
    assert prompts(1, 2, 5, 100) == prompts(1, 2, 5, 100) != prompts(2, 2, 5, 100)


def test_agreement_counts_tokens_before_the_first_difference():
    assert agreement([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.5
