"""The command line of every stage: tyro parses the flags, and a user's mistake is one line without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any


class PartialFailure(ValueError):
    """Some items of a command failed; the message names them. results: those of the others."""

    def __init__(self, message: str, results: Any = None) -> None:
        super().__init__(message)
        self.results = results


def run(stage: Callable[..., Any] | Mapping[str, Callable[..., Any]]) -> Any:
    """Call `stage` with the flags of this process. Of several stages, the first word names one.

    Exit codes: 2 with a message for a ValueError, a disk error and a lack of memory; 1 for a PartialFailure; 130 for
    Ctrl-C.
    """
    import tyro
    from safetensors import SafetensorError

    from distill.layout import program_name
    from distill.terminal import escape_for_terminal, fail

    config = (tyro.conf.OmitArgPrefixes,)
    try:
        if isinstance(stage, Mapping):
            return tyro.extras.subcommand_cli_from_dict(
                dict(stage), config=config, use_underscores=True, prog=program_name()
            )
        return tyro.cli(stage, config=config, use_underscores=True, prog=program_name())
    except PartialFailure as error:
        sys.exit(f"error: {escape_for_terminal(str(error))}")
    except ValueError as error:
        fail(str(error))
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        from distill.training.checkpoint import describe_disk_error

        reason = describe_disk_error(error)
        if reason is None and not isinstance(error, SafetensorError) and getattr(error, "filename", None) is None:
            raise
        fail(f"{reason}, then run the same command again" if reason else str(error))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was complete is kept, run the same command again\n")
        raise SystemExit(130) from None
