"""The one exception a user of the command line ever sees.

Everything a user can cause (a misspelt key, a missing model, a full disk) is raised as `UserError`
with one line that names the field, file or row and the remedy. Anything else is a bug.
"""


class UserError(Exception):
    """Bad input or environment: one line, naming what is wrong and what to do about it."""


class CorruptArtefact(UserError):
    """A stored file is missing, truncated or does not match the checksum in its manifest."""


class Diverged(UserError):
    """A training whose numbers cannot be judged: with these hyper-parameters it never will."""


class Stopped(Exception):
    """The work was asked to stop (Ctrl-C, cancellation); what is committed stays, the rest resumes."""
