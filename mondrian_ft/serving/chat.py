"""The routes of the OpenAI API, so that its clients work with ``model`` = base, channel or version.

One photograph as a data URL; no address is ever fetched. Text is taken as the whole prompt; with
none, the default advisor's is asked. Job database and A/B test have no part in this.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from .ab import Choice
from .advising import STATUS, Desk
from .intake import checked, decoded, read_json
from .pages import Refused
from .protocol import BASE, Answer, Ask, Failure, Fault, Piece
from .waiting import EventStream, unless_gone

MOST_PROMPT = 200_000
"""Characters of a prompt; the longest real one has 40,000."""
MOST_TOKENS = 1_000_000
MOST_MESSAGES = 100
TEMPERATURE = 2.0
PLAIN: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "stop": (None, []),
    "top_p": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
}
"""What an answer would need that is not made here, with the values that ask for nothing."""


@dataclass(frozen=True)
class Wanted:
    """A chat request, read."""

    model: str
    prompt: str
    image: bytes
    max_tokens: int | None
    temperature: float
    seed: int
    constrained: bool | None
    stream: bool
    usage: bool


def read(body: dict[str, Any], most: int) -> Wanted:
    """The request in ``body``.

    Args:
        body: as of the API's ``POST /v1/chat/completions``.
        most: bytes of the photograph.

    Raises:
        Refused: something in it is not what it should be, or not supported (400).
    """
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise Refused(400, "model is missing; it is base, or a version or channel of /v1/models.")
    for name, plain in PLAIN.items():
        if body.get(name) not in plain:
            # Left out of account in silence, the answer would not be what was asked for.
            raise Refused(
                400, f"{name} is not supported; leave it out, or send {json.dumps(plain[1])}."
            )
    prompt, image = _messages(body.get("messages"), most)
    limit = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    options = body.get("stream_options")
    return Wanted(
        model=model,
        prompt=prompt,
        image=image,
        max_tokens=None
        if body.get(limit) is None
        else int(_number(body, limit, 1, 1, MOST_TOKENS, whole=True)),
        temperature=_number(body, "temperature", 0.0, 0, TEMPERATURE),
        seed=int(_number(body, "seed", 0, 0, 2**31 - 1, whole=True)),
        constrained=_constrained(body.get("response_format")),
        stream=body.get("stream") is True,
        usage=isinstance(options, dict) and options.get("include_usage") is True,
    )


def _number(
    body: dict[str, Any], name: str, default: float, low: float, high: float, *, whole: bool = False
) -> float:
    value = body.get(name)
    if value is None:
        value = default
    kinds = int if whole else (int, float)
    fine = isinstance(value, kinds) and not isinstance(value, bool)
    if not fine or not math.isfinite(value) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise Refused(
            400, f"{name} is {str(value)[:80]}; it should be {kind}, {low:g} to {high:g}."
        )
    return value


def _constrained(form: Any) -> bool | None:
    """Whether the critique's schema is kept to; None is as the service is set."""
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise Refused(400, "response_format.type is text, json_object or json_schema.")
    return kind != "text"


def _messages(messages: Any, most: int) -> tuple[str, bytes]:
    if not isinstance(messages, list) or not messages or len(messages) > MOST_MESSAGES:
        raise Refused(400, "messages should be a list of some messages.")
    texts: list[str] = []
    images: list[bytes] = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "developer", "user"):
            raise Refused(
                400,
                "messages hold a system and a user message; a conversation is not supported.",
            )
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        for part in parts:
            _part(part, texts, images, most)
    if len(images) != 1:
        raise Refused(
            400,
            f"The messages hold {len(images)} photographs; send one, as a part of type image_url "
            "with a data URL.",
        )
    prompt = "\n\n".join(text for text in texts if text.strip())
    if len(prompt) > MOST_PROMPT:
        raise Refused(400, f"The prompt has more than {MOST_PROMPT:,} characters.")
    return prompt, images[0]


def _part(part: Any, texts: list[str], images: list[bytes], most: int) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        if any(0xD800 <= ord(letter) < 0xE000 for letter in part["text"]):
            raise Refused(400, "A text of the messages is not valid Unicode.")
        texts.append(part["text"])
    elif kind == "image_url":
        named = part.get("image_url")
        url = named.get("url") if isinstance(named, dict) else named
        if not isinstance(url, str) or not url.lower().startswith("data:"):
            raise Refused(
                400, "image_url is no data URL; photographs are never fetched from elsewhere."
            )
        if len(images) < 2:
            images.append(checked(decoded(url, most) or b"", most).data)
    else:
        raise Refused(400, "A part of the messages is neither text nor image_url.")


