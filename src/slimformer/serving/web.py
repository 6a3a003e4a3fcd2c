"""The endpoints of a served model, their limits, and the page on which a person tries it.

Requests and answers have the shapes that clients know: `/v1/embeddings` those of OpenAI, `/rerank` those of Cohere and Jina, or of Text
Embeddings Inference if the texts are called `texts`. Every answer carries the id of its request, and every error is one JSON object:
`{"error": {"message": ..., "type": ...}}`.
"""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, Response
from jinja2 import Environment
from markupsafe import Markup
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slimformer import __version__
from slimformer.core.pooling import PASSAGE
from slimformer.errors import SlimformerError, readable
from slimformer.measuring.machine import cores
from slimformer.measuring.sessions import open_session
from slimformer.serving.answering import Classes, Scores, Served, Spans, TextOrPair, TokenRow, TooLongError, Vectors
from slimformer.serving.batching import Batcher, FullError, Limits

ENDPOINTS = (Vectors.path, Scores.path, Classes.path, Spans.path)
ENCODED_AT_ONCE = (
    16  # texts that are split into tokens in the event loop; more go to a thread, so that others are heard meanwhile
)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64)
_EXAMPLES: dict[str, dict[str, Any]] = {
    Vectors.path: {"input": ["a text", "another"]},
    Classes.path: {"inputs": ["a text"]},
    Scores.path: {"query": "a question", "documents": ["a text", "another"]},
    Spans.path: {"inputs": ["a text"]},
}
_KNOWN = {*ENDPOINTS, "/embeddings", "/v1/rerank", "/", "/health", "/info", "/metrics", "/v1/models", "/report"}
_SHAPES = {  # of fields that may have several types
    "input": "a text or a list of texts",
    "inputs": "a text or a list of texts, of a classifier also of pairs of texts",
    "documents": 'a list of texts, or of objects with a "text"',
    "texts": "a list of texts",
}
_TYPES = {400: "invalid_request", 404: "not_found", 405: "not_found", 413: "too_large", 429: "too_many_requests"}


