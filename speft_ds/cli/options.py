"""What the help of commands is made of. Imports nothing."""


def examples(*commands: str) -> str:
    """The end of a command's help."""
    return "\n  ".join(["Examples:", *commands])
