"""`python -m csulora`, for where the console script is not on the path."""

import sys

from csulora.cli import main

sys.exit(main())
