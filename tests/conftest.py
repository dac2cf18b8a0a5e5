"""What every test run has: an end. A process that does not exit after its tests fails, and says where it hangs."""

from __future__ import annotations

import faulthandler
import importlib.util

from paths import ROOT

import recog_fast

EXIT_SECONDS = 120

# A checkout that was never installed (a GPU machine) has the kernels beside the package.
if importlib.util.find_spec("recog_fast.triton_kernels") is None:
    recog_fast.__path__.append(str(ROOT))


def pytest_unconfigure() -> None:
    """Data workers, thread pools and libraries all have their say at exit, and any of them can wait for ever."""
    faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True)
