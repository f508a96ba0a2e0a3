"""The one error type that a user of dymoe is meant to read."""


class DymoeError(ValueError):
    """Input that cannot be used; the message names the file, record or key and says what would be right."""
