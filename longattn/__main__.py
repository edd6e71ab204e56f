"""`python -m longattn` is `longattn`."""

import sys

from longattn.cli import main

sys.exit(main())
