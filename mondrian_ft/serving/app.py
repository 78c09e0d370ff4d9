"""The advisor service over HTTP.

    GET  /                      the page: drop a photograph, watch the critique come
    POST /analyze               a critique, awaited
    POST /analyze_stream        the same as server-sent events
    GET  /health                200 ready, 202 loading, 503 and why
    GET  /model-status          what the model's process is doing, and which adapters it holds
    GET  /advisors              who can be asked
    GET  /ab                    answers, latencies and parse rates by arm
    GET  /metrics               for Prometheus
    POST /preference            a thumb up or down
    POST /v1/chat/completions   for OpenAI clients; GET /v1/models

This process holds no weights and imports no MLX: `protocol.Model` is another one. Every error is
``{"error": sentence, "request_id": id}``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from .. import __version__
from ..data.critique import Critique
from ..errors import MondrianError
from . import chat, describe, votes
from .advising import Desk
from .cards import cards
from .front import Front, Limits
from .intake import Folders, read_json, read_request, text_field
from .jobs import Locked
from .local import Asgi
from .pages import Refused, fresh, page
from .planning import Plan
from .protocol import State
from .waiting import EventStream, unless_gone

SETTLE_SECONDS = 2.0
"""Between attempts to write what the job database could not take."""
CLIENT_GONE = 499
"""The status in the log of a request whose client went away; nobody is left to receive it."""


@dataclass(frozen=True)
class Service:
    """Everything the routes need.

    Attributes:
        desk: who answers.
        folders: where ``image_path`` may lead.
        state: the folder of votes.
        limits: what one request may take.
        most: bytes of a photograph.
        log: takes one line of JSON a request.
    """

    desk: Desk
    folders: Folders
    state: Path
    limits: Limits
    most: int
    log: Callable[[str], Any] = field(default=print)


def make_app(service: Service) -> Asgi:
    """The application, guarded. Whoever makes it starts the model before, and stops it after."""
    desk = service.desk
    app = FastAPI(
        title="Mondrian advisor",
        version=__version__,
        description=describe.ABOUT,
        lifespan=lambda _: _lifespan(desk),
        # No generated pages: they would load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        # Nothing of a request goes to whoever configured OpenTelemetry in this process.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    _add_errors(app)
    _add_analysis(app, service)
    _add_status(app, service)
    _add_page(app, service)
    chat.add_routes(app, desk, service.most)
    return Front(
        app,
        limits=service.limits,
        log=service.log,
        on_done=lambda route, _, status, __: desk.meters.requested(route, status),
    )


@asynccontextmanager
async def _lifespan(desk: Desk) -> AsyncIterator[None]:
    settling = asyncio.create_task(_settle(desk))
    try:
        yield
    finally:
        settling.cancel()
        await asyncio.gather(settling, return_exceptions=True)
        await desk.finish()


async def _settle(desk: Desk) -> None:
    while True:
        await asyncio.sleep(SETTLE_SECONDS)
        try:
            await desk.settle()
        except Exception:
            # Told to whoever runs the service, and tried again: else nothing would be from now on.
            traceback.print_exc()


def _add_errors(app: FastAPI) -> None:
    def told(request: Request, status: int, sentence: str, **headers: str) -> JSONResponse:
        body = {"error": sentence, "request_id": request.scope["request_id"]}
        if request.url.path.startswith("/v1/"):
            # As OpenAI's clients read it.
            body["error"] = {"message": sentence, "type": describe.kind_of(status), "code": status}  # pyright: ignore[reportArgumentType]
        request.scope["noted"]["refused"] = sentence
        return JSONResponse(body, status, headers=headers)

    @app.exception_handler(Refused)
    def refused(request: Request, error: Refused) -> JSONResponse:
        return told(request, error.status, str(error), **error.headers)

    @app.exception_handler(MondrianError)
    def failed(request: Request, error: MondrianError) -> JSONResponse:
        return told(request, 503, str(error))

    @app.exception_handler(HTTPException)
    def other(request: Request, error: HTTPException) -> JSONResponse:
        known = {404: "There is no such route; see /openapi.json.", 405: "Not this method."}
        sentence = known.get(error.status_code, str(error.detail))
        return told(request, error.status_code, sentence, **dict(error.headers or {}))

    @app.exception_handler(Exception)
    def fault(request: Request, error: Exception) -> JSONResponse:
        return told(request, 500, "The service failed on this request; its log says more.")


def _add_analysis(app: FastAPI, service: Service) -> None:
    desk = service.desk

    async def planned(request: Request) -> Plan:
        asked = await read_request(request, service.folders, service.most)
        return await desk.plan(asked, request.scope["request_id"])

    @app.post(
        "/analyze",
        tags=["Advisor"],
        summary="Ask for a critique",
        openapi_extra=describe.ANALYZE,
        responses=describe.ANSWERS,
    )
    async def analyze(request: Request) -> Response:
        plan = await planned(request)
        ends = await unless_gone(request, _collect(desk, plan))
        if ends is None:
            request.scope["noted"]["refused"] = "the client went away"
            return Response(status_code=CLIENT_GONE)
        _note(request, ends)
        return _reply(desk, plan, ends)

    @app.post(
        "/analyze_stream",
        tags=["Advisor"],
        summary="Ask for a critique and watch it come, as server-sent events",
        openapi_extra=describe.ANALYZE,
        responses=describe.STREAMED,
    )
    async def analyze_stream(request: Request) -> Response:
        plan = await planned(request)
        events = _sent(desk, plan, request)
        return EventStream(await anext(events), events)

    @app.post(
        "/preference",
        tags=["Advisor"],
        summary="A thumb up or down for an answer",
        openapi_extra=describe.PREFERENCE,
        status_code=201,
    )
    async def preference(request: Request) -> JSONResponse:
        fields = await read_json(request)
        answer_id, wanted = text_field(fields, "answer_id"), text_field(fields, "vote")
        if wanted not in list(votes.Vote):
            raise Refused(400, f"vote is {wanted!r}; it is {', '.join(votes.Vote)}.")
        answer = desk.answer(answer_id or "")
        if answer is None:
            raise Refused(404, f"There is no answer {answer_id!r} of late; votes are on new ones.")
        vote = votes.Vote(wanted)
        await asyncio.to_thread(votes.keep, service.state, answer, vote)
        desk.meters.voted(answer["model_used"], str(vote))
        return JSONResponse({"answer_id": answer_id, "vote": str(vote)}, 201)


async def _collect(desk: Desk, plan: Plan) -> list[tuple[str, dict[str, Any]]]:
    """The answers and errors, in the order in which the advisors were named."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    async with aclosing(desk.events(plan, stream=False)) as events:
        async for name, body in events:
            if name in ("answer", "error"):
                found[body["advisor"]] = (name, body)
    order = [one.id for one in plan.personas]
    return sorted(found.values(), key=lambda end: order.index(end[1]["advisor"]))