def add_routes(app: FastAPI, desk: Desk, most: int) -> None:
    """``/v1/models`` and ``/v1/chat/completions``."""

    @app.get("/v1/models", tags=["OpenAI"], summary="What `model` may be")
    async def models() -> JSONResponse:
        names = [BASE, *await asyncio.to_thread(desk.catalog)]
        return JSONResponse(
            {
                "object": "list",
                "data": [
                    {"id": name, "object": "model", "created": 0, "owned_by": "mondrian_ft"}
                    for name in names
                ],
            }
        )

    @app.post(
        "/v1/chat/completions",
        tags=["OpenAI"],
        summary="Ask as an OpenAI client",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": CHAT_SCHEMA, "example": CHAT_EXAMPLE}},
            }
        },
    )
    async def completions(request: Request) -> Response:
        wanted = read(await read_json(request), most)
        choice = await desk.version(wanted.model)
        ask = _ask(wanted, choice, desk)
        request.scope["noted"].update(arm=choice.arm)
        if wanted.stream:
            events = _stream(desk, ask, choice.used, wanted, request.scope["noted"])
            return EventStream(await anext(events), events)
        desk.enter(1)
        try:
            end = await unless_gone(request, _whole(desk, ask, choice.used))
        finally:
            desk.leave(1)
        if end is None:
            return Response(status_code=499)
        if isinstance(end, Failure):
            raise refused(end, desk, named=True)
        request.scope["noted"].update(hash=end.identity.hash)
        return JSONResponse(_completion(ask, wanted, end))


def refused(failure: Failure, desk: Desk, *, named: bool) -> Refused:
    """A failure as the HTTP error it is; ``named``: the caller chose the version."""
    status = 400 if named and failure.fault is Fault.adapter else STATUS[failure.fault]
    if status in (429, 503):
        return Refused(status, failure.sentence, Retry_After=str(desk.retry_after()))
    return Refused(status, failure.sentence)


def _ask(wanted: Wanted, choice: Choice, desk: Desk) -> Ask:
    settings = desk.settings
    limits = [one for one in (wanted.max_tokens, settings.max_tokens) if one is not None]
    constrained = settings.constrained if wanted.constrained is None else wanted.constrained
    return Ask(
        id=f"chatcmpl-{secrets.token_hex(12)}",
        image=wanted.image,
        prompt=wanted.prompt or desk.personas[desk.settings.default_advisor].prompt,
        arm=choice.arm,
        max_tokens=min(limits, default=None),
        constrained=constrained,
        stream=wanted.stream,
        deadline=settings.deadline,
        temperature=wanted.temperature,
        seed=wanted.seed,
    )


async def _whole(desk: Desk, ask: Ask, used: str) -> Answer | Failure:
    async with aclosing(desk.ask(ask, used)) as coming:
        async for event in coming:
            if not isinstance(event, Piece):
                return event
    raise AssertionError("an ask ends with an answer or a failure")


async def _stream(
    desk: Desk, ask: Ask, used: str, wanted: Wanted, noted: dict[str, Any]
) -> AsyncGenerator[str, None]:
    """Chunks as the API sends them, ended by ``[DONE]``."""
    made = int(time.time())

    def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
        head = {"id": ask.id, "object": "chat.completion.chunk", "created": made}
        content = {**head, "model": wanted.model, "choices": choices, **more}
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    def delta(content: dict[str, Any], why: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": content, "finish_reason": why}]

    desk.enter(1)
    try:
        yield chunk(delta({"role": "assistant", "content": ""}))
        sent = ""
        async with aclosing(desk.ask(ask, used)) as coming:
            async for event in coming:
                if isinstance(event, Piece):
                    sent += event.text
                    yield chunk(delta({"content": event.text}))
                elif isinstance(event, Failure):
                    noted.update(fault=str(event.fault))
                    error = {"message": event.sentence, "type": str(event.fault)}
                    yield f"data: {json.dumps({'error': error})}\n\n"
                else:
                    noted.update(hash=event.identity.hash)
                    if rest := event.text.removeprefix(sent):
                        yield chunk(delta({"content": rest}))
                    yield chunk(delta({}, _why(event)))
                    if wanted.usage:
                        yield chunk([], usage=_usage(event))
        yield "data: [DONE]\n\n"
    finally:
        desk.leave(1)


def _completion(ask: Ask, wanted: Wanted, answer: Answer) -> dict[str, Any]:
    identity = answer.identity
    return {
        "id": ask.id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": wanted.model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answer.text},
                "finish_reason": _why(answer),
            }
        ],
        "usage": _usage(answer),
        "system_fingerprint": (identity.hash or identity.base_weights)[:16],
        "adapter": None
        if identity.hash is None
        else {"version": identity.version, "hash": identity.hash},
    }


def _why(answer: Answer) -> str:
    return "stop" if answer.finished else "length"


def _usage(answer: Answer) -> dict[str, int]:
    read, made = answer.prompt_tokens, answer.tokens
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


CHAT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["model", "messages"],
    "properties": {
        "model": {"type": "string", "description": "base, or a version or channel"},
        "messages": {"type": "array", "minItems": 1, "items": {"type": "object"}},
        "max_tokens": {"type": "integer", "minimum": 1, "maximum": MOST_TOKENS},
        "temperature": {"type": "number", "minimum": 0, "maximum": TEMPERATURE},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
        "stream": {"type": "boolean"},
        "response_format": {"type": "object"},
    },
}
CHAT_EXAMPLE: dict[str, Any] = {
    "model": "production",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Judge the photograph."},
                {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,…"}},
            ],
        }
    ],
}
