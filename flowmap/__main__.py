"""`python -m flowmap` is the command `flowmap`."""

import sys

from flowmap.cli import main

sys.exit(main())
