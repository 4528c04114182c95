"""The one exception that stands for a mistake of the user."""


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong, where, and what to do.

    `vlmscope.app` prints it as `error: ...` without a traceback and exits with code 2. Broken invariants of the
    program itself are `assert`s or other exceptions, which do show a traceback.
    """
