"""The one kind of error that is shown to the user as a message, without a traceback."""


class UserError(Exception):
    """A mistake or a condition that the user can mend; the message says what was found and the remedy."""
