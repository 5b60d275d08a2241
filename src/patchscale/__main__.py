"""``python -m patchscale``."""

import sys

from patchscale.cli import main

sys.exit(main())
