"""`python -m gemkit.cli`"""

import sys

from gemkit.cli import main

sys.exit(main())
