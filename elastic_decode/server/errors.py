"""What goes wrong with a request, as the OpenAI API's error objects."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from elastic_decode.errors import BudgetError, CapacityError, ConfigError


class RequestError(Exception):
    """An answer that is an error: `status` is HTTP's, `kind`, `param` and `code` are the error object's."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.headers = param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


def refusal(error: Exception) -> RequestError:
    """What the engine raised for a request, as an answer: what can never run is the request's fault."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, CapacityError):
        return RequestError(400, str(error), code="context_length_exceeded")
    if isinstance(error, (BudgetError, ConfigError)):
        return RequestError(400, str(error))
    return RequestError(500, f"{type(error).__name__}: {error}", kind="server_error", code="engine_error")


def validation(error: RequestValidationError) -> RequestError:
    """pydantic's findings as one error object that names every field."""
    found = error.errors()
    if any(item["type"] == "json_invalid" for item in found):
        detail = found[0].get("ctx", {}).get("error", found[0]["msg"])
        return RequestError(400, f"the body is not JSON: {detail}", code="invalid_json")
    unknown = [_place(item["loc"]) for item in found if item["type"] == "extra_forbidden"]
    if unknown:
        names = ", ".join(unknown)
        return RequestError(
            400,
            f"this server does not know: {names}; docs/server.md lists the fields it takes",
            param=unknown[0],
            code="unknown_field",
        )
    parts = [f"{_place(item['loc'])}: {item['msg'].removeprefix('Value error, ')}" for item in found]
    return RequestError(400, "; ".join(parts), param=_place(found[0]["loc"]), code="invalid_value")


def _place(location: tuple[int | str, ...]) -> str:
    """("body", "messages", 0, "role") as messages[0].role."""
    text = ""
    for part in location[1:]:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "body"