class _Asked(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None  # of those clients that must name one: there is only this
    truncate: bool = True  # whether a text with more tokens than the model reads is cut; otherwise it is refused


class EmbeddingsAsked(_Asked):
    """What OpenAI's clients send; `input_type` and `prompt_name` say which prompt goes before the texts."""

    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    input_type: Literal["query", "passage", "document"] | None = None
    prompt_name: str | None = None


class ClassesAsked(_Asked):
    """One text, several, or pairs of texts."""

    inputs: str | list[str | Annotated[list[str], Field(min_length=2, max_length=2)]]


class SpansAsked(_Asked):
    """One text or several."""

    inputs: str | list[str]


class RankingAsked(_Asked):
    """A query and the texts to order: `documents`, or `texts` as Text Embeddings Inference calls them."""

    query: str
    documents: list[str | dict[str, Any]] | None = None
    texts: list[str] | None = None
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False
    return_text: bool = False


def app_of(served: Served, *, threads: int | None = None, limits: Limits | None = None) -> FastAPI:
    """The ASGI application of a served model.

    Args:
        served: The model, as `served_model` reads it.
        threads: Threads that the runtime uses; all cores by default.
        limits: What callers may ask for.

    Returns:
        An application for any ASGI server, with the model opened; it answers what waits before it ends.

    Example:
        >>> app = app_of(served_model(Path("small")))
        >>> sorted(route.path for route in app.routes if route.path == "/classify")
        ['/classify']
    """
    return _Web(served, threads or cores(), limits or Limits()).app


class _Web:
    def __init__(self, served: Served, threads: int, limits: Limits) -> None:
        self.served, self.answerer, self.threads, self.limits = served, served.answerer, threads, limits
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "slimformer_requests", "Requests by endpoint and status.", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "slimformer_request_seconds", "Seconds per request.", ["path"], buckets=_SECONDS, registry=self.registry
        )
        self.batches = Histogram("slimformer_batch_rows", "Rows of a batch.", buckets=_ROWS, registry=self.registry)
        self.tokens = Counter("slimformer_tokens", "Tokens computed, padding included.", registry=self.registry)
        Gauge("slimformer_waiting_rows", "Rows that wait for the machine.", registry=self.registry).set_function(
            lambda: self.batcher.waiting
        )
        session = open_session(served.file, threads)
        self.engine = session.engine
        self.batcher = Batcher(session, self.answerer, most_waiting=limits.waiting, seen=self._seen)
        self.app = self._routes(
            FastAPI(title=served.name, version=__version__, docs_url=None, redoc_url=None, lifespan=self._life)
        )

    def _seen(self, rows: int, width: int) -> None:
        self.batches.observe(rows)
        self.tokens.inc(rows * width)

    @asynccontextmanager
    async def _life(self, _: FastAPI) -> AsyncIterator[None]:
        self.batcher.start()
        yield
        await self.batcher.stop()

    # ---- answers

    async def _rows(self, texts: Sequence[TextOrPair], truncate: bool) -> list[list[TokenRow]]:
        if len(texts) > self.limits.items:
            raise HTTPException(413, f"{len(texts):,} texts are more than the {self.limits.items:,} of a request.")
        longest = max((sum(map(len, (text,) if isinstance(text, str) else text)) for text in texts), default=0)
        if longest > self.limits.characters:
            raise HTTPException(413, f"a text of {longest:,} characters is longer than {self.limits.characters:,}.")
        try:
            if len(texts) <= ENCODED_AT_ONCE and longest < 10_000:
                return self.answerer.rows(texts, cut=truncate)
            return await run_in_threadpool(self.answerer.rows, texts, cut=truncate)
        except TooLongError as error:
            raise HTTPException(413, str(error)) from None

    async def _outputs(self, rows: Sequence[Sequence[TokenRow]]) -> list[list[np.ndarray]]:
        """The outputs of the rows of each text."""
        flat = iter(await self.batcher.answers([row for some in rows for row in some]))
        return [[next(flat) for _ in some] for some in rows]

    async def embeddings(self, asked: EmbeddingsAsked) -> dict[str, Any]:
        answerer = self._as(Vectors)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        _some(texts)
        side = PASSAGE if asked.input_type == "document" else asked.input_type
        rows = await self._rows(answerer.prompted(texts, answerer.prompt(asked.prompt_name, side)), asked.truncate)
        vectors = [np.asarray(outputs[0], np.float32) for outputs in await self._outputs(rows)]
        if asked.dimensions is not None:
            if asked.dimensions > len(vectors[0]):
                raise HTTPException(400, f"{asked.dimensions} dimensions are more than the {len(vectors[0])} of these vectors.")
            vectors = [_first_of(vector, asked.dimensions, answerer.head.normalize) for vector in vectors]
        encode = _base64 if asked.encoding_format == "base64" else _floats
        tokens = sum(len(row) for some in rows for row in some)
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": place, "embedding": encode(vector)} for place, vector in enumerate(vectors)
            ],
            "model": self.served.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    async def classify(self, asked: ClassesAsked) -> list[Any]:
        answerer = self._as(Classes)
        texts: list[TextOrPair] = [asked.inputs] if isinstance(asked.inputs, str) else [_text(item) for item in asked.inputs]
        _some(texts)
        outputs = await self._outputs(await self._rows(texts, asked.truncate))
        return [answerer.shares(some[0]) for some in outputs]

    async def tag(self, asked: SpansAsked) -> list[Any]:
        answerer = self._as(Spans)
        texts = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
        _some(texts)
        rows = await self._rows(texts, asked.truncate)
        outputs = await self._outputs(rows)
        return [answerer.spans(*each) for each in zip(texts, rows, outputs, strict=True)]

    async def rerank(self, asked: RankingAsked) -> Any:
        self._as(Scores)
        if (asked.documents is None) == (asked.texts is None):
            raise HTTPException(400, 'name the texts to order: "documents", or "texts".')
        given = asked.texts if asked.texts is not None else asked.documents or []
        texts = [_document(item) for item in given]
        _some(texts)
        rows = await self._rows([(asked.query, text) for text in texts], asked.truncate)
        scores = [float(np.ravel(some[0])[0]) for some in await self._outputs(rows)]
        order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))[: asked.top_n]
        if asked.texts is not None:
            text = {"text": texts} if asked.return_text else {}
            return [
                {"index": place, "score": scores[place], **{key: values[place] for key, values in text.items()}}
                for place in order
            ]
        return {
            "model": self.served.name,
            "results": [
                {
                    "index": place,
                    "relevance_score": scores[place],
                    **({"document": {"text": texts[place]}} if asked.return_documents else {}),
                }
                for place in order
            ],
        }

    def _as(self, kind: type[Any]) -> Any:
        if not isinstance(self.answerer, kind):
            raise HTTPException(404, f"this model does not answer there; it answers {self.answerer.path}.")
        return self.answerer

    # ---- pages and facts

    def info(self) -> dict[str, Any]:
        """What is served: the same facts that the page shows."""
        facts = self.served.facts
        return {
            "name": self.served.name,
            "endpoint": self.answerer.path,
            "file": self.served.file.name,
            "bytes": self.served.file.stat().st_size,
            "runtime": f"{self.engine.runtime} {self.engine.version}",
            "threads": self.threads,
            "max_length": self.answerer.max_length,
            "made_of": facts.model if facts is not None else "",
            "task": str(facts.task.get("use", "")) if facts is not None else "",
            "limits": {"items": self.limits.items, "characters": self.limits.characters, "waiting": self.limits.waiting},
            **self.answerer.facts(),
        }

    def page(self, base: str) -> str:
        """The page on which a person tries the model, with its facts and its card."""
        package, card = files("slimformer"), self.served.folder / "README.md"
        style = package.joinpath("reporting/templates/page.css").read_text(encoding="utf-8")
        text = package.joinpath("serving/templates/try.html").read_text(encoding="utf-8")
        return (
            Environment(autoescape=True)
            .from_string(text)
            .render(
                info=self.info(),
                style=Markup(style),
                base=base,
                example=json.dumps(_EXAMPLES[self.answerer.path]),
                card=card.read_text(encoding="utf-8") if card.is_file() else "",
                report=self._report().is_file(),
            )
        )

    def _report(self) -> Path:
        return self.served.folder / "report.html"

    def _routes(self, app: FastAPI) -> FastAPI:
        def answering(path: str, call: Callable[[Any], Awaitable[Any]], kind: type[BaseModel]) -> None:
            async def route(asked: Any) -> Response:
                return _json(await call(asked))

            route.__annotations__["asked"] = kind
            route.__name__ = path.strip("/").replace("/", "_")
            app.post(path)(route)

        answering(Vectors.path, self.embeddings, EmbeddingsAsked)
        answering("/embeddings", self.embeddings, EmbeddingsAsked)
        answering(Classes.path, self.classify, ClassesAsked)
        answering(Spans.path, self.tag, SpansAsked)
        answering(Scores.path, self.rerank, RankingAsked)
        answering("/v1/rerank", self.rerank, RankingAsked)
        app.get("/health")(lambda: _json({"status": "ok"}))
        app.get("/info")(lambda: _json(self.info()))
        app.get("/v1/models")(lambda: _json({"object": "list", "data": [{"id": self.served.name, "object": "model"}]}))
        app.get("/metrics")(lambda: Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST))
        app.get("/")(self._shown_page)
        app.get("/report")(self._shown_report)
        app.add_exception_handler(RequestValidationError, _invalid)
        app.add_exception_handler(StarletteError, _refused)
        app.add_exception_handler(SlimformerError, _mistaken)
        app.add_exception_handler(FullError, _full)
        app.add_middleware(_Guard, web=self)
        return app

    def _shown_page(self, request: Request) -> Response:
        return HTMLResponse(self.page(str(request.base_url).rstrip("/")))

    def _shown_report(self) -> Response:
        if not self._report().is_file():
            raise HTTPException(404, "this folder holds no report.html.")
        return FileResponse(self._report(), media_type="text/html")


