"""``python -m asynclam``, and the command ``asynclam``."""

from __future__ import annotations

import sys

from asynclam._cli import main

if __name__ == "__main__":  # pragma: no branch - imported by the command only, for main()
    sys.exit(main())
