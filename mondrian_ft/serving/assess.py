"""The page on which a person prefers one of two critiques without knowing whose they are.

    GET  /                                the page: one file, no script or font from elsewhere
    GET  /api/pairs                       every pair in short, and how many are judged
    GET  /api/pairs/{index}               one pair: the two critiques, left and right
    POST /api/pairs/{index}/judgement     what a person preferred
    POST /api/pairs/{index}/reference     the reference; that it was shown is kept
    POST /api/reveal                      which was which, once every pair is judged
    GET  /photographs/{index}             the upright photograph

Blind: nothing that is sent before the reveal depends on which arm stands where, but for the texts
themselves. An answer that can be read is sent as its critique alone, so that spaces, fences and
the order of keys betray nothing. After the reveal nothing is judged any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from ..errors import DataError
from ..evaluation import assessments
from ..evaluation.assessments import Assessments, Choice, Judgement, Pair
from ..evaluation.metrics import dimension_key, read
from .local import Guard
from .pages import Refused, check_picture, fresh, make_page_app, picture

CHANGED = "since it was evaluated, so it is not shown."
LONGEST = 20_000
"""Characters shown of an answer that cannot be read."""


class Judged(BaseModel):
    """The body of a judgement; ``key`` says which two texts the person looked at."""

    model_config = ConfigDict(extra="forbid")

    key: str
    choice: Choice
    remark: str = Field(default="", max_length=2000)
    seconds: float = Field(default=0.0, ge=0, le=86_400, allow_inf_nan=False)


class Asked(BaseModel):
    """The body of a request that says nothing but what it is about."""

    model_config = ConfigDict(extra="forbid")

    key: str = ""


class Desk:
    """The pairs in the order they are shown, and what one reviewer said; safe with threads.

    Args:
        pairs: of the report, in its order.
        found: the judgements so far; those of other answers do not count, nor do other people's.
        adapter: hash of the adapter, part of the draw of order and sides.
        seed: of the draw.
        reviewer: who judges.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        found: Assessments,
        *,
        adapter: str | None,
        seed: int = 0,
        reviewer: str | None = None,
    ) -> None:
        self.pairs = assessments.shuffled(pairs, seed, adapter)
        self.path = found.path
        self.revealed = False
        self._adapter, self._seed, self._reviewer = adapter, seed, reviewer
        self._shown: set[str] = set()
        self._lock = threading.Lock()
        self._latest: dict[str, Judgement] = {}
        for pair in self.pairs:
            judgement = found.latest.get((pair.job_id, reviewer))
            if judgement is not None and assessments.fits(judgement, pair):
                self._latest[pair.job_id] = judgement

    def counts(self) -> dict[str, int]:
        """Pairs ``judged``, ``left`` to judge, and ``all``."""
        judged = len(self._latest)
        return {"judged": judged, "left": len(self.pairs) - judged, "all": len(self.pairs)}

    def brief(self, index: int) -> dict[str, Any]:
        """A pair for a list. ``choice`` is a side as it stands now, whatever it was then."""
        pair = self.pair(index)
        return {"index": index, "image": pair.image, "choice": self._choice(pair)}

    def whole(self, index: int) -> dict[str, Any]:
        """A pair with its two sides."""
        pair = self.pair(index)
        judgement = self._latest.get(pair.job_id)
        left, right = self._sides(pair)
        return {
            **self.brief(index),
            "key": self._key(pair),
            "problem": self._problem(pair),
            "left": side(left),
            "right": side(right),
            "same": left == right,
            # Of the reference: one side's own order must not come first.
            "order": list(read(pair.reference).scores),
            "has_reference": bool(pair.reference.strip()),
            "remark": judgement.remark if judgement else "",
        }

    def reference(self, index: int) -> dict[str, Any]:
        """The reference as a side; that it was looked at goes with the judgement."""
        pair = self.pair(index)
        if not pair.reference.strip():
            raise Refused(404, "The report holds no reference for this photograph.")
        with self._lock:
            self._shown.add(pair.job_id)
        return side(pair.reference)

    def pair(self, index: int) -> Pair:
        """Raises `Refused` (404) if there is no such pair."""
        if not 0 <= index < len(self.pairs):
            raise Refused(404, f"There is no photograph {index}; there are {len(self.pairs)}.")
        return self.pairs[index]

    def judge(self, index: int, wanted: Judged) -> None:
        """Write a judgement; when this returns it is on the disk.

        Raises:
            Refused: the pair is another one than the person saw, or which was which is known (409),
                or the judgement cannot be written down (422).
            MondrianError: the file cannot be written.
        """
        pair = self.pair(index)
        if wanted.key != self._key(pair):
            raise Refused(409, "This pair is another one now than on the page; load it again.")
        with self._lock:
            if self.revealed:
                raise Refused(409, "Which was which is known; nothing is judged any more.")
            # A mistaken key pressed on a pair that is not judged is no event.
            if wanted.choice is Choice.UNDO and pair.job_id not in self._latest:
                return
            try:
                judgement = assessments.judge(
                    pair,
                    wanted.choice,
                    left=self._left(pair),
                    adapter=self._adapter,
                    remark=wanted.remark.strip(),
                    seconds=wanted.seconds,
                    reviewer=self._reviewer,
                    reference_shown=pair.job_id in self._shown,
                )
            except DataError as error:
                raise Refused(422, str(error)) from None
            assessments.append(self.path, judgement)
            if wanted.choice is Choice.UNDO:
                del self._latest[pair.job_id]
            else:
                self._latest[pair.job_id] = judgement

    def reveal(self) -> dict[str, Any]:
        """Everyone's counts, and of each pair who stood where; nothing is judged after it.

        Raises:
            Refused: a pair is not judged yet (403).
        """
        with self._lock:
            if left := self.counts()["left"]:
                noun = "photograph is" if left == 1 else "photographs are"
                raise Refused(403, f"{left} {noun} not judged yet; which was which is told then.")
            self.revealed = True
        # All that is on the disk, so that several people's judgements are counted together.
        people = assessments.summarise(self.pairs, assessments.read(self.path))
        return {
            "people": people,
            "sentence": assessments.sentence(people),
            "notes": assessments.notes(people),
            "pairs": [
                {
                    "index": index,
                    "image": pair.image,
                    "left": self._left(pair),
                    "preferred": self._latest[pair.job_id].preferred,
                    "remark": self._latest[pair.job_id].remark,
                }
                for index, pair in enumerate(self.pairs)
            ],
        }

    def _left(self, pair: Pair) -> assessments.Arm:
        return assessments.left_of(self._seed, self._adapter, pair.job_id)

    def _sides(self, pair: Pair) -> tuple[str, str]:
        return (pair.base, pair.tuned) if self._left(pair) == "base" else (pair.tuned, pair.base)

    def _key(self, pair: Pair) -> str:
        return assessments.sha256_text("\0".join((pair.job_id, *self._sides(pair))))

    def _choice(self, pair: Pair) -> str | None:
        """With another seed than then, what was left may stand on the right now."""
        judgement = self._latest.get(pair.job_id)
        if judgement is None:
            return None
        if judgement.preferred == "equal":
            return "equal"
        return "left" if judgement.preferred == self._left(pair) else "right"

    def _problem(self, pair: Pair) -> str:
        """Why the photograph cannot be shown; blank if it can."""
        if not pair.image_path:
            return "The report does not say where the photograph is."
        try:
            check_picture(Path(pair.image_path), pair.image_sha256, CHANGED)
        except DataError as error:
            return str(error)
        return ""


