"""Which names may be believed that somebody else gave: of a tar's members, of files in a list, a manifest, a listing."""

from pathlib import Path, PurePosixPath


def is_safe(name: str) -> bool:
    """Whether it names a file of whatever directory it is put into, or of one below: relative, without `..`, as short as it can
    be written, of characters that can be printed (so no NUL, no line break, nothing that is not UTF-8).

    Links are not looked at: who can make one in a directory can write there.
    """
    path = PurePosixPath(name)
    goes_down = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return goes_down and str(path) == name and name.isprintable()


def is_below(name: str, root: Path) -> bool:
    """The same of a name that may also be absolute, if it then begins with `root`, or have a `./` too many."""
    path = PurePosixPath(name)
    if path.is_absolute():
        try:
            path = path.relative_to(PurePosixPath(root.absolute()))
        except ValueError:
            return False
    return is_safe(str(path))
