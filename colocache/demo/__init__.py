# SPDX-License-Identifier: Apache-2.0
"""A pair run as a demonstration: two processes, the kill, the takeover, and the sums that `colocache demo` prints."""
