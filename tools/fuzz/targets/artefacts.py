"""What the library writes for itself: drafts, sessions, feature maps, trees, measurements."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import records
from jaxinfer.cache.feature_maps import (
    LessConfig,
    LessFeatureMaps,
    load_feature_maps,
    rounded,
    save_feature_maps,
)
from jaxinfer.files import write_json
from jaxinfer.io.draft import BorrowingDraft, read_draft, save_draft
from jaxinfer.io.sparsity import load_sparsity, save_sparsity
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.models.params import init_params
from jaxinfer.models.recurrent import RecurrentConfig, init_cell
from jaxinfer.speculative import tuning
from jaxinfer.speculative.acceptance import Acceptance
from jaxinfer.speculative.topology import Topology
from pallas_kernels import tuned
from tests.sparsity.artefacts import artefact_of
from tools.fuzz.target import Target
from tools.fuzz.targets.models import ROOT, random_lm

KERNELS = ROOT / "pallas_kernels" / "tuned" / "nvidia-h200.json"


def make_recurrent_draft(folder: Path) -> None:
    """A cell over 20 tokens of the random model's."""
    target = random_lm()
    cfg = RecurrentConfig(
        hidden_size=target.config.hidden_size, intermediate_size=8, blocks=2, vocab_size=20
    )
    params = init_cell(cfg, jax.random.key(0))
    vocabulary = np.arange(0, 60, 3, dtype=np.int32)
    draft = BorrowingDraft(cfg, params, vocabulary, "llama", fingerprint(target.params))
    save_draft(folder, draft)


def make_model_draft(folder: Path) -> None:
    """The same with a layer of attention."""
    target = random_lm()
    cfg = replace(target.config, num_layers=1)
    params = init_params(cfg, jax.random.key(0))
    own = {"layers": params["layers"], "final_norm": params["final_norm"]}
    vocabulary = np.arange(0, 60, 3, dtype=np.int32)
    draft = BorrowingDraft(cfg, own, vocabulary, "llama", fingerprint(target.params))
    save_draft(folder, draft)


def parse_draft(folder: Path) -> None:
    target = random_lm()
    draft = read_draft(folder, target.params)
    assert draft.vocabulary.ndim == 1 and draft.vocabulary.size
    assert ((draft.vocabulary >= 0) & (draft.vocabulary < target.config.vocab_size)).all()
    if isinstance(draft.config, RecurrentConfig):
        assert draft.config.vocab_size == draft.vocabulary.size
    assert draft.config.hidden_size == target.config.hidden_size
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(draft.params))


def make_session(folder: Path) -> None:
    chat = random_lm().session("streaming")
    cache = replace(chat.cache, length=jnp.full_like(chat.cache.length, 3))
    chat.put_back(cache, [1, 2, 3], [4])
    chat.save(folder / "talk.safetensors")


def parse_session(folder: Path) -> None:
    chat = random_lm().restore(folder / "talk.safetensors", "streaming")
    assert chat.cache.length.tolist() == [len(chat.tokens)]
    assert all(0 <= t < 61 and type(t) is int for t in chat.tokens + chat.pending)


def make_feature_maps(folder: Path) -> None:
    cfg = random_lm().config
    config = LessConfig.of(cfg, "0" * 16, model="llama", hidden=4, rank=2)
    rng = np.random.default_rng(0)
    layers = tuple(
        {"feature_map": rounded({n: rng.normal(size=s) for n, s in config.shapes().items()})}
        for _ in range(cfg.num_layers)
    )
    save_feature_maps(folder, LessFeatureMaps(config, layers))


def parse_feature_maps(folder: Path) -> None:
    maps = load_feature_maps(folder)
    assert len(maps.layers) == maps.config.num_layers
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(maps.layers))


def make_sparsity(folder: Path) -> None:
    """Two layers of different forms: routers with a permutation and adapters, and of heads."""
    save_sparsity(folder, artefact_of("llama", ("adapters", "heads")))


def make_new_weights(folder: Path) -> None:
    save_sparsity(folder, artefact_of("learned", ("new weights", "router"), method="deja_vu"))


def parse_sparsity(folder: Path) -> None:
    found = load_sparsity(folder)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.layers))
    for layer in found.layers:
        if layer is not None and layer.permutation is not None:
            assert sorted(layer.permutation) == list(range(found.config.intermediate_size))
        if layer is not None and layer.router is not None:
            assert layer.router.units * found.config.block_size == found.config.intermediate_size
            assert (layer.router.rule.most or 1) <= layer.router.units
            assert layer.router.lookahead in (0.0, found.config.lookahead)


def make_tree(folder: Path) -> None:
    Topology.optimal([0.6, 0.2, 0.1], nodes=12, levels=5).save(folder / "tree.json")


def parse_tree(folder: Path) -> None:
    tree = Topology.load(folder / "tree.json")
    assert tree == Topology.from_json(tree.to_json())
    assert 1 <= tree.levels <= tree.nodes


def acceptance() -> Acceptance:
    return Acceptance(p=((0.6, 0.2), (0.5, 0.25)), temperature=0.5, pair=("a", "b"), samples=100)


def make_acceptance(folder: Path) -> None:
    acceptance().save(folder / "acceptance.json")


def parse_acceptance(folder: Path) -> None:
    found = Acceptance.load(folder / "acceptance.json")
    assert Acceptance.from_dict({**found.to_dict(), "pair": list(found.pair)}) == found
    assert Topology.optimal(found, nodes=8).nodes <= 8


def make_tuning(folder: Path) -> None:
    times = {n: 1.0 + n / 8 for n in (1, 2, 4, 8)}
    record = {"acceptance": acceptance().to_dict(), "verify_ms": times, "draft_ms": 0.2}
    write_json(folder / "tuning.json", record)


def parse_tuning(folder: Path) -> None:
    """A cache: what is damaged is measured again, so nothing is refused."""
    try:
        found = tuning._read(folder / "tuning.json")
    except ValueError as error:
        raise AssertionError(f"a damaged cache was refused: {error}") from error
    if found is not None:
        assert found.choice().topology.nodes >= 1


def make_kernels(folder: Path) -> None:
    (folder / "kernels.json").write_bytes(KERNELS.read_bytes())


def parse_kernels(folder: Path) -> None:
    tuned.read(folder / "kernels.json")


def make_records(folder: Path) -> None:
    line = records.Record(
        name="a", config={"b": 1}, metrics={"c": 2.0}, env={}, command="d", seed=0
    )
    records.append(line, folder)
    records.append(line, folder)


def parse_records(folder: Path) -> None:
    """Lines that make no sense are skipped."""
    records.latest(records.read_records(folder))


TARGETS = (
    Target("draft", make_recurrent_draft, parse_draft, names_file=True),
    Target("model-draft", make_model_draft, parse_draft, share=5, names_file=True),
    Target("session", make_session, parse_session, names_file=True),
    Target("less", make_feature_maps, parse_feature_maps, names_file=True),
    Target("sparsity", make_sparsity, parse_sparsity, names_file=True),
    Target("sparse-weights", make_new_weights, parse_sparsity, share=5, names_file=True),
    Target("tree", make_tree, parse_tree, names_file=True),
    Target("acceptance", make_acceptance, parse_acceptance, names_file=True),
    Target("tuning", make_tuning, parse_tuning),
    Target("kernels", make_kernels, parse_kernels, share=5, names_file=True),
    Target("records", make_records, parse_records, share=3),
)
