"""The tokens of a running service: its file is read again every few seconds, so a token that is taken back ends."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from aldm.errors import UserError
from serve.problems import busy
from serve.security import read_tokens

logger = logging.getLogger(__name__)

READ_S = 2.0
"""How old what is known of the file may be."""


class TokenFile(Mapping[str, str]):
    """Name -> SHA-256 of each token that the file holds now.

    A file that is gone, damaged or empty lets nobody in until it is fixed: what it held before may have been taken
    back. It is never empty, so that it cannot be taken for a service that wants no tokens.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tokens: dict[str, str] = {}
        self._read_at = -math.inf
        self._wrong = ""

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names; raises Problem 503 while the file cannot be used."""
        self._refresh()
        if self._wrong:
            raise busy("the service's file of tokens cannot be used, so nobody is let in", 10)
        return iter(self._tokens)

    def __getitem__(self, name: str) -> str:
        """Return the hash of a token, as the last iteration found it."""
        return self._tokens[name]

    def __len__(self) -> int:
        """Return how many there are, at least 1."""
        return max(1, len(self._tokens))

    def _refresh(self) -> None:
        """Read the file, unless it was read a moment ago."""
        now = time.monotonic()
        if now - self._read_at < READ_S:
            return
        self._read_at = now
        try:
            self._tokens, wrong = read_tokens(self._path), ""
        except UserError as error:
            self._tokens, wrong = {}, str(error)
        if wrong and wrong != self._wrong:
            logger.error("%s; nobody is let in until it is fixed", wrong)
        elif self._wrong and not wrong:
            logger.warning("%s can be used again", self._path)
        self._wrong = wrong
