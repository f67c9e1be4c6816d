"""Shows that the tests see faults: puts one at a time into a copy of the sources and runs them.

    python tools/mutate.py [--only TEXT]

Every mutation is a small wrong change that once passed the whole suite, with the tests that now
fail on it. They must pass without it. Exits with 1 if a mutation survives; compiled programs are
shared with the test suite, so that most of a first run is compilation.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("jaxinfer", "pallas_kernels", "tests", "tools", "bench", "pyproject.toml")
FAILED = 1  # pytest's code when tests ran and some failed; others mean that they did not run


@dataclass(frozen=True)
class Mutation:
    """`old` stands once in `file` and becomes `new`; `tests` are pytest's names of tests."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "the same noise in every plain step",
        "jaxinfer/decode/state.py",
        "return jax.vmap(jax.random.fold_in)(requests.keys, state.written)",
        "return jax.vmap(jax.random.fold_in)(requests.keys, jnp.zeros_like(state.written))",
        ("tests/decode/test_generate.py::test_draws_of_steps_rows_and_samples_are_independent",),
    ),
    Mutation(
        "LESS maps of the next layer",
        "jaxinfer/decode/engine.py",
        'zip(params["layers"], policy.feature_maps.layers, strict=True)',
        'zip(params["layers"], policy.feature_maps.layers[1:] + policy.feature_maps.layers[:1])',
        ("tests/cache/test_less_preset.py::test_every_layer_gets_its_own_feature_maps",),
    ),
    Mutation(
        "padded queries that add to the weights of stored keys",
        "jaxinfer/cache/weights.py",
        "attn_weight = jnp.where(valid[:, None, :, None], attn_weight, 0.0)",
        "attn_weight = jnp.where(valid[:, None, :, None] | True, attn_weight, 0.0)",
        ("tests/cache/test_heavy.py::test_padded_queries_give_stored_keys_nothing",),
    ),
    Mutation(
        "ties that keep the new token",
        "jaxinfer/cache/heavy.py",
        "enters = items.attn_weight > jnp",
        "enters = items.attn_weight >= jnp",
        ("tests/cache/test_heavy.py::test_of_equal_weights_the_stored_token_stays",),
    ),
    Mutation(
        "an int4 head of 4 bits",
        "jaxinfer/models/quantize.py",
        "bits = 8 if is_head else FORMATS[weights]",
        "bits = FORMATS[weights]",
        ("tests/models/test_quantize_params.py::test_the_head_has_8_bits_in_every_format",),
    ),
    Mutation(
        "YaRN without the limits of its channels",
        "jaxinfer/nn/rope.py",
        "low, high = max(low, 0), min(high, rope.rotary_dim - 1)",
        "low, high = max(low, 0), high",
        ("tests/nn/test_rope.py",),
    ),
    Mutation(
        "a template whose output is not counted",
        "jaxinfer/io/template_worker.py",
        "total += len(piece)",
        "total += 1",
        ("tests/io/test_hostile_templates.py::test_a_separator_counts_in_the_text",),
    ),
    Mutation(
        "held-out texts that are training texts too",
        "jaxinfer/eval/documents.py",
        'read_source(source, "heldout", folder)',
        "read_source(source, None, folder)",
        ("tests/test_texts.py::test_evaluation_leaves_out_documents_that_repeat_training_text",),
    ),
    Mutation(
        "the reversed divergence of a draft",
        "jaxinfer/train/draft/losses.py",
        "(p * (wanted - given))",
        "(q * (given - wanted))",
        ("tests/train/test_draft_losses.py",),
    ),
    Mutation(
        "a recurrent draft trained one position too early",
        "jaxinfer/train/draft/losses.py",
        "behind = jnp.take_along_axis(hidden, place[..., None], axis=1)",
        "behind = jnp.take_along_axis(hidden, place[..., None] - 1, axis=1)",
        ("tests/train/test_draft_losses.py",),
    ),
    Mutation(
        "a drafter that keeps the state of the root",
        "jaxinfer/speculative/recurrent.py",
        "end = jnp.maximum(count - 1, 0)[:, None]",
        "end = jnp.zeros_like(count)[:, None]",
        (
            "tests/speculative/test_recurrent.py::"
            "test_a_step_leaves_the_state_of_the_last_node_that_it_kept",
        ),
    ),
    Mutation(
        "the horizon of the first layer only",
        "jaxinfer/speculative/step.py",
        "for policy in dict.fromkeys(cache.policies)]",
        "for policy in cache.policies[:1]]",
        (
            "tests/speculative/test_speculate.py::"
            "test_layers_that_flush_apart_stop_a_step_at_the_nearest_flush",
        ),
    ),
    Mutation(
        "prompt lookup that counts matches with gaps",
        "jaxinfer/speculative/lookup.py",
        "going = going & (earlier == wanted) & (place >= back) & (end[:, None] >= back)\n"
        "            same = same + going",
        "same = same + (going & (earlier == wanted) & (place >= back) & (end[:, None] >= back))",
        ("tests/speculative/test_lookup.py",),
    ),
    Mutation(
        "an interval of 90 %",
        "jaxinfer/eval/perplexity.py",
        "level: float = 0.95,",
        "level: float = 0.9,",
        (
            "tests/eval/test_perplexity.py::"
            "test_an_interval_is_the_percentile_bootstrap_of_scipy_at_95_percent",
        ),
    ),
    Mutation(
        "what LESS recovers, counted from a wider policy",
        "jaxinfer/train/less/layer.py",
        '"recovered": float(1 - (less / bare).mean())',
        '"recovered": float(1 - (less / plus).mean())',
        (
            "tests/train/test_less_training.py::"
            "test_what_is_recovered_is_counted_from_the_policy_alone",
        ),
    ),
    Mutation(
        "the window of acceptance one token late",
        "jaxinfer/speculative/acceptance_rates.py",
        "[:, len(row) - 1 : len(row) - 1 + len(one.tokens)]",
        "[:, len(row) : len(row) + len(one.tokens)]",
        (
            "tests/speculative/test_expected_tokens.py::"
            "test_acceptance_counts_the_new_tokens_from_the_first_to_the_last",
        ),
    ),
)