class _Guard:
    """Counts and times requests, gives each its id, and stops bodies that are too large while they come in."""

    def __init__(self, app: ASGIApp, web: _Web) -> None:
        self.app, self.web = app, web

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value for name, value in scope["headers"] if name in (b"x-request-id", b"content-length")}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        name = given if 0 < len(given) <= 128 and given.isascii() and given.isprintable() else uuid.uuid4().hex
        start, status, path = time.perf_counter(), 500, _known(scope["path"])
        most, came, begun = self.web.limits.body, 0, False

        async def bounded() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > most:
                raise HTTPException(413, f"a request of more than {most:,} bytes is not read.")
            return message

        async def named(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode("ascii"))]
            await send(message)

        try:
            said = headers.get(b"content-length", b"0")
            if said.isdigit() and int(said) > most:
                await _error(413, f"a request of {int(said):,} bytes is more than the {most:,} that are read.")(
                    scope, receive, named
                )
                return
            await self.app(scope, bounded, named)
        except Exception:
            if begun:
                raise
            await _error(500, f"the server failed at this request ({name}); its log says more.")(scope, receive, named)
            raise
        finally:
            self.web.requests.labels(path, str(status)).inc()
            self.web.seconds.labels(path).observe(time.perf_counter() - start)


def _known(path: str) -> str:
    """The path as a label of metrics; whatever strangers call is one."""
    return path if path in _KNOWN else "other"


