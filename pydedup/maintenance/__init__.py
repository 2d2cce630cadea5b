# SPDX-License-Identifier: Apache-2.0
"""Keeping a store sound and small: verify.py checks it, vacuum.py frees and repacks it."""
