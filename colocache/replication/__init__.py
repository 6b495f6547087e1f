# SPDX-License-Identifier: Apache-2.0
"""A primary and a secondary that keep in step over a socket. README.md, beside this file, has the map."""
