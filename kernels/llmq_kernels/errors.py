"""The exception that the kernels raise on purpose, and their warning category."""


class KernelInputError(ValueError):
    """An argument that an op does not accept; the message states what was found and what was expected."""


class KernelWarning(UserWarning):
    """A slower path is used than the one requested or usual; the message states why."""