def passes(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """pytest's exit code on the copy, and the last line of its output."""
    command = [sys.executable, "-m", "pytest", "-n0", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    return done.returncode, lines[-1]


def is_caught(folder: Path, mutation: Mutation) -> bool:
    """Whether the tests fail with the mutation in the copy, which is as it was afterwards."""
    path = folder / mutation.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutation.old) != 1:
        raise typer.BadParameter(f"{mutation.file} does not have {mutation.old!r} once")
    path.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        code, last = passes(folder, mutation.tests)
    finally:
        path.write_text(source, encoding="utf-8")
    if code not in (0, FAILED):
        raise RuntimeError(f"the tests of {mutation.what!r} did not run: {last}")
    return code == FAILED


def main(
    only: Annotated[str, typer.Option(help="Only mutations whose name contains this.")] = "",
) -> None:
    """Runs the tests of every mutation, first without and then with it."""
    chosen = [mutation for mutation in MUTATIONS if only in mutation.what]
    if not chosen:
        raise typer.BadParameter(f"no mutation is called {only!r}")
    with tempfile.TemporaryDirectory(prefix="jaxinfer-mutations-") as work:
        folder = Path(work)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, folder / name)
        (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
        code, last = passes(folder, tuple(dict.fromkeys(t for m in chosen for t in m.tests)))
        if code:
            raise RuntimeError(f"the tests fail without a mutation: {last}")
        caught = 0
        for mutation in chosen:
            start = time.monotonic()
            found = is_caught(folder, mutation)
            caught += found
            seconds = time.monotonic() - start
            typer.echo(f"{'caught  ' if found else 'SURVIVES'} {mutation.what} ({seconds:.0f} s)")
    typer.echo(f"{caught} of {len(chosen)} caught")
    raise typer.Exit(caught < len(chosen))


if __name__ == "__main__":
    typer.run(main)
