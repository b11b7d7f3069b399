"""The errors a user can mend: one line that names the field or file, the value and the mend."""


class UserError(ValueError):
    """A wrong setting, file or model. Commands print it as one line and exit with code 2."""


class SharedError(UserError):
    """An error that every process of a distributed run gets; the first one says so."""


class DivergenceError(UserError):
    """Training produced a loss or weights that are not finite, or a model that is measured does."""
