"""What the kernels raise on purpose, and what they warn with."""


class KernelInputError(ValueError):
    """An argument that an op cannot take; the message says what was found and what was expected."""


class KernelWarning(UserWarning):
    """A slower way is taken than the one that was asked for or could be had; the message says why."""
