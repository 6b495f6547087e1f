# SPDX-License-Identifier: Apache-2.0
"""`python -m colocache.teach`, the same as `colocache teach`."""

import sys

from colocache.entry import main

sys.argv[1:1] = ["teach"]
main()
