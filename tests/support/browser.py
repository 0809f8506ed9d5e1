"""Look at pages in a real browser: a Chromium (`apt-get install chromium`), or the one whose path is in COMQ_BROWSER.

COMQ_SCREENSHOTS names a folder for pictures to look at.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
BROWSER = os.environ.get("COMQ_BROWSER") or next((path for name in NAMES if (path := shutil.which(name))), None)
SCREENSHOTS = os.environ.get("COMQ_SCREENSHOTS")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"no browser is installed: none of {', '.join(NAMES)}")
# of a phone, and of a desktop
WIDTHS = (390, 1280)


def open_page(address: str, profile: Path, dark: bool, *options: str) -> str:
    """Open an address in the browser, and return what it prints; profile: a folder that the browser may use."""
    assert BROWSER is not None
    command = [
        BROWSER, *OPTIONS, "--hide-scrollbars",
        f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=9000", *options, address,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
