"""Arguments that are taken out of a command line before the rest of it is parsed."""


def take(owner: str, arguments: list[str], flag: str) -> str | None:
    """Remove the first "--flag VALUE" or "--flag=VALUE" and return the value; None if there is none.

    Raises:
        ValueError: the flag is the last argument; in the name of `owner`.
    """
    for i, argument in enumerate(arguments):
        if argument == flag:
            if i + 1 == len(arguments):
                raise ValueError(f"{owner}: `{flag}` needs a value.")
            del arguments[i]
            return arguments.pop(i)
        if argument.startswith(f"{flag}="):
            return arguments.pop(i).removeprefix(f"{flag}=")
    return None