# -- Shapes --------------------------------------------------------------------------------------------------------------------


def _some(texts: Sequence[Any]) -> None:
    if not texts:
        raise HTTPException(400, "there is no text.")


def _text(item: str | list[str]) -> TextOrPair:
    return item if isinstance(item, str) else (item[0], item[1])


def _document(item: str | dict[str, Any]) -> str:
    text = item if isinstance(item, str) else item.get("text")
    if not isinstance(text, str):
        raise HTTPException(400, 'a document is a text, or an object with a "text".')
    return text


def _first_of(vector: np.ndarray, count: int, normalize: bool) -> np.ndarray:
    """The first numbers of a vector, brought to length 1 if the whole one has that length."""
    part = vector[:count]
    return part / max(float(np.linalg.norm(part)), 1e-12) if normalize else part


def _floats(vector: np.ndarray) -> list[float]:
    values: list[float] = vector.tolist()
    return values


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


def _json(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "replace"), status, headers, "application/json")


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    kind = _TYPES.get(status, "invalid_request" if status < 500 else "server_error")
    return _json({"error": {"message": readable(message), "type": kind}}, status, headers)


async def _invalid(_: Request, error: Exception) -> Response:
    """The first mistake of a body, with its place."""
    assert isinstance(error, RequestValidationError)
    item = error.errors()[0]
    names = [str(part) for part in item["loc"] if isinstance(part, str) and part != "body"]
    if item["type"] == "json_invalid":
        return _error(400, "the body is no JSON.")
    if not names:
        return _error(400, 'send a JSON object, with the header "content-type: application/json".')
    wanted = _SHAPES.get(names[0])
    said = "it is missing" if item["type"] == "missing" else f"it must be {wanted}" if wanted else str(item["msg"])
    return _error(400, f'"{names[0]}": {said}.')


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteError)
    return _error(error.status_code, str(error.detail))


async def _mistaken(_: Request, error: Exception) -> Response:
    """What the model or its tokenizer cannot do with these texts."""
    assert isinstance(error, SlimformerError)
    return _error(400, " ".join(filter(None, (error.what, error.help))))


async def _full(_: Request, error: Exception) -> Response:
    return _error(429, f"{error} Come again, or ask another server.", {"retry-after": "1"})
