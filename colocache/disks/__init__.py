# SPDX-License-Identifier: Apache-2.0
"""The guest's disks: what the primary's writes travel as, and the secondary's image and its two epoch logs."""
