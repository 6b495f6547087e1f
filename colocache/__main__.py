# SPDX-License-Identifier: Apache-2.0
"""`python -m colocache`, the same as the `colocache` command."""

from colocache.cli import main

main()
