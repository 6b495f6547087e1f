# SPDX-License-Identifier: Apache-2.0
"""A primary and a secondary that keep in step over a socket. messages.py has the conversation's words,
primary_session.py and secondary_session.py its two halves; primary.py and secondary.py what happens between
connections.
"""
