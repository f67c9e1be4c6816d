"""Decoding with sparse blocks against the same model's dense decoding, step for step.

With `--sparsity` the method is measured at its own density, and where it takes one at the preset's;
without, random routers choose the preset's shares of blocks of 32 neurons, so that time is measured
but no quality. `opt-random` is an OPT of width 1024 with 8 layers and random weights. Dense and
sparse take turns in one process, and a ratio is dense time over sparse time in the same round:
above 1 sparse is faster. Where a step would read so many blocks that dense is faster, the method
reads all of them, so that a ratio near 1 is expected of large batches. A tree is a chain of so many
nodes that prompt lookup proposes to one text: a step of so many tokens, whatever is accepted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from bench.harness import Measure, interleave, ratio
from bench.models import load_model, prompts
from bench.options import Options

KEYS = "ms_per_step", "tokens_per_s"


def run(
    options: Options, trees: bool | None = None, only: Sequence[int] | None = None
) -> list[tuple[dict, dict]]:
    """Batches, then trees; with `trees` one of the two, with `only` those of so many tokens."""
    import jax

    sizes = options.settings("sparsity")
    lm = load_model(options.model, options.weights)
    forms = {label: lm.sparsified(one) for label, one in methods(options, lm, sizes).items()}
    agree = {label: same_tokens(form, options.seed, sizes) for label, form in forms.items()}
    found = []
    steps = [(batch, None) for batch in sizes["batches"]] + [(1, tree) for tree in sizes["trees"]]
    for (batch, tree), rounds in zip(steps, sizes["rounds"], strict=True):
        if trees is not None and trees is (tree is None):
            continue
        if only is not None and (tree or batch) not in only:
            continue
        given = prompts(options.seed, batch, sizes["prompt"], lm.config.vocab_size)
        measures: dict[str, Measure] = {
            label: partial(generate, decoder(form, tree), given, sizes["new"])
            for label, form in {"dense": lm, **forms}.items()
        }
        where = f"batch {batch}" if tree is None else f"tree of {tree}"
        samples = interleave(measures, rounds, lambda text, at=where: options.say(f"{at}, {text}"))
        metrics: dict[str, Any] = {name: one.summary(*KEYS) for name, one in samples.items()}
        metrics["ratios"] = {
            label: ratio(samples["dense"], samples[label], "ms_per_step") for label in forms
        }
        metrics |= {"same_tokens_as_masked": agree, "lists": listing(forms, batch * (tree or 1))}
        metrics |= {"device": jax.devices()[0].device_kind, "missing": {}}
        config = {"batch": batch, "tree": tree, "rounds": rounds, "sparsity": options.sparsity}
        config |= {key: sizes[key] for key in ("prompt", "new", "densities", "block_size")}
        found.append((options.config(config | {"weights": options.weights}), metrics))
    return found


def methods(options: Options, lm: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What is measured, by label."""
    if options.sparsity is None:
        from bench.random_routers import RandomRouters

        return {
            f"density {x:g}": RandomRouters(density=x, block_size=sizes["block_size"])
            for x in sizes["densities"]
        }
    from jaxinfer.eval.sparsity_methods import methods_at
    from jaxinfer.names import sparsity_of

    own = sparsity_of(options.sparsity, lm.name)
    assert own is not None
    found = methods_at([options.sparsity], sizes["densities"], model=lm.name)
    if len(found) == 1:  # it has no density to choose
        return {own.name: own}
    labels = [f"density {x:g}" for x in sizes["densities"]]
    return {own.name: own} | dict(zip(labels, (method for _, method in found), strict=True))


def decoder(lm: Any, tree: int | None) -> Any:
    """What generates: the model, or it behind trees of so many nodes."""
    if tree is None:
        return lm
    from jaxinfer.speculative.speculate import speculate
    from jaxinfer.speculative.topology import Topology

    return speculate(lm, "prompt-lookup", Topology.chain(tree))


def generate(decoder: Any, given: list[list[int]], new: int) -> dict[str, float]:
    """The time of a greedy generation's steps, without the prompt."""
    stats = decoder.generate(given, max_new_tokens=new, ignore_eos=True)[0].stats
    seconds, steps = stats.decode_s, sum(stats.step_tokens) or new
    return {"ms_per_step": 1e3 * seconds / steps, "tokens_per_s": len(given) * new / seconds}


def same_tokens(form: Any, seed: int, sizes: Mapping[str, Any]) -> bool:
    """Whether 64 greedy tokens are those of the same selection computed with every neuron."""
    prompt = prompts(seed, 1, sizes["prompt"], form.config.vocab_size)
    layers = tuple(layer | {"mlp": masked(layer["mlp"])} for layer in form.params["layers"])
    whole = replace(form, params=form.params | {"layers": layers})
    options = {"max_new_tokens": 64, "ignore_eos": True}
    one, other = (lm.generate(prompt, **options)[0].tokens for lm in (form, whole))
    return one == other


def masked(block: Any) -> Any:
    """The block as it is computed where all neurons are read; a dense one as it is."""
    return replace(block, unions=(1.0,)) if hasattr(block, "unions") else block


def listing(forms: Mapping[str, Any], rows: int) -> dict[str, int]:
    """The layers of each form that read listed blocks in a step of so many rows."""
    return {
        label: sum(
            block.lists(rows, form.engine.backend)
            for layer in form.params["layers"]
            if hasattr(block := layer["mlp"], "lists")
        )
        for label, form in forms.items()
    }