def side(text: str) -> dict[str, Any]:
    """An answer as both sides show theirs: its critique's parts, or its text where it has none.

    Dimensions have a ``key`` under which the other side's is found.
    """
    critique = read(text).critique
    if critique is None:
        return {"text": text[:LONGEST] or "(no answer)"}
    return {
        "critique": {
            "description": critique.image_description.strip(),
            "dimensions": [
                {
                    "key": dimension_key(one.name),
                    "name": one.name.replace("_", " ").strip(),
                    "score": one.score,
                    "comment": one.comment.strip(),
                    "advice": one.recommendation.strip(),
                }
                for one in critique.dimensions
            ],
            "overall": critique.overall_score,
            "strengths": critique.key_strengths,
            "improvements": critique.priority_improvements,
            "notes": critique.technical_notes.strip(),
        }
    }


def make_app(
    desk: Desk, *, host: str = "127.0.0.1", on_reveal: Callable[[], object] = lambda: None
) -> FastAPI:
    """The application; ``host`` is what it will listen on, see `local.Guard`.

    ``on_reveal`` is called when which was which has been told.
    """
    app = make_page_app("assess")

    @app.get("/api/pairs")
    def pairs() -> JSONResponse:
        found = [desk.brief(index) for index in range(len(desk.pairs))]
        return fresh(
            {
                "pairs": found,
                "counts": desk.counts(),
                "file": desk.path.name,
                "revealed": desk.revealed,
            }
        )

    @app.get("/api/pairs/{index}")
    def pair(index: int) -> JSONResponse:
        return fresh(desk.whole(index))

    @app.post("/api/pairs/{index}/judgement")
    def judgement(index: int, wanted: Judged) -> JSONResponse:
        desk.judge(index, wanted)
        return fresh({"pair": desk.brief(index), "counts": desk.counts()})

    @app.post("/api/pairs/{index}/reference")
    def reference(index: int, asked: Asked) -> JSONResponse:
        return fresh(desk.reference(index))

    @app.post("/api/reveal")
    def reveal(asked: Asked) -> JSONResponse:
        told = desk.reveal()
        on_reveal()
        return fresh(told)

    @app.get("/photographs/{index}")
    def photograph(index: int) -> Response:
        found = desk.pair(index)
        if not found.image_path:
            raise Refused(404, "The report does not say where this photograph is.")
        try:
            data = picture(Path(found.image_path), found.image_sha256, CHANGED)
        except DataError as error:
            raise Refused(404, str(error)) from None
        # Kept while the page is open; another start may show another photograph here.
        return Response(
            data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=600"}
        )

    app.add_middleware(Guard, host=host)
    return app
