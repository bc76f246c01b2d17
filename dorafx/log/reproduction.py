"""The script that rebuilds a captured graph, as a log keeps it."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Reproduction:
    """A script, compressed, or why there is none.

    Attributes:
        key: a digest of what the script computes; graphs that compute the same have the same.
        packed: the script, compressed; empty if there is none.
        left_out: what of the graph could not be rebuilt, one sentence each; why there is no script, if there is none.
    """

    key: str
    packed: bytes
    left_out: tuple[str, ...] = ()

    @staticmethod
    def of(script: str, program: str, left_out: tuple[str, ...] = ()) -> Reproduction:
        """Args:
        script: the whole file.
        program: the part of it that decides what is computed, without comments.
        left_out: see above.
        """
        digest = hashlib.sha256(program.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return Reproduction(digest, zlib.compress(script.encode("utf-8", "replace"), 6), left_out)

    @staticmethod
    def impossible(why: str) -> Reproduction:
        """Where there is no script."""
        return Reproduction(hashlib.sha256(why.encode("utf-8", "surrogatepass")).hexdigest()[:16], b"", (why,))

    @property
    def script(self) -> str:
        """The file's text; empty if there is none."""
        return zlib.decompress(self.packed).decode("utf-8") if self.packed else ""
