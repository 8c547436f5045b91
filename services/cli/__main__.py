"""`python -m sdft.services.cli`, for environments without the `sdft` script on their path."""

import sys

from sdft.services.cli.main import main

sys.exit(main())
