"""The OpenAPI page for endpoints that read their bodies by hand, for OpenAI's error body and a size limit."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/{model}"


def install_api_schema(app: FastAPI, bodies: dict[str, type[BaseModel]]) -> None:
    """`bodies`: path of a POST endpoint -> its request body. Made when /openapi.json is first asked for."""
    describe_app = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = describe_app()
            modes: list[Any] = [(body, "validation") for body in bodies.values()]
            definitions = models_json_schema(modes, ref_template=_REF)[1]["$defs"]
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions)
            for path, body in bodies.items():
                content = {"application/json": {"schema": {"$ref": _REF.format(model=body.__name__)}}}
                schema["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
