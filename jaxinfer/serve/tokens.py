"""`POST /tokenize` and `POST /detokenize`."""

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.serve.context import Context
from jaxinfer.serve.errors import ApiError, Json, refusing
from jaxinfer.serve.messages import chat_tokens
from jaxinfer.serve.schema import DetokenizeRequest, TokenizeRequest


async def tokenize(
    context: Context, request: Request, body: TokenizeRequest, owner: str
) -> Response:
    """The tokens of a text or a conversation, as a completion would read it."""
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    if body.tools is not None and body.messages is None:
        raise ApiError(400, "tools need messages", param="tools")
    tokens = await run_in_threadpool(_tokens, context, body)
    most = context.batcher.context
    return Json({"tokens": tokens, "count": len(tokens), "max_model_len": most})


def _tokens(context: Context, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        return chat_tokens(context, body.messages, body.tools)
    assert body.prompt is not None
    with refusing(param="prompt"):
        return list(context.vocabulary.tokenizer.encode(body.prompt, body.add_special_tokens))


async def detokenize(
    context: Context, request: Request, body: DetokenizeRequest, owner: str
) -> Response:
    """The text of tokens, special ones included."""
    size = context.vocabulary.size
    if body.tokens and max(body.tokens) >= size:
        what = f"token {max(body.tokens)} is beyond the vocabulary of {size}"
        raise ApiError(400, what, param="tokens")
    with refusing(param="tokens"):
        text = context.vocabulary.tokenizer.decode(body.tokens, skip_special=False)
    return Json({"prompt": text})
