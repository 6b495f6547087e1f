# SPDX-License-Identifier: Apache-2.0
"""`python -m colocache`, the same as the `colocache` command."""

from colocache.entry import main

main()
