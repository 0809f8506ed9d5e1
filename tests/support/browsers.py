"""Find a browser that runs without a window: a Chromium, or the one that COMQ_BROWSER names."""

from __future__ import annotations

import os
import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
BROWSER = os.environ.get("COMQ_BROWSER") or next((path for name in NAMES if (path := shutil.which(name))), None)
MISSING = f"no browser is installed: none of {', '.join(NAMES)}"
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
