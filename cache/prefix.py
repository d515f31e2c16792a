"""Which full page holds which prefix: a hash chain over the tokens of full pages.

The key of page i is a digest of the key of page i - 1 and of the tokens of page i, so that equal
keys mean equal prefixes. The chain starts from everything that changes what is stored: the model,
the adapter's content (never its name), the backend's own salt and the tenant. Token ids are
compared on every hit all the same: a collision must not serve another prompt's keys.
"""

from array import array
from collections.abc import Sequence as Tokens
from hashlib import blake2b


def _digest(*parts: bytes) -> bytes:
    # Length-prefixed, so that ("ab", "c") and ("a", "bc") differ.
    state = blake2b(digest_size=32)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def _token_bytes(tokens: Tokens[int]) -> bytes:
    return array("I", tokens).tobytes()


class PrefixIndex:
    """Key to page and back. Holds no reference: the pool keeps idle pages until it evicts them."""

    def __init__(self, identity: str, salt: tuple[str, ...]) -> None:
        """`identity` names the model, `salt` everything else that changes stored bytes."""
        self._root = _digest(b"kvfold", identity.encode(), *(part.encode() for part in salt))
        self._page_of: dict[bytes, int] = {}
        self._entry_of: dict[int, tuple[bytes, bytes]] = {}

    def root(self, generation: bytes, tenant: str) -> bytes:
        """First key of the chain, for one adapter content and one tenant."""
        return _digest(self._root, generation, tenant.encode())

    @staticmethod
    def extend(key: bytes, tokens: Tokens[int]) -> bytes:
        """Key of the page that holds `tokens` after the page with `key`."""
        return _digest(key, _token_bytes(tokens))

    def find(self, key: bytes, tokens: Tokens[int]) -> int | None:
        """The page stored under `key`, if it holds exactly these tokens."""
        page = self._page_of.get(key)
        if page is None or self._entry_of[page][1] != _token_bytes(tokens):
            return None
        return page

    def publish(self, key: bytes, tokens: Tokens[int], page: int) -> None:
        """Offer a full page for later hits; the first page published under a key stays."""
        if key not in self._page_of:
            self._page_of[key] = page
            self._entry_of[page] = (key, _token_bytes(tokens))

    def holds(self, page: int) -> bool:
        """Whether the page can be hit."""
        return page in self._entry_of

    def forget(self, page: int) -> None:
        """The page is about to be overwritten."""
        key, _ = self._entry_of.pop(page)
        del self._page_of[key]
