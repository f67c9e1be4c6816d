"""The same Llama weights in transformers on torch: the reference that we did not write."""

import numpy as np


def torch_llama(lm):
    """`LlamaForCausalLM` with the parameters of `lm`, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from jaxinfer.models.registry import family_for

    cfg = lm.config
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.hidden_size,
            intermediate_size=cfg.intermediate_size,
            num_hidden_layers=cfg.num_layers,
            num_attention_heads=cfg.num_heads,
            num_key_value_heads=cfg.num_kv_heads,
            max_position_embeddings=cfg.max_positions,
            rms_norm_eps=cfg.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rope.theta},
            tie_word_embeddings=cfg.tie_embeddings,
            bos_token_id=cfg.bos_token_id,
            eos_token_id=list(cfg.eos_token_ids) or None,
        )
    ).eval()
    state = {}
    for path, source in family_for("llama").sources(cfg).items():
        value = lm.params
        for step in path:
            value = value[step]
        value = np.asarray(value, np.float32)
        state["model." + source.name.removeprefix("model.")] = torch.from_numpy(np.array(value))
    if "model.lm_head.weight" in state:
        state["lm_head.weight"] = state.pop("model.lm_head.weight")
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    return reference
