"""``python -m calguide_fast`` is the command line."""

import sys

from calguide_fast.cli import main

sys.exit(main())
