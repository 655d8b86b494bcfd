"""The one exception for a user's mistake."""


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, and what would be right.

    A library call raises it. The mains print the line and exit with code 2.
    """


class DivergedError(FloatingPointError):
    """Loss or gradient is NaN or infinite. The message names the step, and the last good checkpoint."""
