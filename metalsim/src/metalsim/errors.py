"""What the simulator raises."""


class MetalError(RuntimeError):
    """Anything Metal would reject, or that a checked run found wrong."""


class CompileError(MetalError):
    """The source does not compile, or Apple's compiler would reject it."""


class LaunchError(MetalError):
    """The arguments or the sizes of a dispatch are not ones Metal accepts."""


class KernelError(MetalError):
    """A kernel did something wrong while it ran: the message names kernel, place and thread."""
