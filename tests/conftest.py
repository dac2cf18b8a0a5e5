"""What every test run has: an end. A process that does not exit after its tests fails, and says where it hangs."""

from __future__ import annotations

import faulthandler

EXIT_SECONDS = 120


def pytest_unconfigure() -> None:
    """Data workers, thread pools and libraries all have their say at exit, and any of them can wait for ever."""
    faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True)
