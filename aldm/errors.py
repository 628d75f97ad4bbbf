"""The error that a user can fix."""


class UserError(ValueError):
    """Something that the user gave cannot be used: the message says what, where, wanted, got, and the way out.

    It names parameters in backticks (`max_voxels`) and settings as assignments (`codec.kind=haar`): the command line
    makes flags of them, the service fields of its form. The command line prints the message without a traceback and
    exits with code 2; every other exception is a bug of ours and keeps its traceback.
    """


class NotFiniteError(UserError):
    """A loss or gradient that is not finite: every rank of a training meets it in the same step."""
