"""What the kernels raise on purpose."""


class KernelInputError(ValueError):
    """An argument that an op cannot take; the message says what was found and what was expected."""
