"""Decode with a draft model in front of the target, and check that the tokens stay the same.

python docs/examples/speculate.py
"""

import jaxinfer as ji

PROMPTS = ["The history of", "And the king said unto"]


def main() -> None:
    lm = ji.load("tiny-llama")
    # The k-th entry is how often the draft's k-th guess is accepted; the tree maximizes the
    # expected number of tokens per step.
    tree = ji.Topology.optimal([0.55, 0.15, 0.08], nodes=8)
    fast = ji.speculate(lm, ji.load("tiny-draft"), tree)
    print(f"tree: {tree}")

    plain = lm.generate(PROMPTS, max_new_tokens=48)
    drafted = fast.generate(PROMPTS, max_new_tokens=48)
    for one, other in zip(plain, drafted, strict=True):
        same = "same tokens" if one.tokens == other.tokens else "different tokens"
        print(f"{same}, {other.stats.tokens_per_step:.2f} tokens per step:{other.text!r}")


if __name__ == "__main__":
    main()
