"""`python -m flowmap.data.fetch`."""

import sys

from flowmap.data.fetch import main

sys.exit(main())
