"""The one kind of error that a user can mend, and how a script reads its arguments and reports errors."""

import argparse
import difflib
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path


def one_line(text: object) -> str:
    """text with every character that does not print, such as a line break, as its escape sequence."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


class UserError(Exception):
    """Wrong input: one line that says what is wrong, where, and what to do."""

    def __init__(self, message: object):
        super().__init__(one_line(message))


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; did you mean NAME?" for the most similar of names, or the list of all if none is similar."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; valid are {', '.join(names)}"


def argument_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is `doc`. A wrong argument is one line, and options have no shorter forms."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                   usage=argparse.SUPPRESS, allow_abbrev=False)


def run_script(main: Callable[[], int]) -> None:
    """Exit with main()'s status. A UserError, a system error or a lack of memory becomes one line and status 2."""
    name = Path(sys.argv[0]).name
    sys.stdout.reconfigure(errors="surrogateescape")  # a path need not be UTF-8
    warnings.formatwarning = lambda message, *_, **__: f"{name}: warning: {one_line(message)}\n"
    try:
        sys.exit(main())
    except (UserError, OSError, FloatingPointError) as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, OSError):  # a UserError: once, by rank 0
            print(f"{name}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:  # RuntimeError: of torch, whose other ones are faults of the code
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        print(f"{name}: error: not enough memory: {''.join(str(error).splitlines()[:1])}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
