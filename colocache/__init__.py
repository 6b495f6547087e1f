# SPDX-License-Identifier: Apache-2.0
"""colocache: the COLO cache of a secondary virtual machine. See README.md; the C library's manual is colocache.h."""

from colocache.errors import ColocacheError

__all__ = ["ColocacheError"]
