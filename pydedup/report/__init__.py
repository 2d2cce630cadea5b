# SPDX-License-Identifier: Apache-2.0
"""What a store looks like: figures.py computes sizes, sharing and differences. No output here."""
