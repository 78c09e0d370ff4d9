"""What the OpenAPI document says of the routes, and how events are written."""

from __future__ import annotations

import json
from typing import Any

from .ab import Mode
from .intake import MOST_TEXT
from .votes import Vote

ABOUT = """\
Critiques of photographs by a vision-language model: the base, tuned by an adapter, or an A/B test
of both. Every answer says which model gave it. Errors are `{"error": sentence, "request_id": id}`.
"""

_TEXT: dict[str, Any] = {"type": "string", "maxLength": MOST_TEXT}
_FIELDS: dict[str, Any] = {
    "advisor": {
        **_TEXT,
        "description": "An id of /advisors, several with commas between, `all` or `random`. "
        "Several (or `all`) give a list of answers.",
        "example": "ansel",
    },
    "job_id": {
        **_TEXT,
        "description": "A row of the job database. The same request again gets the same answer.",
    },
    "mode": {"type": "string", "enum": [*Mode], "description": "Default: as it was started."},
    "version": {**_TEXT, "description": "base, or a version or channel of /v1/models."},
    "user": {**_TEXT, "description": "Who asks: gets the same arm of an A/B test each time."},
    "response_format": {"type": "string", "enum": ["json", "html"], "default": "json"},
    "replace": {
        "type": "boolean",
        "default": False,
        "description": "Write over the analysis of a job that is finished.",
    },
}
ANALYZE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "file": {"type": "string", "format": "binary"},
                        **_FIELDS,
                    },
                    "anyOf": [{"required": ["image"]}, {"required": ["file"]}],
                }
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "image_path": {
                            "type": "string",
                            "description": "Below data.source_dir or serve.upload_dir.",
                        },
                        "image": {
                            "type": "string",
                            "description": "A path as image_path, a data URL, or base64.",
                        },
                        **_FIELDS,
                    },
                    "anyOf": [{"required": ["image_path"]}, {"required": ["image"]}],
                },
                "examples": {
                    "path": {
                        "summary": "A photograph below data.source_dir",
                        "value": {"image_path": "moonrise.jpg", "advisor": "ansel"},
                    },
                    "base64": {
                        "summary": "The photograph itself",
                        "value": {"image": "data:image/jpeg;base64,…", "advisor": "ansel,weston"},
                    },
                },
            },
        },
    }
}
_EXAMPLE: dict[str, Any] = {
    "request_id": "5f1c9a0b7e3d2468",
    "answer_id": "0d7b8f9e-5c1a-4b0e-9f53-3a1f0c8f2f11.0",
    "job_id": None,
    "advisor": "ansel",
    "mode": "fine_tuned",
    "model_used": "fine_tuned",
    "parse_success": True,
    "analysis": {
        "image_description": "A ridge under evening clouds.",
        "dimensions": [
            {
                "name": "Composition",
                "score": 8,
                "comment": "The ridge leads in.",
                "recommendation": "Step to the left.",
            }
        ],
        "overall_score": 7.4,
        "key_strengths": ["Light"],
        "priority_improvements": ["Foreground"],
        "technical_notes": "Sharp throughout.",
    },
    "raw": '{"image_description": …}',
    "mends": [],
    "model": "Qwen3-VL-4B-Instruct",
    "adapter": {"version": "v3", "hash": "9c1e…"},
    "prompt_fingerprint": "77ab…",
    "pixel_fingerprint": "03f2…",
    "seconds": {"queued": 0.01, "first_token": 0.9, "total": 21.4, "service": 21.5},
}


def _error(text: str, *examples: str) -> dict[str, Any]:
    example = {"error": examples[0] if examples else text, "request_id": "5f1c9a0b7e3d2468"}
    return {"description": text, "content": {"application/json": {"example": example}}}


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: _error("Something in the request is not what it should be."),
    401: _error("The token is missing or wrong."),
    403: _error("image_path leads out of the served folders."),
    404: _error("There is no such photograph or job."),
    408: _error("The request was sent too slowly."),
    409: _error("The job is finished, or being answered."),
    413: _error("The request is too long."),
    415: _error("Neither multipart/form-data nor application/json."),
    422: _error("The model's answer is no critique; `raw` holds it."),
    429: _error("The queue is full; Retry-After says when to ask again."),
    500: _error("A fault of the service."),
    503: _error("The model or the job database is not ready; Retry-After says when to ask again."),
    504: _error("There was no answer in time."),
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The critique, or a list of them.",
        "content": {
            "application/json": {"example": _EXAMPLE},
            "text/html": {"schema": {"type": "string"}},
        },
    },
    **_ERRORS,
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "`start`, `piece` (advisor, text), then for each advisor `answer` (as of "
        "/analyze) or `error` (with its `status`), then `done`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    **_ERRORS,
}
HEALTH: dict[int | str, dict[str, Any]] = {
    202: {"description": "Loading: `stage`, and `progress` from 0 to 1."},
    503: {"description": "Failed, with its `reason`."},
}
PREFERENCE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["answer_id", "vote"],
                    "properties": {
                        "answer_id": _TEXT,
                        "vote": {"type": "string", "enum": [*Vote]},
                    },
                },
                "example": {"answer_id": _EXAMPLE["answer_id"], "vote": "up"},
            }
        },
    }
}


def event(name: str, body: dict[str, Any]) -> str:
    """One server-sent event; JSON holds no line break, so its data is one line."""
    return f"event: {name}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n"


def kind_of(status: int) -> str:
    """The ``type`` of an error as OpenAI's clients know them."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
