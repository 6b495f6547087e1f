# SPDX-License-Identifier: Apache-2.0
"""The commands of the `colocache` command line, one module each; colocache.cli imports them when they are called."""
