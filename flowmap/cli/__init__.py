"""The command line, a module for each verb.

Exit 0 on success, 2 with one line on a user's mistake, 3 when a dry run finds that something named is missing on this
machine, 75 when a signal asked it to end (preemption), 1 on a failure.  Each verb's module has `add_arguments(parser)`
and `run(arguments) -> exit code`, and imports what is heavy inside `run`.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

from flowmap.base.distributed import is_child
from flowmap.base.preempt import STATUS, Preempted, preemptible
from flowmap.base.trust import allow_import
from flowmap.cli.parser import parse
from flowmap.cli.terminal import plain_warnings

__all__ = ["main", "parse"]

PATH_MISTAKES = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        for name in arguments.imports or ():
            allow_import(name)
        with plain_warnings(), preemptible():
            return arguments.run(arguments)
    except ValueError as error:  # RecipeError among them: a user's mistake
        return _say_error(error, 2)
    except Preempted as error:
        return _say_error(error, STATUS)
    except KeyboardInterrupt as error:
        return _say_error(str(error) or "interrupted", 1)
    except BrokenPipeError:  # the reader of our output (`| head`) has left
        sys.stderr.close()
        return 0
    except OSError as error:
        return _say_error(error, 2 if error.errno in PATH_MISTAKES else 1)
    except (RuntimeError, ImportError) as error:
        return _say_error(error, 1)


def _say_error(error: object, code: int) -> int:
    if is_child():  # the first process prints it
        return code
    print(f"flowmap: {' '.join(str(error).split())}", file=sys.stderr)
    return code
