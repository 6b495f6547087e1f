# SPDX-License-Identifier: Apache-2.0
"""`python -m colocache.teach`, the same as `colocache teach`."""

from colocache.commands.teach import teach

teach(prog_name="python -m colocache.teach")