async def _sent(desk: Desk, plan: Plan, request: Request) -> AsyncGenerator[str, None]:
    ends: list[tuple[str, dict[str, Any]]] = []
    async with aclosing(desk.events(plan, stream=True)) as events:
        async for name, body in events:
            if name in ("answer", "error"):
                ends.append((name, body))
            yield describe.event(name, body)
    _note(request, ends)
    yield describe.event("done", {"request_id": plan.request_id})


def _note(request: Request, ends: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """What the log says of the answers: who gave them, nothing of what they are about."""
    bodies = [body for _, body in ends]
    request.scope["noted"].update(
        advisor=[body["advisor"] for body in bodies],
        arm=[body["model_used"] for body in bodies],
        hash=[(body.get("adapter") or {}).get("hash") for body in bodies],
        parsed=[body["parse_success"] for body in bodies],
    )
    if faults := [body["fault"] for body in bodies if "fault" in body]:
        request.scope["noted"].update(fault=faults)


def _reply(desk: Desk, plan: Plan, ends: Sequence[tuple[str, dict[str, Any]]]) -> Response:
    """One answer, or a list of them; the status is that of the worst."""
    status = max((body.get("status", 200) for _, body in ends), default=500)
    bodies = [{k: v for k, v in body.items() if k != "status"} for _, body in ends]
    headers = {"Cache-Control": "no-store"}
    if status in (429, 503):
        headers["Retry-After"] = str(desk.retry_after())
    if status == 200 and plan.asked.response_format == "html":
        headers["X-Model-Used"] = ",".join(body["model_used"] for body in bodies)
        adapters = [body["adapter"] or {} for body in bodies]
        headers["X-Adapter-Hash"] = ",".join(one.get("hash") or "" for one in adapters)
        headers["Content-Security-Policy"] = "default-src 'none'; style-src 'unsafe-inline'"
        return HTMLResponse("\n".join(map(_section, bodies)), headers=headers)
    return JSONResponse(bodies if plan.several else bodies[0], status, headers=headers)


def _section(body: dict[str, Any]) -> str:
    shown = cards(Critique.model_validate(body["analysis"]))
    return f'<section data-advisor="{escape(body["advisor"])}">\n{shown}</section>'


def _add_status(app: FastAPI, service: Service) -> None:
    desk = service.desk

    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["Operation"], summary="Whether it answers", responses=describe.HEALTH)
    async def health() -> JSONResponse:
        now = desk.model.status()
        if now.state is State.ready:
            router = desk.router
            body = {
                "status": "ready",
                "model_mode": str(router.mode),
                "fine_tuned": any(one.hash is not None for one in now.arms),
                "adapter": router.adapter,
            }
            return fresh(body)
        if now.state is State.loading:
            body = {"status": "loading", "stage": now.stage, "progress": now.progress}
            return JSONResponse(body, 202, headers={"Retry-After": "1"})
        body = {"status": str(now.state), "reason": now.reason or "it is being stopped"}
        return JSONResponse(body, 503, headers={"Retry-After": "5"})

    @app.get("/model-status", tags=["Operation"], summary="What the model's process is doing")
    async def model_status() -> JSONResponse:
        router = desk.router
        return fresh(
            {
                **dataclasses.asdict(desk.model.status()),
                "model_mode": str(router.mode),
                "ab_test_split": router.split,
                "adapter": router.adapter,
                "adapters": router.adapters,
                "waiting": desk.waiting,
                "max_queue": desk.settings.max_queue,
            }
        )

    @app.get("/advisors", tags=["Advisor"], summary="Who can be asked")
    async def advisors() -> JSONResponse:
        return fresh(
            {
                "default": desk.settings.default_advisor,
                "advisors": [
                    {
                        "id": one.id,
                        "name": one.name,
                        "adapter": desk.router.tuned(one.id),
                        "prompt_fingerprint": one.prompt_fingerprint,
                        "prompt_source": one.source,
                    }
                    for one in desk.personas.values()
                ],
            }
        )

    @app.get("/ab", tags=["Operation"], summary="Answers by arm, with 95 % intervals")
    async def ab(
        since: Annotated[
            str | None, Query(description="ISO time; answers before it are left out.")
        ] = None,
    ) -> JSONResponse:
        report = await asyncio.to_thread(desk.tally.report, _time(since))
        report |= {"model_mode": str(desk.router.mode), "database": None}
        if desk.jobs is not None:
            try:
                report["database"] = await asyncio.to_thread(desk.jobs.counts)
            except Locked as error:
                raise Refused(503, str(error), Retry_After="5") from None
        return fresh(report)

    @app.get("/metrics", tags=["Operation"], summary="For Prometheus", response_class=Response)
    async def metrics() -> Response:
        unsettled = desk.jobs.unsettled if desk.jobs else 0
        text = desk.meters.page(desk.model.status, desk.waiting, unsettled)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})


def _time(text: str | None) -> float | None:
    """Seconds since 1970 of an ISO time, UTC where it names no zone.

    Raises:
        Refused: it is none (400).
    """
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise Refused(
            400, f"since is {text[:80]!r}; it should be a time such as 2026-01-31T12:00:00Z."
        ) from None


def _add_page(app: FastAPI, service: Service) -> None:
    desk = service.desk

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        content, policy = page("advisor", "basics")
        chosen = desk.settings.default_advisor
        options = "\n".join(
            f'<option value="{escape(one.id)}"{" selected" if one.id == chosen else ""}>'
            f"{escape(one.name)}</option>"
            for one in desk.personas.values()
        )
        tuned = any(desk.router.tuned(name) for name in desk.personas)
        content = content.replace("<!--advisors-->", options)
        content = content.replace("<!--most-->", str(service.most))
        content = content.replace("<!--compare-->", "" if tuned else "hidden")
        policy = policy.replace("form-action 'none'", "form-action 'self'")
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store"}
        return HTMLResponse(content, headers=headers)
