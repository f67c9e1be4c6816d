"""A server in a thread, and its model: tiny-llama with a chat template that knows tools."""

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import uvicorn

import jaxinfer as ji
from jaxinfer.decode.batcher import Batcher
from jaxinfer.serve import ServeConfig, create_app

TEMPLATE = """\
{% if tools %}Call as <tool_call>{"name": ..., "arguments": ...}</tool_call>:{{ "\\n" }}
{%- for tool in tools %}{{ tool | tojson }}{{ "\\n" }}{% endfor %}{% endif %}
{%- for m in messages %}{{ m.role }}: {{ m.content or "" }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{{- "\\n" }}{% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""


def model(template: str | None = TEMPLATE) -> ji.LM:
    lm = ji.load("tiny-llama")
    lm.tokenizer = dataclasses.replace(lm.tokenizer, chat_template=template)
    return lm


@dataclasses.dataclass
class Server:
    url: str
    app: object
    batcher: Batcher
    key: str = "none"

    @property
    def context(self):
        return self.app.state.context

    def client(self, key: str | None = None, **options) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=0, **options
        )

    def post(self, path: str, body: object = None, **options) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def get(self, path: str, **options) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def settled(self) -> None:
        """Waits until nothing runs or waits."""
        end = time.monotonic() + 30
        while self.batcher.running or self.batcher.waiting or self.context.drain.running:
            assert time.monotonic() < end
            time.sleep(0.01)


@contextlib.contextmanager
def serving(batcher: Batcher, config: ServeConfig | None = None) -> Iterator[Server]:
    """A server of a batcher at a free port of this machine."""
    app = create_app(batcher, config or ServeConfig(warmup=False))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    keys = app.state.context.config.api_keys
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield Server(url, app, batcher, keys[0] if keys else "none")
    finally:
        server.should_exit = True
        thread.join()
