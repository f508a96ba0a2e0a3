"""Which numbers can be computed with."""

SMALLEST, LARGEST = 1e-30, 1e30
WORKABLE = f"0 or a number between {SMALLEST:g} and {LARGEST:g} in size"


def workable(value: float) -> bool:
    """Whether a number, and its inverse, are far from where single precision ends; infinity and nan are not.

    >>> workable(0.01), workable(1e-320), workable(float("inf"))
    (True, False, False)
    """
    return value == 0 or SMALLEST <= abs(value) <= LARGEST
