# SPDX-License-Identifier: Apache-2.0
"""Keeping a store sound and small.

verify.py checks it (damage.py is what it reports), repair.py restores damaged pages (survey.py says
what is lost, blocks_from.py finds it, relocate.py publishes it), vacuum.py and repack.py free and
repack, versions.py moves aliases and removes versions.
"""
