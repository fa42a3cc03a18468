"""The command line of every stage: flags by tyro, a user's mistake as one line without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any


def run(stage: Callable[..., Any] | Mapping[str, Callable[..., Any]]) -> Any:
    """Call `stage`, or the one of several that the first word names, with the flags of this process.

    A ValueError ends it with its message and exit code 1.
    """
    import tyro

    from distill.config import visible

    config = (tyro.conf.OmitArgPrefixes,)
    try:
        if isinstance(stage, Mapping):
            return tyro.extras.subcommand_cli_from_dict(dict(stage), config=config, use_underscores=True)
        return tyro.cli(stage, config=config, use_underscores=True)
    except ValueError as error:
        sys.exit(f"error: {visible(str(error))}")
    except KeyboardInterrupt:
        sys.exit("interrupted; what was complete is kept, run the same command again")
