# SPDX-License-Identifier: Apache-2.0
"""What the world sees of a pair: output is held until its epoch is sealed, and goes on at a takeover."""
