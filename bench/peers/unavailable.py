"""How a peer says that it cannot run here."""


class Unavailable(Exception):
    """The reason why a peer is left out: not installed, or not made for this case."""
