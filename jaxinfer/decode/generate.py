"""Generation with checked options; `jaxinfer.lm.LM` has the same with keywords and names."""

from collections.abc import Sequence

from jaxinfer.arguments import shown, whole
from jaxinfer.decode.capacity import LONGEST
from jaxinfer.decode.model import Model, Prompt, plain
from jaxinfer.decode.options import Options
from jaxinfer.decode.results import Completion
from jaxinfer.decode.run import Run
from jaxinfer.decode.stream import Stream
from jaxinfer.runtime import memory


def generate(model: Model, prompts: Sequence[Prompt], opts: Options) -> list[Completion]:
    """One completion per prompt and sample, samples of a prompt next to each other."""
    return Run(model, prompts, opts).finish() if prompts else []


def stream(model: Model, prompt: Prompt, opts: Options) -> Stream:
    """The continuation of one prompt; bad options are refused here, not at the first piece."""
    if opts.samples != 1:
        raise ValueError(f"a stream is one text, got samples={opts.samples}; use generate")
    return Stream(Run(model, [prompt], opts))


def warmup(model: Model, prompt_lengths: Sequence[int], batch: int, opts: Options) -> float:
    """Compiles what such generations need; returns the seconds that it took."""
    before = model.engine.compile_s
    lengths, batch = plain(prompt_lengths), whole("batch", batch, most=LONGEST)
    if not isinstance(lengths, list | tuple | range):
        raise ValueError(f"prompt_lengths must be a list of numbers, got {shown(prompt_lengths)}")
    for length in [whole("prompt_lengths", one, most=LONGEST) for one in lengths]:
        memory.check_available({"prompts": batch * (memory.ROW + length * memory.TOKEN)})
        generate(model, [[0] * length] * batch, opts)
    return model.engine.compile_s - before
