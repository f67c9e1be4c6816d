"""Generate the same continuation through several cache policies and compare what they cost.

python docs/examples/compare_policies.py
"""

import jaxinfer as ji

POLICIES = {
    "full": ji.full(),
    "kivi, 4 bits": ji.kivi(bits=4, group=16, residual=32),
    "kivi, 2 bits": ji.kivi(bits=2, group=16, residual=32),
    "streaming": ji.streaming(sinks=4, window=60),
    "h2o": ji.h2o(heavy=32, recent=32),
}
TEXT = (
    "The king went up to the city with all his people, and they made a great feast in the house of "
    "his father. In the morning the people of the city came to him and asked him for bread, and he "
    "gave them bread and wine. "
) * 3


def main() -> None:
    lm = ji.load("tiny-llama")
    print(f"{'policy':<14}{'cache, KB':>10}{'perplexity':>12}")
    for name, policy in POLICIES.items():
        score = lm.score(TEXT, policy=policy)[0]
        print(f"{name:<14}{score.cache_bytes / 1e3:>10.1f}{score.perplexity:>12.2f}")


if __name__ == "__main__":
    main()
