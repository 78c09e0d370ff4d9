"""Adapters of the tiny model, asks, and engines to put them to."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mondrian_ft.evaluation.probing import probe_inputs
from mondrian_ft.model import adapter as adapters
from mondrian_ft.model import lora
from mondrian_ft.model.features import FeatureStore
from mondrian_ft.serving.arms import Arms
from mondrian_ft.serving.engine import Engine
from mondrian_ft.serving.protocol import Answer, Ask, Event, Failure

PROMPTS = ("Judge it.", "Judge this photograph at length, please, and leave nothing out.", "?")
SIZES = ((64, 96), (128, 64), (96, 96), (64, 64), (160, 64))


def save_adapter(lab: Any, base: Any, folder: Path, **changes: Any) -> Path:
    """An adapter directory with a proof; the model is its base again."""
    spec = lab.attach(base, **changes)
    inputs = probe_inputs(base, lab.settings)
    adapters.save(
        folder,
        base,
        spec,
        pixels={"min_pixels": 1024, "max_pixels": 16384, "fingerprint": inputs.pixels},
        prompts=[],
        data_lock="d" * 64,
        facts={},
        probe=inputs,
    )
    lora.detach(base.model)
    return folder


def picture(number: int) -> bytes:
    """A photograph of noise, the same for the same number."""
    width, height = SIZES[number % len(SIZES)]
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def make_ask(number: int, arm: str = "base", **changes: Any) -> Ask:
    """An ask with a picture and a prompt that depend on its number."""
    values: dict[str, Any] = {"max_tokens": 24, "constrained": False, **changes}
    values.setdefault("prompt", PROMPTS[number % len(PROMPTS)])
    return Ask(f"ask{number}", values.pop("image", None) or picture(number), arm=arm, **values)


class Bench:
    """An engine on the tiny model, and the events it sent."""

    def __init__(self, lab: Any, base: Any, *, folders: Any = (), **options: Any) -> None:
        lora.detach(base.model)  # what another engine left in it
        self.events: list[Event] = []
        places = {
            key: options.pop(key)
            for key in ("root", "name", "most", "merge_bytes")
            if key in options
        }
        self.arms = Arms(
            base, probe_inputs(base, lab.settings), folders=[str(f) for f in folders], **places
        )
        self.features = FeatureStore(base.backbone)
        options.setdefault("max_tokens", 64)
        self.engine = Engine(
            base, self.arms, lab.settings, self.features, self.events.append, **options
        )

    def ends(self) -> dict[str, Answer | Failure]:
        """How each ask ended; none ends twice."""
        ended = [event for event in self.events if isinstance(event, Answer | Failure)]
        assert len({event.id for event in ended}) == len(ended)
        return {event.id: event for event in ended}

    def alone(self, asks: list[Ask]) -> dict[str, Answer | Failure]:
        """Each when the one before has ended."""
        self.events.clear()
        for ask in asks:
            self.engine.submit(ask)
            self.engine.run()
        return self.ends()

    def together(self, asks: list[Ask], *, turns: int = 0) -> dict[str, Answer | Failure]:
        """All under way at once, each coming so many turns after the one before."""
        self.events.clear()
        for ask in asks:
            self.engine.submit(ask)
            for _ in range(turns):
                self.engine.turn()
        self.engine.run()
        return self.ends()


def said(ends: dict[str, Answer | Failure]) -> dict[str, Any]:
    """What matters of answers: everything but the times."""
    assert all(isinstance(end, Answer) for end in ends.values()), ends
    return {
        end.id: (end.text, end.tokens, end.finished, end.prompt_tokens, end.identity)
        for end in ends.values()
        if isinstance(end, Answer)
    }
