"""The document at `/openapi.json`, made of the schemas that requests are validated with."""

import functools
import re

from pydantic.json_schema import models_json_schema

import jaxinfer
from jaxinfer.serve import schema
from jaxinfer.serve.response_schema import ResponseRequest

BODIES = {
    "/v1/completions": (schema.CompletionRequest, "Continue texts or tokens"),
    "/v1/chat/completions": (schema.ChatRequest, "Answer a conversation"),
    "/v1/responses": (ResponseRequest, "Answer, and keep the answer"),
    "/tokenize": (schema.TokenizeRequest, "The tokens of a text or a conversation"),
    "/detokenize": (schema.DetokenizeRequest, "The text of tokens"),
}
READS = {
    "/v1/models": "The model that is served",
    "/v1/models/{name}": "The same by its name",
    "/health": "Whether the server is alive",
    "/ready": "Whether it is compiled and takes requests",
    "/metrics": "Metrics for Prometheus",
    "/openapi.json": "This document",
}
OPEN = ("/health", "/ready", "/metrics", "/openapi.json")
PLACE = "#/components/schemas/{model}"


@functools.lru_cache
def document(name: str) -> dict[str, object]:
    """The OpenAPI 3.1 document of a server of the model `name`."""
    kinds = [(kind, "validation") for kind, _ in BODIES.values()]
    _, schemas = models_json_schema(kinds, ref_template=PLACE)  # type: ignore[arg-type]
    components = schemas["$defs"] | {"Error": _error_schema()}
    paths: dict[str, object] = {
        path: {"post": _operation(path, title) | {"requestBody": _body(kind.__name__)}}
        for path, (kind, title) in BODIES.items()
    }
    paths |= {path: {"get": _operation(path, title)} for path, title in READS.items()}
    kept = "/v1/responses/{identifier}"
    paths[kept] = {
        "get": _operation(kept, "A kept answer"),
        "delete": _operation(kept, "Forget an answer"),
    }
    paths[f"{kept}/cancel"] = {"post": _operation(kept, "End an answer that is being made")}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"jaxinfer: {name}", "version": jaxinfer.__version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(path: str, title: str) -> dict[str, object]:
    json_type = {"schema": {"$ref": "#/components/schemas/Error"}}
    operation: dict[str, object] = {
        "summary": title,
        "security": [] if path in OPEN else [{}, {"key": []}],
        "responses": {
            "200": {"description": "The answer"},
            "default": {"description": "Why not", "content": {"application/json": json_type}},
        },
    }
    for name in re.findall(r"\{(\w+)\}", path):
        place = {"in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"] = [{"name": name} | place]
    return operation


def _body(name: str) -> dict[str, object]:
    content = {"schema": {"$ref": f"#/components/schemas/{name}"}}
    return {"required": True, "content": {"application/json": content}}


def _error_schema() -> dict[str, object]:
    text, maybe = {"type": "string"}, {"type": ["string", "null"]}
    fields = {"message": text, "type": text, "param": maybe, "code": maybe}
    error = {"type": "object", "properties": fields, "required": [*fields]}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}
