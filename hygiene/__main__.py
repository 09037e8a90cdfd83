"""``python -m hygiene`` is the command ``hygiene``."""

from __future__ import annotations

import sys

from hygiene.cli import main

if __name__ == "__main__":
    sys.exit(main())
