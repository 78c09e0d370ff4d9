"""Which model answers a request: the modes, and the keyed draw of an A/B test.

The draw is a keyed hash (BLAKE2b, RFC 7693) of who asks. With the secret kept in the service's
folder it is the same after a restart, and nobody who only chooses ids can choose an arm.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ..errors import ServerError, nearest
from .protocol import BASE


class Mode(StrEnum):
    """How the arm of a request is chosen."""

    base = "base"
    fine_tuned = "fine_tuned"
    ab_test = "ab_test"


OLD_NAMES = {"baseline": Mode.base, "lora": Mode.fine_tuned}
"""What older clients of the advisor service call two of the modes (facts: "The jobs table")."""


class UnknownMode(ValueError):
    """A mode that there is not; ``str()`` is the sentence."""


def mode_of(name: str) -> Mode:
    """The mode that a request's ``mode`` means, old names included.

    Raises:
        UnknownMode: there is none; another one is never taken in its place.
    """
    plain = name.strip().lower()
    if plain in OLD_NAMES:
        return OLD_NAMES[plain]
    try:
        return Mode(plain)
    except ValueError:
        meant = nearest(plain, [*Mode, *OLD_NAMES])
        hint = f"did you mean {meant}?" if meant else f"there are {', '.join(Mode)}."
        raise UnknownMode(f"There is no mode {name[:80]!r}; {hint}") from None


@dataclass(frozen=True)
class Choice:
    """The arm of one request.

    Attributes:
        arm: what the model is asked for.
        used: what ``jobs.model_used`` says: ``base``, ``fine_tuned``, ``ab_test_base`` or
            ``ab_test_fine_tuned``.
    """

    arm: str
    used: str


class Router:
    """Chooses arms.

    Args:
        mode: what happens to a request that names no mode.
        split: share (0 to 1) of an A/B test that goes to the tuned model.
        adapter: the tuned arm; None if there is none.
        adapters: the tuned arms of single advisors, by id; they come before ``adapter``.
        secret: key of the draw, 16 to 64 bytes.
    """

    def __init__(
        self,
        mode: Mode,
        split: float,
        adapter: str | None,
        adapters: Mapping[str, str],
        secret: bytes,
    ) -> None:
        self.mode, self.split, self.adapter = mode, split, adapter
        self.adapters = dict(adapters)
        self._secret = secret

    def tuned(self, advisor: str) -> str | None:
        """The tuned arm of an advisor; None if there is none."""
        return self.adapters.get(advisor, self.adapter)

    def draw(self, key: str, what: str = "arm") -> float:
        """A number in [0, 1) that depends on the key, the secret and ``what`` is drawn alone."""
        text = f"{what}\0{key}".encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(text, key=self._secret, digest_size=8).digest()
        # 53 bits, as many as a float holds exactly: 64 would round the largest up to 1.
        return (int.from_bytes(digest) >> 11) / 2**53

    def choose(self, advisor: str, key: str, mode: Mode | None = None) -> Choice:
        """The arm of one advisor's answer to whoever ``key`` names.

        A request that asks for ``base`` or ``fine_tuned`` takes no part in a test, and is not
        counted with it.

        Raises:
            ServerError: the tuned model is wanted and there is none.
        """
        mode = mode or self.mode
        if mode is Mode.base:
            return Choice(BASE, "base")
        tuned = self.tuned(advisor)
        if tuned is None:
            raise ServerError(
                f"mode={mode} needs an adapter, and this service has none for {advisor}; start it "
                "with task.adapter or serve.adapters, or ask for mode=base."
            )
        if mode is Mode.fine_tuned:
            return Choice(tuned, "fine_tuned")
        if self.draw(key) < self.split:
            return Choice(tuned, "ab_test_fine_tuned")
        return Choice(BASE, "ab_test_base")


def secret_of(folder: Path) -> bytes:
    """The service's own 32 secret bytes, drawn once and kept in ``<folder>/secret``, mode 600.

    Raises:
        ServerError: the file cannot be read or made, or holds something else.
    """
    path = folder / "secret"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32))
                file.flush()
                os.fsync(file.fileno())
        secret = bytes.fromhex(path.read_text(encoding="ascii"))
    except OSError as error:
        raise ServerError(
            f"{path} cannot be used: {error.strerror}; set serve.state_dir to a folder that may be "
            "written."
        ) from None
    except ValueError:
        secret = b""
    if len(secret) != 32:
        raise ServerError(
            f"{path} does not hold the 64 hexadecimal digits that arms of an A/B test are drawn "
            "with; put it back from a backup, or remove it: then arms are drawn anew."
        )
    return secret
