"""Stream a text far beyond the model's trained context in constant memory.

python docs/examples/long_stream.py
"""

import itertools

import jaxinfer as ji

PIECES = 150


def main() -> None:
    lm = ji.load("tiny-llama")
    policy = ji.streaming(sinks=4, window=124)
    sampler = ji.Sampler(temperature=0.8, top_p=0.95)
    stream = lm.stream(
        "The history of", policy=policy, sampler=sampler, max_new_tokens=None, ignore_eos=True
    )
    # Without a limit the stream goes on until it is closed.
    for piece in itertools.islice(stream, PIECES):
        print(piece, end="", flush=True)
    stream.close()
    stats = stream.completion.stats
    print(f"\n\n{stats.new_tokens} tokens through a cache of {stats.cache_bytes} bytes")


if __name__ == "__main__":
    main()
