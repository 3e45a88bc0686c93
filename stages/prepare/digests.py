"""A set of digests that stays small: what is seen of millions of conversations is kept in it."""

_WIDTH = 16  # bytes of a digest that are kept: no two of a billion conversations will share them
_FREE = bytes(_WIDTH)


class DigestSet:
    """Hashing with open addressing and linear probing, in one flat table of bytes.

    The table is a quarter to half full: 32 to 64 bytes a digest, where Python's own set of bytes
    takes 110 to 150.
    """

    def __init__(self) -> None:
        self._table = bytearray(_WIDTH << 10)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, digest: bytes) -> bool:
        at = self._place(digest[:_WIDTH])
        return self._table[at : at + _WIDTH] != _FREE

    def add(self, digest: bytes) -> bool:
        """Add a digest of at least 16 bytes.

        Returns:
            Whether it is new.
        """
        key = digest[:_WIDTH]
        at = self._place(key)
        if self._table[at : at + _WIDTH] == key:
            return False
        self._table[at : at + _WIDTH] = key
        self._count += 1
        if 2 * _WIDTH * self._count > len(self._table):
            self._grow()
        return True

    def _place(self, key: bytes) -> int:
        """Where in the table a key stands, or else the free place that it would take."""
        table, size = self._table, len(self._table)
        # The first bytes of a digest are as good as any hash of it.
        at = int.from_bytes(key[:8]) * _WIDTH % size
        while (found := table[at : at + _WIDTH]) != key and found != _FREE:
            at = (at + _WIDTH) % size
        return at

    def _grow(self) -> None:
        old, self._table = self._table, bytearray(2 * len(self._table))
        for begin in range(0, len(old), _WIDTH):
            key = bytes(old[begin : begin + _WIDTH])
            if key != _FREE:
                at = self._place(key)
                self._table[at : at + _WIDTH] = key
