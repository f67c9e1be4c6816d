"""`Watch`: every request is counted, timed and logged, and waited for when the server ends."""

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxinfer.serve.context import Context


class Watch:
    """A layer around the application."""

    def __init__(self, app: ASGIApp, context: Context):
        self._app, self._context = app, context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, status = time.perf_counter(), 0

        async def sends(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        context = self._context
        try:
            with context.drain.request():
                await self._app(scope, receive, sends)
        except Exception as error:  # `_fault` in `app` has told the client
            context.log.fault(error)
        finally:
            seconds = time.perf_counter() - start
            route = scope.get("route")  # the pattern, as paths are without number
            context.metrics.answered(getattr(route, "path", "other"), status or 500, seconds)
            context.log.request(scope["method"], scope["path"], status or 500, seconds)
