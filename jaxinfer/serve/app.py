"""The routes of the server, and what surrounds every request."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxinfer.decode.batcher import Batcher
from jaxinfer.serve import schema, tokens
from jaxinfer.serve.chat import chat
from jaxinfer.serve.completions import complete
from jaxinfer.serve.config import ServeConfig
from jaxinfer.serve.context import Context
from jaxinfer.serve.errors import ApiError, Json
from jaxinfer.serve.generation import ClientGone
from jaxinfer.serve.limits import read_object
from jaxinfer.serve.metrics import CONTENT_TYPE
from jaxinfer.serve.openapi import document
from jaxinfer.serve.response_schema import ResponseRequest
from jaxinfer.serve.responses import Responses
from jaxinfer.serve.validate import validated
from jaxinfer.serve.watch import Watch

Post = Callable[[Context, Request, Any, str], Awaitable[Response]]
"""A handler: of a request with its validated body, and of whose key it is."""

KEPT = "/v1/responses/{identifier}"

GONE = 499
"""The status of a client that went away, as nginx writes it."""


def make(batcher: Batcher, config: ServeConfig) -> Starlette:
    """The application."""
    context, responses = Context(batcher, config), Responses(config.stored)
    posts: dict[str, tuple[type[schema.Body], Post]] = {
        "/v1/completions": (schema.CompletionRequest, complete),
        "/v1/chat/completions": (schema.ChatRequest, chat),
        "/v1/responses": (ResponseRequest, responses.create),
        "/tokenize": (schema.TokenizeRequest, tokens.tokenize),
        "/detokenize": (schema.DetokenizeRequest, tokens.detokenize),
    }
    gets = {
        "/v1/models": _models,
        "/v1/models/{name:path}": _model,
        "/health": _health,
        "/ready": _ready,
        "/metrics": _metrics,
        "/openapi.json": _openapi,
    }
    cors = Middleware(
        CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["Authorization", "Content-Type"],
    )  # fmt: skip
    app = Starlette(
        routes=[
            *(Route(path, _post(kind, handler), methods=["POST"])
              for path, (kind, handler) in posts.items()),
            *(Route(path, handler) for path, handler in gets.items()),
            Route(KEPT, responses.retrieve),
            Route(KEPT, responses.delete, methods=["DELETE"]),
            Route(f"{KEPT}/cancel", responses.cancel, methods=["POST"]),
        ],
        middleware=[Middleware(Watch, context=context), *([cors] if config.cors_origins else [])],
        exception_handlers={
            ApiError: _refused, HTTPException: _http_error, ClientGone: _gone, Exception: _fault,
        },
        lifespan=_lifespan,
    )  # fmt: skip
    app.state.context = context
    return app


def _post(kind: type[schema.Body], handler: Post) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint of a handler: who asks, and what."""

    async def endpoint(request: Request) -> Response:
        context: Context = request.app.state.context
        owner = context.keys.owner(request)
        config = context.config
        given = await read_object(request, config.body_bytes, config.body_s)
        body = validated(kind, given)
        context.check_model(getattr(body, "model", None))
        return await handler(context, request, body, owner)

    return endpoint


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    """Compiles in the background, and waits for that at the end."""
    context: Context = app.state.context
    task = asyncio.ensure_future(_warm_up(context))
    yield
    await task


async def _warm_up(context: Context) -> None:
    if context.config.warmup:
        seconds = await run_in_threadpool(context.batcher.warmup)
        context.log.event(f"ready after {seconds:.1f} seconds of compilation")
    context.warm = True


async def _models(request: Request) -> Response:
    context: Context = request.app.state.context
    context.keys.owner(request)
    return Json({"object": "list", "data": [_described(context)]})


async def _model(request: Request) -> Response:
    context: Context = request.app.state.context
    context.keys.owner(request)
    context.check_model(request.path_params["name"])
    return Json(_described(context))


def _described(context: Context) -> dict[str, object]:
    return {
        "id": context.name,
        "object": "model",
        "created": context.created,
        "owned_by": "jaxinfer",
        "context_length": context.batcher.context,
    }


async def _health(request: Request) -> Response:
    return Json({"status": "alive"})


async def _ready(request: Request) -> Response:
    context: Context = request.app.state.context
    context.drain.check()
    if not context.warm:
        raise ApiError(503, "the server compiles; ask again", code="warming_up")
    return Json({"status": "ready"})


async def _metrics(request: Request) -> Response:
    text = request.app.state.context.metrics.text()
    return Response(text, headers={"Content-Type": CONTENT_TYPE})


async def _openapi(request: Request) -> Response:
    return Json(document(request.app.state.context.name))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.app.state.context.metrics.refused(error.code or str(error.status))
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, what, headers=error.headers).response()


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


async def _fault(request: Request, error: Exception) -> Response:
    return ApiError(500, "the server failed; it goes on", code=type(error).__name__).response()
