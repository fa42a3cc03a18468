"""The command line of every stage: flags by tyro, a user's mistake as one line without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def run(stage: Callable[..., Any]) -> Any:
    """Call `stage` with the flags of this process; a ValueError ends it with its message and exit code 1."""
    import tyro

    try:
        return tyro.cli(stage, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; what was complete is kept, run the same command again")
