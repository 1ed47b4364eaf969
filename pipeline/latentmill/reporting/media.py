"""Pictures and players as data URIs, within the size that a page may have."""

from __future__ import annotations

from dataclasses import dataclass

from latentmill.pictures.drawing import Picture
from latentmill.pictures.opus import opus, opus_uri
from latentmill.record import FloatArray

PAGE_BYTES = 15_000_000  # what mail servers usually accept
TEXT_BYTES = 3_000_000  # kept for everything but pictures and players
PLAYERS = 100


@dataclass(frozen=True)
class Image:
    """A picture in the page."""

    uri: str
    width: int
    height: int
    scale: str


@dataclass
class Budget:
    """What can still be added to a page.

    Attributes:
        bytes: Characters of data URIs.
        players: Number of players.
        left_out: Number of pictures and players for which there was no space.
    """

    bytes: int = PAGE_BYTES - TEXT_BYTES
    players: int = PLAYERS
    left_out: int = 0

    def image(self, picture: Picture) -> Image | None:
        """A picture; None if there is no space."""
        uri = picture.uri
        if not self._take(len(uri)):
            return None
        return Image(uri, picture.width, picture.height, picture.scale)

    def player(self, audio: FloatArray | None, rate: int, kbps: int) -> str | None:
        """The address of a sound; None if there is no sound or no space."""
        if audio is None or not audio.size:
            return None
        if not self.players:
            self.left_out += 1
            return None
        uri = opus_uri(opus(audio, rate, kbps=kbps))
        if not self._take(len(uri)):
            return None
        self.players -= 1
        return uri

    def _take(self, size: int) -> bool:
        if size > self.bytes:
            self.left_out += 1
            return False
        self.bytes -= size
        return True
