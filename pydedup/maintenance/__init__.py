# SPDX-License-Identifier: Apache-2.0
"""Keeping a store sound and small.

verify.py checks it, vacuum.py and repack.py free and repack it, versions.py moves aliases and
removes versions.
"""
