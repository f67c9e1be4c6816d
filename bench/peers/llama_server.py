"""llama.cpp's server through the wheel `xllamacpp`, until end of input or SIGTERM.

python -m bench.peers.llama_server FILE.gguf PORT SLOTS CONTEXT THREADS
"""

import signal
import sys

import xllamacpp


def main(gguf: str, port: int, slots: int, context: int, threads: int) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.hostnames, params.port = ["127.0.0.1"], port
    params.n_parallel, params.n_ctx = slots, slots * context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup = True
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
