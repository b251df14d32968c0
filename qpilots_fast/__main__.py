"""`python -m qpilots_fast` is `qpilots-fast`."""

import sys

from .cli import main

sys.exit(main())
