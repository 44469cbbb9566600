"""Two ways in which a program ends early. command_line.py makes a sentence and an exit code of them."""


class UserError(ValueError):
    """A mistake that the user can mend: exit code 2, nothing written."""


class Fault(Exception):
    """Something broke on the way: exit code 1, the last checkpoint is kept."""
